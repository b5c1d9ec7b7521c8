"""Inverses of `peers.py` to an equal true error: of one block by its Lipschitz constant, and of trained flows from samples.

Both sides run by their own rule, as they are and with the largest power of ten as tolerance that reaches the true error. Where
normflows does not reach 1e-5 at any tolerance, both are asked for the least error that it reaches, and ours for 1e-5 beside.
"""

import functools
from typing import cast

import jax
import numpy as np
from _peers_cases import exact_inverse, random_block
from _peers_pair import NORMFLOWS, OURS, pair
from _peers_processes import take_turns
from _record import RESULTS

from iresnet_jax.bijections.residual import Solver
from iresnet_jax.models import priors
from iresnet_jax.models.density import Density
from iresnet_jax.runs.trained_run import load

TOLERANCE = 1e-5  # largest error of an entry
LIPSCHITZ, KINDS = (0.7, 0.9, 0.98), ("random", "contracting")
OUR_DEFAULT = {"atol": Solver().atol, "refine": False}
OUR_SETTINGS = [{"atol": 10.0**-k, "refine": False} for k in range(7)]
OUR_SETTINGS += [{"atol": 10.0**-k, "refine": True} for k in range(3, 9)]
THEIR_TOLERANCES = [10.0**-k for k in range(5, 15)]  # of the square of a change
MOST_EVALS = 1000  # of a block by normflows: about where its iteration gives up
OUR_TUNED, OUR_EXACT, THEIR_TUNED = "ours, tuned", "ours, to 1e-5", "normflows, tuned"
AGREEMENT = 1e-8  # of latents
EFFORT = {"turns": 7, "seconds_a_turn": 0.3, "most_seconds": 12}
QUICK_EFFORT = {"turns": 2, "seconds_a_turn": 0.1}


def first_that_reaches(worker, settings, goal, *, gives_up=lambda found: False):
    """The first settings whose inverse is within a true error, None if none is, and what every one that was tried reached."""
    tried = []
    for setting in settings:
        seconds = worker.ask("invert", num=1, **setting)
        tried.append({**setting, **worker.ask("error"), "seconds": seconds})
        if tried[-1]["largest"] <= goal:
            return setting, tried
        if gives_up(tried[-1]):
            break
    return None, tried


def race(model, z, start, folder, effort):
    """Seconds of the inverse of all latents, in turns, of both sides as they are and as tuned."""
    num_blocks, scale = model.spec.flow.num_blocks, max(float(np.abs(z).max()), 1.0)
    with pair(model, exact_inverse(model, z), z, start, folder, agreement=AGREEMENT * scale) as workers:

        def gives_up(found):
            return found["evals"] > MOST_EVALS * num_blocks

        theirs, their_tries = first_that_reaches(
            workers.theirs, [{"tolerance": t} for t in THEIR_TOLERANCES], TOLERANCE, gives_up=gives_up
        )
        best = min(their_tries, key=lambda tried: tried["largest"])
        goal = TOLERANCE if theirs else best["largest"]
        ours, our_tries = first_that_reaches(workers.ours, OUR_SETTINGS, goal)
        settings = {
            OURS: (workers.ours, OUR_DEFAULT),
            OUR_TUNED: (workers.ours, ours),
            NORMFLOWS: (workers.theirs, {}),
            THEIR_TUNED: (workers.theirs, theirs or {"tolerance": best["tolerance"]}),
        }
        if goal > TOLERANCE:
            settings[OUR_EXACT] = workers.ours, first_that_reaches(workers.ours, OUR_SETTINGS, TOLERANCE)[0]
        settings = {name: given for name, given in settings.items() if given[1] is not None}
        errors = {}

        def invert(name, num):
            worker, setting = settings[name]
            seconds = worker.ask("invert", num=num, **setting)
            errors[name] = worker.ask("error")
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
        return {"num": len(z), "goal": goal, "agreement": workers.agreement, "peers": peers, "tried": tried}


def inverses(arguments, start, folder):
    """Inverse of one random block, by case."""
    lipschitz = LIPSCHITZ[1:2] if arguments.quick else LIPSCHITZ
    cases = {f"{kind}, L = {bound}": random_block(kind, bound) for kind in KINDS for bound in lipschitz}
    batch = jax.random.normal(jax.random.key(1), (4 if arguments.quick else 32, 16, 16, 12))
    results = {}
    for name, model in cases.items():
        z = np.asarray(jax.jit(lambda model, x: model.flow().forward(x))(model, batch))
        results[name] = race(model, z, start, folder, QUICK_EFFORT if arguments.quick else EFFORT)
    return results


def samples(arguments, start, folder):
    """Samples of trained flows, from latents of their priors, by model."""
    results = {}
    for name in ("digits_density",) if arguments.quick else ("digits_density", "mnist_density"):
        model = cast(Density, load(RESULTS / name).model)
        num = 4 if arguments.quick else 32
        z = np.asarray(priors.sample(model.spec.prior, model.prior, jax.random.key(2), num, 1.0))
        results[name] = race(model, z, start, folder, QUICK_EFFORT if arguments.quick else EFFORT)
    return results


def _rows(results, shown):
    rows = []
    for name, found in results.items():
        for peer, own in found["peers"].items():
            tolerance = own.get("atol", own.get("tolerance"))
            rule = "its own" if tolerance is None else f"{tolerance:g}" + (", float64" if own.get("refine") else "")
            ratios = [f"{own[key]:.2f}" if (key := f"times {baseline}") in own else "" for baseline in (OURS, OUR_TUNED)]
            error = f"{own['largest']:.1e}" + ("" if own["largest"] <= TOLERANCE else " (above 1e-5)")
            seconds = shown(found["num"], own["median_s"])
            rows.append((name, peer, rule, seconds, *ratios, f"{own['evals_a_block']:.1f}", error, f"{own['euclidean']:.1e}"))
    return rows


def inverse_rows(results):
    """The table of `inverses`."""
    return _rows(results, lambda _, seconds: f"{1e3 * seconds:.1f}")


def sample_rows(results):
    """The table of `samples`."""
    return _rows(results, lambda num, seconds: f"{num / seconds:.1f}")


COLUMNS = ("times ours", "times ours, tuned", "evaluations a block", "error of an entry", "of an example")
INVERSE_HEADER = ("block", "peer", "tolerance", "ms a batch", *COLUMNS)
SAMPLE_HEADER = ("model", "peer", "tolerance", "samples/s", *COLUMNS)
