"""Where examples come from: labelled images by name here, 2-D densities in `toys`, batch order in `feed`.

An image source is one function that fills in an `ImageData`; `SOURCES` is the list of them. Pixels stay integers until the
model dequantises them, so that ``num_levels`` and the likelihood in bits per dimension always belong together.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from jaxtyping import Int32, UInt8


class ImageData(NamedTuple):
    """Labelled images in three disjoint splits: "train", "validation" and "test".

    Choose hyper-parameters and checkpoints on "validation"; "test" is for the number that is reported.

    Attributes:
        name: the name that `load` knows it by.
        num_levels: number of grey levels of a channel; pixels are integers in ``[0, num_levels)``.
        num_classes: number of classes; labels are integers in ``[0, num_classes)``.
        images: pixels of each split.
        labels: class of each image of each split.
    """

    name: str
    num_levels: int
    num_classes: int
    images: dict[str, UInt8[np.ndarray, "_ h w c"]]
    labels: dict[str, Int32[np.ndarray, " _"]]

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Height, width and channels of one image."""
        height, width, channels = self.images["train"].shape[1:]
        return height, width, channels


def _digits(data_dir: str | None) -> ImageData:
    del data_dir  # embedded in scikit-learn: nothing to look for
    from iresnet_jax.data import digits

    return digits.load()


# A source receives `data_dir` and imports what it needs when it is called: a new one is a function and a line here.
SOURCES: dict[str, Callable[[str | None], ImageData]] = {"digits": _digits}


def load(name: str, *, data_dir: str | None = None) -> ImageData:
    """Loads a labelled image data set by its name.

    Example::

        data = load("digits")
        data.images["train"].shape  # (1257, 8, 8, 1)

    Args:
        name: a key of `SOURCES`.
        data_dir: folder of prepared data sets, for the sources that read from disk; embedded ones ignore it.

    Returns:
        The data set, wholly in host memory.

    Raises:
        ValueError: if no source has this name.
    """
    if name not in SOURCES:
        raise ValueError(
            f"unknown image data set {name!r}: known are {', '.join(sorted(SOURCES))}; "
            "2-D toy densities are loaded with iresnet_jax.data.toys.get"
        )
    return SOURCES[name](data_dir)
