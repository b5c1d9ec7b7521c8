"""Training steps in worker processes: the step of train.py, and those of others in PyTorch.

Nothing is imported before a worker makes its case: what a process does before JAX starts counts,
and PyTorch's have no JAX.
"""

import contextlib
import gc
import itertools
import os
import time
from pathlib import Path
from typing import Any

WARMUP = 2


def prepare_jax(config=None):
    """What train.py does in its process before JAX starts; without a config what a command for a
    trained model does.
    """
    from iresnet_jax.maths import platforms
    from iresnet_jax.runs.config import Config

    gc.set_threshold(50_000, 20, 100)
    if config is not None:
        platforms.keep_freed_memory()
    platforms.use_all_cores(config or Config())
    platforms.cache_programs()


def training_step(config, data):
    """The step of train.py for all devices, ``(state, batch) -> (state, metrics)``, the state
    before the first, examples for batches, name of the loss.
    """
    from iresnet_jax.maths.platforms import prepare_backend
    from iresnet_jax.runs.job import Job
    from iresnet_jax.training import parallel
    from iresnet_jax.training.step import first_state

    prepare_backend(config.training.matmul_precision)
    job = Job.of(config, data)
    step, fixed = job.step()
    mapped = parallel.parallelize(step)
    start = first_state(job.free(), step.optimizer, step.length)
    return lambda state, batch: mapped(state, fixed, batch), start, job.examples, job.objective.name


def _peak_bytes():
    """Largest resident memory of this process, where the system tells."""
    path = Path("/proc/self/status")
    lines = path.read_text().splitlines() if path.exists() else []
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith("VmHWM")), None)


class Steps:
    """A training that a worker goes on with; subclasses make `take`, one step, `wait` for its
    end, and `loss`.
    """

    take: Any
    loss: Any

    def warm_up(self, num=WARMUP):
        """Takes the first steps, which compile; the largest memory is then counted anew, where
        the system can.
        """
        for _ in range(num):
            self.take()
        self.wait()
        self._peak_bytes, self._is_forgotten = _peak_bytes(), False
        with contextlib.suppress(OSError):
            self._is_forgotten = Path("/proc/self/clear_refs").write_text("5") > 0

    def steps(self, num):
        """Seconds of a step, mean over ``num``, after one that does not count: it finds caches
        as other processes left them.
        """
        self.take()
        self.wait()
        start = time.perf_counter()
        for _ in range(num):
            self.take()
        self.wait()
        return (time.perf_counter() - start) / num

    def memory(self):
        """Largest resident memory of the process, and that since the first steps, without
        compilation.
        """
        later = _peak_bytes()
        whole = None if later is None or self._peak_bytes is None else max(later, self._peak_bytes)
        return {
            "peak_bytes": whole,
            "peak_bytes_after_warmup": later if self._is_forgotten else None,
            "loss": self.loss(),
        }

    def wait(self):
        """Waits until all steps are done."""


class OurSteps(Steps):
    """The step of train.py for plain data of a config; random images stand in for those of
    TensorFlow Datasets.
    """

    def __init__(self, config, *, warmup=WARMUP):
        from iresnet_jax.runs.config import parse

        settings = parse(config)
        prepare_jax(settings)
        import jax

        from iresnet_jax.maths import platforms
        from iresnet_jax.runs import plan
        from iresnet_jax.training.parallel import device_batches

        self._jax = jax
        self._step, self._state, examples, self._name = training_step(
            settings, plan.data_for(settings)
        )
        self._feed = device_batches(
            examples, seed=settings.seed, batch_size=settings.training.batch_size
        )
        self.take()
        self.wait()
        platforms.return_freed_memory()
        self.warm_up(warmup)

    def take(self):
        self._state, self._metrics = self._step(self._state, next(self._feed))

    def wait(self):
        self._jax.block_until_ready((self._state, self._metrics))

    def loss(self):
        return float(self._metrics[self._name])


class TorchSteps(Steps):
    """The step of a "naive" or "normflows" peer: Adam, gradient clipped, no moving average, and so
    many terms and iterations.

    ``architecture`` is that of `_peers_flows.architecture`, ``batches`` a file of preprocessed
    ones, (n, b, c, h, w).
    """

    def __init__(
        self,
        kind,
        architecture,
        batches,
        num_terms,
        num_steps,
        learning_rate,
        clip_norm,
        warmup=WARMUP,
    ):
        import numpy as np
        import torch  # pyright: ignore[reportMissingImports]

        torch.set_num_threads(
            len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 1
        )
        torch.manual_seed(0)
        from _pytorch import flow, take_step

        model = flow(architecture, kind, num_terms=num_terms, num_steps=num_steps)
        optimizer = torch.optim.Adam(model.parameters(), learning_rate, (0.9, 0.99))
        given = torch.tensor(np.load(batches))
        with torch.no_grad():
            model.log_prob(given[0])  # fits ActNorm and shapes the vectors of the power iterations
        settings = {
            "num_dims": given[0, 0].numel(),
            "clip_norm": clip_norm,
            "power_iterations": num_steps,
        }
        self._losses = (take_step(model, optimizer, x, **settings) for x in itertools.cycle(given))
        self.warm_up(warmup)

    def take(self):
        self._last = next(self._losses)

    def loss(self):
        return float(self._last)
