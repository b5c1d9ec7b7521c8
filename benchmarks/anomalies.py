"""How well does `ResidualFlowDetector` rank anomalies, and are its p-values valid?

    python benchmarks/anomalies.py --sets DIR [--names 45_wine] [--minutes .5] [--seeds 3] [--quick]

DIR has the sets of ADBench (Han et al. 2022) as npz files, each with rows ``X`` and ``y``, 1 for
anomalies. Half of the normal rows train, at most 10,000; the others and the anomalies test, at most
4000 of each. The detector has its default of a fifth of them for calibration.

- **auroc**: of anomalies among test rows, beside the distance to the fifth nearest training row
  (knn), an isolation forest, local outlier factors, a Gaussian mixture whose number of components
  and covariances have the best BIC, and ECOD and COPOD of PyOD, left out if it is not installed
  (``pip install --no-deps pyod numba llvmlite``). These take standardised columns, and all training
  rows.
- **false_alarms**: share of normal test rows whose p-value is at most alpha. Given ``m`` rows that
  calibrate, it is a draw of Beta(k, m + 1 - k), with ``k`` the whole part of ``(m + 1) alpha``,
  if no scores are equal, and lower otherwise (Bates et al. 2023). The standard error counts this
  and the number of test rows. The summary has the ten sets with most rows.

Differences are ours minus the other, means over seeds, with the standard error over sets. Whatever
has been measured is in the record, and the same command goes on behind it; one seed of all sets
comes first.
"""

import importlib.util
import math
import time
import warnings
from pathlib import Path

import numpy as np
import scipy.stats
from _record import parser, resume
from sklearn.ensemble import IsolationForest
from sklearn.metrics import roc_auc_score
from sklearn.mixture import GaussianMixture
from sklearn.neighbors import LocalOutlierFactor, NearestNeighbors
from sklearn.preprocessing import StandardScaler

from iresnet_jax.estimators import ResidualFlowDetector

MOST_TRAINED, MOST_TESTED = 10_000, 4000
ALPHAS = (0.1, 0.05, 0.01)
NUM_NEIGHBOURS = 5
COMPONENTS, REGULARISATION = (1, 2, 4, 8, 16), 1e-3  # of mixtures
MOST_ENTRIES = 10_000_000  # of covariances, beyond which a mixture has diagonal ones
LARGEST = 10  # sets whose false alarms are in the summary
QUICK_MINUTES, QUICK_SET = 0.05, "45_wine"
VERSIONS = ("iresnet_jax", "jax", "scikit-learn", "pyod")


def split(path, seed):
    """Training rows, test rows, and which of these are anomalies."""
    with np.load(path) as arrays:
        x, is_anomaly = np.asarray(arrays["X"], np.float64), arrays["y"] == 1
    rng = np.random.default_rng(seed)
    normal, anomalies = (
        rng.permutation(np.flatnonzero(each)) for each in (~is_anomaly, is_anomaly)
    )
    train, rest = np.split(normal, [len(normal) // 2])
    test = np.concatenate([rest[:MOST_TESTED], anomalies[:MOST_TESTED]])
    return x[train[:MOST_TRAINED]], x[test], is_anomaly[test]


# --- others, whose scores are high for anomalies --------------------------------------------------


def knn(train, test, seed):
    neighbours = NearestNeighbors(n_neighbors=NUM_NEIGHBOURS).fit(train)
    return neighbours.kneighbors(test)[0][:, -1]


def forest(train, test, seed):
    return -IsolationForest(random_state=seed).fit(train).score_samples(test)


def local_outlier_factor(train, test, seed):
    return -LocalOutlierFactor(novelty=True).fit(train).score_samples(test)


def mixture(train, test, seed):
    fitted = []
    for num in COMPONENTS:
        for kind in ("full", "diag"):
            entries = num * train.shape[1] ** 2
            if num < len(train) / 4 and (kind == "diag" or entries < MOST_ENTRIES):
                model = GaussianMixture(
                    num, covariance_type=kind, reg_covar=REGULARISATION, random_state=seed
                )
                fitted.append(model.fit(train))
    return -min(fitted, key=lambda model: model.bic(train)).score_samples(test)


def ecod(train, test, seed):
    from pyod.models.ecod import ECOD  # pyright: ignore[reportMissingImports]

    return ECOD().fit(train).decision_function(test)


def copod(train, test, seed):
    from pyod.models.copod import COPOD  # pyright: ignore[reportMissingImports]

    return COPOD().fit(train).decision_function(test)


OTHERS = {
    "knn": knn,
    "forest": forest,
    "local_outlier_factor": local_outlier_factor,
    "mixture": mixture,
}
OF_PYOD = {"ecod": ecod, "copod": copod}


# --- one run --------------------------------------------------------------------------------------


def measured(folder, name, seed, minutes):
    train, test, is_anomaly = split(folder / f"{name}.npz", seed)
    began = time.monotonic()
    detector = ResidualFlowDetector(minutes=minutes, random_state=seed).fit(train)
    fit_seconds = time.monotonic() - began
    began = time.monotonic()
    scores = detector.score_samples(test)
    seconds = time.monotonic() - began
    assert np.all(np.isfinite(scores))
    auroc = {"ours": float(roc_auc_score(is_anomaly, -scores))}
    p_values = detector.p_values(test[~is_anomaly])
    scaler = StandardScaler().fit(train)
    train, test = (np.asarray(scaler.transform(each)) for each in (train, test))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of mixtures that did not converge
        for other, score in {**OTHERS, **(OF_PYOD if has_pyod() else {})}.items():
            auroc[other] = float(roc_auc_score(is_anomaly, score(train, test, seed)))
    num_calibrating = len(detector.calibration_scores_)
    return {
        "columns": train.shape[1],
        "train_rows": len(train),
        "calibration_rows": num_calibrating,
        "normal_rows": int(np.sum(~is_anomaly)),
        "anomalies": int(np.sum(is_anomaly)),
        "fit_seconds": fit_seconds,
        "score_seconds": seconds,
        "auroc": auroc,
        "false_alarms": {
            f"{alpha:g}": false_alarms(p_values, alpha, num_calibrating) for alpha in ALPHAS
        },
    }


def has_pyod():
    return importlib.util.find_spec("pyod") is not None


def false_alarms(p_values, alpha, num_calibrating):
    """Their rate, the one to expect, and its standard error."""
    num_below = math.floor((num_calibrating + 1) * alpha + 1e-9)
    expected, stderr = 0.0, 0.0
    if num_below:
        rate = scipy.stats.beta(num_below, num_calibrating + 1 - num_below)
        expected, variance = float(rate.mean()), float(rate.var())
        of_rows = (expected * (1 - expected) - variance) / len(p_values)
        stderr = math.sqrt(variance + of_rows)
    return {
        "rate": float(np.mean(p_values <= alpha)),
        "expected": expected,
        "stderr": stderr,
    }


# --- record ---------------------------------------------------------------------------------------


def summarize(runs):
    """Mean AUROC of each method, differences over sets, and false alarms on the largest sets."""
    names = sorted({run["name"] for run in runs})
    methods = [method for method in runs[0]["auroc"] if all(method in r["auroc"] for r in runs)]
    of_sets = {
        method: np.array(
            [np.mean([r["auroc"][method] for r in runs if r["name"] == name]) for name in names]
        )
        for method in methods
    }
    summary = {
        "sets": len(names),
        "runs": len(runs),
        "auroc": {method: float(values.mean()) for method, values in of_sets.items()},
        "fit_seconds": float(np.mean([run["fit_seconds"] for run in runs])),
    }
    if len(names) > 1:
        for method in methods[1:]:
            minus = of_sets["ours"] - of_sets[method]
            stderr = minus.std(ddof=1) / math.sqrt(len(names))
            summary[f"minus_{method}"] = {"mean": float(minus.mean()), "stderr": float(stderr)}
    size = {run["name"]: run["train_rows"] + run["normal_rows"] for run in runs}
    largest = sorted(names, key=lambda name: (-size[name], name))[:LARGEST]
    summary["false_alarms"] = {
        alpha: of_false_alarms([r["false_alarms"][alpha] for r in runs if r["name"] in largest])
        for alpha in map("{:g}".format, ALPHAS)
    }
    return summary


def of_false_alarms(found):
    """The mean rate, the one to expect, its standard error, and the farthest in standard errors."""
    errors = [(each["rate"] - each["expected"]) / (each["stderr"] or 1) for each in found]
    return {
        "runs": len(found),
        "rate": float(np.mean([each["rate"] for each in found])),
        "expected": float(np.mean([each["expected"] for each in found])),
        "stderr": float(np.linalg.norm([each["stderr"] for each in found]) / len(found)),
        "farthest_below": min(errors),
        "farthest_above": max(errors),
    }


def main():
    options = parser(__doc__)
    options.add_argument(
        "--sets", type=Path, required=True, metavar="DIR", help="folder of the npz files"
    )
    options.add_argument("--names", nargs="+", metavar="NAME", help="sets (all)")
    options.add_argument(
        "--minutes", type=float, default=0.5, metavar="M", help="time of each fit (%(default)s)"
    )
    options.add_argument(
        "--seeds", type=int, default=3, metavar="N", help="number of splits (%(default)s)"
    )
    arguments = options.parse_args()
    names = arguments.names or sorted(path.stem for path in arguments.sets.glob("*.npz"))
    minutes, seeds = arguments.minutes, arguments.seeds
    if arguments.quick:
        names, minutes, seeds = arguments.names or [QUICK_SET], QUICK_MINUTES, 1
    if not has_pyod():
        print("not installed, and left out: pyod")
    identities = [
        {"name": name, "seed": seed, "minutes": minutes} for seed in range(seeds) for name in names
    ]
    settings = {"most_trained": MOST_TRAINED, "most_tested": MOST_TESTED, "alphas": ALPHAS}
    resume(
        "anomalies",
        arguments,
        settings,
        identities,
        lambda name, seed, minutes: measured(arguments.sets, name, seed, minutes),
        summarize,
        VERSIONS,
    )


if __name__ == "__main__":
    main()
