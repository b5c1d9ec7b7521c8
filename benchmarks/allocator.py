"""What kept memory in large pages saves in a training step on a CPU, against the C library's default in the same run.

    python benchmarks/allocator.py [--config configs/digits_density.py] [--quick]

Two processes take training steps in turns, one of them as train.py does: with large pages, after `allocator.keep_freed_memory`.
"""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

from _models import read_config
from _record import Timing, describe, parser, summarize, write

BASELINE, OURS = "default", "kept"
STEPS = 5  # training steps a turn


def work(path, name):
    """Takes steps whenever a line comes in, and answers with the seconds of one."""
    from iresnet_jax.runs import allocator

    if name == OURS and not allocator.keep_freed_memory():
        raise RuntimeError("the C library of this system has no mallopt")
    import jax
    import numpy as np

    from iresnet_jax import data
    from iresnet_jax.runs import loop
    from iresnet_jax.training import parallel

    config = read_config(path)
    objective = loop.build_objective(config, data.load(config.data.name, config.data.data_dir))
    current = objective.initial_state()
    batch = next(loop.batches(config, objective.examples, 0))
    step = parallel.parallelize(objective.make_step(objective.num_terms))
    for _ in range(2):
        current, metrics = step(current, batch)
    jax.block_until_ready(metrics)
    print("ready", flush=True)
    for _ in sys.stdin:
        before = Path("/proc/self/stat").read_text().split()[9]
        start = time.perf_counter()
        for _ in range(STEPS):
            current, metrics = step(current, batch)
        jax.block_until_ready(metrics)
        seconds = (time.perf_counter() - start) / STEPS
        faults = (int(Path("/proc/self/stat").read_text().split()[9]) - int(before)) / STEPS
        assert np.isfinite(metrics["grad_norm"]).all()
        print(json.dumps([seconds, faults]), flush=True)


def main():
    options = parser(__doc__)
    options.add_argument("--config", type=Path, default=Path("configs/digits_density.py"), metavar="FILE")
    options.add_argument("--turns", type=int, default=20)
    options.add_argument("--work", choices=(BASELINE, OURS), help="what one of the two processes is told")
    arguments = options.parse_args()
    if arguments.work:
        work(arguments.config, arguments.work)
        return
    plain = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_") and name != "GLIBC_TUNABLES"}
    workers = {}
    for name in (BASELINE, OURS):
        command = [sys.executable, __file__, "--config", str(arguments.config), "--work", name]
        environment = plain | ({"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"} if name == OURS else {})
        workers[name] = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment)
        assert workers[name].stdout.readline() == "ready\n", f"the process of {name} ended"
    measured = {name: [] for name in workers}
    for _ in range(2 if arguments.quick else arguments.turns):
        for name, worker in workers.items():
            worker.stdin.write("\n")
            worker.stdin.flush()
            measured[name].append(json.loads(worker.stdout.readline()))
    for worker in workers.values():
        worker.stdin.close()
        worker.wait()
    timings = {name: Timing(tuple(seconds for seconds, _ in values)) for name, values in measured.items()}
    faults = {name: sum(count for _, count in values) / len(values) for name, values in measured.items()}
    print(describe(timings, BASELINE))
    print("page faults a step: " + ", ".join(f"{name} {count:.0f}" for name, count in faults.items()))
    results = {name: {**numbers, "page_faults_a_step": faults[name]} for name, numbers in summarize(timings, BASELINE).items()}
    write(f"allocator_{arguments.config.stem}", arguments, {"config": str(arguments.config), "steps_a_turn": STEPS}, results)


if __name__ == "__main__":
    main()
