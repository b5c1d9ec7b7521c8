"""Training steps on this machine's devices: examples a second and memory, by precision.

    python benchmarks/throughput.py [--configs iresnet_density:cifar10 ...] [--batch 128] [--quick]

For GPUs and TPUs; it runs on CPUs, where precisions change little. Each precision is a process of its own, so that peaks of
memory are its own; float32 is the baseline. Images are random ones of the data's shape, parameters are random.
"""

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from _models import read_config
from _record import parser, table, write

CONFIGS = Path(__file__).parents[1] / "configs"
NAMES = ("iresnet_density:cifar10", "iresnet_classification:cifar10", "mnist_density")
BASELINE = "float32"
PRECISIONS = {
    BASELINE: ("training.matmul_precision=float32",),
    "tensorfloat32": ("training.matmul_precision=tensorfloat32",),
    "bfloat16": ("training.matmul_precision=float32", "training.bfloat16=True"),
    "float32 in 4 parts": ("training.matmul_precision=float32", "training.num_parts=4"),
    "float32, blocks anew": ("training.matmul_precision=float32", "training.rematerialize=True"),
}
WARMUP, MAX_STEPS, MAX_S = 3, 50, 20.0  # steps that are not timed, and that are; seconds


def work(file, precision, batch):
    """Takes steps and prints what they took, as JSON."""
    import jax

    from iresnet_jax.runs import loop
    from iresnet_jax.runs.machine import prepare_backend
    from iresnet_jax.runs.planning import plan, profile
    from iresnet_jax.runs.planning.program_costs import flops
    from iresnet_jax.training import parallel

    config = read_config(file, *PRECISIONS[precision], *([f"training.batch_size={batch}"] if batch else []))
    prepare_backend(config.training.matmul_precision)
    data = plan.data_for(config)
    objective = loop.build_objective(config, data)
    current, batch = profile.random_state(objective), profile.first_batch(objective.examples, config.training.batch_size)
    step = objective.make_step(objective.num_terms)
    traced = parallel.for_devices(step, jax.devices()[:1]).trace(current, jax.tree.map(lambda rows: rows[0], batch))
    share = config.training.batch_size // jax.device_count()
    run = parallel.parallelize(step)
    began = time.perf_counter()
    for _ in range(WARMUP):
        current, metrics = run(current, batch)
    jax.block_until_ready(metrics)
    warm = time.perf_counter()
    seconds = []
    while len(seconds) < MAX_STEPS and (time.perf_counter() - warm < MAX_S or len(seconds) < 2):
        start = time.perf_counter()
        current, metrics = run(current, batch)
        jax.block_until_ready(metrics)
        seconds.append(time.perf_counter() - start)
    memory = jax.local_devices()[0].memory_stats() or {}
    found = {
        "seconds": seconds,
        "warmup_seconds": warm - began,
        "batch_size": config.training.batch_size,
        "gflop_per_example": flops(traced.jaxpr.jaxpr).total() / share / 1e9,
        "peak_bytes": memory.get("peak_bytes_in_use"),
        "device": jax.devices()[0].device_kind,
        "num_devices": jax.device_count(),
        "grad_norm": float(metrics["grad_norm"]),
    }
    print(json.dumps(found))


def measure(name, precision, batch) -> dict[str, Any]:
    """Runs `work` in a process of its own."""
    file, _, argument = name.partition(":")
    path = str(CONFIGS / f"{file}.py") + (f":{argument}" if argument else "")
    command = [sys.executable, __file__, "--work", path, precision, str(batch or "")]
    run = subprocess.run(command, capture_output=True, text=True)
    if run.returncode:
        return {"failed": run.stderr.strip().splitlines()[-1][:300] if run.stderr.strip() else f"status {run.returncode}"}
    found = json.loads(run.stdout.strip().splitlines()[-1])
    times = sorted(found.pop("seconds"))
    found |= {"median_s": times[len(times) // 2], "fastest_s": times[0], "steps": len(times)}
    found["examples_per_s"] = found["batch_size"] / found["median_s"]
    found["tflop_per_s"] = found["gflop_per_example"] * found["examples_per_s"] / 1e3 / found["num_devices"]
    return found


def main():
    options = parser(__doc__)
    options.add_argument("--configs", nargs="+", default=NAMES, metavar="NAME", help="of configs/, with what follows a colon")
    options.add_argument("--batch", type=int, help="batch size over all devices; by default the config's")
    options.add_argument("--precisions", nargs="+", default=list(PRECISIONS), choices=PRECISIONS, metavar="NAME")
    arguments = options.parse_args()
    names = ("digits_density",) if arguments.quick else arguments.configs
    results: dict[str, dict[str, Any]] = {}
    rows = []
    for name in names:
        results[name] = {}
        for precision in [BASELINE, "bfloat16"] if arguments.quick else arguments.precisions:
            found = results[name][precision] = measure(name, precision, arguments.batch)
            if "failed" in found:
                rows.append((name, precision, found["failed"], "", "", "", ""))
                continue
            baseline = results[name].get(BASELINE, {}).get("median_s")
            found["speedup"] = baseline / found["median_s"] if baseline else None
            peak = "" if found["peak_bytes"] is None else f"{found['peak_bytes'] / 1e9:.2f}"
            times = f"{found['speedup']:.2f}" if found["speedup"] else ""
            rates = (f"{found['examples_per_s']:.0f}", f"{found['tflop_per_s']:.3g}")
            rows.append((name, precision, f"{1e3 * found['median_s']:.1f}", *rates, times, peak))
            print(f"{name}, {precision}: {found}", flush=True)
    print(table(rows, ("config", "precision", "ms a step", "examples/s", "TFLOP/s a device", "times as fast", "peak GB")))
    write("throughput", arguments, {"batch": arguments.batch, "precisions": PRECISIONS}, results)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--work"]:
        work(sys.argv[2], sys.argv[3], int(sys.argv[4]) if sys.argv[4] else None)
    else:
        main()
