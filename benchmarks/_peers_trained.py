"""Trained flows beside normflows at equal accuracy: likelihoods, inverses of a block, and samples.

Likelihoods: normflows' estimator has no bias: a power series of 20 terms, and a random number of
further ones, divided by the probability that they are there. Its mean over ``n`` draws has the
standard error ``sqrt(variance / n)``; the draws that the target takes are too many to run, so
seconds are those of a draw times ``variance / target^2``. The measured variance is that of ordinary
draws: the rare long ones, divided by probabilities that fall faster than the terms, would raise it.

Inverses: both sides run by their own rule, as they are and with the largest power of ten as
tolerance that reaches the true error. Where normflows does not reach 1e-5 at any tolerance, both
are asked for the least error that it reaches, and ours for 1e-5 beside.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from _models import encode
from _peers_flows import OurFlow, TorchFlow, exact_inverse
from _record import RESULTS, take_turns

from iresnet_jax.bijections.residual import Solver
from iresnet_jax.maths.logdet_series import SeriesLogdet
from iresnet_jax.models.architecture import FlowSpec, StageSpec
from iresnet_jax.models.contractions import freeze
from iresnet_jax.models.density import Density
from iresnet_jax.models.density_spec import DensitySpec
from iresnet_jax.models.linen import ResidualFlow
from iresnet_jax.models.priors import Gaussian
from iresnet_jax.runs.trained_run import load
from iresnet_jax.training.objectives import evaluation_keys

OURS, NORMFLOWS = "ours", "normflows"
MODELS = ("digits_density", "mnist_density")
QUICK_EFFORT = {"turns": 2, "seconds_a_turn": 0.1}

TARGET = 0.001  # bits/dim of a likelihood
NUM_IMAGES, NUM_DRAWN = 128, 32  # of ours; the first of them are drawn for by normflows
DRAWS = 12  # of normflows
PRODUCTS_OF_A_DRAW = 22  # in a block: 20 terms, and 2 on average
LIKELIHOOD_EFFORT = {"turns": 5, "seconds_a_turn": 0.1, "most_seconds": 60}

TOLERANCE = 1e-5  # largest error of an entry of an inverse
LIPSCHITZ, KINDS = (0.7, 0.9, 0.98), ("random", "contracting")
OUR_DEFAULT = {"atol": Solver().atol, "refine": False}
OUR_SETTINGS = [{"atol": 10.0**-k, "refine": False} for k in range(7)]
OUR_SETTINGS += [{"atol": 10.0**-k, "refine": True} for k in range(3, 9)]
TOLERANCES = [10.0 ** (-k / 2) for k in range(10, 29)]  # of the square of a change
THEIR_SETTINGS = [
    {"tolerance": tolerance, "refine": refine}
    for refine in (False, True)
    for tolerance in TOLERANCES
]
MOST_EVALS = 1000  # of a block by normflows: about where its iteration gives up
OUR_TUNED, OUR_EXACT, THEIR_TUNED = "ours, tuned", "ours, to 1e-5", "normflows, tuned"
INVERSE_EFFORT = {"turns": 7, "seconds_a_turn": 0.3, "most_seconds": 12}


def reference(model, images):
    """Inputs of the flow, and latents, log-determinants and log-likelihoods to 1e-6 nats, with
    the noise of seed 0.
    """
    keys = evaluation_keys(jax.random.key(0), np.arange(len(images)), 0, 0)
    x = np.asarray(jax.jit(model.preprocess)(images, keys[0]), np.float64)
    # only what comes before the flow is read
    cheap = model.with_(estimator=SeriesLogdet(num_terms=1))
    known = np.asarray(
        jax.jit(lambda model: model.terms(images, *keys).log_det_transform)(cheap), np.float64
    )
    with jax.enable_x64(True):
        weights, prior = jax.tree.map(
            lambda leaf: np.asarray(leaf, np.float64), (model.weights, model.prior)
        )
        exact = model.with_(weights=weights, prior=prior)
        z, log_dets = (
            encode(exact, x),
            np.asarray(exact.flow().forward_and_logdet(x, jax.random.key(0))[1]),
        )
        log_prior = np.asarray(prior.log_prob(z))
    return x, np.asarray(z), log_dets, log_prior + log_dets + known


def likelihoods(arguments):
    """Seconds an image of ours and of normflows, by model; accuracies are in bits/dim."""
    results, num, num_draws = {}, *((4, 4) if arguments.quick else (NUM_IMAGES, DRAWS))
    for name in MODELS[:1] if arguments.quick else MODELS:
        run = load(RESULTS / name)
        model: Any = run.model
        images, drawn = run.data.held_out("test", num, run.config.seed).x, min(num, NUM_DRAWN)
        x, z, log_dets, exact = reference(model, images)
        our_flow, their_flow, answers = (
            OurFlow(model, x, z),
            TorchFlow(model, x[:drawn], z[:drawn], agreement=1e-6),
            [],
        )

        def ours(count, our_flow=our_flow, answers=answers, images=images):
            answers.append(our_flow.log_probs(math.ceil(count / num), images))
            return answers[-1][0] / num

        def theirs(count, their_flow=their_flow, drawn=drawn):
            return their_flow.draw(math.ceil(count / drawn)) / drawn

        # Units are images, which both sides take all at once.
        timings = take_turns(
            {OURS: ours, NORMFLOWS: theirs},
            **(QUICK_EFFORT if arguments.quick else LIKELIHOOD_EFFORT),
        )
        their_flow.draw(max(num_draws - len(their_flow.log_dets), 1))
        (_, values), unit = answers[-1], model.spec.unit_of_a_nat
        draws = unit * their_flow.log_dets
        variance, error = float(draws.var(axis=0, ddof=1).mean()), unit * (values - exact)
        difference = draws.mean(axis=0) - unit * log_dets[:drawn]
        needed = max(math.ceil(variance / TARGET**2), 1)
        seconds = {OURS: timings[OURS].median, NORMFLOWS: needed * timings[NORMFLOWS].median}
        results[name] = {
            "agreement": their_flow.agreement,
            "seconds_an_image": seconds,
            "times_as_fast": seconds[NORMFLOWS] / seconds[OURS],
            OURS: {
                **timings[OURS].summary(),
                "num_images": num,
                "true_error": float(np.sqrt(np.mean(error**2))),
                "true_bias": float(error.mean()),
            },
            NORMFLOWS: {
                "extrapolated": "seconds of a draw times the draws that its measured variance asks "
                "for, bias taken as 0",
                "seconds_of_a_draw_an_image": timings[NORMFLOWS].summary(),
                "num_images": drawn,
                "draws_run": len(draws),
                "standard_error_of_draws_run": math.sqrt(variance / len(draws)),
                "true_error_of_draws_run": float(np.sqrt(np.mean(difference**2))),
                "true_bias_of_draws_run": float(difference.mean()),
                "standard_error_of_true_bias": float(
                    draws.mean(axis=1).std(ddof=1) / math.sqrt(len(draws))
                ),
                "variance_of_a_draw": variance,
                "draws_needed": needed,
                "products_needed": needed * PRODUCTS_OF_A_DRAW * model.spec.flow.num_blocks,
            },
        }
    return results


def fastest_that_reaches(flow, settings, goal, *, gives_up=lambda found: False):
    """The fastest settings whose inverse is within a true error, None if none is, and what every
    one that was tried reached.

    In each precision nothing is tried after the first that is within, or that gives up.
    """
    tried, done, within = [], set(), []
    for setting in settings:
        if setting["refine"] not in done:
            seconds = flow.invert(1, **setting)
            tried.append({**setting, **flow.error(), "seconds": seconds})
            if tried[-1]["largest"] <= goal:
                within.append((seconds, setting))
            if tried[-1]["largest"] <= goal or gives_up(tried[-1]):
                done.add(setting["refine"])
    return min(within, key=lambda found: found[0], default=(0.0, None))[1], tried


def race(model, z, effort):
    """Seconds of the inverse of all latents, in turns, of both sides as they are and as tuned."""
    num_blocks, x = model.spec.flow.num_blocks, exact_inverse(model, z)
    our_flow, their_flow = (
        OurFlow(model, x, z),
        TorchFlow(model, x, z, agreement=1e-8 * max(float(np.abs(z).max()), 1.0)),
    )

    def gives_up(found):
        return found["evals"] > MOST_EVALS * num_blocks

    theirs, their_tries = fastest_that_reaches(
        their_flow, THEIR_SETTINGS, TOLERANCE, gives_up=gives_up
    )
    best = min(their_tries, key=lambda tried: tried["largest"])
    goal = TOLERANCE if theirs else best["largest"]
    ours, our_tries = fastest_that_reaches(our_flow, OUR_SETTINGS, goal)
    settings = {
        OURS: (our_flow, OUR_DEFAULT),
        OUR_TUNED: (our_flow, ours),
        NORMFLOWS: (their_flow, {}),
        THEIR_TUNED: (their_flow, theirs or {what: best[what] for what in ("tolerance", "refine")}),
    }
    if goal > TOLERANCE:
        settings[OUR_EXACT] = our_flow, fastest_that_reaches(our_flow, OUR_SETTINGS, TOLERANCE)[0]
    settings = {name: given for name, given in settings.items() if given[1] is not None}
    errors = {}

    def invert(name, num):
        flow, setting = settings[name]
        seconds = flow.invert(num, **setting)
        errors[name] = flow.error()
        return seconds

    timings = take_turns({name: functools.partial(invert, name) for name in settings}, **effort)
    peers = {}
    for name, (_, setting) in settings.items():
        peers[name] = {**timings[name].summary(), **setting, **errors[name]}
        peers[name]["evals_a_block"] = peers[name].pop("evals") / num_blocks
        for baseline in (OURS, OUR_TUNED):
            if baseline in timings:
                peers[name][f"times {baseline}"] = timings[baseline].speedup_over(timings[name])
    tried = {NORMFLOWS: their_tries, OURS: our_tries}
    return {
        "num": len(z),
        "goal": goal,
        "agreement": their_flow.agreement,
        "peers": peers,
        "tried": tried,
    }


def random_block(kind, lipschitz):
    """A flow of one residual block on 16 x 16 x 12 with random kernels of certified norms, whose
    product is ``lipschitz``.

    A "random" block is 3x3-1x1-3x3 with independent kernels. A "contracting" one is ``-W^T phi(W x
    + 1)``, whose Jacobian has eigenvalues close to ``-lipschitz``, as blocks have them that
    training makes contract.
    """
    kernel_sizes, hidden = ((3, 1, 3), (64, 64)) if kind == "random" else ((3, 3), (64,))
    spec = FlowSpec(
        (16, 16, 12),
        (StageSpec(1, hidden, kernel_sizes),),
        coeff=lipschitz ** (1 / len(kernel_sizes)),
    )
    params = jax.jit(ResidualFlow(spec).init)(jax.random.key(0), jnp.zeros((2, 16, 16, 12)))[
        "params"
    ]
    blocks = {
        name: jax.tree.map(lambda leaf: 10 * leaf, own)
        for name, own in params["stage0"]["blocks"].items()
    }
    if kind == "contracting":
        there = blocks["conv0"]["kernel"]  # (1, 3, 3, 12, 64)
        blocks["conv1"]["kernel"] = -jnp.swapaxes(jnp.flip(there, (1, 2)), 3, 4)
        blocks["conv0"]["bias"] = jnp.ones_like(blocks["conv0"]["bias"])
    blocks["actnorm"] = jax.tree.map(jnp.zeros_like, blocks["actnorm"])
    frozen = freeze(spec, {"stage0": {"blocks": blocks}})
    return Density(DensitySpec(spec), frozen, Gaussian.standard(spec.num_dims))


def inverses(arguments):
    """Inverse of one random block, by case."""
    num, effort = (4, QUICK_EFFORT) if arguments.quick else (32, INVERSE_EFFORT)
    batch, results = jax.random.normal(jax.random.key(1), (num, 16, 16, 12)), {}
    for kind in KINDS:
        for bound in LIPSCHITZ[1:2] if arguments.quick else LIPSCHITZ:
            model = random_block(kind, bound)
            z = np.asarray(encode(model, batch))
            results[f"{kind}, L = {bound}"] = race(model, z, effort)
    return results


def samples(arguments):
    """Samples of trained flows, from latents of their priors, by model."""
    (num, effort), results = (4, QUICK_EFFORT) if arguments.quick else (32, INVERSE_EFFORT), {}
    for name in MODELS[:1] if arguments.quick else MODELS:
        model: Any = load(RESULTS / name).model
        results[name] = race(
            model, np.asarray(model.sample_latents(jax.random.key(2), num)), effort
        )
    return results
