"""Test log-likelihood of `fit` with its defaults beside other densities of vectors: same data, split, machine and wall-clock.

    python benchmarks/tabular.py [--data patches wine] [--models ours normflows] [--seeds 3] [--minutes M] [--quick]

The data sets and their dequantisation are described in _tables.py, the models and their settings in _densities.py. All models
see the same float32 arrays, standardised by the training examples; likelihoods are in nats in the data's own units. Each seed
draws its own split and noise, the same for all models, and seeds each model.

--minutes is the time that each model is given: 3 on patches, 1.5 on ridges, 1 on the tables. Whatever has been measured is in
the record, and the same command goes on behind it; results are kept of other data, models and seeds. To measure something
anew, take it out of the record or write elsewhere with --output.

An error is the larger of two: over groups of neighbouring test examples, and over seeds. That of a difference is of
differences example by example.
"""

import importlib.metadata
import importlib.util
import itertools
import json
import math
import time

import _densities
import _tables
import numpy as np
from _densities import MODELS
from _record import RESULTS, parser, write

from iresnet_jax.evaluation import environment

BASELINE, TRUTH = "ours", "truth"
MINUTES = {"patches": 3.0, "ridges": 1.5}  # of the time for each model; the tables get TABLE_MINUTES
TABLE_MINUTES, QUICK_MINUTES = 1.0, 0.05
GROUPS = 100  # most groups of neighbouring test examples
VERSIONS = ("iresnet_jax", "jax", "scikit-learn", "flowjax", "normflows", "torch")
SETTINGS = {
    "patches": _tables.PATCHES._asdict(),
    "ridges": _tables.RIDGES._asdict(),
    "groups": GROUPS,
    "flowjax": _densities.FLOWJAX,
    "normflows": {**_densities.NORMFLOWS, "power_iterations": _densities.POWER_ITERATIONS},
    "learning_rate": _densities.LEARNING_RATE,
    "warmup_steps": _densities.WARMUP_STEPS,
    "clip_norm": _densities.CLIP_NORM,
    "gmm": {"first": _densities.FIRST_MIXTURES, "more_components": _densities.MORE_COMPONENTS},
    "kde": {"bandwidths": _densities.BANDWIDTHS, "refinements": _densities.REFINEMENTS, "validated": _densities.KDE_VALIDATED},
}


def measure(table, model, seed, minutes):
    """Fits a model and evaluates it on the test examples."""
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
    """Mean, its standard error and the means of groups of test examples.

    Raises:
        ValueError: If a log-density is not finite.
    """
    if bad := np.count_nonzero(~np.isfinite(values)):
        raise ValueError(f"the log-density of {bad} of {len(values)} test examples is not finite")
    groups = [float(group.mean()) for group in np.array_split(values, min(len(values), GROUPS))]
    return {"log_prob": float(values.mean()), "stderr": stderr(groups), "groups": groups}


def stderr(values):
    """Standard error of the mean of independent values; zero of one value."""
    return float(np.std(values, ddof=1) / math.sqrt(len(values))) if len(values) > 1 else 0.0


def over_seeds(groups_by_seed):
    """Mean of groups over seeds, and its error over groups and over seeds."""
    means = [float(np.mean(groups)) for groups in groups_by_seed]
    within = math.sqrt(sum(stderr(groups) ** 2 for groups in groups_by_seed)) / len(groups_by_seed)
    return {"mean": float(np.mean(means)), "stderr_examples": within, "stderr_seeds": stderr(means), "by_seed": means}


def summarize(runs):
    """Each model on each data set over its seeds, best first, and how far ours is above it."""
    lines = []
    for name, minutes in itertools.product(_tables.NAMES, sorted({run["minutes"] for run in runs})):
        by_model = {}
        for run in runs:
            if (run["data"], run["minutes"]) == (name, minutes):
                by_model.setdefault(run["model"], {})[run["seed"]] = run
        own = by_model.get(BASELINE, {})
        block = []
        for model, by_seed in by_model.items():
            groups = [by_seed[seed]["groups"] for seed in sorted(by_seed)]
            line = {"data": name, "minutes": minutes, "model": model, "log_prob": over_seeds(groups)}
            if model != BASELINE and (shared := own.keys() & by_seed.keys()):
                pairs = [(own[seed]["groups"], by_seed[seed]["groups"]) for seed in sorted(shared)]
                line["ours_minus_it"] = over_seeds([np.subtract(*pair).tolist() for pair in pairs])
            line["fit_seconds"] = float(np.mean([run["fit_seconds"] for run in by_seed.values()]))
            line["num_parameters"] = [run["num_parameters"] for run in by_seed.values()]
            block.append(line)
        lines += sorted(block, key=lambda line: -line["log_prob"]["mean"])
    return lines


def with_error(estimate, sign=""):
    """A mean with the larger of its errors."""
    error = max(estimate["stderr_examples"], estimate["stderr_seeds"])
    return f"{estimate['mean']:{sign}.3f} ± {error:.3f}"


def markdown(summary):
    """The table of all results."""
    header = ("data", "minutes", "model", "test log-likelihood, nats", "by seed", "ours - it", "seconds", "parameters")
    rows = [header, ("---",) * len(header)]
    for line in summary:
        difference = line.get("ours_minus_it")
        rows.append(
            (
                line["data"],
                f"{line['minutes']:g}",
                line["model"],
                with_error(line["log_prob"]),
                ", ".join(f"{mean:.3f}" for mean in line["log_prob"]["by_seed"]),
                with_error(difference, "+") if difference else "",
                f"{line['fit_seconds']:.0f}",
                " to ".join(str(number) for number in sorted({min(line["num_parameters"]), max(line["num_parameters"])})),
            )
        )
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def kept_runs(path, settings):
    """The runs of a record that was begun before.

    Raises:
        ValueError: If they were made under other settings.
    """
    if path is None or not path.exists():
        return []
    record = json.loads(path.read_text())
    if record["settings"] != json.loads(json.dumps(settings)):
        raise ValueError(f"{path} was made under other settings: move it away, or write elsewhere with --output")
    return record["results"]["runs"]


def made_with():
    """What a run was made with, which may be another commit than that of the next one."""
    found = environment.describe()
    installed = {name: importlib.metadata.version(name) for name in VERSIONS if _is_installed(name)}
    return {"commit": found.commit, "date": found.date, "versions": installed}


def _is_installed(distribution):
    try:
        return bool(importlib.metadata.version(distribution))
    except importlib.metadata.PackageNotFoundError:
        return False


def check_installed(models):
    """Raises ``ValueError`` if a model's packages are missing."""
    for model in models:
        missing = [name for name in _densities.PACKAGES.get(model.split("_")[0], ()) if importlib.util.find_spec(name) is None]
        if missing:
            raise ValueError(f"{model} needs {', '.join(missing)}: install the extra 'bench', or choose other --models")


def main():
    options = parser(__doc__)
    options.add_argument("--data", nargs="+", choices=_tables.NAMES, metavar="NAME", help=f"of {', '.join(_tables.NAMES)}")
    options.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS), metavar="NAME", help=", ".join(MODELS))
    options.add_argument("--seeds", type=int, default=3, metavar="N", help="splits, and trainings of each model")
    options.add_argument("--minutes", type=float, metavar="M", help="time for each model; by default by data set")
    arguments = options.parse_args()
    quick = arguments.quick
    names = arguments.data or (["wine"] if quick else _tables.NAMES)
    path = arguments.output or (None if quick else RESULTS / "tabular.json")
    try:
        check_installed(arguments.models)
        runs = kept_runs(path, {"quick": quick, **SETTINGS})
    except ValueError as error:
        raise SystemExit(f"error: {error}") from None

    def record(identity, result):
        runs.append({**identity, **result, **made_with()})
        done = f"{runs[-1]['log_prob']:.3f} ± {runs[-1]['stderr']:.3f} nats after {runs[-1]['fit_seconds']:.0f} s"
        print(f"{identity['data']}, seed {identity['seed']}, {identity['model']}: {done}", flush=True)
        write("tabular", arguments, SETTINGS, {"summary": summarize(runs), "runs": runs})

    def is_missing(identity):
        return all(any(run[name] != value for name, value in identity.items()) for run in runs)

    for seed in range(1 if quick else arguments.seeds):
        for name in names:
            table = _tables.load(name, seed, quick=quick)
            minutes = arguments.minutes or (QUICK_MINUTES if quick else MINUTES.get(name, TABLE_MINUTES))
            for model in arguments.models:
                identity = {"data": name, "model": model, "seed": seed, "minutes": minutes}
                if is_missing(identity):
                    record(identity, measure(table, model, seed, minutes))
            identity = {"data": name, "model": TRUTH, "seed": seed, "minutes": minutes}
            if table.true_log_prob is not None and is_missing(identity):
                nothing = {"fit_seconds": 0.0, "num_parameters": 0, "details": {}}
                record(identity, {**likelihood(table.true_log_prob), **nothing})
    print(markdown(summarize(runs)))


if __name__ == "__main__":
    main()
