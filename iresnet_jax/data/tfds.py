"""Image classification data sets of TensorFlow Datasets (TFDS), read from array_record files
without TensorFlow.

Only preparing a data set, once, which downloads it, needs TensorFlow; without it, the data set can
be prepared elsewhere and its folder copied. A prepared and decoded data set is found again without
importing TFDS.
"""

import importlib.util
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from iresnet_jax.data.dataset import DataSet, Splits
from iresnet_jax.data.images import Contents, decoded
from iresnet_jax.storage import locked

_FORMAT = "array_record"
_CHUNK = 1024  # images read at once
_SQUARE, _COLOUR = (28, 28, 1), (32, 32, 3)
# Shape of an image and number of classes, by name.
CUSTOMARY: dict[str, tuple[tuple[int, int, int], int | None]] = {
    "mnist": (_SQUARE, 10),
    "fashion_mnist": (_SQUARE, 10),
    "kmnist": (_SQUARE, 10),
    "cifar10": (_COLOUR, 10),
    "cifar100": (_COLOUR, 100),
    "svhn_cropped": (_COLOUR, 10),
    "downsampled_imagenet/32x32": (_COLOUR, None),
    "downsampled_imagenet/64x64": ((64, 64, 3), None),
}
_NUM_STAND_INS = 256


def load(name: str) -> DataSet | None:
    """A data set by its TFDS name, such as ``mnist``, ``downsampled_imagenet/32x32`` or
    ``cifar10:3.0.2``.

    The newest version that is prepared in ``$TFDS_DATA_DIR``, else ``~/tensorflow_datasets``, is
    used. Without one, the data set is downloaded and prepared, with TFDS' progress bar.

    Args:
        name: Data set, ``/`` and configuration if it has several, ``:`` and version to choose one.

    Returns:
        The data set; None if TFDS has no such data set and none was prepared under that name.
    """
    if not re.fullmatch(r"\w+(/[\w.-]+)?(:\d+\.\d+\.\d+)?", name):
        return None
    root = Path(os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets").expanduser()
    folder = _find(root, name) or _prepare(root, name)
    if folder is None:
        return None
    files = [
        path for path in folder.iterdir() if path.suffix == ".json" or f".{_FORMAT}-" in path.name
    ]
    return decoded(name, folder, files, lambda: _contents(name, folder))


def stand_in(name: str) -> DataSet | None:
    """Random images with the shape and the classes of a customary data set, as a stand-in; None for
    another name.
    """
    if name not in CUSTOMARY:
        return None
    shape, num_classes = CUSTOMARY[name]
    drawn = np.random.default_rng(0).integers(0, 256, (_NUM_STAND_INS, *shape), np.uint8)
    examples: Splits = dict.fromkeys(("train", "validation", "test"), drawn)
    labels: Splits = {}
    if num_classes is not None:
        labels = dict.fromkeys(examples, np.arange(_NUM_STAND_INS, dtype=np.int32) % num_classes)
    return DataSet(name, examples, labels, num_levels=256, num_classes=num_classes)


def _find(root: Path, name: str) -> Path | None:
    """Finds the folder of the newest prepared version, or of the named version."""
    name, _, version = name.partition(":")
    found = [path.parent for path in (root / name).glob(f"{version or '*'}/dataset_info.json")]
    numbered = {
        tuple(map(int, folder.name.split("."))): folder
        for folder in found
        if re.fullmatch(r"\d+\.\d+\.\d+", folder.name)
    }
    return numbered[max(numbered)] if numbered else None


def _prepare(root: Path, name: str) -> Path | None:
    import tensorflow_datasets as tfds  # slow to import

    try:
        builder = tfds.builder(name, data_dir=root)
    except tfds.core.DatasetNotFoundError:
        return None
    folder = Path(builder.data_path)
    if (folder / "dataset_info.json").is_file():  # the default configuration
        return folder
    _keys(builder.info, name)
    if importlib.util.find_spec("tensorflow") is None:
        raise ValueError(
            f"{name} is not prepared in {root}, and preparing needs TensorFlow, once: run pip "
            "install 'iresnet_jax[prepare]' and start again to download it, or set TFDS_DATA_DIR "
            "to a folder in which it is prepared"
        )
    root.mkdir(parents=True, exist_ok=True)
    with locked(root / "iresnet_jax"):
        # It returns at once if another process has prepared the data set.
        builder.download_and_prepare(file_format=_FORMAT)
    return folder


def _contents(name: str, folder: Path) -> Contents:
    import tensorflow_datasets as tfds

    builder: Any = tfds.builder_from_directory(folder)
    image_key, label_key = _keys(builder.info, name)

    def read(split: str) -> Iterator[tuple[str, np.ndarray, int | None]]:
        records = builder.as_data_source(split)
        for start in range(0, len(records), _CHUNK):
            examples = records.__getitems__(range(start, min(start + _CHUNK, len(records))))
            for number, example in enumerate(examples, start):
                label = int(example[label_key]) if label_key else None
                yield f"image {number} of {split!r} of {name}", example[image_key], label

    num_classes = builder.info.features[label_key].num_classes if label_key else None
    sizes = {split: found.num_examples for split, found in builder.info.splits.items()}
    return Contents(sizes, num_classes, read)


def _keys(info: Any, name: str) -> tuple[str, str | None]:
    """Names of the features for the image and for the class, None without classes."""
    features, keys = dict(info.features.items()), info.supervised_keys or ("image", None)
    image_key, label_key = keys if len(keys) == 2 else ("image", None)
    has_images = len(getattr(features.get(image_key), "shape", ())) == 3
    if not has_images or (label_key and not hasattr(features[label_key], "num_classes")):
        raise ValueError(
            f"{name} is not a data set of images with classes: its features are "
            f"{', '.join(sorted(features))}"
        )
    return image_key, label_key
