"""Where examples come from: labelled images by name here, 2-D densities in `toys`, batch order in `feed`.

A name is one of these:

======================  ==============================================================================================
``digits``              embedded in scikit-learn
``mnist`` ``cifar10``   any image classification data set of TensorFlow Datasets by its name there, such as
                        ``downsampled_imagenet/32x32`` or ``mnist:3.0.1``; downloaded once if TensorFlow is installed
``idx:FOLDER``          IDX files as MNIST is published, ``train-images-idx3-ubyte.gz`` and so on
``cifar:PATH``          the binary version of CIFAR-10 or CIFAR-100, a folder or the ``.tar.gz``
``npz:FILE``            arrays ``x_train``, ``y_train``, ``x_test``, ``y_test``
``folder:FOLDER``       image files ``train/CLASS/NAME.png``, ``test/CLASS/NAME.png``
======================  ==============================================================================================

Pixels stay integers until the model dequantises them, so that ``num_levels`` and the likelihood in bits per dimension always
belong together. Data that lie on disk are decoded once, see `decoded`; how the validation split is made is written in `splits`.
"""

from collections.abc import Callable
from pathlib import Path

from iresnet_jax.data.images import ImageData
from iresnet_jax.data.source import Source

__all__ = ["EMBEDDED", "FORMATS", "TFDS_NAMES", "ImageData", "load"]


def _digits() -> ImageData:
    from iresnet_jax.data import digits

    return digits.load()


def _idx(path: Path, name: str) -> Source:
    from iresnet_jax.data import idx

    return idx.source(path, name)


def _cifar(path: Path, name: str) -> Source:
    from iresnet_jax.data import cifar

    return cifar.source(path, name)


def _npz(path: Path, name: str) -> Source:
    from iresnet_jax.data import npz

    return npz.source(path, name)


def _folder(path: Path, name: str) -> Source:
    from iresnet_jax.data import image_folder

    return image_folder.source(path, name)


# Each imports what it needs when it is called: a new one is a function and a line here.
EMBEDDED: dict[str, Callable[[], ImageData]] = {"digits": _digits}
FORMATS: dict[str, Callable[[Path, str], Source]] = {"idx": _idx, "cifar": _cifar, "npz": _npz, "folder": _folder}
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


def load(name: str, *, data_dir: str | None = None) -> ImageData:
    """Loads an image data set by its name.

    Example::

        data = load("digits")
        data.images["train"].shape  # (1257, 8, 8, 1)
        load("fashion_mnist", data_dir="~/tensorflow_datasets")
        load("idx:~/mnist")

    Args:
        name: see above.
        data_dir: folder that holds the prepared data sets of TFDS (by default ``$TFDS_DATA_DIR``, else
            ``~/tensorflow_datasets``), and from which relative paths after ``idx:`` and so on start (by default ``.``).

    Returns:
        The data set: arrays in memory or read-only views of a file.

    Raises:
        ValueError: if no data set has this name, or what there is does not make up a data set.
        RuntimeError: if TFDS cannot prepare it.
        OSError: if files cannot be read, or decoded images cannot be written.
    """
    if name in EMBEDDED:
        return EMBEDDED[name]()
    from iresnet_jax.data import decoded, tfds_source

    kind, colon, path = name.partition(":")
    if colon and kind in FORMATS:
        source = FORMATS[kind](Path(data_dir or "", Path(path).expanduser()).expanduser(), name)
    else:
        source = tfds_source.source(name, data_dir)
    if source is None:
        raise ValueError(
            f"unknown image data set {name!r}: known are {', '.join([*EMBEDDED, *TFDS_NAMES])}, "
            f"others of TFDS, and own data as {', '.join(f'{kind}:PATH' for kind in FORMATS)}; "
            "2-D toy densities are loaded with iresnet_jax.data.toys.get"
        )
    return decoded.load(source)
