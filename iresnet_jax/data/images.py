"""A labelled image data set in memory or memory-mapped: what every source ends up as."""

from typing import NamedTuple

import numpy as np
from jaxtyping import Int32, UInt8


class ImageData(NamedTuple):
    """Images in three disjoint splits: "train", "validation" and "test".

    Choose hyper-parameters and checkpoints on "validation"; "test" is for the number that is reported.

    Attributes:
        name: the name that `load` knows it by.
        num_levels: number of grey levels of a channel; pixels are integers in ``[0, num_levels)``.
        num_classes: number of classes; labels are integers in ``[0, num_classes)``. 0 where there are no labels.
        images: pixels of each split. They may be read-only views of a file: index them with a batch at a time.
        labels: class of each image of each split; empty where there are no labels.
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
