"""What memory that is kept, and the Lipschitz constraint, do to a training step: variants of it in turns, each in its process.

    python benchmarks/steps.py {allocator,constraint} [--config configs/digits_classification.py] [--quick]

Allocator: one process takes steps with large pages and with freed memory kept, as train.py does, the other with the C library's
default. Constraint: a step beside its unconstrained twin. The paper reports .5 s with one power iteration and .2 s without.
"""

import functools
from pathlib import Path

from _models import read_config
from _processes import workers
from _record import parser, summarize, take_turns, write

from iresnet_jax.checked_dataclasses import to_plain

MEMORY = {"default": {"keeps_memory": False}, "kept": {"keeps_memory": True}}
NORMS = {"unconstrained": "none", "estimated": "estimated", "certified": "certified"}
STEPS = 5  # training steps a turn of the allocator


def in_turns(cases, num, turns):
    """Timings and page faults of a step, by name of the case, and the number of devices."""
    faults = {name: [] for name in cases}
    with workers() as start:
        running = {name: start(None, "_steps", "OurSteps", case) for name, case in cases.items()}

        def take(name, _):
            before = running[name].ask("page_faults")
            seconds = running[name].ask("steps", num=num)
            faults[name].append((running[name].ask("page_faults") - before) / (num + 1))  # `steps` takes one more
            return seconds

        timings = take_turns({name: functools.partial(take, name) for name in cases}, turns=turns)
        num_devices = next(iter(running.values())).ask("num_devices")
    return timings, {name: sum(own[1:]) / turns for name, own in faults.items()}, num_devices  # the first was no turn


def main():
    options = parser(__doc__)
    options.add_argument("what", choices=("allocator", "constraint"))
    options.add_argument("--config", type=Path, default=Path("configs/digits_classification.py"), metavar="FILE")
    arguments = options.parse_args()
    file, settings = arguments.config, {"config": str(arguments.config)}
    if arguments.what == "allocator":
        config = to_plain(read_config(file))
        cases = {name: {"config": config, **memory} for name, memory in MEMORY.items()}
        timings, faults, _ = in_turns(cases, STEPS, 2 if arguments.quick else 20)
        results = summarize(timings, "default")
        for name, own in results.items():
            own["page_faults_a_step"] = faults[name]
        write(f"allocator_{file.stem}", arguments, {**settings, "steps_a_turn": STEPS}, results)
    else:
        configs = {name: read_config(file, f"constraint.norms={norms}") for name, norms in NORMS.items()}
        cases = {name: {"config": to_plain(config)} for name, config in configs.items()}
        timings, _, num_devices = in_turns(cases, 1, 3 if arguments.quick else 100)
        results = summarize(timings, "unconstrained")
        for own in results.values():
            own["ratio"] = 1 / own["speedup"]
        config = configs["estimated"]
        settings |= {"num_steps": config.constraint.num_steps, "batch_size": config.training.batch_size}
        write(f"classification_step_{file.stem}", arguments, {**settings, "devices": num_devices}, results)


if __name__ == "__main__":
    main()
