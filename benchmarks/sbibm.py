"""How close does `fit` come to the posteriors of the SBI benchmark (Lueckmann et al. 2021)?

    python benchmarks/sbibm.py [--simulations 10000 100000] [--tasks two_moons sir] [--observations
    10] [--minutes 30] [--quick]

For each task and number of simulations one ``fit(parameters, context=observations)`` with its
defaults, of which 10,000 samples for each of ten observations are compared with the benchmark's
reference samples by its C2ST: the accuracy of a classifier that tells one from the other, .5 if
none can. The record has published numbers of NPE beside ours, which is amortised as `fit` is.

Needs the reference samples: ``pip install --no-deps sbibm``. Whatever has been measured is in the
record, and the same command goes on behind it. ``--cache`` keeps simulations and models, so that
more observations take no new fit. Tasks are described in _sbibm_tasks.py.
"""

import functools
import itertools
import json
import time
from pathlib import Path

import numpy as np
from _record import parser, resume
from _sbibm_tasks import NUM_OBSERVATIONS, TASKS, c2st

import iresnet_jax as ir
from iresnet_jax.evaluation import round_trips

NUM_SAMPLES, QUICK_SAMPLES = 10_000, 500
VERSIONS = ("iresnet_jax", "jax")
# Mean C2ST over the ten observations, from the benchmark's published results, for 10,000 and
# 100,000 simulations.
PUBLISHED = {
    "bernoulli_glm": (0.678, 0.559),
    "bernoulli_glm_raw": (0.765, 0.607),
    "gaussian_linear": (0.552, 0.506),
    "gaussian_linear_uniform": (0.553, 0.509),
    "gaussian_mixture": (0.661, 0.555),
    "lotka_volterra": (0.997, 0.981),
    "sir": (0.680, 0.585),
    "slcp": (0.901, 0.831),
    "slcp_distractors": (0.970, 0.863),
    "two_moons": (0.606, 0.542),
}
TARGETS = {10_000: 0.69, 100_000: 0.60}  # of the mean over the tasks
TOLERATED = 0.02  # that a task may be above the published number


def published(task, simulations):
    """The published C2ST of NPE; None for other numbers of simulations."""
    return dict(zip(TARGETS, PUBLISHED[task], strict=True)).get(simulations)


def fitted(task, simulations, minutes, cache):
    """The model of a task, and how its fit went; both of the cache, if they are there."""
    folder = None if cache is None else cache / f"{task.name}_{simulations}_{minutes:g}"
    if folder is not None and (folder / "fit.json").exists():
        return ir.load(folder / "model.npz"), json.loads((folder / "fit.json").read_text())
    parameters, observations = task.draw(simulations, cache=cache)
    began = time.monotonic()
    model = ir.fit(
        task.to_fit(parameters), context=observations, bounds=task.bounds, minutes=minutes
    )
    about = {"fit_seconds": time.monotonic() - began}
    history = model.history
    if history is not None and history.attempts:
        best = min(history.attempts, key=lambda attempt: attempt.loss)
        about |= {
            "chosen": best.what,
            "validation_nll": best.loss,
            "step": best.best_step,
            "ended": history.ended,
        }
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
        model.save(folder / "model.npz")
        (folder / "fit.json").write_text(json.dumps(about))
    return model, about


def measure(task, model, number, num):
    """C2ST of a model's samples for an observation, and what share of its inverses converged."""
    x = np.repeat(task.observation(number)[None], num, axis=0).astype(np.float32)
    began = time.monotonic()
    values, convergence = round_trips.draw(model, num, 1000, seed=number, contexts=x)
    sample_seconds, began = time.monotonic() - began, time.monotonic()
    accuracy = c2st(task.from_fit(values.astype(np.float64)), task.reference(number)[:num])
    return {
        "c2st": accuracy,
        "converged": 1 - len(convergence.failed) / num,
        "sample_seconds": sample_seconds,
        "c2st_seconds": time.monotonic() - began,
    }


def summarize(runs):
    """Mean C2ST of each task over the observations so far beside the published one, and of all
    tasks beside the target.
    """
    summary = []
    for simulations in sorted({run["simulations"] for run in runs}):
        of_tasks = []
        for name in TASKS:
            found = [
                run["c2st"]
                for run in runs
                if (run["task"], run["simulations"]) == (name, simulations)
            ]
            if found:
                other = published(name, simulations)
                worst = other is not None and float(np.mean(found)) > other + TOLERATED
                of_tasks.append(
                    {
                        "task": name,
                        "c2st": float(np.mean(found)),
                        "observations": len(found),
                        "npe": other,
                    }
                )
                of_tasks[-1]["too_high"] = worst
        own, others = (
            np.mean([line["c2st"] for line in of_tasks]),
            [line["npe"] for line in of_tasks if line["npe"]],
        )
        line = {"simulations": simulations, "tasks": of_tasks, "mean_c2st": float(own)}
        line["npe"] = float(np.mean(others)) if others else None
        if simulations in TARGETS and len(of_tasks) == len(TASKS):
            line["target"] = {
                "mean_c2st": TARGETS[simulations],
                "reached": bool(own <= TARGETS[simulations]),
            }
        summary.append(line)
    return summary


def main():
    options = parser(__doc__)
    options.add_argument(
        "--tasks", nargs="+", choices=TASKS, metavar="NAME", help=f"of {', '.join(TASKS)}"
    )
    options.add_argument(
        "--simulations", nargs="+", type=int, metavar="N", help="for each fit (10000 100000)"
    )
    options.add_argument(
        "--observations",
        type=int,
        default=NUM_OBSERVATIONS,
        metavar="N",
        help="of each task (%(default)s)",
    )
    options.add_argument(
        "--minutes",
        type=float,
        default=30.0,
        metavar="M",
        help="longest time of a fit (%(default)s)",
    )
    options.add_argument("--cache", type=Path, metavar="DIR", help="keeps simulations and models")
    arguments = options.parse_args()
    quick = arguments.quick
    names = arguments.tasks or (["two_moons"] if quick else list(TASKS))
    minutes, num = (0.2, QUICK_SAMPLES) if quick else (arguments.minutes, NUM_SAMPLES)
    fit = functools.cache(
        lambda task, simulations: fitted(TASKS[task], simulations, minutes, arguments.cache)
    )

    def measured(task, simulations, observation):
        model, about = fit(task, simulations)
        return {**measure(TASKS[task], model, observation, num), "minutes": minutes, **about}

    sizes, observations = (
        arguments.simulations or ([1000] if quick else list(TARGETS)),
        1 if quick else arguments.observations,
    )
    # the first of all tasks before the second of any
    runs = itertools.product(sizes, range(1, 1 + observations), names)
    identities = (
        {"task": task, "simulations": simulations, "observation": number}
        for simulations, number, task in runs
    )
    resume(
        "sbibm", arguments, {"samples": num, "seed": 0}, identities, measured, summarize, VERSIONS
    )


if __name__ == "__main__":
    main()
