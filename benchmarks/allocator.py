"""What kept memory in large pages saves in a training step on a CPU, against the C library's default in the same run.

    python benchmarks/allocator.py [--config configs/digits_density.py] [--quick]

Two processes take training steps in turns, one of them with large pages and with freed memory kept, as train.py does.
"""

from pathlib import Path

from _models import read_config
from _processes import workers
from _record import parser, summarize, take_turns, write

from iresnet_jax.json_dataclasses import to_plain

BASELINE, OURS = "default", "kept"
STEPS = 5  # training steps a turn


def main():
    options = parser(__doc__)
    options.add_argument("--config", type=Path, default=Path("configs/digits_density.py"), metavar="FILE")
    options.add_argument("--turns", type=int, default=20)
    arguments = options.parse_args()
    config, faults = to_plain(read_config(arguments.config)), {BASELINE: [], OURS: []}
    with workers() as start:

        def steps_of(name):
            worker = start(None, "_steps", "OurSteps", {"config": config, "keeps_memory": name == OURS})

            def steps(_):
                before = worker.ask("page_faults")
                seconds = worker.ask("steps", num=STEPS)
                faults[name].append((worker.ask("page_faults") - before) / (STEPS + 1))  # `steps` takes one more
                return seconds

            return steps

        asked = {name: steps_of(name) for name in faults}
        timings = take_turns(asked, turns=2 if arguments.quick else arguments.turns)
    results = summarize(timings, BASELINE)
    for name, own in results.items():
        own["page_faults_a_step"] = sum(faults[name][1:]) / len(faults[name][1:])  # the first was no turn
    write(f"allocator_{arguments.config.stem}", arguments, {"config": str(arguments.config), "steps_a_turn": STEPS}, results)


if __name__ == "__main__":
    main()
