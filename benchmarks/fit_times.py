"""Seconds of `ir.fit` on a small array: in a process that has compiled nothing, on another array of that shape, and on folds.

    python benchmarks/fit_times.py [--quick]

The array has 1200 rows: three entries are a noisy curve, one is apart from them. "cold" is the first fit of a process with an
empty folder of compiled programs, from the start of the process on; "warm" is that of the next process, which finds the
programs there; "second" is the second fit of a process, of other rows. "folds" is a cross-validation of `ResidualFlowDensity`
in a process that has fitted before: five folds, one after the other or two at once in threads. The baseline of a fit is the sum
of the times of its runs without compilation, the first two of which are trained at once.
"""

import tempfile
import time

import numpy as np
from _processes import most_cores, workers
from _record import Timing, parser, write

ROWS, FOLDS, TURNS = 1200, 5, 3


def rows(seed, num=ROWS):
    """The array."""
    rng = np.random.default_rng(seed)
    angle = rng.uniform(0, 1.5 * np.pi, num)
    curve = np.stack([np.cos(angle), np.sin(angle), 0.3 * angle, rng.normal(size=num)], axis=1)
    return (curve + 0.1 * rng.normal(size=(num, 4))).astype(np.float32)


class Fits:
    """Fits in a process of their own."""

    def __init__(self, most_steps=None):
        import iresnet_jax as ir

        self._ir, self._limit = ir, {} if most_steps is None else {"steps": most_steps}

    def fit(self, seed):
        """Seconds of a fit, those of its runs without compilation, and the runs."""
        began = time.perf_counter()
        history = self._ir.fit(rows(seed), progress=False, **self._limit).history
        runs = [[run.what, run.best_step, run.num_steps, run.seconds] for run in history.attempts]
        return {"seconds": time.perf_counter() - began, "runs_s": sum(run[-1] for run in runs), "runs": runs}

    def cross_validate(self, at_once):
        """Seconds of a cross-validation of so many folds at once, in threads, and its scores: mean log-likelihoods in nats."""
        from joblib import parallel_config
        from sklearn.model_selection import cross_val_score

        from iresnet_jax.estimators import ResidualFlowDensity

        began = time.perf_counter()
        with parallel_config("threading", n_jobs=at_once):
            scores = cross_val_score(ResidualFlowDensity(random_state=0, **self._limit), rows(0), cv=FOLDS)
        return {"seconds": time.perf_counter() - began, "scores": scores.tolist()}


def main():
    arguments = parser(__doc__).parse_args()
    given = {"most_steps": 20} if arguments.quick else {}
    measured, details = {name: [] for name in ("cold", "warm", "second", "folds", "folds, two at once")}, []
    with workers() as start, tempfile.TemporaryDirectory() as folder:
        for turn in range(1 if arguments.quick else TURNS):
            for name in ("cold", "warm"):
                worker = start(most_cores(), "fit_times", "Fits", given, {"IRESNET_JAX_CACHE_DIR": f"{folder}/{turn}"})
                first = worker.ask("fit", seed=0)
                measured[name].append((worker.ready_s + first["seconds"], first["runs_s"]))
                details.append({"turn": turn, "process": name, **first})
            second = worker.ask("fit", seed=1)
            measured["second"].append((second["seconds"], second["runs_s"]))
            details.append({"turn": turn, "process": "warm", **second})
            for name, at_once in (("folds", 1), ("folds, two at once", 2)):
                folds = worker.ask("cross_validate", at_once=at_once)
                measured[name].append((folds["seconds"], None))
                details.append({"turn": turn, "process": "warm", "at_once": at_once, **folds})
            worker.stop()
    results = {}
    for name, values in measured.items():
        whole = Timing(tuple(seconds for seconds, _ in values))
        results[name] = {"median_s": whole.median, "seconds": list(whole.seconds)}
        if all(of_runs for _, of_runs in values):
            runs = Timing(tuple(of_runs for _, of_runs in values))
            results[name] |= {"runs_s": runs.median, "times_runs": runs.speedup_over(whole)}
    write("fit_times", arguments, {"rows": ROWS, "folds": FOLDS, **given}, {**results, "details": details})


if __name__ == "__main__":
    main()
