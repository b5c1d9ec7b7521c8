"""What training and evaluation need of data: one value for image sets and for 2-D toys."""

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int32, PRNGKeyArray, Shaped

from iresnet_jax.data.toys import Toy

Splits = dict[str, Shaped[np.ndarray, "_ ..."]]


@dataclass(frozen=True, eq=False)
class DataSet:
    """Examples in three disjoint splits, "train", "validation" and "test", or an endless toy.

    Choose hyper-parameters and checkpoints on "validation"; "test" is for the number that is reported.

    Attributes:
        name: Name that `iresnet_jax.data.load` knows it by.
        event_shape: Shape of one example.
        num_levels: Grey levels of an image, whose entries are integers in ``[0, num_levels)``; None for continuous data.
        num_classes: Classes, labelled ``0`` to ``num_classes - 1``; None without labels.
        fingerprint: Identity of the content in 64 hexadecimal digits. Another pixel, label, order, shape or number of levels
            gives another fingerprint; name, path, file format and times of change do not matter.
        examples: Arrays by split; empty for a toy. They may be read-only views of files: index them a batch at a time.
        labels: Classes by split; empty without labels.
        toy: Density that a toy's examples are drawn from; None for a data set of arrays.
    """

    name: str
    event_shape: tuple[int, ...]
    num_levels: int | None
    num_classes: int | None
    fingerprint: str
    examples: Splits = field(default_factory=dict)
    labels: dict[str, Int32[np.ndarray, " _"]] = field(default_factory=dict)
    toy: Toy | None = None

    @classmethod
    def from_arrays(
        cls,
        name: str,
        examples: Splits,
        labels: dict[str, Int32[np.ndarray, " _"]],
        *,
        num_levels: int | None,
        num_classes: int | None,
        fingerprint: str | None = None,
    ) -> "DataSet":
        """Makes a data set of arrays by split; the fingerprint is computed from all their bytes unless it is known."""
        if fingerprint is None:
            arrays = {f"{split}_examples": array for split, array in examples.items()}
            arrays |= {f"{split}_labels": array for split, array in labels.items()}
            described = {name: describe(array, _sha256(np.ascontiguousarray(array).data)) for name, array in arrays.items()}
            fingerprint = fingerprint_of(described, num_levels=num_levels, num_classes=num_classes)
        event_shape = examples["train"].shape[1:]
        return cls(name, event_shape, num_levels, num_classes, fingerprint, examples, labels)

    @classmethod
    def from_toy(cls, toy: Toy) -> "DataSet":
        """Makes an endless data set of a 2-D density, whose fingerprint is that of its name and entropy."""
        return cls(toy.name, (2,), None, None, _hash({"toy": toy.name, "entropy": round(toy.entropy, 6)}), toy=toy)

    @property
    def entropy(self) -> float | None:
        """Floor of the expected negative log-likelihood in nats; None unless it is known, as for toys."""
        return None if self.toy is None else self.toy.entropy

    @property
    def draw(self) -> Callable[[PRNGKeyArray, Any], Array] | None:
        """Sampler ``(key, placeholder) -> example`` of endless data; None for arrays."""
        toy = self.toy
        return None if toy is None else lambda key, _: toy.sample(key, 1)[0]

    def held_out(self, split: str, num: int | None = None, seed: int = 0) -> Shaped[np.ndarray, "_ ..."]:
        """Returns the first ``num`` examples of "validation" or "test".

        Args:
            split: "validation" or "test".
            num: Most examples to return; None returns the whole split, which a toy does not have.
            seed: Seed of a toy's examples; each split of each seed has its own. Arrays ignore it.

        Raises:
            ValueError: If all examples of a toy are asked for.
        """
        if self.toy is None:
            return self.examples[split][:num]
        if num is None:
            raise ValueError(f"{self.name} has no end: say how many examples of {split!r} to draw")
        stream = {"validation": 1, "test": 2}[split]
        key = jax.random.fold_in(jax.random.key(seed), 2**31 + stream)
        return np.asarray(self.toy.sample(key, num))

    def random_train(self, key: PRNGKeyArray, num: int) -> Shaped[Array, "_ ..."]:
        """Draws up to ``num`` distinct training examples, to initialise a model with."""
        if self.toy is not None:
            return self.toy.sample(key, num)
        train = self.examples["train"]
        return jnp.asarray(train[np.asarray(jax.random.permutation(key, len(train)))[:num]])


def describe(array: np.ndarray, sha256: str) -> dict[str, Any]:
    """Returns what `fingerprint_of` knows of an array: its type, its shape and the SHA-256 of its bytes in C order."""
    return {"dtype": array.dtype.name, "shape": list(array.shape), "sha256": sha256}


def fingerprint_of(arrays: dict[str, dict[str, Any]], *, num_levels: int | None, num_classes: int | None) -> str:
    """Returns the fingerprint of a data set from `describe` of its arrays, by names such as ``train_examples``."""
    return _hash({"num_levels": num_levels, "num_classes": num_classes, "arrays": arrays})


def _hash(content: dict[str, Any]) -> str:
    return _sha256(json.dumps(content, sort_keys=True).encode())


def _sha256(content: bytes | memoryview) -> str:
    return hashlib.sha256(content).hexdigest()
