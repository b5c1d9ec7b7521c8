"""Log-likelihoods of `peers.py`: seconds an image until |bias| + standard error is at most .001 bits/dim, on trained models."""

import math
from typing import cast

import jax
import numpy as np
from _models import flow_input
from _peers_cases import architecture, write_arrays
from _peers_processes import core_counts, take_turns
from _record import RESULTS

from iresnet_jax.evaluation.trained_run import load
from iresnet_jax.models.density import Density

TARGET = 0.001  # bits/dim
NUM_PRODUCTS, REFERENCE = (4, 6, 8, 10, 12, 16), 40  # of a probe in a block
KEYS = 16  # probes that biases and variances are measured by
MOST_PROBES = 32  # at once
DRAWS = 16  # of normflows, at least
EXACT_IMAGES = 8
AGREEMENT = 1e-4  # of latents of PyTorch with ours
OURS, NORMFLOWS = "ours", "normflows"


def krylov(num_terms, num_probes=1):
    """Plain data of the estimator."""
    return {"kind": "krylov", "num_terms": num_terms, "num_probes": num_probes}


def cheapest_krylov(ours, target, quick):
    """The Krylov estimator of least products that meets a target in nats, with what it takes.

    Biases are those beside `REFERENCE` products of the same probes; the variance is that of single probes.
    """
    keys = 4 if quick else KEYS
    reference = np.array(ours.ask("log_dets", num=keys, estimator=krylov(REFERENCE))["values"])
    found = []
    for num in NUM_PRODUCTS[1:2] if quick else NUM_PRODUCTS:
        values = np.array(ours.ask("log_dets", num=keys, estimator=krylov(num))["values"])
        bias = float(np.abs((values - reference).mean(axis=0)).mean())
        variance = float(values.var(axis=0, ddof=1).mean())
        if bias < target:
            probes = max(math.ceil(variance / (target - bias) ** 2), 1)
            found.append({"num_terms": num, "bias": bias, "variance": variance, "probes": probes, "products": num * probes})
    if not found:
        raise RuntimeError(f"no Krylov subspace of up to {NUM_PRODUCTS[-1]} products has a bias below {target:.3g} nats")
    return min(found, key=lambda each: each["products"]), found


def ours_at_best(ours, target, num, quick):
    """Ours by the cheaper of exact log-determinants and Krylov subspaces: ``num ->`` seconds an image, and what was found."""
    exact_images = min(num, EXACT_IMAGES)
    exact = ours.ask("log_dets", num=1, estimator={"kind": "exact"}, num_images=exact_images)
    chosen, tried = cheapest_krylov(ours, target, quick)
    at_once = min(chosen["probes"], MOST_PROBES)
    times = math.ceil(chosen["probes"] / at_once)
    estimator = krylov(chosen["num_terms"], at_once)
    estimate = ours.ask("log_dets", num=times, key=1000, estimator=estimator)
    error = np.abs(np.mean(estimate["values"], axis=0)[:exact_images] - exact["values"][0]).mean()
    seconds = {"exact": exact["seconds"] / exact_images, "krylov": times * estimate["seconds"] / num}
    facts = {"seconds_an_image": seconds, "krylov": {**chosen, "probes_run": times * at_once}, "krylov_tried": tried}
    facts["mean_error_of_krylov"] = float(error)

    def measure(count):
        if seconds["exact"] <= seconds["krylov"]:
            return (
                ours.ask("log_dets", num=count, estimator={"kind": "exact"}, num_images=exact_images)["seconds"] / exact_images
            )
        return times * ours.ask("log_dets", num=count * times, estimator=estimator)["seconds"] / num

    return measure, facts, np.array(exact["values"][0])


def draws_of(theirs, num):
    """``count ->`` seconds an image of a draw of normflows' estimator."""
    return lambda count: theirs.ask("draws", num=count) / num


def likelihoods(arguments, start, folder):
    """Seconds an image of ours and of normflows, by model; nats are those of an image."""
    results, cores = {}, max(core_counts().values(), key=len)
    for name in ("digits_density",) if arguments.quick else ("digits_density", "mnist_density"):
        run, num = load(RESULTS / name), 4 if arguments.quick else 32
        model = cast(Density, run.model)
        x = flow_input(run, num)
        z = np.asarray(jax.jit(lambda model, x: model.flow().forward(x))(model, x))
        write_arrays(model, x, z, folder / "arrays.npz")
        arrays, file = str(folder / "arrays.npz"), str(model.save(folder / "model.npz"))
        ours = start(cores, "_peers_fixed", "Ours", {"model": file, "arrays": arrays})
        given = {"architecture": architecture(model.spec), "arrays": arrays, "threads": len(cores)}
        theirs = start(cores, "_peers_fixed", "Normflows", given)
        agreement = theirs.ask("check")
        if agreement["float32"] > AGREEMENT:
            raise RuntimeError(f"PyTorch's latents are not those of ours: {agreement}")
        target = TARGET / model.spec.unit_of_a_nat
        measure, facts, exact = ours_at_best(ours, target, num, arguments.quick)
        asked = {OURS: measure, NORMFLOWS: draws_of(theirs, num)}
        turns = 2 if arguments.quick else 5
        timings = take_turns(asked, turns=turns, seconds_a_turn=0.1)
        if (missing := (4 if arguments.quick else DRAWS) - turns - 1) > 0:
            theirs.ask("draws", num=missing)
        drawn = {name: np.array(values) for name, values in theirs.ask("log_dets").items()}
        variance, draws = float(drawn["variance"].mean()), int(drawn["draws"])
        needed = max(math.ceil(variance / target**2), 1)
        difference = drawn["mean"][: len(exact)] - exact
        z_score = float(difference.mean() / math.sqrt(drawn["variance"][: len(exact)].mean() / draws / len(exact)))
        seconds = {OURS: timings[OURS].median, NORMFLOWS: needed * timings[NORMFLOWS].median}
        results[name] = {
            "num_images": num,
            "agreement": agreement,
            "target_nats": target,
            "seconds_an_image": seconds,
            "times_as_fast": seconds[NORMFLOWS] / seconds[OURS],
            OURS: {**facts, **timings[OURS].summary()},
            NORMFLOWS: {
                "extrapolated": "seconds of a draw times the draws that its measured variance asks for",
                "seconds_of_a_draw_an_image": timings[NORMFLOWS].summary(),
                "variance": variance,
                "draws_measured": draws,
                "draws_needed": needed,
                "z_against_exact": z_score,
            },
        }
        for worker in (ours, theirs):
            worker.stop()
    return results


def rows(results):
    """Lines of the table."""
    shown = []
    for name, found in results.items():
        ours, theirs = found[OURS], found[NORMFLOWS]
        how = min(ours["seconds_an_image"], key=ours["seconds_an_image"].get)
        krylov = ours["krylov"]
        detail = "exact" if how == "exact" else f"{krylov['probes_run']} probes of {krylov['num_terms']} products"
        shown.append((name, OURS, f"{found['seconds_an_image'][OURS]:.3g}", "1.0", detail))
        detail = f"{theirs['draws_needed']} draws, z = {theirs['z_against_exact']:+.1f}"
        shown.append((name, NORMFLOWS, f"{found['seconds_an_image'][NORMFLOWS]:.3g}", f"{found['times_as_fast']:.0f}", detail))
    return shown


HEADER = ("model", "peer", "s an image", "times ours", "how")
