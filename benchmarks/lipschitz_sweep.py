"""The paper's Table 2: what the Lipschitz constraint costs in accuracy, and what it buys in invertibility.

    python benchmarks/lipschitz_sweep.py [--config configs/digits_classification.py] [--seeds 3] [--quick]

Trains a classifier for every coefficient c, its unconstrained twin, and the network with BatchNorm, a few seeds each. Reports
the test error, whether every block is certified a contraction, and how test images come back from the features: by Banach
iteration as in the paper (at most 500 evaluations a block) and by Anderson's method. An image is recovered if no entry is off
by more than 1e-4 in the units of the network's input; it is converged if the solver's bound holds, which takes a contraction.

Networks with a certificate reconstruct the first --num_certified test images, others the first --num, as their inverses run to
the cap. --runs keeps the runs and what was measured, so that a sweep can be stopped and goes on. A folder there with model.npz
and metrics.jsonl, such as a copy of results/mnist_classification, stands for its run.
"""

import json
import statistics
from pathlib import Path

import jax
import numpy as np
from _models import read_config
from _record import parser, table, write

from iresnet_jax.bijections.residual import Solver
from iresnet_jax.evaluation import accuracy
from iresnet_jax.evaluation.inversion import RECOVERED, round_trip
from iresnet_jax.json_dataclasses import first_difference, to_plain
from iresnet_jax.models import saved
from iresnet_jax.models.classifier import Classifier
from iresnet_jax.report import style
from iresnet_jax.report.contents import TrainingTimes
from iresnet_jax.runs import loop
from iresnet_jax.runs.metrics import read_metrics
from iresnet_jax.runs.trained_run import load
from iresnet_jax.training.parallel import eval_batches

VARIANTS = ("batchnorm", "vanilla", "0.9", "0.8", "0.7", "0.6", "0.5")
SOLVERS = {"banach": Solver(memory=0, max_evals=500), "anderson": Solver(memory=4, max_evals=2000)}
QUICK = ("training.total_steps=20", "training.eval_every_steps=20", "training.log_every_steps=10")


@jax.jit
def there_and_back(model, images):
    """Round trips of images to features and back."""
    return round_trip(model, model.preprocess(images))[1]


def invertibility(run, num):
    """Summary of the round trips of test images, by either solver."""
    images, settings = run.data.held_out("test", num), run.config.evaluation
    found = {}
    for name, solver in SOLVERS.items():
        model = run.model.with_(solver=solver._replace(atol=settings.inverse_atol))
        trips = []
        for indices, mask in eval_batches(len(images), min(settings.batch_size, len(images))):
            trip = jax.device_get(there_and_back(model, images[indices]))
            trips.append(jax.tree.map(lambda values, mask=mask: values[mask], trip))
        trip = jax.tree.map(lambda *values: np.concatenate(values), *trips)
        found[name] = {
            "num": len(images),
            "recovered": float((trip.max_abs_error <= RECOVERED).mean()),
            "converged": float(trip.converged.mean()),
            "median_error": float(np.median(trip.max_abs_error)),
            "max_error": float(np.nan_to_num(trip.max_abs_error, nan=np.inf).max()),
            "evals_a_block": float(trip.num_evals.mean() / model.spec.flow.num_blocks),
        }
    return found


def trained(config, workdir):
    """The run of a config: the model in the folder, or a training that begins or goes on there."""
    if not (workdir / saved.FILE_NAME).exists():
        loop.train(config, workdir)
        return load(workdir)
    run = load(workdir)
    if difference := first_difference(to_plain(config), to_plain(run.config), "config"):
        raise ValueError(f"{workdir} holds a model of another config: {difference}; choose another --runs or delete it")
    return run


def measure(variant, seed, folder, arguments):
    """One trained network: its error, and its inverse."""
    config = read_config(f"{arguments.config}:{variant}", f"seed={seed}", *(QUICK if arguments.quick else ()))
    workdir = folder / f"{variant}_seed{seed}"
    run = trained(config, workdir)
    measured, num = workdir / "sweep.json", [32, 32] if arguments.quick else [arguments.num, arguments.num_certified]
    if measured.exists() and (kept := json.loads(measured.read_text()))["num"] == num:
        return kept["row"]
    assert isinstance(run.model, Classifier)
    result = accuracy.evaluate(run.model, run.test_examples(), run.data.labels["test"], config.evaluation.batch_size)
    times = TrainingTimes.from_metrics(read_metrics(workdir), run.step)
    row = {"variant": variant, "seed": seed, "error": result.error, "num_examples": result.num_examples}
    row |= {"loss": result.loss, "seconds_per_step": times.seconds_per_step, "total_seconds": times.total_seconds}
    if run.is_bijective:
        certificate = run.model.certificate()
        row |= {"max_block": certificate.max_block, "certified": certificate.certified}
        limit = num[certificate.certified]
        row["inverse"] = invertibility(run, min(limit or result.num_examples, result.num_examples))
    measured.write_text(json.dumps({"num": num, "row": row}))
    return row


def summarized(rows):
    """One line a variant: means over seeds."""
    lines = []
    for variant in dict.fromkeys(row["variant"] for row in rows):
        own = [row for row in rows if row["variant"] == variant]
        errors = [100 * row["error"] for row in own]
        spread = f" ± {statistics.stdev(errors) / len(errors) ** 0.5:.2f}" if len(errors) > 1 else ""
        line = [variant, f"{statistics.mean(errors):.2f}{spread}"]
        if "inverse" in own[0]:
            line.append(f"{max(row['max_block'] for row in own):.3g}")
            for name in SOLVERS:
                recovered = statistics.mean(row["inverse"][name]["recovered"] for row in own)
                worst = max(row["inverse"][name]["max_error"] for row in own)
                line += [f"{100 * recovered:.1f} %", f"{worst:.1e}"]
            line.append(f"{100 * statistics.mean(row['inverse']['anderson']['converged'] for row in own):.1f} %")
        lines.append([*line, *[""] * (8 - len(line))])
    return lines


def picture(rows, path):
    """Error, and the largest reconstruction error, against the coefficient."""
    figure = style.figure(width=10.0, height=3.4)
    left, right = figure.subplots(1, 2)
    variants = list(dict.fromkeys(row["variant"] for row in rows))
    for row in rows:
        place = variants.index(row["variant"])
        left.scatter(place, 100 * row["error"], color=style.BLUE, alpha=0.7)
        for name, color in zip(SOLVERS, (style.ORANGE, style.PLUM), strict=True):
            error = row.get("inverse", {}).get(name, {}).get("max_error")
            if error is not None:
                label = name if row is rows[-1] else ""
                right.scatter(place, min(error, 1e6), color=color, alpha=0.7, label=label)
    left.set_ylim(bottom=0)
    right.set_yscale("log")
    right.axhline(RECOVERED, color=style.INK, linewidth=1.0)
    for axes, title in ((left, "test error [%]"), (right, "largest reconstruction error")):
        axes.set_xticks(range(len(variants)), variants)
        style.label(axes, "c", title)
    style.legend(right)
    figure.savefig(path, dpi=150)


def main():
    options = parser(__doc__)
    options.add_argument("--config", type=Path, default=Path("configs/digits_classification.py"), metavar="FILE")
    options.add_argument("--variants", nargs="+", default=list(VARIANTS), help="variants of the config")
    options.add_argument("--seeds", type=int, default=3, metavar="N", help="trainings of each")
    options.add_argument("--num", type=int, default=None, metavar="N", help="test images to reconstruct without a certificate")
    options.add_argument("--num_certified", type=int, default=None, metavar="N", help="the same with one; all by default")
    options.add_argument("--runs", type=Path, default=Path("runs/lipschitz_sweep"), metavar="DIR", help="keeps the trainings")
    arguments = options.parse_args()
    folder = arguments.runs / (arguments.config.stem + "_quick" * arguments.quick)
    seeds = range(1 if arguments.quick else arguments.seeds)
    rows = []
    for seed in seeds:
        for variant in arguments.variants:
            rows.append(measure(variant, seed, folder, arguments))
            print(f"{variant} seed {seed}: error {100 * rows[-1]['error']:.2f} %, {rows[-1].get('inverse')}", flush=True)
    rows.sort(key=lambda row: arguments.variants.index(row["variant"]))
    header = ("c", "test error [%]", "largest Lip(g)", "recovered, Banach", "worst", "recovered, Anderson", "worst", "promised")
    print(table(summarized(rows), header))
    name = f"lipschitz_sweep_{arguments.config.stem}"
    solvers = {name: {"memory": solver.memory, "max_evals": solver.max_evals} for name, solver in SOLVERS.items()}
    settings = {"config": str(arguments.config), "seeds": list(seeds), "solvers": solvers, "recovered": RECOVERED}
    if written := write(name, arguments, settings, rows):
        picture(rows, written.with_suffix(".png"))


if __name__ == "__main__":
    main()
