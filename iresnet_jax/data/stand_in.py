"""Data sets that stand in for ones that this machine does not have, where shapes are all that counts."""

import numpy as np

from iresnet_jax.data.dataset import DataSet, Splits

_SQUARE, _COLOUR = (28, 28, 1), (32, 32, 3)
IMAGES: dict[str, tuple[tuple[int, int, int], int | None]] = {  # shape of an image, and number of classes
    "mnist": (_SQUARE, 10),
    "fashion_mnist": (_SQUARE, 10),
    "kmnist": (_SQUARE, 10),
    "cifar10": (_COLOUR, 10),
    "cifar100": (_COLOUR, 100),
    "svhn_cropped": (_COLOUR, 10),
    "downsampled_imagenet/32x32": (_COLOUR, None),
    "downsampled_imagenet/64x64": ((64, 64, 3), None),
}
NUM_EXAMPLES = 256


def images(name: str) -> DataSet | None:
    """Random images of the shape of a well-known data set, with as many classes; None if it is not known.

    Args:
        name: Name in TensorFlow Datasets, such as "cifar10".
    """
    if name not in IMAGES:
        return None
    shape, num_classes = IMAGES[name]
    rng = np.random.default_rng(0)
    drawn = rng.integers(0, 256, (NUM_EXAMPLES, *shape), np.uint8)
    examples: Splits = {split: drawn for split in ("train", "validation", "test")}
    labels: Splits = {}
    if num_classes is not None:
        labels = {split: np.arange(NUM_EXAMPLES, dtype=np.int32) % num_classes for split in examples}
    return DataSet.from_arrays(name, examples, labels, num_levels=256, num_classes=num_classes)
