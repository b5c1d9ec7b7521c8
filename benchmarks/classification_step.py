"""How much of a classifier's training step is the Lipschitz constraint, against its unconstrained twin in the same run.

    python benchmarks/classification_step.py [--config configs/digits_classification.py] [--quick]

The paper reports .5 s a step with one power iteration and .2 s without, 2.5 times as long.
"""

import importlib.util
from pathlib import Path

import jax
import numpy as np
from _record import describe, interleave, parser, summarize, write
from iresnet_jax.training.source import load_source

from iresnet_jax.training import parallel, state
from iresnet_jax.training.objectives import classification

VARIANTS = {"unconstrained": "none", "estimated": "estimated", "certified": "certified"}


def get_config(path, variant):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.get_config(*([variant] if variant else []))


def make_step(config, source):
    """A function without arguments that takes one training step."""
    objective = classification.objective(config, source)
    current = state.create(objective.initial_variables(), objective.optimizer)
    size = config.training.batch_size
    batch = parallel.shard(tuple(np.asarray(rows[:size]) for rows in objective.examples))
    step = parallel.parallelize(objective.make_step(objective.num_terms))

    def take():
        nonlocal current  # the step donates its state
        current, metrics = step(current, batch)
        return metrics

    return take


def main():
    options = parser(__doc__)
    options.add_argument("--config", type=Path, default=Path("configs/digits_classification.py"), metavar="FILE")
    options.add_argument("--variant", default=None, help="of the config, such as cifar10 for the paper's")
    arguments = options.parse_args()
    steps = {}
    for name, norms in VARIANTS.items():
        config = get_config(arguments.config, arguments.variant)
        config.constraint.norms = norms
        source = load_source(config.data.name, config.data.data_dir)
        steps[name] = make_step(config, source)
    timings = interleave(steps, turns=3 if arguments.quick else 100, warmup=2)
    print(describe(timings, "unconstrained"))
    ratios = {name: 1 / timing.speedup_over(timings["unconstrained"]) for name, timing in timings.items()}
    for name, ratio in ratios.items():
        print(f"  {name}: {ratio:.3f} times the unconstrained step")
    settings = {"config": str(arguments.config), "variant": arguments.variant, "num_steps": config.constraint.num_steps}
    settings |= {"batch_size": config.training.batch_size, "devices": jax.local_device_count()}
    results = {name: {**numbers, "ratio": ratios[name]} for name, numbers in summarize(timings, "unconstrained").items()}
    write(f"classification_step_{arguments.config.stem}", arguments, settings, results)


if __name__ == "__main__":
    main()
