"""Examples of "train", "validation" and "test", chosen by their number alone."""

import hashlib

import numpy as np
from jaxtyping import Bool, Int

_SALT = "iresnet_jax/validation"  # part of the definition of the split: changing it invalidates every reported number
_MOST_VALIDATION = 5000

SPLITS = ("train", "validation", "test")


def validation_mask(num_train: int) -> Bool[np.ndarray, " n"]:
    """Chooses the training examples that are set aside for validation: a tenth of them, at most 5000.

    They are those with the smallest SHA-256 of "iresnet_jax/validation:<index>": as good as a random choice with respect to
    the images, the same for every data set of that size, and independent of any random number generator.

    Args:
        num_train: Number of published training examples, at least 2.
    """
    return np.isin(np.arange(num_train), by_digest(num_train)[: min(max(num_train // 10, 1), _MOST_VALIDATION)])


def fraction_masks(num: int, fractions: tuple[float, float]) -> dict[str, Bool[np.ndarray, " n"]]:
    """Splits examples that nobody has split: those with the smallest digests are for the test, the next for validation.

    Args:
        fractions: Shares for validation and for the test, each in [0, 1) and together below 1; 0 leaves a split out.

    Returns:
        Masks by split: each split that is asked for has at least one example, and "train" the rest.

    Raises:
        ValueError: If there are too few examples for that, or fractions are out of range.
    """
    validation, test = fractions
    if not (0 <= validation < 1 and 0 <= test < 1 and validation + test < 1):
        raise ValueError(f"the shares for validation and test must lie in [0, 1) and leave some for training, got {fractions}")
    sizes = {"test": test, "validation": validation}
    counts = {split: max(round(share * num), 1) for split, share in sizes.items() if share}
    if sum(counts.values()) + 2 > num:
        raise ValueError(
            f"{num} examples are too few to be split into {', '.join(['train', *counts])}: {sum(counts.values())} would be "
            "held out, and at least 2 must be left for training"
        )
    parts = np.split(by_digest(num), np.cumsum(list(counts.values())))
    masks = {split: np.isin(np.arange(num), part) for split, part in zip([*counts, "train"], parts, strict=True)}
    return dict(reversed(masks.items()))


def by_digest(num: int, salt: str = _SALT) -> Int[np.ndarray, " n"]:
    """The numbers below ``num`` by the SHA-256 of "<salt>:<number>": an order that looks random and never changes."""
    digests = [hashlib.sha256(f"{salt}:{index}".encode()).digest() for index in range(num)]
    return np.array(sorted(range(num), key=digests.__getitem__), int)


def some_rows(num: int, most: int) -> Int[np.ndarray, " _"]:
    """Places of at most so many of the rows, drawn from all and in their order: files may be sorted, or periodic."""
    return np.sort(np.random.default_rng(0).choice(num, min(num, most), replace=False))
