"""Where examples come from: `load` returns images and toys by name as a `DataSet`.

======================  ==============================================================================================
``digits``              8x8 images embedded in scikit-learn
``moons`` ``rings``     2-D toy densities, listed in `toys`
``mnist`` ``cifar10``   any image classification data set of TensorFlow Datasets by its name there, such as
                        ``downsampled_imagenet/32x32`` or ``mnist:3.0.1``; downloaded once if TensorFlow is installed
``idx:FOLDER``          IDX files as MNIST is published, ``train-images-idx3-ubyte.gz`` and so on
``cifar:PATH``          the binary version of CIFAR-10 or CIFAR-100, a folder or the ``.tar.gz``
``npz:FILE``            arrays ``x_train``, ``y_train``, ``x_test``, ``y_test``
``folder:FOLDER``       image files ``train/CLASS/NAME.png``, ``test/CLASS/NAME.png``
======================  ==============================================================================================

Pixels stay integers until the model dequantises them, so ``num_levels`` and bits per dimension always belong together. Image
files are decoded once (`decoding`, `cache`). `splits` says how the validation split is made, and `batches` which examples a
training step sees.
"""

from pathlib import Path

from iresnet_jax.data import decoding, toys
from iresnet_jax.data.dataset import DataSet
from iresnet_jax.data.sources import cifar, digits, idx, image_folder, npz, tfds
from iresnet_jax.data.toys import Toy

__all__ = ["EMBEDDED", "FORMATS", "TFDS_NAMES", "DataSet", "Toy", "load"]

EMBEDDED = {"digits": digits.load}
FORMATS = {"idx": idx.source, "cifar": cifar.source, "npz": npz.source, "folder": image_folder.source}
TFDS_NAMES = (  # the customary ones
    "mnist",
    "fashion_mnist",
    "kmnist",
    "cifar10",
    "cifar100",
    "svhn_cropped",
    "downsampled_imagenet/32x32",
    "downsampled_imagenet/64x64",
)


def load(name: str, data_dir: str | None = None) -> DataSet:
    """Loads a data set or toy by its name.

    Example::

        data = load("digits")
        data.examples["train"].shape  # (1257, 8, 8, 1)
        load("moons").held_out("test", 1000).shape  # (1000, 2)
        load("fashion_mnist", data_dir="~/tensorflow_datasets")
        load("idx:~/mnist")

    Args:
        name: Name as in the table above.
        data_dir: Folder that holds the prepared data sets of TFDS (by default ``$TFDS_DATA_DIR``, else
            ``~/tensorflow_datasets``), and from which relative paths after ``idx:`` and so on start (by default ``.``).

    Raises:
        ValueError: If no data set has this name, or its files do not make up a data set.
        RuntimeError: If TFDS cannot prepare it.
        OSError: If files cannot be read, or decoded images cannot be written.
    """
    if name in toys.TOYS:
        return DataSet.from_toy(toys.get(name))
    if name in EMBEDDED:
        return EMBEDDED[name]()
    kind, colon, path = name.partition(":")
    if colon and kind in FORMATS:
        source = FORMATS[kind](Path(data_dir or "", Path(path).expanduser()).expanduser(), name)
    else:
        source = tfds.source(name, data_dir)
    if source is None:
        raise ValueError(
            f"unknown data set {name!r}: known are the images {', '.join([*EMBEDDED, *TFDS_NAMES])} and others of TFDS, "
            f"the toys {', '.join(toys.TOYS)}, and own images as {', '.join(f'{kind}:PATH' for kind in FORMATS)}"
        )
    return decoding.load(source)
