"""How close do conditional densities come to posteriors that are known?

    python benchmarks/posterior.py [--quick] [--workdir DIR]

Trains both simulators of configs/posterior.py from their configs, one after the other, and compares them with the truth on
test pairs: the divergence (expected Kullback-Leibler divergence of the true posterior from the model, nats) and C2ST (accuracy
of the SBI benchmark's classifier, .5 is indistinguishable). Targets: a divergence of at most .02 nats for the linear Gaussian,
a C2ST of at most .6 for two moons after at most 5 minutes on 2 cores.
"""

import os
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

from _models import config_file, load, read_config
from _record import parser, write

from iresnet_jax.evaluation import posterior
from iresnet_jax.runs.loop import train
from iresnet_jax.runs.metrics import read_metrics

TARGETS = {"linear_gaussian": ("divergence", 0.02), "sbi_two_moons": ("mean_c2st", 0.6)}
QUICK = ("training.total_steps=20", "training.minutes=0.0", "training.blocks=scan", "training.eval_examples=500")
QUICK += ("evaluation.num_examples=500", "evaluation.num_posteriors=2", "evaluation.num_posterior_samples=100")


def measure(name, config, workdir):
    """Trains a model of a simulator's posterior and compares it with the truth."""
    load_before = os.getloadavg()
    train(config, workdir, say=print)
    load_after, run = os.getloadavg(), load(workdir)
    compared: Any = posterior.compare_run(run)
    found, (measured, target) = compared.summary, TARGETS[name]
    return {
        **asdict(found),
        "mean_c2st": found.mean_c2st,
        "target": {measured: target, "reached": bool(getattr(found, measured) <= target)},
        "training_seconds": read_metrics(workdir)[-1]["wall_time_s"],  # of all commands that went on with it
        "steps": run.step,
        "load_average_before": load_before,
        "load_average_after": load_after,
    }


def main():
    options = parser(__doc__)
    options.add_argument("--workdir", type=Path, metavar="DIR", help="keeps the runs in folders of this one")
    arguments = options.parse_args()
    configs = {name: read_config(config_file(f"posterior:{name}"), *(QUICK if arguments.quick else ())) for name in TARGETS}
    with tempfile.TemporaryDirectory() as temporary:
        folder = arguments.workdir or Path(temporary)
        results = {name: measure(name, config, folder / name) for name, config in configs.items()}
    write("posterior", arguments, {name: asdict(config) for name, config in configs.items()}, results)


if __name__ == "__main__":
    main()
