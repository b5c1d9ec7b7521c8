"""Host time to feed a training step, as a share of the step: it should stay under 2 %.

    python benchmarks/input_pipeline.py [--quick]

Random images of the size of MNIST and of CIFAR-10 lie in a file, memory-mapped, and feed the library's own training
step of a small density model; a larger model only makes the share smaller. Turns of some steps each way alternate with turns
on one fixed batch that is on the device already:

    streamed     `device_batches`, read from the memory map by its thread
    resident     the same from a copy of all images on the device

"host time" is what the loop spends waiting for the next batch, "slowdown" how much longer a turn takes than on the fixed batch.
"""

import functools
import itertools
import tempfile
import time
from pathlib import Path

import jax
import numpy as np
from _record import interleave, parser, write
from _steps import training_step

from iresnet_jax.data.batches import device_batches
from iresnet_jax.data.dataset import DataSet
from iresnet_jax.runs.config import default_config, parse

SIZES = {"MNIST": (60_000, 28, 28, 1), "CIFAR-10": (50_000, 32, 32, 3)}
FIXED, BATCH_SIZE = "fixed batch", 64
STAGES = ({"num_blocks": 2, "hidden": (16,), "kernel_sizes": (3, 3), "activation": "clipswish", "squeeze": 4},)


def measure(images, *, turns, steps):
    """Per way: median host time of a batch, median step and slowdown over a fixed batch."""
    settings = default_config()
    settings.model.stages = STAGES
    splits = {split: images for split in ("train", "validation", "test")}
    dataset = DataSet.from_arrays("random", splits, {}, num_levels=256, num_classes=None, fingerprint="random")
    _, step, current, examples, _ = training_step(parse(settings), dataset)
    batches = functools.partial(device_batches, examples, seed=0, batch_size=BATCH_SIZE)
    sources = {
        FIXED: itertools.repeat(next(batches())),
        "streamed": batches(keep_on_device=False),
        "resident": batches(keep_on_device=True),
    }
    waited = {name: [] for name in sources}

    def turn(name):
        nonlocal current
        for _ in range(steps):
            start = time.perf_counter()
            batch = next(sources[name])
            waited[name].append(time.perf_counter() - start)
            current, metrics = step(current, batch)
            jax.block_until_ready(metrics)

    timings = interleave({name: functools.partial(turn, name) for name in sources}, turns=turns)
    step_s = timings[FIXED].median / steps
    results = {FIXED: {"step_s": step_s}}
    for name in list(sources)[1:]:
        host_s = float(np.median(waited[name][2 * steps :]))  # without the two turns of warm-up
        slowdown = 1 / timings[name].speedup_over(timings[FIXED]) - 1
        results[name] = {"host_s": host_s, "host_share": host_s / step_s, "slowdown": slowdown}
    return results


def main():
    arguments = parser(__doc__).parse_args()
    turns, steps = (3, 5) if arguments.quick else (10, 10)
    results = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, shape in SIZES.items():
            path = Path(folder) / f"{name}.npy"
            np.save(path, np.random.default_rng(0).integers(0, 256, shape, np.uint8))
            start = time.perf_counter()
            images = np.load(path, mmap_mode="r")
            results[name] = {"open_s": time.perf_counter() - start, **measure(images, turns=turns, steps=steps)}
    settings = {"sizes": SIZES, "batch_size": BATCH_SIZE, "stages": STAGES, "turns": turns, "steps_a_turn": steps}
    write("input_pipeline", arguments, settings, results)


if __name__ == "__main__":
    main()
