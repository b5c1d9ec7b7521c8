"""How much of a classifier's training step is the Lipschitz constraint, against its unconstrained twin in the same run.

    python benchmarks/classification_step.py [--config configs/digits_classification.py] [--quick]

The paper reports .5 s a step with one power iteration and .2 s without, 2.5 times as long.
"""

from pathlib import Path

from _models import read_config
from _processes import workers
from _record import parser, summarize, take_turns, write

from iresnet_jax.json_dataclasses import to_plain

BASELINE = "unconstrained"
VARIANTS = {BASELINE: "none", "estimated": "estimated", "certified": "certified"}


def main():
    options = parser(__doc__)
    options.add_argument("--config", type=Path, default=Path("configs/digits_classification.py"), metavar="FILE")
    options.add_argument("--variant", default=None, help="variant of the config, such as cifar10")
    arguments = options.parse_args()
    file = f"{arguments.config}:{arguments.variant}" if arguments.variant else arguments.config
    configs = {name: read_config(file, f"constraint.norms={norms}") for name, norms in VARIANTS.items()}
    with workers() as start:
        running = {name: start(None, "_steps", "OurSteps", {"config": to_plain(config)}) for name, config in configs.items()}
        asked = {name: lambda num, worker=worker: worker.ask("steps", num=num) for name, worker in running.items()}
        timings = take_turns(asked, turns=3 if arguments.quick else 100)
        devices = running[BASELINE].ask("devices")["num_devices"]
    results = summarize(timings, BASELINE)
    for name, own in results.items():
        own["ratio"] = 1 / timings[name].speedup_over(timings[BASELINE])
    config = configs["estimated"]
    settings = {"config": str(arguments.config), "variant": arguments.variant, "num_steps": config.constraint.num_steps}
    settings |= {"batch_size": config.training.batch_size, "devices": devices}
    write(f"classification_step_{arguments.config.stem}", arguments, settings, results)


if __name__ == "__main__":
    main()
