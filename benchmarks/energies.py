"""Effective sample size and error of log Z of flows that were trained against an energy: same
target, machine and wall-clock.

    python benchmarks/energies.py [--targets funnel phi4] [--models ours realnvp] [--seeds 3]
    [--minutes M] [--quick]

Targets are described in _energies.py, models in _energy_models.py. Importance weights are those of
10,000 samples with exact log-determinants, summarised by one function for all models; their
logarithmic mean is recorded whether or not their tail makes it worth anything, and `pareto_k` says
which. Where there are exact samples of the target, ``upper`` bounds log Z from above: a model that
has lost modes has a large gap between its bounds. Of residual flows, ``log_z_one_probe`` is what
one Hutchinson probe makes of log Z. What has been measured is in the record, and the same command
goes on behind it.
"""

import functools
import itertools
import math
import time

import _energy_models
import numpy as np
from _energies import TARGETS
from _energy_models import MODELS
from _record import parser, resume

from iresnet_jax.energies import weigh

MINUTES, QUICK_MINUTES = 1.0, 0.05
RIGHT = 3  # standard errors
NUM, QUICK_NUM, NUM_TRUE = 10_000, 1_000, 2_000  # samples of a model, and of the target
VERSIONS = ("iresnet_jax", "jax", "flowjax", "normflows", "torch")
SETTINGS = {"num_true": NUM_TRUE, **_energy_models.SETTINGS}


def measure(target, model, seed, minutes, num):
    """Trains a model against a target and weighs its samples."""
    known, began = TARGETS[target], time.monotonic()
    trained = MODELS[model](known, seed, minutes)
    seconds, began = time.monotonic() - began, time.monotonic()
    x, log_prob = trained.draw(num)
    log_weights = np.asarray(known.log_density(x), np.float64) - log_prob
    if bad := int(np.sum(~np.isfinite(log_weights))):
        return {"not_finite": bad, "fit_seconds": seconds, **trained.details}
    weights = weigh(log_weights)
    found = {
        **weights._asdict(),
        "is_reliable": weights.pareto_k <= weights.threshold,
        "lower": float(log_weights.mean()),
    }
    if known.log_z is not None:
        found["error"] = weights.log_z - known.log_z
        found["standard_errors"] = abs(found["error"]) / max(weights.stderr, 1e-9)
    if known.sample is not None:
        true = known.sample(np.random.default_rng(seed), NUM_TRUE).astype(np.float32)
        found["upper"] = float(
            np.mean(np.asarray(known.log_density(true), np.float64) - trained.log_prob(true))
        )
    if trained.draw_by_one_probe is not None:
        x, log_prob = trained.draw_by_one_probe(num)
        log_weights = np.asarray(known.log_density(x), np.float64) - log_prob
        found["log_z_one_probe"] = weigh(log_weights).log_z
    found = {
        key: None if isinstance(value, float) and not math.isfinite(value) else value
        for key, value in found.items()
    }
    return {
        **found,
        "fit_seconds": seconds,
        "evaluation_seconds": time.monotonic() - began,
        **trained.details,
    }


def summarize(runs):
    """Each model on each target, means over seeds: first those that are right in every seed, then
    by effective sample size.

    A model is right if log Z is known and its estimate within `RIGHT` standard errors: one that has
    lost modes has as large an effective sample size as one that has them all.
    """
    lines = []
    for name, minutes in itertools.product(TARGETS, sorted({run["minutes"] for run in runs})):
        block = []
        for model in MODELS:
            own = [
                run
                for run in runs
                if (run["target"], run["model"], run["minutes"]) == (name, model, minutes)
            ]
            done = [run for run in own if "ess" in run]
            if not own:
                continue
            line = {
                "target": name,
                "minutes": minutes,
                "model": model,
                "seeds": len(own),
                "failed": len(own) - len(done),
            }
            line["reliable"] = sum(run["is_reliable"] for run in done)
            line["ess"] = float(np.mean([run["ess"] for run in done])) if done else 0.0
            line["log_z"] = [run["log_z"] for run in done]
            line["stderr"] = [run["stderr"] for run in done]
            if errors := [abs(run["error"]) for run in done if "error" in run]:
                line["mean_error"] = float(np.mean(errors))
                line["standard_errors"] = [run["standard_errors"] for run in done]
                line["right"] = sum(error <= RIGHT for error in line["standard_errors"])
            block.append(line)
        lines += sorted(
            block, key=lambda line: (line.get("right", 0) < line["seeds"], -line["ess"])
        )
    return lines


def main():
    options = parser(__doc__)
    options.add_argument(
        "--targets",
        nargs="+",
        choices=TARGETS,
        default=list(TARGETS),
        metavar="NAME",
        help=", ".join(TARGETS),
    )
    options.add_argument(
        "--models",
        nargs="+",
        choices=MODELS,
        default=list(MODELS),
        metavar="NAME",
        help=", ".join(MODELS),
    )
    options.add_argument(
        "--seeds", type=int, default=3, metavar="N", help="trainings of each model"
    )
    options.add_argument(
        "--minutes", type=float, metavar="M", help=f"time for each model, {MINUTES:g} by default"
    )
    arguments = options.parse_args()
    quick = arguments.quick
    minutes = arguments.minutes or (QUICK_MINUTES if quick else MINUTES)
    runs = itertools.product(
        range(1 if quick else arguments.seeds), arguments.targets, arguments.models
    )
    identities = (
        {"target": target, "model": model, "seed": seed, "minutes": minutes}
        for seed, target, model in runs
    )
    num = QUICK_NUM if quick else NUM
    measured, settings = functools.partial(measure, num=num), {**SETTINGS, "num": num}
    resume("energies", arguments, settings, identities, measured, summarize, VERSIONS)


if __name__ == "__main__":
    main()
