"""The data of a run: an image data set or a 2-D toy, behind one face."""

import functools
import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from iresnet_jax import data
from iresnet_jax.data import toys


@dataclass(frozen=True)
class Source:
    """The data of a run.

    Attributes:
        name: Its name.
        event_shape: Shape of one example.
        num_levels: Grey levels; None for a 2-D toy.
        images: The image data set, or None.
        toy: The toy, or None.
        num_classes: Classes of its labels; None without labels.
    """

    name: str
    event_shape: tuple[int, ...]
    num_levels: int | None
    images: data.ImageData | None = None
    toy: toys.Toy | None = None
    num_classes: int | None = None

    @functools.cached_property
    def fingerprint(self) -> str:
        """A hash of everything that a model learns from: it changes when the data do, and not with their path."""
        digest = hashlib.sha256(repr((self.event_shape, self.num_levels, self.num_classes, self.toy and self.name)).encode())
        if self.images is not None:
            for kind in (self.images.images, self.images.labels):
                for split in sorted(kind):
                    digest.update(f"{split} {kind[split].shape}".encode())
                    digest.update(np.ascontiguousarray(kind[split]).data)
        return digest.hexdigest()

    @property
    def draw(self) -> Callable[[Any, Any], Any] | None:
        """For endless data, ``(key, placeholder) -> example``."""
        toy = self.toy
        return None if toy is None else lambda key, _: toy.sample(key, 1)[0]

    def held_out(self, split: str, num: int, seed: int) -> np.ndarray:
        """Up to ``num`` examples of "validation" or "test"; a toy's are drawn from a key of their own."""
        if self.toy is not None:
            stream = {"validation": 1, "test": 2}[split]
            key = jax.random.fold_in(jax.random.key(seed), 2**31 + stream)
            return np.asarray(self.toy.sample(key, num))
        assert self.images is not None
        return self.images.images[split][:num]

    def labels(self, split: str, num: int | None = None) -> np.ndarray:
        """The labels of those examples, or of all."""
        assert self.images is not None
        return self.images.labels[split][:num]


def load_source(name: str, data_dir: str | None = None) -> Source:
    """The data set or toy of that name.

    Raises:
        ValueError: If there is none; the message lists those there are.
    """
    if name in toys.TOYS:
        return Source(name, (2,), None, toy=toys.get(name))
    images = data.load(name, data_dir=data_dir)
    return Source(name, images.image_shape, images.num_levels, images=images, num_classes=images.num_classes or None)
