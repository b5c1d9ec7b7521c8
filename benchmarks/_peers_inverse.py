"""Inverses of `peers.py` to an equal true error: of one block by its Lipschitz constant, and of trained flows from samples."""

from typing import cast

import jax
import numpy as np
from _peers_cases import architecture, exact_inverse, random_block, write_arrays
from _peers_processes import core_counts, take_turns
from _record import RESULTS

from iresnet_jax.evaluation.trained_run import load
from iresnet_jax.models import priors
from iresnet_jax.models.density import Density

TOLERANCE = 1e-5  # largest error of an entry
LIPSCHITZ, KINDS = (0.7, 0.9, 0.98), ("random", "contracting")
OUR_SETTINGS = [{"atol": atol, "refine": refine} for refine in (False, True) for atol in (1e-5, 1e-6, 1e-7)]
THEIR_TOLERANCES = [10.0**-k for k in range(6, 15)]  # of the square of a change
PATIENCE_S = 60.0  # no smaller tolerance of normflows is tried once an inverse took so long
OURS, DEFAULT, TUNED = "ours", "normflows", "normflows, tuned"


def first_that_reaches(worker, settings):
    """The first settings whose inverse is within `TOLERANCE`, None if none is, and what every one that was tried reached."""
    tried = []
    for setting in settings:
        seconds = worker.ask("invert", num=1, **setting)
        tried.append({**setting, **worker.ask("error"), "seconds": seconds})
        if tried[-1]["largest"] <= TOLERANCE:
            return setting, tried
        if seconds > PATIENCE_S:
            break
    return None, tried


def race(model, z, start, folder, *, turns, seconds_a_turn):
    """Seconds of the inverse of all latents, in turns, of ours and of normflows as it is and with the tolerance it needs."""
    cores, x = max(core_counts().values(), key=len), exact_inverse(model, z)
    write_arrays(model, x, z, folder / "arrays.npz")
    arrays, file = str(folder / "arrays.npz"), str(model.save(folder / "model.npz"))
    ours = start(cores, "_peers_fixed", "Ours", {"model": file, "arrays": arrays})
    given = {"architecture": architecture(model.spec), "arrays": arrays, "threads": len(cores)}
    theirs = start(cores, "_peers_fixed", "Normflows", given)
    agreement = theirs.ask("check")
    scale = max(float(np.abs(z).max()), 1.0)
    if agreement["float64"] > 1e-8 * scale:
        raise RuntimeError(f"the exact inverse is none under PyTorch's weights: {agreement}")
    our_setting, our_tries = first_that_reaches(ours, OUR_SETTINGS)
    setting, tries = first_that_reaches(theirs, [{"tolerance": tolerance} for tolerance in THEIR_TOLERANCES])
    asked = {
        OURS: lambda num: ours.ask("invert", num=num, **(our_setting or OUR_SETTINGS[-1])),
        DEFAULT: lambda num: theirs.ask("invert", num=num),
    }
    if setting is not None:
        asked[TUNED] = lambda num: theirs.ask("invert", num=num, **setting)
    timings = take_turns(asked, turns=turns, seconds_a_turn=seconds_a_turn)
    found = {name: {**timing.summary(), "times_ours": timings[OURS].speedup_over(timing)} for name, timing in timings.items()}
    theirs.ask("invert", num=1)
    found[OURS] |= our_tries[-1]
    found[DEFAULT] |= theirs.ask("error")
    if setting is not None:
        found[TUNED] |= tries[-1]
    for worker in (ours, theirs):
        worker.stop()
    return {"num": len(z), "agreement": agreement, "peers": found, "normflows_tried": tries, "ours_tried": our_tries}


def inverses(arguments, start, folder):
    """Inverse of one random block, by case."""
    lipschitz = LIPSCHITZ[1:2] if arguments.quick else LIPSCHITZ
    cases = {f"{kind}, L = {bound}": random_block(kind, bound) for kind in KINDS for bound in lipschitz}
    batch = jax.random.normal(jax.random.key(1), (4 if arguments.quick else 32, 16, 16, 12))
    results = {}
    for name, model in cases.items():
        z = np.asarray(jax.jit(lambda model, x: model.flow().forward(x))(model, batch))
        results[name] = race(model, z, start, folder, **_effort(arguments))
    return results


def samples(arguments, start, folder):
    """Samples of trained flows, from latents of their priors, by model."""
    results = {}
    for name in ("digits_density",) if arguments.quick else ("digits_density", "mnist_density"):
        model = cast(Density, load(RESULTS / name).model)
        num = 4 if arguments.quick else 64
        z = np.asarray(priors.sample(model.spec.prior, model.prior, jax.random.key(2), num, 1.0))
        results[name] = race(model, z, start, folder, **_effort(arguments))
    return results


def _effort(arguments):
    return {"turns": 2, "seconds_a_turn": 0.2} if arguments.quick else {"turns": 10, "seconds_a_turn": 2.0}


def _row(name, found, peer, unit):
    own = found["peers"].get(peer)
    if own is None:
        best = min(found["normflows_tried"], key=lambda tried: tried["largest"])
        return (name, peer, "never", f"{best['largest']:.1e}", f"{best['euclidean']:.1e}", "")
    seconds = own["median_s"]
    shown = f"{1e3 * seconds:.1f}" if unit == "ms" else f"{found['num'] / seconds:.1f}"
    return (name, peer, shown, f"{own['largest']:.1e}", f"{own['euclidean']:.1e}", f"{own['times_ours']:.1f}")


def inverse_rows(results):
    """The table of `inverses`."""
    return [_row(name, found, peer, "ms") for name, found in results.items() for peer in (OURS, DEFAULT, TUNED)]


def sample_rows(results):
    """The table of `samples`."""
    return [_row(name, found, peer, "rate") for name, found in results.items() for peer in (OURS, DEFAULT, TUNED)]


ERRORS = ("error of an entry", "of an example", "times ours")
INVERSE_HEADER = ("block", "peer", "ms a batch", *ERRORS)
SAMPLE_HEADER = ("model", "peer", "samples/s", *ERRORS)
