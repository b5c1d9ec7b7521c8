"""Data for training and evaluation: one value for images, vectors and 2-D toys, in three splits.

Examples are chosen for a split by their number alone.
"""

import functools
import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import jax
import numpy as np
from jaxtyping import Array, Bool, Int, Int32, PRNGKeyArray, Shaped

from iresnet_jax.bijections.marginals import Marginals
from iresnet_jax.data.toys import Toy
from iresnet_jax.maths.platforms import fast_compile
from iresnet_jax.models.columns import Column

Splits = dict[str, Shaped[np.ndarray, "_ ..."]]
SPLITS = ("train", "validation", "test")
# The salt defines the split: changing it invalidates every reported number.
_SALT = "iresnet_jax/validation"
_MOST_VALIDATION = 5000


@dataclass(frozen=True, eq=False)
class DataSet:
    """Examples in three disjoint splits, "train", "validation" and "test", or an endless toy.

    Choose hyper-parameters and checkpoints on "validation"; report on "test".

    Attributes:
        name: Name for `iresnet_jax.data.load`.
        event_shape: Shape of one example.
        num_levels: Grey levels of an image, whose entries are integers in ``[0, num_levels)``; None
            for continuous data.
        num_classes: Classes, labelled ``0`` to ``num_classes - 1``; None without labels.
        fingerprint: Identity of the content in 64 hexadecimal digits. Another pixel, label, order,
            shape or number of levels gives another fingerprint; name, path, file format and times
            of change do not matter.
        examples: Arrays by split; empty for endless data. They may be read-only views of files:
            index them batch by batch.
        labels: Classes by split; empty without labels.
        contexts: Context vectors by split, on which a density of the examples may depend; empty
            without contexts.
        marginals: Map of entries of vectors to lines or scores; None if nothing has mass, ends or
            heavy tails, or if data are levels.
        kinds: What each column of vectors holds, see `iresnet_jax.data.tables.Kind`.
        columns: Columns of the data frame or table that the entries come from; None for arrays.
        context_kinds: What each entry of contexts holds.
        context_columns: Columns of the data frame that contexts come from; None for arrays.
        notes: Sentences on how the entries were interpreted.
        generator: Toy that examples of endless data are drawn from; None for arrays.
    """

    name: str
    event_shape: tuple[int, ...]
    num_levels: int | None
    num_classes: int | None
    fingerprint: str
    examples: Splits = field(default_factory=dict)
    labels: dict[str, Int32[np.ndarray, " _"]] = field(default_factory=dict)
    contexts: Splits = field(default_factory=dict)
    marginals: Marginals | None = None
    kinds: tuple[Any, ...] = ()
    columns: tuple[Column, ...] | None = None
    context_kinds: tuple[Any, ...] = ()
    context_columns: tuple[Column, ...] | None = None
    notes: tuple[str, ...] = ()
    generator: Toy | None = None

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
        fingerprint: str | None = None,
        **others: Any,
    ) -> "DataSet":
        """Makes a data set from arrays by split; a fingerprint that is not given is computed from
        all their bytes. ``others`` are further attributes.
        """
        contexts = contexts or {}
        if fingerprint is None:
            kinds = {"examples": examples, "labels": labels, "contexts": contexts}
            described = {
                f"{split}_{kind}": _content(array)
                for kind, arrays in kinds.items()
                for split, array in arrays.items()
            }
            fingerprint = _hash(
                {"num_levels": num_levels, "num_classes": num_classes, "arrays": described}
            )
        return cls(
            name,
            examples["train"].shape[1:],
            num_levels,
            num_classes,
            fingerprint,
            examples,
            labels,
            contexts,
            **others,
        )

    @classmethod
    def endless(cls, generator: Toy) -> "DataSet":
        """Makes a data set from a 2-D density; its fingerprint comes from name and entropy."""
        fingerprint = _hash({"toy": generator.name, "entropy": round(generator.entropy, 6)})
        return cls(generator.name, (2,), None, None, fingerprint, generator=generator)

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

    def held_out(
        self, split: str, num: int | None = None, seed: int = 0
    ) -> Shaped[np.ndarray, "_ ..."]:
        """Returns ``num`` examples: "validation" draws them from the whole split, as files may be
        sorted; "test" takes the first.

        Args:
            split: "validation" or "test".
            num: Largest number of examples to return; None returns the whole split of arrays.
            seed: Seed of endless data; each split of each seed has its own examples. Arrays ignore
                it.
        """
        if not self.is_endless:
            return self._taken(self.examples, split, num)
        assert num is not None, "endless data have no whole split"
        stream = {"validation": 1, "test": 2}[split]
        return np.asarray(
            self._drawn(jax.random.fold_in(jax.random.key(seed), 2**31 + stream), num)
        )

    def held_out_contexts(
        self, split: str, num: int | None = None
    ) -> Shaped[np.ndarray, "_ k"] | None:
        """Returns the contexts of the examples that `held_out` returns for the same arguments; None
        without contexts.
        """
        return self._taken(self.contexts, split, num) if self.contexts else None

    def held_out_labels(self, split: str, num: int | None = None) -> Int32[np.ndarray, " _"]:
        """Returns the classes of the examples that `held_out` returns for the same arguments."""
        return self._taken(self.labels, split, num)

    def random_train(self, key: PRNGKeyArray, num: int) -> tuple[Any, Any, Any]:
        """Draws up to ``num`` distinct training examples with their contexts and classes, or
        None, to initialise a model.
        """
        if self.is_endless:
            return self._drawn(key, num), None, None
        chosen = np.asarray(_permutation(len(self.examples["train"]), key))[:num]
        kinds = self.examples, self.contexts, self.labels
        examples, contexts, labels = (
            jax.device_put(kind["train"][chosen]) if kind else None for kind in kinds
        )
        return examples, contexts, labels

    def _taken(self, arrays: Splits, split: str, num: int | None) -> np.ndarray:
        """The rows that `held_out` returns."""
        if split not in arrays:
            raise ValueError(f"{self.name} has no split {split!r}: it has {', '.join(arrays)}")
        if split != "validation" or num is None:
            return arrays[split][:num]
        return arrays[split][some_rows(len(arrays[split]), num)]

    def _drawn(self, key: PRNGKeyArray, num: int) -> Array:
        """Examples of endless data."""
        assert self.generator is not None
        return jax.jit(self.generator.sample, static_argnums=1)(key, num)


@functools.partial(fast_compile, static_argnums=(0,))
def _permutation(num: int, key: PRNGKeyArray) -> Array:
    return jax.random.permutation(key, num)


def _content(array: np.ndarray) -> dict[str, Any]:
    sha256 = hashlib.sha256(np.ascontiguousarray(array).data).hexdigest()
    return {"dtype": array.dtype.name, "shape": list(array.shape), "sha256": sha256}


def _hash(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


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


def some_rows(num: int, most: int) -> Int[np.ndarray, " _"]:
    """Sorted places of at most ``most`` of ``num`` rows, drawn at random: files may be sorted, or
    periodic.
    """
    return np.sort(np.random.default_rng(0).choice(num, min(num, most), replace=False))
