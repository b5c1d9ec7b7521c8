"""Training steps of `peers.py`: time and memory, each peer, size and number of cores in a process of its own."""

import time
from abc import ABC, abstractmethod

from _peers_worker import forget_peak, peak_bytes

WARMUP = 2


class Steps(ABC):
    """A training that a worker goes on with; subclasses make ``_take``, one step, and ``_wait`` for its end."""

    def _warm_up(self, num=WARMUP):
        for _ in range(num):
            self._take()
        self._wait()
        self._peak_bytes = peak_bytes()
        self._can_forget = forget_peak()

    @abstractmethod
    def _take(self): ...

    def _wait(self):  # noqa: B027 (PyTorch has nothing to wait for)
        """Waits until all steps are done."""

    def steps(self, num):
        """Seconds of a step, mean over ``num``, after one that does not count: it finds caches as other processes left them."""
        self._take()
        self._wait()
        start = time.perf_counter()
        for _ in range(num):
            self._take()
        self._wait()
        return (time.perf_counter() - start) / num

    def memory(self):
        """Largest resident memory of the process, and that since the first steps, without compilation."""
        later = peak_bytes()
        whole = None if later is None or self._peak_bytes is None else max(later, self._peak_bytes)
        return {"peak_bytes": whole, "peak_bytes_after_warmup": later if self._can_forget else None, "loss": self._loss()}

    @abstractmethod
    def _loss(self): ...


def prepare_ours(config=None):
    """What train.py, or a command for a trained model, does in its process before JAX starts: the one place to change.

    Args:
        config: Settings of the training; None for an evaluation by `python -m iresnet_jax`, on one device a core.
    """
    from iresnet_jax.runs import allocator, machine
    from iresnet_jax.runs.config import Config

    allocator.collect_garbage_rarely()
    if config is not None:
        allocator.use_large_pages()  # starts this process again, the first time
        allocator.keep_freed_memory()
        machine.compile_quickly()
    machine.use_all_cores(config or Config())
    from iresnet_jax.runs.machine import keep_compiled_programs

    keep_compiled_programs()


class Ours(Steps):
    """The step of train.py, fed by its batches.

    Args:
        config: Plain data of a `Config`.
    """

    def __init__(self, config):
        from iresnet_jax.runs.config import parse

        settings = parse(config)
        prepare_ours(settings)
        import jax

        from iresnet_jax.runs import allocator, loop
        from iresnet_jax.runs.machine import prepare_backend
        from iresnet_jax.runs.planning import plan
        from iresnet_jax.training import parallel

        prepare_backend(settings.training.matmul_precision)
        objective = loop.build_objective(settings, plan.data_for(settings))
        self._block, self._name = jax.block_until_ready, objective.name
        self._state = objective.initial_state()
        self._feed = loop.batches(settings, objective.examples, 0)
        self._of_device = objective.make_step(objective.num_terms)
        self._step = parallel.parallelize(self._of_device)
        batch = loop.abstract_batch(objective.examples, settings.training.batch_size)
        self._step.compile(self._state, jax.eval_shape(parallel.shard, batch))
        allocator.return_freed_memory()
        self._metrics = {}
        self._warm_up()

    def _take(self):
        self._state, self._metrics = self._step(self._state, next(self._feed))

    def _wait(self):
        self._block((self._state, self._metrics))

    def _loss(self):
        return float(self._metrics[self._name])

    def arithmetic(self):
        """Multiplications and additions of a step, and how many a second one large matrix product does here."""
        from jax import numpy as jnp

        from iresnet_jax.runs.planning.profile import matmul_peak, step_flops

        flops = step_flops(self._of_device, self._state, next(self._feed))
        return {"flops": flops, "matmul_peak_flops": matmul_peak(jnp.float32)}


class PyTorch(Steps):
    """The step of a peer on batches that our preprocessing has gone over: Adam, gradient clipped, no moving average.

    Args:
        kind: "naive" or "normflows".
        architecture: See `_peers_cases.architecture`.
        batches: File of `_peers_cases.write_batches`.
        num_dims: Dimensions of an image.
        num_terms: Terms of the series.
        num_steps: Power iterations.
        learning_rate: Learning rate of Adam.
        clip_norm: Largest norm of the gradient.
        threads: Threads of PyTorch.
        warmup: Steps before it is ready.
    """

    def __init__(
        self, kind, architecture, batches, num_dims, num_terms, num_steps, learning_rate, clip_norm, threads, warmup=WARMUP
    ):
        import numpy as np
        import torch  # pyright: ignore[reportMissingImports]

        torch.set_num_threads(threads)
        torch.manual_seed(0)
        from _normflows import take_step
        from _peers_torch import flow

        self._model = flow(architecture, kind, num_terms=num_terms, num_steps=num_steps)
        optimizer = torch.optim.Adam(self._model.parameters(), learning_rate, (0.9, 0.99))
        with np.load(batches) as arrays:
            self._batches = torch.tensor(arrays["batches"])
        with torch.no_grad():
            self._model.log_prob(self._batches[0])  # fits ActNorm and shapes the vectors of the power iterations
        self._number, self._last = 0, torch.zeros(())
        settings = {"num_dims": num_dims, "clip_norm": clip_norm, "power_iterations": num_steps}
        self._step = lambda x: take_step(self._model, optimizer, x, **settings)
        self._warm_up(warmup)

    def _take(self):
        x = self._batches[self._number % len(self._batches)]
        self._number, self._last = self._number + 1, self._step(x)

    def _loss(self):
        return float(self._last)
