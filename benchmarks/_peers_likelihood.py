"""Log-likelihoods of `peers.py`: seconds an image until |bias| + standard error is at most .001 bits/dim, on trained models.

Ours are those of `stated_accuracy.log_prob`, from levels to nats, pilot included. normflows' estimator has no bias: a power
series of 20 terms, and a random number of further ones, divided by the probability that they are there. Its mean over ``n``
draws has the standard error ``sqrt(variance / n)``; the draws that the target takes are too many to run, so seconds are those
of a draw times ``variance / target^2``. The measured variance is that of ordinary draws: the rare long ones, divided by
probabilities that fall faster than the terms, would raise it.
"""

import math
from typing import cast

import jax
import numpy as np
from _peers_pair import NORMFLOWS, OURS, pair
from _peers_processes import take_turns
from _record import RESULTS

from iresnet_jax.maths.logdet.exact import ExactLogdet
from iresnet_jax.maths.logdet.hutchinson_series import SeriesLogdet
from iresnet_jax.models import priors
from iresnet_jax.models.density import Density
from iresnet_jax.runs.trained_run import load
from iresnet_jax.training.objectives.likelihood import evaluation_keys

TARGET = 0.001  # bits/dim
NUM_IMAGES, NUM_DRAWN = 128, 32  # of ours; the first of them are drawn for by normflows
AT_ONCE = 16  # images with exact log-determinants in float64, which take much memory
DRAWS = 12  # of normflows
PRODUCTS_OF_A_DRAW = 22  # in a block: 20 terms, and 2 on average
AGREEMENT = 1e-6  # of latents
EFFORT = {"turns": 5, "seconds_a_turn": 0.1, "most_seconds": 60}
QUICK_EFFORT = {"turns": 2, "seconds_a_turn": 0.1}


def reference(model, images):
    """Inputs of the flow, and in float64 latents, exact log-determinants and log-likelihoods, under the noise of seed 0."""
    keys = evaluation_keys(jax.random.key(0), np.arange(len(images)), 0, 0)
    cheap = model.with_(estimator=SeriesLogdet(num_terms=1))  # only what comes before the flow is read
    x, known = jax.jit(lambda model, x, keys: (model.preprocess(x, keys[0]), model.terms(x, *keys).log_det_transform))(
        cheap, images, keys
    )
    x, known = np.asarray(x, np.float64), np.asarray(known, np.float64)
    with jax.enable_x64(True):
        weights, prior = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), (model.weights, model.prior))
        exact = model.with_(weights=weights, prior=prior, estimator=ExactLogdet())

        @jax.jit
        def evaluate(model, x):
            z, log_dets, _ = model.flow().forward_and_logdet(x, jax.random.key(0))
            return z, log_dets, priors.log_prob(model.spec.prior, model.prior, z)

        parts = [evaluate(exact, x[i : i + AT_ONCE]) for i in range(0, len(x), AT_ONCE)]
        z, log_dets, log_prior = (np.concatenate(values) for values in zip(*parts, strict=True))
    return x, z, log_dets, log_prior + log_dets + known


def likelihoods(arguments, start, folder):
    """Seconds an image of ours and of normflows, by model."""
    results = {}
    for name in ("digits_density",) if arguments.quick else ("digits_density", "mnist_density"):
        run = load(RESULTS / name)
        model = cast(Density, run.model)
        images = run.data.held_out("test", 4 if arguments.quick else NUM_IMAGES, run.config.seed)
        x, z, log_dets, exact = reference(model, images)
        np.save(folder / "images.npy", images)
        with pair(model, x[:NUM_DRAWN], z[:NUM_DRAWN], start, folder, agreement=AGREEMENT) as workers:
            results[name] = _measured(workers, model.spec, str(folder / "images.npy"), exact, log_dets, arguments)
    return results


def _measured(workers, spec, images, exact, log_dets, arguments):
    """Seconds in turns, what ours found, and what normflows would take; everything in bits/dim."""
    num, drawn = len(exact), min(len(exact), NUM_DRAWN)
    answers = []

    def ours(count):
        answers.append(workers.ours.ask("log_probs", num=count, images=images, target=TARGET))
        return answers[-1]["seconds"] / num

    def theirs(count):
        return workers.theirs.ask("draws", num=count) / drawn

    timings = take_turns({OURS: ours, NORMFLOWS: theirs}, **(QUICK_EFFORT if arguments.quick else EFFORT))
    draws = workers.theirs.ask("log_dets")
    if (missing := (4 if arguments.quick else DRAWS) - draws["draws"]) > 0:
        workers.theirs.ask("draws", num=missing)
        draws = workers.theirs.ask("log_dets")
    unit, count = spec.unit_of_a_nat, draws["draws"]
    variance = unit**2 * float(np.mean(draws["variance"]))
    difference = unit * (np.array(draws["mean"]) - log_dets[:drawn])
    needed = max(math.ceil(variance / TARGET**2), 1)
    seconds = {OURS: timings[OURS].median, NORMFLOWS: needed * timings[NORMFLOWS].median}
    error = unit * (np.array(answers[-1]["values"]) - exact)
    return {
        "agreement": workers.agreement,
        "seconds_an_image": seconds,
        "times_as_fast": seconds[NORMFLOWS] / seconds[OURS],
        OURS: {
            **timings[OURS].summary(),
            "num_images": num,
            **answers[-1]["accuracy"],
            "true_error": float(np.sqrt(np.mean(error**2))),
            "true_bias": float(error.mean()),
        },
        NORMFLOWS: {
            "extrapolated": "seconds of a draw times the draws that its measured variance asks for, bias taken as 0",
            "seconds_of_a_draw_an_image": timings[NORMFLOWS].summary(),
            "num_images": drawn,
            "draws_run": count,
            "standard_error_of_draws_run": math.sqrt(variance / count),
            "true_error_of_draws_run": float(np.sqrt(np.mean(difference**2))),
            "true_bias_of_draws_run": float(difference.mean()),
            "standard_error_of_true_bias": unit * math.sqrt(draws["variance_of_mean"] / count),
            "variance_of_a_draw": variance,
            "draws_needed": needed,
            "products_needed": needed * PRODUCTS_OF_A_DRAW * spec.flow.num_blocks,
        },
    }


def rows(results):
    """Lines of the table."""
    shown = []
    for name, found in results.items():
        ours, theirs, seconds = found[OURS], found[NORMFLOWS], found["seconds_an_image"]
        error = f"{ours['true_error']:.1g}, stated {ours['bias'] + ours['stderr']:.1g}"
        run = f"{ours['num_images']} images"
        shown.append((name, OURS, f"{seconds[OURS]:.3g}", "1", f"{ours['products']:.3g}", run, error))
        error = f"{theirs['true_error_of_draws_run']:.1g} as run"
        run = f"{theirs['draws_run']} of {theirs['draws_needed']:,} draws, {theirs['num_images']} images"
        times, products = f"{found['times_as_fast']:.0f}", f"{theirs['products_needed']:.3g}"
        shown.append((name, NORMFLOWS, f"{seconds[NORMFLOWS]:.3g}, extrapolated", times, products, run, error))
    return shown


HEADER = ("model", "peer", "s an image", "times ours", "products", "run", "true error, bits/dim")
