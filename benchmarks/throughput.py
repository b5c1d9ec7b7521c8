"""Training steps on this machine's devices: examples a second and memory, by precision.

    python benchmarks/throughput.py [--configs iresnet_density:cifar10 ...] [--batch 128] [--quick]

For GPUs and TPUs; it runs on CPUs, where precisions change little. Each precision is a process of its own, so that peaks of
memory are its own; float32 is the baseline. Random images of the data's shape stand in for those of TensorFlow Datasets.
"""

import time
from typing import Any

from _models import config_file, read_config
from _processes import workers
from _record import parser, show, write

from iresnet_jax.json_dataclasses import to_plain

NAMES = ("iresnet_density:cifar10", "iresnet_classification:cifar10", "mnist_density")
BASELINE = "float32"
PRECISIONS = {
    BASELINE: ("training.matmul_precision=float32",),
    "tensorfloat32": ("training.matmul_precision=tensorfloat32",),
    "bfloat16": ("training.matmul_precision=float32", "training.bfloat16=True"),
    "float32 in 4 parts": ("training.matmul_precision=float32", "training.num_parts=4"),
    "float32, blocks anew": ("training.matmul_precision=float32", "training.rematerialize=True"),
}
MAX_STEPS, MAX_S = 50, 20.0  # steps that are timed; seconds


def measure(config) -> dict[str, Any]:
    """Steps of a config in a process of its own."""
    size = config.training.batch_size
    with workers() as start:
        try:
            worker = start(None, "_steps", "OurSteps", {"config": to_plain(config)})
        except RuntimeError as error:  # such as out of memory
            return {"failed": str(error).splitlines()[-1][:300]}
        seconds, began = [], time.perf_counter()
        while len(seconds) < 2 or (len(seconds) < MAX_STEPS and time.perf_counter() - began < MAX_S):
            seconds.append(worker.ask("steps", num=1))
        found, flops = worker.ask("devices"), worker.ask("arithmetic")["flops"]
    median = sorted(seconds)[len(seconds) // 2]
    found |= {"batch_size": size, "gflop_per_example": flops / size / 1e9, "steps": len(seconds)}
    found |= {"median_s": median, "fastest_s": min(seconds), "examples_per_s": size / median}
    return {**found, "tflop_per_s": flops / median / found["num_devices"] / 1e12}


def main():
    options = parser(__doc__)
    options.add_argument("--configs", nargs="+", default=NAMES, metavar="NAME", help="of configs/, with what follows a colon")
    options.add_argument("--batch", type=int, help="batch size over all devices; by default the config's")
    options.add_argument("--precisions", nargs="+", default=list(PRECISIONS), choices=PRECISIONS, metavar="NAME")
    arguments = options.parse_args()
    batch = [f"training.batch_size={arguments.batch}"] if arguments.batch else []
    results: dict[str, dict[str, Any]] = {}
    for name in ("digits_density",) if arguments.quick else arguments.configs:
        results[name] = {}
        for precision in [BASELINE, "bfloat16"] if arguments.quick else arguments.precisions:
            found = measure(read_config(config_file(name), *PRECISIONS[precision], *batch))
            baseline = results[name].get(BASELINE, found).get("median_s")
            results[name][precision] = found | ({"speedup": baseline / found["median_s"]} if "median_s" in found else {})
            show(results[name][precision], f"{name}, {precision}")
    write("throughput", arguments, {"batch": arguments.batch, "precisions": PRECISIONS}, results)


if __name__ == "__main__":
    main()
