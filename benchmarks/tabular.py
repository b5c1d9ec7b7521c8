"""Test log-likelihood of `fit` with its defaults beside other densities of vectors: same data,
split, machine and wall-clock.

    python benchmarks/tabular.py [--data patches wine] [--models ours normflows] [--seeds 3]
    [--minutes M] [--quick]

Each seed draws its own split and noise, the same for all models, and seeds each model; likelihoods
are in nats in the data's own units. Whatever has been measured is in the record, and the same
command goes on behind it; results are kept of other data, models and seeds. To measure something
anew, take it out of the record or write elsewhere with --output.

An error is the larger of two: over groups of neighbouring test examples, and over seeds. That of a
difference is of differences example by example. Data are described in _tables.py, models in
_densities.py.
"""

import functools
import importlib.util
import itertools
import math
import time
from pathlib import Path

import _densities
import _tables
import numpy as np
from _densities import MODELS
from _record import parser, resume

BASELINE, TRUTH = "ours", "truth"
# of the time for each model; the tables get TABLE_MINUTES
MINUTES = {"patches": 3.0, "ridges": 1.5, "bsds300": 10.0}
TABLE_MINUTES, QUICK_MINUTES = 1.0, 0.05
# Of data whose seeds split the same rows: test rows for each row that trains, and the share of test
# rows that two seeds have in common. Other data are drawn anew for each seed.
SHARED = {
    "patches": (1 / 8, 0.1),
    "bsds300": (0.0, 1.0),
    **dict.fromkeys(_tables.TABLES, (0.15 / 0.7, 0.15)),
}
GROUPS = 100  # most groups of neighbouring test examples
VERSIONS = ("iresnet_jax", "jax", "scikit-learn", "flowjax", "normflows", "torch")
SETTINGS = {
    "patches": _tables.PATCHES,
    "ridges": _tables.RIDGES,
    "groups": GROUPS,
    "flowjax": _densities.FLOWJAX,
    "normflows": {**_densities.NORMFLOWS, "power_iterations": _densities.POWER_ITERATIONS},
    "learning_rate": _densities.LEARNING_RATE,
    "warmup_steps": _densities.WARMUP_STEPS,
    "clip_norm": _densities.CLIP_NORM,
    "gmm": {"first": _densities.FIRST_MIXTURES, "more_components": _densities.MORE_COMPONENTS},
    "kde": {
        "bandwidths": _densities.BANDWIDTHS,
        "refinements": _densities.REFINEMENTS,
        "validated": _densities.KDE_VALIDATED,
    },
}


def measure(table, model, seed, minutes):
    """Fits a model and evaluates it on the test examples; the truth takes no fit."""
    if model == TRUTH:
        return {
            **likelihood(table.true_log_prob),
            "fit_seconds": 0.0,
            "num_parameters": 0,
            "details": {},
        }
    began = time.monotonic()
    fitted = MODELS[model](table, seed, minutes)
    fit_seconds = time.monotonic() - began
    validation = fitted.log_prob(table.validation[: _densities.VALIDATED]).mean() + table.log_det
    began = time.monotonic()
    values = fitted.log_prob(table.test) + table.log_det
    return {
        **likelihood(values),
        "validation_log_prob": float(validation),
        "fit_seconds": fit_seconds,
        "evaluation_seconds": time.monotonic() - began,
        "num_parameters": fitted.num_parameters,
        "details": fitted.details,
    }


def likelihood(values):
    """Mean, its standard error and the means of groups of test examples; all log-densities have
    to be finite.
    """
    if bad := np.count_nonzero(~np.isfinite(values)):
        raise ValueError(f"the log-density of {bad} of {len(values)} test examples is not finite")
    groups = [
        round(float(group.mean()), 4) for group in np.array_split(values, min(len(values), GROUPS))
    ]
    return {"log_prob": float(values.mean()), "stderr": stderr(groups), "groups": groups}


def stderr(values):
    """Standard error of the mean of independent values; zero of one value."""
    return float(np.std(values, ddof=1) / math.sqrt(len(values))) if len(values) > 1 else 0.0


def over_seeds(groups_by_seed, tested, common):
    """Mean of groups over seeds, and its error over groups and over seeds, which share rows as in
    `SHARED`.

    Errors are those of ``J`` independent seeds times ``sqrt(1 + (J - 1) common)`` over groups, as
    for test sets with a share in common, and times ``sqrt(1 + J tested)`` over seeds (Nadeau and
    Bengio 2003).
    """
    means, num = [float(np.mean(groups)) for groups in groups_by_seed], len(groups_by_seed)
    within = (
        math.sqrt(sum(stderr(groups) ** 2 for groups in groups_by_seed) * (1 + (num - 1) * common))
        / num
    )
    between = stderr(means) * math.sqrt(1 + num * tested)
    return {
        "mean": float(np.mean(means)),
        "stderr_examples": within,
        "stderr_seeds": between,
        "by_seed": means,
    }


def summarize(runs):
    """Each model on each data set over its seeds, best first, and how far ours is above it."""
    lines = []
    for name, minutes in itertools.product(_tables.NAMES, sorted({run["minutes"] for run in runs})):
        by_model, shares = {}, SHARED.get(name, (0.0, 0.0))
        for run in runs:
            if (run["data"], run["minutes"]) == (name, minutes):
                by_model.setdefault(run["model"], {})[run["seed"]] = run
        own = by_model.get(BASELINE, {})
        block = []
        for model, by_seed in by_model.items():
            groups = [by_seed[seed]["groups"] for seed in sorted(by_seed)]
            line = {
                "data": name,
                "minutes": minutes,
                "model": model,
                "log_prob": over_seeds(groups, *shares),
            }
            if model != BASELINE and (shared := own.keys() & by_seed.keys()):
                pairs = [(own[seed]["groups"], by_seed[seed]["groups"]) for seed in sorted(shared)]
                line["ours_minus_it"] = over_seeds(
                    [np.subtract(*pair).tolist() for pair in pairs], *shares
                )
            line["fit_seconds"] = float(np.mean([run["fit_seconds"] for run in by_seed.values()]))
            line["num_parameters"] = [run["num_parameters"] for run in by_seed.values()]
            block.append(line)
        lines += sorted(block, key=lambda line: -line["log_prob"]["mean"])
    return lines


def main():
    options = parser(__doc__)
    options.add_argument(
        "--data",
        nargs="+",
        choices=_tables.NAMES,
        metavar="NAME",
        help=f"of {', '.join(_tables.NAMES)}",
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
        "--seeds", type=int, default=3, metavar="N", help="splits, and trainings of each model"
    )
    options.add_argument(
        "--minutes", type=float, metavar="M", help="time for each model; by default by data set"
    )
    options.add_argument(
        "--bsds300", type=Path, metavar="FOLDER", help="folder of bsds300, see configs/bsds300.py"
    )
    arguments = options.parse_args()
    quick = arguments.quick
    names = arguments.data or (
        ["wine"] if quick else _tables.NAMES if arguments.bsds300 else _tables.NAMES[:-1]
    )
    if "bsds300" in names and arguments.bsds300 is None:
        raise SystemExit(
            "error: bsds300 needs --bsds300 FOLDER, with its train.npy, validation.npy and test.npy"
        )
    packages = {model.split("_")[0] for model in arguments.models} & {"flowjax", "normflows"}
    if missing := [name for name in sorted(packages) if importlib.util.find_spec(name) is None]:
        raise SystemExit(
            f"error: there is no {' and no '.join(missing)}: install the extra "
            "'bench', or choose other --models"
        )

    @functools.lru_cache(maxsize=1)
    def table_of(data, seed):
        return _tables.load(data, seed, quick=quick, bsds300=arguments.bsds300)

    def identities():
        for seed, name in itertools.product(range(1 if quick else arguments.seeds), names):
            minutes = arguments.minutes or (
                QUICK_MINUTES if quick else MINUTES.get(name, TABLE_MINUTES)
            )
            for model in arguments.models + [TRUTH] * (name not in SHARED):
                yield {"data": name, "model": model, "seed": seed, "minutes": minutes}

    def measured(data, model, seed, minutes):
        return measure(table_of(data, seed), model, seed, minutes)

    resume("tabular", arguments, SETTINGS, identities(), measured, summarize, VERSIONS)


if __name__ == "__main__":
    main()
