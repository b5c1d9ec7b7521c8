"""How good is `fit` on raw real tables, beside other densities, samplers and classifiers?

    python benchmarks/tables.py --tables DIR [--parts density samples] [--names engel] [--half A]
    [--minutes .4] [--key 0] [--quick]

DIR has CSV files of Rdatasets: 30 random tables, and 13 for classes and regressions. Rows with
missing values are left out, as are row numbers and the text of `DROPPED`. 80 % of the rows train.

- **density**: mean log-likelihood of test rows under ``fit(frame)``, over 16 keys of noise, beside
  the independent columns, and beside the best of five densities without training by a
  cross-validation on training rows (`_untrained.py`). Levels and whole numbers count as
  probabilities, other numbers on a grid as probabilities by the width of their cells, continuous
  ones as densities. Test rows with unknown levels are left out for all alike.
- **samples**: whether 10,000 samples keep to what holds for all rows.
- **sampled**: AUROC of boosting that tells as many samples from rows of the table, .5 if it
  cannot, for ours, for a Gaussian copula (copulas) and for adversarial random
  forests (arfpy), left out if not installed (``pip install --no-deps copulas arfpy``).
  Samples of both are moved to the values of their columns. Their likelihoods are not compared:
  there is none, or one in another unit.
- **classes**: test log-loss of `ResidualFlowClassifier` in the first of three folds, beside
  logistic regression and boosting.
- **regressions**: mean log-likelihood of a test response under ``fit(y, context=x)``, beside a
  linear model with normal residuals, boosting with a kernel density of residuals, and the
  distribution of the response alone.
- **binaries**: mean log-likelihood of six independent 0/1 columns beside the true one.
- **one_dimension**: whether the likelihoods of all values of one column add up to 1.

Differences are ours minus the other, with the standard error of the mean of paired differences.
Whatever has been measured is in the record, and the same command goes on behind it. ``--half`` has
every other one of the 30 tables, sorted by name: A the first, B the second.
"""

import functools
import importlib.util
import math
import time
import warnings
from pathlib import Path

import _untrained
import jax
import numpy as np
import pandas as pd
from _record import parser, resume
from scipy.stats import norm
from sklearn.ensemble import HistGradientBoostingClassifier, HistGradientBoostingRegressor
from sklearn.linear_model import LinearRegression, LogisticRegression
from sklearn.metrics import log_loss
from sklearn.model_selection import StratifiedKFold, cross_val_predict, cross_val_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

import iresnet_jax as ir
from iresnet_jax.estimators import ResidualFlowClassifier

KEYS, NUM_SAMPLES, MOST_ROWS = 16, 10_000, 2000
QUICK_MINUTES, QUICK_TABLE = 0.05, "datasets__airquality"
TOLERATED = 1e-3  # how far from 1 the sum of a density may be
RIVALS = ("copulas", "arfpy")
VERSIONS = ("iresnet_jax", "jax", "scikit-learn", "pandas", *RIVALS)
# Text most of whose values occur once; columns of row numbers have no name and need no mention.
DROPPED = {
    "Auto": ["name"],
    "Stat2Data__AlitoConfirmation": ["Senator"],
    "collegeScorecard__school": ["name", "city", "zip", "url"],
    "fivethirtyeight__fandango": ["film"],
    "openintro__london_murders": ["forename", "date"],
}
# labels, and columns that are no features
CLASSES = {
    "TitanicSurvival": (["survived"], []),
    "BEPS": (["vote"], []),
    "biopsy": (["class"], ["ID"]),
    "crabs": (["sp", "sex"], ["index"]),
    "fgl": (["type"], []),
    "hpc_data": (["class"], []),
    "scat": (["Species"], []),
    "spam7": (["yesno"], []),
}
REGRESSIONS = {
    "engel": ("foodexp", []),
    "mcycle": ("accel", []),
    "Auto": ("mpg", []),
    "HousePrices": ("price", []),
    "Wage": ("wage", ["logwage"]),
}
CONTINUOUS = ("exponential", "zeros")
DRAWS, REPEATS, PIECES = 1024, 8, 100_000
BINARIES = (0.5, 0.3, 0.7, 0.1, 0.02, 0.9)
ONE_DIMENSION = {  # columns, the values that have a probability, and its unit
    "counts": (lambda rng: rng.poisson(3, 1000), np.arange(-20, 60), 1.0),
    "heaped": (lambda rng: heaped(rng, 1000), np.arange(-200, 300), 1.0),
    "exponential": (lambda rng: rng.exponential(size=1000), np.empty(0), 1.0),
    "zeros": (
        lambda rng: rng.exponential(size=1000) * (rng.uniform(size=1000) > 0.3),
        np.zeros(1),
        1.0,
    ),
    "rounded": (lambda rng: rng.normal(size=1000).round(1), np.arange(-200, 200) / 10, 0.1),
}


# --- tables ---------------------------------------------------------------------------------------


def read(folder, name):
    """A table without missing values, row numbers and text that hardly repeats."""
    path = folder / f"{name}.csv"
    frame = pd.read_csv(path, index_col=0 if name in {*CLASSES, *REGRESSIONS} else None).dropna()
    dropped = [column for column in frame if str(column).startswith("Unnamed")]
    return frame.drop(columns=dropped + DROPPED.get(name, [])).reset_index(drop=True)


def random_tables(folder):
    """Sorted names of the tables that are not for classes or regressions."""
    return sorted({path.stem for path in folder.glob("*.csv")} - {*CLASSES, *REGRESSIONS})


def split(frame):
    """Training and test rows, without test rows that have unknown levels, and kinds of columns."""
    rows, num = np.random.default_rng(7).permutation(len(frame)), int(0.8 * len(frame))
    train, test = (
        frame.iloc[np.sort(part)].reset_index(drop=True) for part in (rows[:num], rows[num:])
    )
    kinds = [_untrained.Kind.of(train[name]) for name in frame]
    for name, kind in zip(frame, kinds, strict=True):
        if kind.levels is not None:
            test = test[test[name].isin(kind.levels)]
    return train, test.reset_index(drop=True), kinds


def fit(frame, minutes, key):
    """A model of a data frame, and the time that its fit took."""
    began = time.monotonic()
    model = ir.fit(frame, minutes=minutes, key=jax.random.key(key), progress=False)
    return model, time.monotonic() - began


def likelihood(model, x, **context):
    """Log-likelihood of each row, mean over keys of noise."""
    keys = jax.random.split(jax.random.key(1), KEYS)
    return np.mean([np.asarray(model.log_prob(x, key, **context)) for key in keys], axis=0)


def draw(model, num):
    """Samples as a data frame, and how many have no value, which are not in it."""
    x = np.asarray(model.sample(jax.random.key(2), num)[0])
    known = ~np.isnan(x).any(axis=1)
    return model.to_frame(x[known]), int(np.sum(~known))


def paired(values, others):
    """Mean of differences with its standard error."""
    differences = np.asarray(values, np.float64) - others
    stderr = differences.std(ddof=1) / math.sqrt(len(differences))
    return {"mean": float(differences.mean()), "stderr": float(stderr)}


# --- parts on random tables -----------------------------------------------------------------------


def density(frame, fitted):
    train, test, kinds = split(frame)
    model, seconds = fitted()
    own = likelihood(model, test)
    train, test = (_untrained.places_of(part, kinds) for part in (train, test))
    others = _untrained.log_probs(train, test, kinds, draws=4)
    chosen = _untrained.choose(train, kinds)
    return {
        "rows": len(frame),
        "columns": len(kinds),
        "test_rows": len(own),
        "fit_seconds": seconds,
        "score": float(own.mean()),
        "untrained": {name: float(values.mean()) for name, values in others.items()},
        "chosen": chosen,
        "minus_independent": paired(own, others["independent"]),
        "minus_chosen": paired(own, others[chosen]),
    }


def samples(frame, fitted):
    train, model = split(frame)[0], fitted()[0]
    drawn, lost = draw(model, NUM_SAMPLES)
    numbers = [name for name in train if pd.api.types.is_numeric_dtype(train[name].dtype)]
    numbers = [name for name in numbers if train[name].dtype != bool]
    flags = [name for name in numbers if set(train[name]) == {0, 1}]
    levels = [name for name in train if name not in numbers] + flags
    low, high = train[numbers].min(), train[numbers].max()
    margin = 0.1 * (high - low)
    outside = (drawn[numbers] < low - margin) | (drawn[numbers] > high + margin)
    positive = [name for name in numbers if low[name] >= 0]
    return {
        "lost": lost,
        "not_0_or_1": float((~drawn[flags].isin([0, 1])).to_numpy().mean()) if flags else None,
        "level_difference": max((shifted(train[name], drawn[name]) for name in levels), default=0),
        "outside": float(outside.any(axis=1).mean()),
        "smallest": float(drawn[positive].min().min()) if positive else None,
        "lost_constants": [
            str(name)
            for name in train
            if train[name].nunique() == 1 and (drawn[name] != train[name].iloc[0]).any()
        ],
        **new_pairs(frame, drawn),
    }


def shifted(train, drawn):
    """Largest difference of the share of a level, in units of 3 standard errors and .005."""
    values = sorted({*train, *drawn})
    ours, theirs = (
        np.array([(part == value).mean() for value in values]) for part in (drawn, train)
    )
    both = (ours * len(drawn) + theirs * len(train)) / (len(drawn) + len(train))
    stderr = np.sqrt(both * (1 - both) * (1 / len(drawn) + 1 / len(train)))
    return float(np.max(np.abs(ours - theirs) / (3 * stderr + 0.005)))


def new_pairs(frame, drawn):
    """Share of samples with a species on an island where it does not live, of penguins."""
    pair = ["species", "island"]
    if not {*pair} <= {*frame}:
        return {}
    known = set(frame[pair].astype(str).agg(" ".join, axis=1))
    return {"new_pairs": float((~drawn[pair].astype(str).agg(" ".join, axis=1).isin(known)).mean())}


def sampled(frame, fitted):
    train, _, kinds = split(frame)
    num = min(len(frame), MOST_ROWS)
    real = frame.iloc[np.random.default_rng(5).permutation(len(frame))[:num]]
    found = {"auroc": {"ours": told_apart(real, draw(fitted()[0], num)[0])}, "missing": []}
    for name, rival in {"copulas": copula_samples, "arfpy": forest_samples}.items():
        if importlib.util.find_spec(name) is None:
            found["missing"].append(name)
        else:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                drawn = on_values(rival(train, kinds, num), train, kinds)
            found["auroc"][name] = told_apart(real, drawn)
    return found


def told_apart(real, drawn):
    """AUROC of boosting in five folds: which rows are samples?"""
    both = pd.concat([real, drawn.astype(real.dtypes)], ignore_index=True)
    for name in both:
        if both[name].dtype.kind not in "iuf":
            both[name] = both[name].astype(str).astype("category").cat.codes
    labels = np.repeat([0, 1], [len(real), len(drawn)])
    folds = StratifiedKFold(5, shuffle=True, random_state=0)
    boosting = HistGradientBoostingClassifier(random_state=0)
    return float(cross_val_score(boosting, both, labels, cv=folds, scoring="roc_auc").mean())


def on_values(drawn, train, kinds):
    """Samples of a rival on the values of their columns, which it does not know."""
    made, drawn = {}, drawn.dropna()
    for name, kind in zip(train, kinds, strict=True):
        if kind.levels is None:
            made[name] = kind.nearest(drawn[name].to_numpy(np.float64))
        else:
            made[name] = drawn[name].to_numpy()
    return pd.DataFrame(made)


def copula_samples(train, kinds, num):
    """Samples of a Gaussian copula; levels are their numbers, and samples the nearest ones."""
    from copulas.multivariate import (  # pyright: ignore[reportMissingImports]
        GaussianMultivariate,
    )

    numbers = {name: kind.numbers(train[name]) for name, kind in zip(train, kinds, strict=True)}
    model = GaussianMultivariate()
    np.random.seed(0)  # noqa: NPY002 (it has no generator of its own)
    model.fit(pd.DataFrame(numbers))
    drawn = model.sample(num)
    for name, kind in zip(train, kinds, strict=True):
        if kind.levels is not None:
            places = np.clip(np.rint(drawn[name].to_numpy()), 0, len(kind.levels) - 1).astype(int)
            drawn[name] = np.array(kind.levels, object)[places]
    return drawn


def forest_samples(train, kinds, num):
    """Samples of adversarial random forests; levels are its categories."""
    from arfpy import arf  # pyright: ignore[reportMissingImports]

    if not hasattr(np, "in1d"):  # arfpy 0.1.1 needs it, and NumPy 2.4 has it no more
        np.in1d = np.isin  # noqa: NPY201  # pyright: ignore[reportAttributeAccessIssue]
    numbered = train.set_axis(range(train.shape[1]), axis=1)  # pandas 3 finds its columns by these
    text = [place for place, kind in enumerate(kinds) if kind.levels is not None]
    np.random.seed(0)  # noqa: NPY002 (it has no generator of its own)
    model = arf.arf(numbered.astype(dict.fromkeys(text, object)), verbose=False, random_state=0)
    model.forde()
    return model.forge(num).set_axis(train.columns, axis=1)


# --- classes and regressions ----------------------------------------------------------------------


def features(frame, dropped):
    """Numbers as they are, and all but the first level of text as columns of 0 and 1."""
    return pd.get_dummies(frame.drop(columns=dropped), drop_first=True).to_numpy(np.float64)


def classes(folder, name, minutes, key):
    frame, (labels, others) = read(folder, name), CLASSES[name]
    x, y = features(frame, labels + others), frame[labels].agg(" ".join, axis=1).to_numpy()
    train, test = next(StratifiedKFold(3, shuffle=True, random_state=0).split(x, y))
    models = {
        "ours": ResidualFlowClassifier(minutes=minutes, random_state=key),
        "logistic": make_pipeline(StandardScaler(), LogisticRegression(max_iter=5000)),
        "boosting": HistGradientBoostingClassifier(random_state=0),
    }
    losses = {}
    for kind, model in models.items():
        model.fit(x[train], y[train])
        probabilities = model.predict_proba(x[test])
        losses[kind] = log_loss(y[test], probabilities, labels=model.classes_)
    return {"rows": len(frame), "features": x.shape[1], "log_loss": losses}


def regression(folder, name, minutes, key):
    frame, (response, others) = read(folder, name), REGRESSIONS[name]
    x, y = features(frame, [response, *others]), frame[response]
    rows = np.random.default_rng(3).permutation(len(y))
    train, test = np.split(rows, [int(0.75 * len(y))])
    began = time.monotonic()
    model = ir.fit(
        y.to_numpy(np.float64)[train, None],
        context=x[train],
        minutes=minutes,
        key=jax.random.key(key),
        progress=False,
    )
    seconds = time.monotonic() - began
    own = likelihood(model, y.to_numpy(np.float64)[test, None], context=x[test])
    kind = _untrained.Kind.of(y.iloc[train])
    places = [kind.places(kind.numbers(y.iloc[rows])) for rows in (train, test)]
    others = {
        "linear": linear_log_prob(x[train], x[test], *places),
        "boosting": boosting_log_prob(x[train], x[test], *places),
        "alone": marginal_log_prob(*places),
    }
    return {
        "rows": len(y),
        "test_rows": len(test),
        "fit_seconds": seconds,
        "scores": {kind: float(values.mean()) for kind, values in {"ours": own, **others}.items()},
        **{f"minus_{kind}": paired(own, values) for kind, values in others.items()},
    }


def linear_log_prob(x, x_test, train, test):
    """A normal distribution around least squares, on the line of cells."""
    y = train.start + train.width / 2
    model = make_pipeline(StandardScaler(), LinearRegression()).fit(x, y)
    residuals = test.start + test.width / 2 - model.predict(x_test)
    ratios = _untrained.Places(*(part[:, None] for part in test)).log_units
    return norm.logpdf(residuals, scale=np.std(y - model.predict(x))) + ratios


def boosting_log_prob(x, x_test, train, test):
    """A kernel density of the residuals of held-out rows around boosting."""
    y, boosting = train.start + train.width / 2, HistGradientBoostingRegressor(random_state=0)
    predicted = cross_val_predict(boosting, x, y, cv=5), boosting.fit(x, y).predict(x_test)
    residuals = [
        places._replace(start=places.start - middle)
        for places, middle in zip((train, test), predicted, strict=True)
    ]
    return marginal_log_prob(*residuals)


def marginal_log_prob(train, test):
    """The distribution of training values, whatever the context."""
    return _untrained.Marginal(train, 0, np.random.default_rng(0)).log_prob(test)


# --- made tables ----------------------------------------------------------------------------------


def heaped(rng, num):
    """Whole numbers from 18 to 90, 40 % of them rounded to tens."""
    x = rng.integers(18, 91, num)
    return np.where(rng.uniform(size=num) < 0.4, np.clip(10 * np.rint(x / 10), 20, 90), x)


def binaries(minutes, key):
    rng, shares = np.random.default_rng(0), np.array(BINARIES)
    train, test = (
        pd.DataFrame((rng.uniform(size=(num, 6)) < shares).astype(int), columns=list("abcdef"))
        for num in (300, 2000)
    )
    model, seconds = fit(train, minutes, key)
    own, true = likelihood(model, test), np.where(test == 1, np.log(shares), np.log1p(-shares))
    return {
        "fit_seconds": seconds,
        "score": float(own.mean()),
        "truth": float(true.sum(axis=1).mean()),
        "minus_truth": paired(own, true.sum(axis=1)),
    }


def one_dimension(name, minutes, key):
    column, values, unit = ONE_DIMENSION[name]
    x = column(np.random.default_rng(0))
    model, seconds = fit(pd.DataFrame({"x": x}), minutes, key)
    sums = np.zeros(REPEATS) + integral(model, x) if name in CONTINUOUS else np.zeros(REPEATS)
    if len(values):
        sums += [unit * sum_of(model, values, jax.random.key(seed)) for seed in range(REPEATS)]
    stderr = float(np.std(sums, ddof=1) / math.sqrt(REPEATS))
    adds_up = abs(sums.mean() - 1) < TOLERATED + 3 * stderr
    return {
        "fit_seconds": seconds,
        "total": float(sums.mean()),
        "stderr": stderr,
        "adds_up": bool(adds_up),
    }


def sum_of(model, values, key):
    """Sum of the likelihoods of values, each a mean over noise."""
    x = np.repeat(values, DRAWS)[:, None].astype(np.float32)
    return float(np.exp(np.asarray(model.log_prob(x, key), np.float64)).sum() / DRAWS)


def integral(model, x):
    """Integral of a density from far below all examples to far above, by middles of pieces."""
    edges = np.linspace(x.min() - 3 * np.ptp(x), x.max() + 3 * np.ptp(x), PIECES + 1)
    middles = ((edges[1:] + edges[:-1]) / 2)[:, None].astype(np.float32)
    densities = np.exp(np.asarray(model.log_prob(middles, jax.random.key(0)), np.float64))
    return float(densities @ np.diff(edges))


# --- record ---------------------------------------------------------------------------------------

OF_MODELS = {"density": density, "samples": samples, "sampled": sampled}
OF_TABLES = {"classes": (classes, CLASSES), "regressions": (regression, REGRESSIONS)}
MADE = {"binaries": ("binaries",), "one_dimension": tuple(ONE_DIMENSION)}
PARTS = (*OF_MODELS, *OF_TABLES, *MADE)


def cases(arguments):
    """Parts and tables in the order in which they are measured."""
    names = random_tables(arguments.tables)
    names = {"A": names[::2], "B": names[1::2], "all": names}[arguments.half]
    if arguments.quick and not arguments.names:
        arguments.names = [QUICK_TABLE, "engel", "crabs", "counts", "binaries"]
    asked = [
        *((part, name) for name in names for part in OF_MODELS),  # one fit is enough for all
        *((part, name) for part, (_, of_part) in OF_TABLES.items() for name in of_part),
        *((part, name) for part, of_part in MADE.items() for name in of_part),
    ]
    return [
        (part, name)
        for part, name in asked
        if part in arguments.parts and (not arguments.names or name in arguments.names)
    ]


def summarize(runs):
    """How often and how far ours is better, by part, minutes and key."""
    summary = {}
    for minutes, key in sorted({(run["minutes"], run["key"]) for run in runs}):
        of_parts = summary[f"{minutes:g} minutes, key {key}"] = {}
        for part in PARTS:
            own = [
                run
                for run in runs
                if (run["part"], run["minutes"], run["key"]) == (part, minutes, key)
            ]
            if own:
                of_parts[part] = {"tables": len(own), **SUMMARIES[part](own)}
    return summary


def mean(runs, *path):
    """Mean of a number that runs have."""
    return float(np.mean([functools.reduce(dict.__getitem__, path, run) for run in runs]))


def of_density(runs):
    found = {"fit_seconds": mean(runs, "fit_seconds")}
    for other in ("independent", "chosen"):
        minus = [run[f"minus_{other}"] for run in runs]
        found[f"below_{other}"] = sum(each["mean"] < -2 * each["stderr"] for each in minus)
        found[f"minus_{other}"] = mean(minus, "mean")
    return found


def of_samples(runs):
    smallest = [run["smallest"] for run in runs if run["smallest"] is not None]
    return {
        "lost": sum(run["lost"] for run in runs),
        "most_not_0_or_1": max(run["not_0_or_1"] or 0.0 for run in runs),
        "largest_level_difference": max(run["level_difference"] for run in runs),
        "most_outside": max(run["outside"] for run in runs),
        "smallest": min(smallest, default=None),
        "lost_constants": sum(len(run["lost_constants"]) for run in runs),
        "new_pairs": max((run["new_pairs"] for run in runs if "new_pairs" in run), default=None),
    }


def of_methods(runs, values):
    """Means of all methods over the tables that have them."""
    methods = dict.fromkeys(method for run in runs for method in run[values])
    return {
        method: mean([run for run in runs if method in run[values]], values, method)
        for method in methods
    }


def of_regressions(runs):
    found = of_methods(runs, "scores")
    for other in [method for method in found if method != "ours"]:
        minus = [run[f"minus_{other}"] for run in runs]
        found[f"below_{other}"] = sum(each["mean"] < -2 * each["stderr"] for each in minus)
    return found


SUMMARIES = {
    "density": of_density,
    "samples": of_samples,
    "sampled": lambda runs: of_methods(runs, "auroc"),
    "classes": lambda runs: of_methods(runs, "log_loss"),
    "regressions": of_regressions,
    "binaries": lambda runs: {"minus_truth": mean(runs, "minus_truth", "mean")},
    "one_dimension": lambda runs: {"add_up": sum(run["adds_up"] for run in runs)},
}


def print_table(runs):
    """A line for each run, with the numbers that matter."""
    for part in PARTS:
        lines = [run for run in runs if run["part"] == part]
        for run in sorted(lines, key=lambda run: (run["table"], run["minutes"], run["key"])):
            print(f"{part:13s} {run['table']:34s} {LINES[part](run)}")


def with_error(value):
    """A difference and its standard error."""
    return f"{value['mean']:+.3f} ± {value['stderr']:.3f}"


def numbers(values):
    """Numbers by name."""
    return ", ".join(
        f"{name} {value:.3f}" if isinstance(value, float) else f"{name} {value}"
        for name, value in values.items()
    )


LINES = {
    "density": lambda run: (
        f"{run['rows']} x {run['columns']}, {run['fit_seconds']:.0f} s, "
        f"ours {run['score']:.2f}, independent {run['untrained']['independent']:.2f} "
        f"({with_error(run['minus_independent'])}), {run['chosen']} "
        f"{run['untrained'][run['chosen']]:.2f} ({with_error(run['minus_chosen'])})"
    ),
    "samples": lambda run: numbers(
        {
            name: run[name]
            for name in (
                "lost",
                "not_0_or_1",
                "level_difference",
                "outside",
                "smallest",
                "lost_constants",
                "new_pairs",
            )
            if name in run
        }
    ),
    "sampled": lambda run: numbers(run["auroc"]),
    "classes": lambda run: numbers(run["log_loss"]),
    "regressions": lambda run: numbers(run["scores"]),
    "binaries": lambda run: f"{run['score']:.4f}, minus truth {with_error(run['minus_truth'])}",
    "one_dimension": lambda run: f"{run['total']:.5f} ± {run['stderr']:.5f}",
}


def main():
    options = parser(__doc__)
    options.add_argument(
        "--tables", type=Path, required=True, metavar="DIR", help="folder of the CSV files"
    )
    options.add_argument(
        "--parts",
        nargs="+",
        choices=PARTS,
        default=list(PARTS),
        metavar="PART",
        help=f"of {', '.join(PARTS)}",
    )
    options.add_argument("--names", nargs="+", metavar="NAME", help="tables (all)")
    options.add_argument(
        "--half", choices=["A", "B", "all"], default="all", help="of the 30 tables (%(default)s)"
    )
    options.add_argument(
        "--minutes", type=float, default=0.4, metavar="M", help="time of each fit (%(default)s)"
    )
    options.add_argument(
        "--key", type=int, default=0, metavar="N", help="seed of each fit (%(default)s)"
    )
    arguments = options.parse_args()
    minutes, key = QUICK_MINUTES if arguments.quick else arguments.minutes, arguments.key
    if missing := [name for name in RIVALS if importlib.util.find_spec(name) is None]:
        print(f"not installed, and left out of the part sampled: {', '.join(missing)}")

    @functools.lru_cache(maxsize=1)
    def fitted(table):
        return fit(split(read(arguments.tables, table))[0], minutes, key)

    def measured(part, table, minutes, key):
        if part in OF_MODELS:
            frame = read(arguments.tables, table)
            return OF_MODELS[part](frame, functools.partial(fitted, table))
        if part in OF_TABLES:
            return OF_TABLES[part][0](arguments.tables, table, minutes, key)
        if part == "binaries":
            return binaries(minutes, key)
        return one_dimension(table, minutes, key)

    identities = (
        {"part": part, "table": name, "minutes": minutes, "key": key}
        for part, name in cases(arguments)
    )
    settings = {"keys": KEYS, "samples": NUM_SAMPLES, "most_rows": MOST_ROWS, "dropped": DROPPED}
    print_table(resume("tables", arguments, settings, identities, measured, summarize, VERSIONS))


if __name__ == "__main__":
    main()
