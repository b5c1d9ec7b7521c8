"""Data for training and evaluation: one value for images, vectors and 2-D toys, in three splits.

Examples are chosen for a split by their number alone.
"""

import functools
import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Array, Bool, Int, Int32, PRNGKeyArray, Shaped

from iresnet_jax.bijections.marginals import Marginals
from iresnet_jax.data.toys import Toy
from iresnet_jax.maths.platforms import fast_compile
from iresnet_jax.models.columns import Column

Splits = dict[str, Shaped[np.ndarray, "_ ..."]]
SPLITS: tuple[str, ...] = ("train", "validation", "test")
# The salt defines the split: changing it invalidates every reported number.
_SALT = "iresnet_jax/validation"
_MOST_VALIDATION = 5000


class Arrays(NamedTuple):
    """Examples with their labels and contexts; None if they have none.

    Attributes:
        x: Vectors ``(n, d)`` or images ``(n, h, w, c)``.
        labels: Classes ``(n,)``.
        context: Context vectors ``(n, k)``.
    """

    x: np.ndarray
    labels: Any = None
    context: Any = None

    def take(self, chosen: Any) -> "Arrays":
        """The chosen examples, by places, by a slice or by a mask."""
        return jax.tree.map(lambda array: array[chosen], self)


@dataclass(frozen=True, eq=False)
class DataSet:
    """Examples in three disjoint splits, "train", "validation" and "test", or an endless toy.

    Choose hyper-parameters and checkpoints on "validation"; report on "test".

    Attributes:
        name: Name for `iresnet_jax.data.load`.
        examples: Arrays by split; empty for endless data. They may be read-only views of files:
            index them batch by batch.
        labels: Classes by split; empty without labels.
        contexts: Context vectors by split, on which a density of the examples may depend; empty
            without contexts.
        num_levels: Grey levels of an image, whose entries are integers in ``[0, num_levels)``; None
            for continuous data.
        num_classes: Classes, labelled ``0`` to ``num_classes - 1``; None without labels.
        marginals: Map of entries of vectors to lines or scores; None if nothing has mass, ends or
            heavy tails, or if data are levels.
        kinds: What each column of vectors holds, see `iresnet_jax.data.tables.Kind`.
        columns: Columns of the data frame or table that the entries come from; None for arrays.
        context_kinds: What each entry of contexts holds.
        context_columns: Columns of the data frame that contexts come from; None for arrays.
        notes: Sentences on how the entries were interpreted.
        generator: Toy that examples of endless data are drawn from; None for arrays.
        fingerprint: Identity of the content in 64 hexadecimal digits, computed unless it is given.
            Another pixel, label, order, shape or number of levels gives another fingerprint; name,
            path, file format and times of change do not matter.
    """

    name: str
    examples: Splits = field(default_factory=dict)
    labels: dict[str, Int32[np.ndarray, " _"]] = field(default_factory=dict)
    contexts: Splits = field(default_factory=dict)
    num_levels: int | None = None
    num_classes: int | None = None
    marginals: Marginals | None = None
    kinds: tuple[Any, ...] = ()
    columns: tuple[Column, ...] | None = None
    context_kinds: tuple[Any, ...] = ()
    context_columns: tuple[Column, ...] | None = None
    notes: tuple[str, ...] = ()
    generator: Toy | None = None
    fingerprint: str = ""

    def __post_init__(self):
        if not self.fingerprint:
            object.__setattr__(self, "fingerprint", self._hash())

    @property
    def event_shape(self) -> tuple[int, ...]:
        """Shape of one example."""
        return (2,) if self.is_endless else self.examples["train"].shape[1:]

    @property
    def is_endless(self) -> bool:
        """Whether examples are drawn, as for a toy, instead of kept in arrays."""
        return self.generator is not None

    @property
    def context_dim(self) -> int:
        """Entries of a context vector; 0 without contexts."""
        return self.contexts["train"].shape[1] if self.contexts else 0

    @property
    def entropy(self) -> float | None:
        """Floor of the expected negative log-likelihood in nats; None unless it is known, as for
        endless data.
        """
        return None if self.generator is None else self.generator.entropy

    @property
    def draw(self) -> Callable[[PRNGKeyArray, Any], tuple[Array, Array | None]] | None:
        """Sampler ``(key, placeholder) -> (example, None)`` of endless data, which have no
        contexts; None for arrays.
        """
        return (lambda key, _: (self._drawn(key, 1)[0], None)) if self.is_endless else None

    def part(self, split: str) -> Arrays:
        """All examples of a split, of data in arrays."""
        if split not in self.examples:
            raise ValueError(
                f"{self.name} has no split {split!r}: it has {', '.join(self.examples)}"
            )
        return Arrays(self.examples[split], self.labels.get(split), self.contexts.get(split))

    def held_out(self, split: str, num: int | None = None, seed: int = 0) -> Arrays:
        """Returns ``num`` examples: "validation" draws them from the whole split, as files may be
        sorted; "test" takes the first.

        Args:
            split: "validation" or "test".
            num: Largest number of examples to return; None returns the whole split of arrays.
            seed: Seed of endless data; each split of each seed has its own examples. Arrays ignore
                it.
        """
        if self.is_endless:
            assert num is not None, "endless data have no whole split"
            stream = {"validation": 1, "test": 2}[split]
            key = jax.random.fold_in(jax.random.key(seed), 2**31 + stream)
            return Arrays(np.asarray(self._drawn(key, num)))
        found = self.part(split)
        if split != "validation" or num is None or num >= len(found.x):
            return found.take(slice(num))
        rows = np.random.default_rng(0).choice(len(found.x), num, replace=False)
        return found.take(np.sort(rows))

    def random_train(self, key: PRNGKeyArray, num: int) -> Arrays:
        """Draws up to ``num`` distinct training examples, to initialise a model."""
        if self.is_endless:
            return Arrays(np.asarray(self._drawn(key, num)))
        found = self.part("train")
        return found.take(np.asarray(_permutation(len(found.x), key))[:num])

    def _drawn(self, key: PRNGKeyArray, num: int) -> Array:
        """Examples of endless data."""
        assert self.generator is not None
        return jax.jit(self.generator.sample, static_argnums=1)(key, num)

    def _hash(self) -> str:
        if self.generator is not None:
            content = {"toy": self.name, "entropy": round(self.generator.entropy, 6)}
        else:
            kinds = {"examples": self.examples, "labels": self.labels, "contexts": self.contexts}
            arrays = {
                f"{split}_{kind}": {
                    "dtype": array.dtype.name,
                    "shape": list(array.shape),
                    "sha256": hashlib.sha256(np.ascontiguousarray(array).data).hexdigest(),
                }
                for kind, by_split in kinds.items()
                for split, array in by_split.items()
            }
            numbers = {"num_levels": self.num_levels, "num_classes": self.num_classes}
            content = {**numbers, "arrays": arrays}
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


@functools.partial(fast_compile, static_argnums=(0,))
def _permutation(num: int, key: PRNGKeyArray) -> Array:
    return jax.random.permutation(key, num)


def validation_mask(num_train: int) -> Bool[np.ndarray, " n"]:
    """Chooses the training examples that are set aside for validation: a tenth of them, at most
    5000.

    The chosen indices have the smallest SHA-256 of "iresnet_jax/validation:<index>": as good as a
    random choice with respect to the images, the same for every data set of this size, and
    independent of any random number generator.

    Args:
        num_train: Number of published training examples, at least 2.
    """
    return np.isin(
        np.arange(num_train), by_digest(num_train)[: min(max(num_train // 10, 1), _MOST_VALIDATION)]
    )


def fraction_masks(num: int, fractions: tuple[float, float]) -> dict[str, Bool[np.ndarray, " n"]]:
    """Splits examples without published splits: indices with the smallest digests go to the test,
    the next to validation.

    Args:
        fractions: Shares for validation and for the test, each in [0, 1) and together below 1; 0
            leaves a split out.

    Returns:
        Masks by split: each split with a positive share has at least one example, and "train" the
            rest.
    """
    validation, test = fractions
    sizes = {"test": test, "validation": validation}
    counts = {split: max(round(share * num), 1) for split, share in sizes.items() if share}
    if min(fractions) < 0 or sum(counts.values()) + 2 > num:
        raise ValueError(
            f"{num} examples are too few for the shares {fractions} of validation and test, of "
            "which none is negative: at least 2 must be left for training"
        )
    parts = np.split(by_digest(num), np.cumsum(list(counts.values())))
    masks = {
        split: np.isin(np.arange(num), part)
        for split, part in zip([*counts, "train"], parts, strict=True)
    }
    return dict(reversed(masks.items()))


def by_digest(num: int, salt: str = _SALT) -> Int[np.ndarray, " n"]:
    """The numbers below ``num`` by the SHA-256 of "<salt>:<number>": an order that looks random
    and never changes.
    """
    digests = [hashlib.sha256(f"{salt}:{index}".encode()).digest() for index in range(num)]
    return np.array(sorted(range(num), key=digests.__getitem__), int)
