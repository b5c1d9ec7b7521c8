"""The paper's Table 2: what the Lipschitz constraint costs in accuracy, and what it buys in
invertibility.

    python benchmarks/lipschitz_sweep.py [--config configs/digits_classification.py] [--seeds 3]
    [--quick]

Trains a classifier for every coefficient c, and its unconstrained twin, a few seeds each. Test
images come back from the features by Banach iteration as in the paper (at most 500 evaluations a
block) and by Anderson's method. An image is recovered if no entry is off by more than 1e-4 in the
units of the network's input; it is converged if the solver's bound holds, which takes a
contraction. Networks with a certificate reconstruct the first --num_certified test images, others
the first --num, as their inverses run to the cap. --runs keeps the runs, so that a sweep can be
stopped and goes on. A folder there with model.npz and metrics.jsonl, such as a copy of
results/mnist_classification, stands for its run.
"""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from _models import load, read_config
from _record import parser, show, write

from iresnet_jax.bijections.residual import Solver
from iresnet_jax.evaluation import classification
from iresnet_jax.evaluation.report import TrainingTimes
from iresnet_jax.models.model import FILE_NAME
from iresnet_jax.pytrees import first_difference
from iresnet_jax.runs import job
from iresnet_jax.runs.config import to_plain
from iresnet_jax.runs.metrics import read_metrics

VARIANTS = ("vanilla", "0.9", "0.8", "0.7", "0.6", "0.5")
RECOVERED = 1e-4  # largest entry of an error up to which an example counts as recovered
SOLVERS = {"banach": Solver(memory=0, max_evals=500), "anderson": Solver(memory=4, max_evals=2000)}
QUICK = ("training.total_steps=20", "training.eval_every_steps=20", "training.log_every_steps=10")


@jax.jit
def there_and_back(model, images, bounds):
    """Largest error of each image on its way to features and back, and how the inverse ended."""
    flow, there = model.flow(bounds=bounds), model.preprocess(images)
    back, info = flow.inverse(flow.forward(there))
    return jnp.max(jnp.abs(back - there), axis=(1, 2, 3)), info


def invertibility(run, num):
    """Summary of the round trips of test images, by either solver."""
    images, size, found = run.data.held_out("test", num).x, run.config.evaluation.batch_size, {}
    for name, solver in SOLVERS.items():
        model = run.model.with_(solver=solver._replace(atol=run.config.evaluation.inverse_atol))
        bounds, starts = model.bounds(), range(0, len(images), size)
        trips = [there_and_back(model, images[i : i + size], bounds) for i in starts]
        errors, info = jax.tree.map(lambda *values: np.concatenate(values), *trips)
        found[name] = {
            "num": len(images),
            "recovered": float((errors <= RECOVERED).mean()),
            "converged": float(info.converged.mean()),
            "median_error": float(np.median(errors)),
            "max_error": float(np.nan_to_num(errors, nan=np.inf).max()),
            "evals_a_block": float(info.num_evals.mean() / model.spec.flow.num_blocks),
        }
    return found


def trained(config, workdir) -> Any:
    """The run of a config: the model in the folder, or a training that begins or goes on there."""
    if not (workdir / FILE_NAME).exists():
        job.train(config, workdir)
    run = load(workdir)
    if difference := first_difference(to_plain(config), to_plain(run.config), "config"):
        raise ValueError(
            f"{workdir} holds a model of another config: {difference}; choose another "
            "--runs or delete it"
        )
    return run


def measure(variant, seed, folder, arguments):
    """One trained network: its error, and its inverse."""
    config = read_config(
        f"{arguments.config}:{variant}", f"seed={seed}", *(QUICK if arguments.quick else ())
    )
    workdir = folder / f"{variant}_seed{seed}"
    run, num = (
        trained(config, workdir),
        (32, 32) if arguments.quick else (arguments.num, arguments.num_certified),
    )
    result = classification.evaluate(
        run.model, run.test_data().x, run.data.labels["test"], config.evaluation.batch_size
    )
    times = TrainingTimes.from_metrics(read_metrics(workdir), run.step)
    row = {
        "variant": variant,
        "seed": seed,
        "error": result.error,
        "num_examples": result.num_examples,
    }
    row |= {
        "loss": result.loss,
        "seconds_per_step": times.seconds_per_step,
        "total_seconds": times.total_seconds,
    }
    certificate = run.model.certificate()
    row |= {"max_block": certificate.max_block, "certified": certificate.certified}
    limit = num[certificate.certified]
    return row | {
        "inverse": invertibility(run, min(limit or result.num_examples, result.num_examples))
    }


def main():
    options = parser(__doc__)
    options.add_argument(
        "--config", type=Path, default=Path("configs/digits_classification.py"), metavar="FILE"
    )
    options.add_argument(
        "--variants", nargs="+", default=list(VARIANTS), help="variants of the config"
    )
    options.add_argument("--seeds", type=int, default=3, metavar="N", help="trainings of each")
    options.add_argument(
        "--num",
        type=int,
        default=None,
        metavar="N",
        help="test images to reconstruct without a certificate",
    )
    options.add_argument(
        "--num_certified",
        type=int,
        default=None,
        metavar="N",
        help="the same with one; all by default",
    )
    options.add_argument(
        "--runs",
        type=Path,
        default=Path("runs/lipschitz_sweep"),
        metavar="DIR",
        help="keeps the trainings",
    )
    arguments = options.parse_args()
    folder = arguments.runs / (arguments.config.stem + "_quick" * arguments.quick)
    seeds = range(1 if arguments.quick else arguments.seeds)
    rows = []
    for seed in seeds:
        for variant in arguments.variants:
            rows.append(measure(variant, seed, folder, arguments))
            show(rows[-1], f"{variant} seed {seed}")
    rows.sort(key=lambda row: arguments.variants.index(row["variant"]))
    solvers = {
        name: {"memory": solver.memory, "max_evals": solver.max_evals}
        for name, solver in SOLVERS.items()
    }
    settings = {
        "config": str(arguments.config),
        "seeds": list(seeds),
        "solvers": solvers,
        "recovered": RECOVERED,
    }
    write(f"lipschitz_sweep_{arguments.config.stem}", arguments, settings, rows, is_shown=True)


if __name__ == "__main__":
    main()
