"""What training and evaluation need of data: one value for images, vectors, 2-D toys and simulators."""

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int32, PRNGKeyArray, Shaped
from numpy.typing import DTypeLike

from iresnet_jax.bijections.transforms.dequantize import Grid
from iresnet_jax.data.simulators import Simulator
from iresnet_jax.data.toys import Toy

Splits = dict[str, Shaped[np.ndarray, "_ ..."]]


@dataclass(frozen=True, eq=False)
class DataSet:
    """Examples in three disjoint splits, "train", "validation" and "test", or an endless toy or simulator.

    Choose hyper-parameters and checkpoints on "validation"; "test" is for the number that is reported.

    Attributes:
        name: Name that `iresnet_jax.data.load` knows it by.
        event_shape: Shape of one example.
        num_levels: Grey levels of an image, whose entries are integers in ``[0, num_levels)``; None for continuous data.
        num_classes: Classes, labelled ``0`` to ``num_classes - 1``; None without labels.
        fingerprint: Identity of the content in 64 hexadecimal digits. Another pixel, label, order, shape or number of levels
            gives another fingerprint; name, path, file format and times of change do not matter.
        examples: Arrays by split; empty for endless data. They may be read-only views of files: index them batch by batch.
        labels: Classes by split; empty without labels.
        contexts: Context vectors by split, on which a density of the examples may depend; empty without.
        grid: Entries of vectors that lie on a grid; None if all are continuous, or levels.
        toy: Density that a toy's examples are drawn from; None for other data.
        simulator: Simulator that draws examples with their contexts, and knows the density of one given the other; None for
            other data.
    """

    name: str
    event_shape: tuple[int, ...]
    num_levels: int | None
    num_classes: int | None
    fingerprint: str
    examples: Splits = field(default_factory=dict)
    labels: dict[str, Int32[np.ndarray, " _"]] = field(default_factory=dict)
    contexts: Splits = field(default_factory=dict)
    grid: Grid | None = None
    toy: Toy | None = None
    simulator: Simulator | None = None

    @classmethod
    def from_arrays(
        cls,
        name: str,
        examples: Splits,
        labels: dict[str, Int32[np.ndarray, " _"]],
        *,
        num_levels: int | None,
        num_classes: int | None,
        contexts: Splits | None = None,
        grid: Grid | None = None,
        fingerprint: str | None = None,
    ) -> "DataSet":
        """Makes a data set of arrays by split; the fingerprint is computed from all their bytes unless it is known."""
        if fingerprint is None:
            arrays = {f"{split}_examples": array for split, array in examples.items()}
            arrays |= {f"{split}_labels": array for split, array in labels.items()}
            arrays |= {f"{split}_contexts": array for split, array in (contexts or {}).items()}
            hashes = {name: hashlib.sha256(np.ascontiguousarray(array).data).hexdigest() for name, array in arrays.items()}
            described = {name: describe(array.dtype, array.shape, hashes[name]) for name, array in arrays.items()}
            fingerprint = fingerprint_of(described, num_levels=num_levels, num_classes=num_classes)
        event_shape = examples["train"].shape[1:]
        return cls(name, event_shape, num_levels, num_classes, fingerprint, examples, labels, contexts or {}, grid)

    @classmethod
    def from_toy(cls, toy: Toy) -> "DataSet":
        """Makes an endless data set of a 2-D density, whose fingerprint is that of its name and entropy."""
        return cls(toy.name, (2,), None, None, _hash({"toy": toy.name, "entropy": round(toy.entropy, 6)}), toy=toy)

    @classmethod
    def from_simulator(cls, simulator: Simulator) -> "DataSet":
        """Makes an endless data set of parameters given observations, with a fingerprint of its name and entropy."""
        content = {"simulator": simulator.name, "entropy": round(simulator.entropy, 4)}
        return cls(simulator.name, (simulator.num_parameters,), None, None, _hash(content), simulator=simulator)

    @property
    def is_endless(self) -> bool:
        """Whether examples are drawn, as those of a toy or simulator, and not kept in arrays."""
        return self.toy is not None or self.simulator is not None

    @property
    def context_dim(self) -> int:
        """Entries of a context vector; 0 without contexts."""
        if self.simulator is not None:
            return self.simulator.num_observed
        return self.contexts["train"].shape[1] if self.contexts else 0

    @property
    def entropy(self) -> float | None:
        """Floor of the expected negative log-likelihood in nats; None unless it is known, as for endless data."""
        known = self.toy or self.simulator
        return None if known is None else known.entropy

    @property
    def draw(self) -> Callable[[PRNGKeyArray, Any], tuple[Array, Array | None]] | None:
        """Sampler ``(key, placeholder) -> (example, context)`` of endless data; None for arrays."""
        if not self.is_endless:
            return None

        def draw_one(key: PRNGKeyArray, _: Any) -> tuple[Array, Array | None]:
            example, context = self._drawn(key, 1)
            return example[0], None if context is None else context[0]

        return draw_one

    def held_out(self, split: str, num: int | None = None, seed: int = 0) -> Shaped[np.ndarray, "_ ..."]:
        """Returns the first ``num`` examples of "validation" or "test".

        Args:
            split: "validation" or "test".
            num: Largest number of examples to return; None returns the whole split, which endless data do not have.
            seed: Seed of endless data; each split of each seed has its own examples. Arrays ignore it.

        Raises:
            ValueError: If all examples of endless data are asked for, or the data have no such split.
        """
        return self._held_out(split, num, seed)[0]

    def held_out_contexts(self, split: str, num: int | None = None, seed: int = 0) -> Shaped[np.ndarray, "_ k"] | None:
        """Returns the contexts of what `held_out` returns with the same arguments; None without contexts."""
        return self._held_out(split, num, seed)[1]

    def random_train(self, key: PRNGKeyArray, num: int) -> tuple[Shaped[Array, "_ ..."], Shaped[Array, "_ k"] | None]:
        """Draws up to ``num`` distinct training examples and their contexts, to initialise a model with."""
        if self.is_endless:
            return self._drawn(key, num)
        chosen = self._random_places(key, num)
        context = jnp.asarray(self.contexts["train"][chosen]) if self.contexts else None
        return jnp.asarray(self.examples["train"][chosen]), context

    def random_train_labels(self, key: PRNGKeyArray, num: int) -> Int32[np.ndarray, " _"]:
        """Returns the classes of the examples that `random_train` draws with the same arguments."""
        return self.labels["train"][self._random_places(key, num)]

    def _random_places(self, key: PRNGKeyArray, num: int) -> np.ndarray:
        return np.asarray(jax.random.permutation(key, len(self.examples["train"])))[:num]

    def _held_out(self, split: str, num: int | None, seed: int) -> tuple[np.ndarray, np.ndarray | None]:
        if not self.is_endless:
            if split not in self.examples:
                raise ValueError(f"{self.name} has no split {split!r}: it has {', '.join(self.examples)}")
            return self.examples[split][:num], self.contexts[split][:num] if self.contexts else None
        if num is None:
            raise ValueError(f"{self.name} has no end: say how many examples of {split!r} to draw")
        stream = {"validation": 1, "test": 2}[split]
        examples, contexts = self._drawn(jax.random.fold_in(jax.random.key(seed), 2**31 + stream), num)
        return np.asarray(examples), None if contexts is None else np.asarray(contexts)

    def _drawn(self, key: PRNGKeyArray, num: int) -> tuple[Array, Array | None]:
        """Examples of endless data and their contexts."""
        if self.simulator is not None:
            return jax.jit(self.simulator.sample, static_argnums=1)(key, num)
        assert self.toy is not None
        return jax.jit(self.toy.sample, static_argnums=1)(key, num), None


def describe(dtype: DTypeLike, shape: tuple[int, ...], sha256: str) -> dict[str, Any]:
    """Returns what `fingerprint_of` knows of an array: its type, its shape and the SHA-256 of its bytes in C order."""
    return {"dtype": np.dtype(dtype).name, "shape": list(shape), "sha256": sha256}


def fingerprint_of(arrays: dict[str, dict[str, Any]], *, num_levels: int | None, num_classes: int | None) -> str:
    """Returns the fingerprint of a data set from `describe` of its arrays, by names such as ``train_examples``."""
    return _hash({"num_levels": num_levels, "num_classes": num_classes, "arrays": arrays})


def _hash(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
