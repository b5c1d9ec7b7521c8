"""How much of a classifier's training step is the Lipschitz constraint, against its unconstrained twin in the same run.

    python benchmarks/classification_step.py [--config configs/digits_classification.py] [--quick]

The paper reports .5 s a step with one power iteration and .2 s without, 2.5 times as long.
"""

from pathlib import Path

import jax
from _models import read_config
from _record import describe, interleave, parser, summarize, write

from iresnet_jax import data
from iresnet_jax.runs import loop
from iresnet_jax.training import parallel

VARIANTS = {"unconstrained": "none", "estimated": "estimated", "certified": "certified"}


def make_step(config):
    """A function without arguments that takes one training step."""
    objective = loop.build_objective(config, data.load(config.data.name, config.data.data_dir))
    current = objective.initial_state()
    batch = next(loop.batches(config, objective.examples, 0))
    step = parallel.parallelize(objective.step)

    def take():
        nonlocal current  # the step donates its state
        current, metrics = step(current, batch)
        return metrics

    return take


def main():
    options = parser(__doc__)
    options.add_argument("--config", type=Path, default=Path("configs/digits_classification.py"), metavar="FILE")
    options.add_argument("--variant", default=None, help="variant of the config, such as cifar10")
    arguments = options.parse_args()
    file = f"{arguments.config}:{arguments.variant}" if arguments.variant else arguments.config
    configs = {name: read_config(file, f"constraint.norms={norms}") for name, norms in VARIANTS.items()}
    steps = {name: make_step(config) for name, config in configs.items()}
    timings = interleave(steps, turns=3 if arguments.quick else 100, warmup=2)
    print(describe(timings, "unconstrained"))
    ratios = {name: 1 / timing.speedup_over(timings["unconstrained"]) for name, timing in timings.items()}
    for name, ratio in ratios.items():
        print(f"  {name}: {ratio:.3f} times the unconstrained step")
    config = configs["estimated"]
    settings = {"config": str(arguments.config), "variant": arguments.variant, "num_steps": config.constraint.num_steps}
    settings |= {"batch_size": config.training.batch_size, "devices": jax.local_device_count()}
    results = {name: {**numbers, "ratio": ratios[name]} for name, numbers in summarize(timings, "unconstrained").items()}
    write(f"classification_step_{arguments.config.stem}", arguments, settings, results)


if __name__ == "__main__":
    main()
