"""Where examples come from: `load` returns images and toys by name as a `DataSet`.

======================  ===========================================================================
``digits``              8x8 images embedded in scikit-learn
``moons`` ``rings``     2-D toy densities, listed in `toys`
``mnist`` ``cifar10``   any image classification data set of TensorFlow Datasets by its name
                        there, such as ``downsampled_imagenet/32x32`` or ``mnist:3.0.1``;
                        downloaded once if TensorFlow is installed
``idx:FOLDER``          IDX files as MNIST is published, ``train-images-idx3-ubyte.gz`` etc.
``cifar:FOLDER``        the binary version of CIFAR-10 or CIFAR-100, from its unpacked archive
``npz:FILE``            arrays ``x_train``, ``y_train``, ``x_test``, ``y_test``, or ``x`` alone,
                        to be split; images of 8 bits or floats, with contexts
                        ``context_train`` or ``context``
``npy:PATH`` ``csv:``   vectors, and as ``npy:`` images of floats or integer levels, see `sources`
``folder:FOLDER``       image files ``train/CLASS/NAME.png``, ``test/CLASS/NAME.png``
======================  ===========================================================================

Pixels stay integers until the model dequantises them, so ``num_levels`` and bits per dimension
always belong together. Images of TFDS and image files are decoded once (`cache`). `dataset` says
how the validation split is made, and `batches` which examples a training step sees.
"""

import dataclasses
from pathlib import Path

import numpy as np

from iresnet_jax.atomic_files import path_of
from iresnet_jax.data import images, sources, tfds
from iresnet_jax.data.dataset import DataSet
from iresnet_jax.data.toys import TOYS, Toy

__all__ = ["DataSet", "Toy", "conditioned_on_labels", "load"]

_IMAGES = {"idx": images.load_idx, "cifar": images.load_cifar, "folder": images.load_folder}
_ARRAYS = {"npz": sources.load_npz, "npy": sources.load_npy, "csv": sources.load_csv}


def load(
    name: str, *, fractions: tuple[float, float] = (0.1, 0.1), num_classes: int | None = None
) -> DataSet:
    """Loads a data set or toy by its name.

    Example::

        data = load("digits")
        data.examples["train"].shape  # (1257, 8, 8, 1)
        load("moons").held_out("test", 1000).shape  # (1000, 2)
        load("fashion_mnist")  # in $TFDS_DATA_DIR, else ~/tensorflow_datasets
        load("idx:~/mnist")

    Args:
        name: Name as in the table above.
        fractions: Shares for validation and test, for a file whose arrays are not split.
        num_classes: Number of classes of arrays in a file; by default the labels' classes, without
            gaps.

    Raises:
        ValueError: If no data set has this name, or its files do not make up a data set.
        RuntimeError: If TFDS cannot prepare it.
        OSError: If files cannot be read, or decoded images cannot be written.
    """
    if name in TOYS:
        return DataSet.endless(TOYS[name])
    if name == "digits":
        return images.load_digits()
    kind, colon, path = name.partition(":")
    if colon and kind in _ARRAYS:
        return _ARRAYS[kind](path_of(path), name, fractions, num_classes)
    if colon and kind in _IMAGES:
        return _IMAGES[kind](Path(path).expanduser(), name)
    if (found := tfds.load(name)) is None:
        raise ValueError(
            f"unknown data set {name!r}: known are the images digits, {', '.join(tfds.CUSTOMARY)} "
            f"and others of TFDS, the toys {', '.join(TOYS)}, and own data as "
            f"{', '.join(f'{kind}:PATH' for kind in [*_IMAGES, *_ARRAYS])}"
        )
    return found


def conditioned_on_labels(data: DataSet) -> DataSet:
    """The data set with each example's class, as a one-hot vector, for its context."""
    if data.num_classes is None or data.contexts:
        problem = "contexts already" if data.contexts else "no labels"
        raise ValueError(
            f"data.condition_on_labels makes contexts of labels, and {data.name} has "
            f"{problem}: switch it off"
        )
    vectors = np.eye(data.num_classes, dtype=np.float32)
    contexts = {split: vectors[labels] for split, labels in data.labels.items()}
    return dataclasses.replace(data, contexts=contexts)
