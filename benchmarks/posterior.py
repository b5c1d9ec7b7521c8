"""How close do conditional densities come to posteriors that are known?

    python benchmarks/posterior.py [--quick] [--workdir DIR]

Trains both simulators of configs/posterior.py from their configs, one after the other, and compares them with the truth on
test pairs: the divergence (expected Kullback-Leibler divergence of the true posterior from the model, nats) and C2ST (accuracy
of the SBI benchmark's classifier, .5 is indistinguishable). Targets: a divergence of at most .02 nats for the linear Gaussian,
a C2ST of at most .6 for two moons after at most 5 minutes on 2 cores.
"""

import importlib.util
import os
import tempfile
import time
from dataclasses import asdict, replace
from pathlib import Path

from _record import parser, table, write

from iresnet_jax.data.simulators import SIMULATORS
from iresnet_jax.evaluation import posterior
from iresnet_jax.runs.config import parse
from iresnet_jax.runs.loop import train
from iresnet_jax.runs.trained_run import load

CONFIG = Path(__file__).parents[1] / "configs" / "posterior.py"
TARGETS = {"linear_gaussian": ("divergence", 0.02), "sbi_two_moons": ("mean_c2st", 0.6)}
QUICK_STEPS = 20


def config_of(name, quick):
    """The config of a simulator, for few steps if quick."""
    spec = importlib.util.spec_from_file_location("posterior_config", CONFIG)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    config = parse(module.get_config(name))
    if not quick:
        return config
    training = replace(config.training, total_steps=QUICK_STEPS, minutes=0.0, blocks="scan", eval_examples=500)
    return replace(config, training=training, evaluation=replace(config.evaluation, num_examples=500, num_posteriors=2))


def measure(name, workdir, quick):
    """Trains a model of a simulator's posterior and compares it with the truth."""
    config, load_before = config_of(name, quick), os.getloadavg()
    start = time.monotonic()
    train(config, workdir, say=print)
    seconds = time.monotonic() - start
    load_after = os.getloadavg()
    run = load(workdir)
    compared = posterior.compare_run(run)
    assert compared is not None, f"{name} is no simulator"
    found = compared.summary
    measured, target = TARGETS[name]
    return {
        **asdict(found),
        "mean_c2st": found.mean_c2st,
        "target": {measured: target, "reached": bool(getattr(found, measured) <= target)},
        "training_seconds": seconds,
        "steps": run.step,
        "load_average_before": load_before,
        "load_average_after": load_after,
    }


def main():
    options = parser(__doc__)
    options.add_argument("--workdir", type=Path, metavar="DIR", help="keeps the runs in folders of this one")
    arguments = options.parse_args()
    results = {}
    with tempfile.TemporaryDirectory() as temporary:
        for name in SIMULATORS:
            results[name] = measure(name, (arguments.workdir or Path(temporary)) / name, arguments.quick)
    rows = [
        (
            name,
            f"{found['divergence']:.4f} ± {found['stderr']:.4f}",
            f"{found['mean_c2st']:.3f}",
            f"{found['training_seconds'] / 60:.1f}",
            found["steps"],
            f"{found['load_average_after'][1]:.1f}",
            "reached" if found["target"]["reached"] else "missed",
        )
        for name, found in results.items()
    ]
    print(table(rows, ("simulator", "divergence [nats]", "C2ST", "minutes", "steps", "load", "target")))
    settings = {name: asdict(config_of(name, arguments.quick)) for name in SIMULATORS}
    write("posterior", arguments, settings, results)


if __name__ == "__main__":
    main()
