"""What a process does in one of the two trees that reference.py compares: the process finds that
tree's package first, and a case makes sure of it.

Only what is public is called, as the trees may differ in all else. Arrays travel in ``.npz`` files.
"""

import dataclasses
import resource
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np


class Tree:
    """A process that uses the package of a tree."""

    def __init__(self, tree):
        import jax

        import iresnet_jax as ir

        if not Path(ir.__file__).is_relative_to(tree):
            raise RuntimeError(f"{ir.__file__} is not the package of {tree}")
        self.jax, self.ir, self.num_programs = jax, ir, 0
        jax.monitoring.register_event_duration_secs_listener(self._count)

    def _count(self, event, *_, **__):
        """Programs that are compiled or taken from the cache on disk."""
        self.num_programs += event == "/jax/core/compile/backend_compile_duration"

    def kept(self, folder, inputs, output):
        """Writes all that a saved model says of inputs."""
        model, given = self.ir.load(folder), np.load(inputs)
        x, key = given["x"], self.jax.random.key(7)
        said: dict[str, Any] = {"certificate": model.certificate()}
        if hasattr(model, "log_prob"):
            said |= {"log_prob": model.log_prob(x, key), "decode": model.decode(given["z"])}
        else:  # before classifiers had the methods of densities, these had names of their own
            encode = getattr(model, "encode", None) or model.features
            decode = getattr(model, "decode", None) or model.reconstruct
            data, *_, info = decode(encode(x))
            said |= {"logits": model.logits(x), "decode": (data, info)}
        arrays: dict[str, Any] = {name: np.asarray(value) for name, value in leaves("", said)}
        np.savez(output, **arrays)

    def fit(self, data, seed, minutes):
        """Mean log-density of the test examples after `fit`."""
        given, key = np.load(data), self.jax.random.key(seed)
        model = self.ir.fit(given["train"], minutes=minutes, key=key, progress=False)
        return float(np.mean(model.log_prob(given["test"], self.jax.random.key(7))))

    def start(self, num, dims):
        """Programs and seconds of a first `train` of vectors."""
        self._x = np.random.default_rng(0).normal(size=(num, dims)).astype(np.float32)
        stages = [self.ir.StageSpec(num_blocks=4, hidden=(64,), activation="clipswish")]
        self._model = self.ir.Density.init(self.jax.random.key(0), self._x, stages=stages)
        before, began = self.num_programs, time.perf_counter()
        self._train(2)
        return {
            "programs": self.num_programs - before,
            "first_seconds": time.perf_counter() - began,
        }

    def seconds_per_step(self, fewer, more):
        """By two trainings of different length, what comes before and after the steps left out."""
        seconds = [self._train(steps) for steps in (fewer, more)]
        return (seconds[1] - seconds[0]) / (more - fewer)

    def peak_bytes(self):
        """Largest resident memory of this process."""
        return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

    def _train(self, steps):
        def loss(model, batch, key):
            return -model.log_prob(batch, key).mean()

        began, key = time.perf_counter(), self.jax.random.key(1)
        trained = self.ir.train(self._model, loss, self._x, key=key, steps=steps, progress=False)
        self.jax.block_until_ready(trained)
        return time.perf_counter() - began


def leaves(name: str, value: Any) -> Iterator[tuple[str, Any]]:
    """Numbers, words and arrays of a result, by the names of the fields that hold them."""
    if dataclasses.is_dataclass(value):
        value = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    elif hasattr(value, "_asdict"):
        value = value._asdict()
    elif isinstance(value, list | tuple):
        value = {str(place): part for place, part in enumerate(value)}
    if not isinstance(value, Mapping):
        yield name, "None" if value is None else value
        return
    for part, own in value.items():
        yield from leaves(f"{name}/{part}".lstrip("/"), own)
