"""The paper's Table 2: what the Lipschitz constraint costs in accuracy, and what it buys in invertibility.

    python benchmarks/lipschitz_sweep.py [--config configs/digits_classification.py] [--seeds 3] [--quick]

Trains a classifier for every coefficient c, its unconstrained twin, and the network with BatchNorm, a few seeds each, and asks
of every one: the test error; whether every block is certified a contraction; and how test images come back from the features,
by Banach iteration as in the paper (at most 500 evaluations a block) and with Anderson's method. An image counts as recovered
if no pixel is off by more than 1e-4 in the units of the network's input, whatever was promised; it counts as converged only if
the solver's bound holds, which takes a contraction. Certified networks reconstruct all test images, or the first
--num_certified, others the first --num, if given, as their inverses run to the cap. Runs and what was measured of each are
kept in --runs, so that a sweep can be stopped; a folder there with a frozen model and its metrics.jsonl, such as
../results/fashion_mnist_classification, stands for its run.
"""

import importlib.util
import json
import statistics
from pathlib import Path

import jax
import numpy as np
from _record import parser, table, write
from iresnet_jax.evaluation.examples import held_out

from iresnet_jax.bijections import bijection as bijections
from iresnet_jax.data.batches import eval_batches
from iresnet_jax.evaluation import accuracy, frozen, lipschitz, trained
from iresnet_jax.evaluation.inversion import round_trip
from iresnet_jax.evaluation.results import RECOVERED, TrainingTimes
from iresnet_jax.report import style
from iresnet_jax.training import config as config_lib
from iresnet_jax.training import loop, run
from iresnet_jax.training.metrics import read_metrics

VARIANTS = ("batchnorm", "vanilla", "0.9", "0.8", "0.7", "0.6", "0.5")
SOLVERS = {"banach": {"memory": 0, "max_evals": 500}, "anderson": {"memory": 4, "max_evals": 2000}}


def get_config(path, variant):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.get_config(variant)


def invertibility(loaded, num):
    """How test images come back from the features, by either solver."""
    images = loaded.source.held_out("test", num, loaded.config.seed)
    atol = loaded.config.evaluation.inverse_atol
    found = {}
    for name, settings in SOLVERS.items():
        solver = bijections.Solver(atol=atol, **settings)

        @jax.jit
        def there_and_back(weights, images, solver=solver):
            there = run.network_input(loaded.spec, jax.random.key(0), images)[1]
            return round_trip(loaded.spec.flow, weights, there, solver)[1]

        trips = []
        for indices, mask in eval_batches(len(images), min(loaded.config.evaluation.batch_size, len(images))):
            trip = jax.device_get(there_and_back(loaded.weights, images[indices]))
            trips.append(jax.tree.map(lambda values, mask=mask: values[mask], trip))
        trip = jax.tree.map(lambda *values: np.concatenate(values), *trips)
        found[name] = {
            "num": len(images),
            "recovered": float((trip.max_abs_error <= RECOVERED).mean()),
            "converged": float(trip.converged.mean()),
            "median_error": float(np.median(trip.max_abs_error)),
            "max_error": float(np.nan_to_num(trip.max_abs_error, nan=np.inf).max()),
            "evals_a_block": float(trip.num_evals.mean() / loaded.num_blocks),
        }
    return found


def measure(path, variant, seed, folder, arguments):
    """One trained network: its error, and its inverse."""
    config = get_config(path, variant)
    config.seed = seed
    if arguments.quick:
        config.training.update({"total_steps": 20, "eval_every_steps": 20, "log_every_steps": 10})
    workdir = folder / f"{variant}_seed{seed}"
    if (workdir / frozen.FILE_NAME).exists():
        theirs = config_lib.to_plain(frozen.load(workdir).config)
        if difference := config_lib.first_difference(config_lib.to_plain(config), theirs):
            raise ValueError(f"{workdir} holds a model of another config: {difference}; choose another --runs or delete it")
    else:
        loop.train(config, workdir)
    measured, num = workdir / "sweep.json", [32, 32] if arguments.quick else [arguments.num, arguments.num_certified]
    if measured.exists() and (kept := json.loads(measured.read_text()))["num"] == num:
        return kept["row"]
    loaded = trained.load(workdir)
    images, labels = held_out(loaded.source, config.evaluation, seed), loaded.source.labels("test")
    result = accuracy.evaluate(loaded, images, labels, config.evaluation.batch_size)
    times = TrainingTimes.from_metrics(read_metrics(workdir), loaded.step)
    row = {"variant": variant, "seed": seed, "error": result.error, "num_examples": result.num_examples}
    row |= {"loss": result.loss, "seconds_per_step": times.seconds_per_step, "total_seconds": times.total_seconds}
    if loaded.is_bijective:
        constants = lipschitz.measure(loaded)
        row |= {"max_block": constants.max_block, "certified": constants.certified}
        limit = num[constants.certified]
        row["inverse"] = invertibility(loaded, min(limit or result.num_examples, result.num_examples))
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
    options.add_argument("--variants", nargs="+", default=list(VARIANTS), help="of the config")
    options.add_argument("--seeds", type=int, default=3, metavar="N", help="trainings of each")
    options.add_argument("--num", type=int, default=None, metavar="N", help="test images to reconstruct without a certificate")
    options.add_argument("--num_certified", type=int, default=None, metavar="N", help="and with one; all by default")
    options.add_argument("--runs", type=Path, default=Path("runs/lipschitz_sweep"), metavar="DIR", help="keeps the trainings")
    arguments = options.parse_args()
    folder = arguments.runs / (arguments.config.stem + "_quick" * arguments.quick)
    seeds = range(1 if arguments.quick else arguments.seeds)
    rows = []
    for seed in seeds:
        for variant in arguments.variants:
            rows.append(measure(arguments.config, variant, seed, folder, arguments))
            print(f"{variant} seed {seed}: error {100 * rows[-1]['error']:.2f} %, {rows[-1].get('inverse')}", flush=True)
    rows.sort(key=lambda row: arguments.variants.index(row["variant"]))
    header = ("c", "test error [%]", "largest Lip(g)", "recovered, Banach", "worst", "recovered, Anderson", "worst", "promised")
    print(table(summarized(rows), header))
    name = f"lipschitz_sweep_{arguments.config.stem}"
    settings = {"config": str(arguments.config), "seeds": list(seeds), "solvers": SOLVERS, "recovered": RECOVERED}
    if written := write(name, arguments, settings, rows):
        picture(rows, written.with_suffix(".png"))


if __name__ == "__main__":
    main()
