"""Images in their published formats: scikit-learn's digits, IDX files, CIFAR's binary files, image
files, data sets of TensorFlow Datasets (TFDS); and a cache of decoded images.

TFDS is read from array_record files without TensorFlow. Only preparing a data set, once, which
downloads it, needs TensorFlow; without it, the data set can be prepared elsewhere and its folder
copied. A prepared and decoded data set is found again without importing TFDS.
"""

import collections
import contextlib
import gzip
import hashlib
import importlib.util
import json
import logging
import os
import re
import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int, Integer

from iresnet_jax.data.arrays import Arrays, from_arrays
from iresnet_jax.data.dataset import SPLITS, DataSet, by_digest, validation_mask
from iresnet_jax.storage import locked, user_folder

_log = logging.getLogger(__name__)

# ------------------------------------------------------------------------------------------- digits

# The salt defines the split: changing it invalidates every reported number.
_SALT = "iresnet_jax/digits"


def load_digits() -> DataSet:
    """The 8x8 digits of scikit-learn: 1257 train, 180 validation and 360 test images with levels 0
    to 16.

    1797 scans of handwritten digits (Alpaydin and Kaynak 1998, the test part of the UCI "optical
    recognition of handwritten digits"). There is no customary split, so `split_digits` defines a
    permanent one.
    """
    from sklearn import datasets

    pixels, classes = datasets.load_digits(return_X_y=True)
    images, labels = np.asarray(pixels).reshape(-1, 8, 8, 1).astype(np.uint8), np.asarray(classes)
    return from_arrays(
        "digits",
        {split: Arrays(images[rows], labels[rows]) for split, rows in split_digits(labels).items()},
    )


def split_digits(labels: Integer[np.ndarray, " n"]) -> dict[str, Int[np.ndarray, " _"]]:
    """Splits examples into 70 % train, 10 % validation and 20 % test, stratified by class.

    Order the examples by ``(label, SHA-256 of "iresnet_jax/digits:<index>")`` and deal them out in
    tens: positions 0 and 1 of every ten go to "test", position 2 to "validation", the rest to
    "train". Every class is thus divided to within two examples of its exact share, and the result
    depends on no random number generator and no version of NumPy.

    Args:
        labels: Class of each example, in the order of the source.
    """
    order = by_digest(len(labels), _SALT)
    dealt = order[np.argsort(labels[order], kind="stable")]
    place = np.arange(len(labels)) % 10
    chosen = {"train": place > 2, "validation": place == 2, "test": place < 2}
    return {split: np.sort(dealt[mask]) for split, mask in chosen.items()}


# ---------------------------------------------------------------------------------------------- IDX


def load_idx(folder: Path, name: str) -> DataSet:
    """MNIST and its relatives: ``train-images-idx3-ubyte``, ``train-labels-idx1-ubyte``,
    ``t10k-...`` or ``.gz``.
    """
    parts = {}
    for split, prefix in (("train", "train"), ("test", "(?:t10k|test)")):
        images, labels = (
            read_idx(_find_idx(folder, f"{prefix}-{kind}")) for kind in ("images", "labels")
        )
        parts[split] = Arrays(images[..., None], labels)
    num_classes = 1 + max(int(part.labels.max()) for part in parts.values())
    return from_arrays(name, parts, num_classes=num_classes)


def _find_idx(folder: Path, kind: str) -> Path:
    """Finds the file of a kind; an unpacked file takes precedence over its archive."""
    # Some archives unpack to train-images.idx3-ubyte.
    pattern = re.compile(rf"{kind}.idx\d-ubyte(\.gz)?$")
    found = sorted(path for path in folder.iterdir() if pattern.search(path.name))
    if len({path.name.removesuffix(".gz") for path in found}) != 1:
        raise ValueError(
            f"{folder} must hold one file {kind}-idx...-ubyte or its .gz, and has "
            f"{', '.join(path.name for path in found) or 'none'}"
        )
    return found[0]


def read_idx(path: Path) -> np.ndarray:
    """Reads one IDX file of unsigned bytes, plain or compressed with gzip.

    The file is two zero bytes, a byte for the type (8: unsigned byte), a byte for the number of
    dimensions, each dimension as a big-endian 32-bit integer, and then the bytes
    (http://yann.lecun.com/exdb/mnist).
    """
    content = path.read_bytes()
    if content[:2] == b"\x1f\x8b":
        content = gzip.decompress(content)
    if content[:3] != b"\0\0\x08":
        raise ValueError(f"{path} is no IDX file of unsigned bytes: it does not begin with 0, 0, 8")
    start = 4 + 4 * content[3]
    shape = np.frombuffer(content[4:start], ">u4")
    return np.frombuffer(content, np.uint8, offset=start).reshape(shape)


# -------------------------------------------------------------------------------------------- CIFAR

_CIFAR10 = {"train": [f"data_batch_{i}.bin" for i in range(1, 6)], "test": ["test_batch.bin"]}
_CIFAR100 = {"train": ["train.bin"], "test": ["test.bin"]}


def load_cifar(folder: Path, name: str) -> DataSet:
    """CIFAR-10 or CIFAR-100 from the unpacked archive of the authors' binary version.

    A record is the label (CIFAR-100: the coarse and the fine one) and 3 x 32 x 32 bytes, one colour
    plane after the other (https://www.cs.toronto.edu/~kriz/cifar.html).
    """
    found = {file.name: file for file in folder.rglob("*.bin")}
    is_100 = "train.bin" in found
    num_labels, parts = 2 if is_100 else 1, {}
    for split, files in (_CIFAR100 if is_100 else _CIFAR10).items():
        content = b"".join(found[file].read_bytes() for file in files)
        records = np.frombuffer(content, np.uint8).reshape(-1, num_labels + 3 * 32 * 32)
        images = records[:, num_labels:].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
        parts[split] = Arrays(images, records[:, num_labels - 1])
    return from_arrays(name, parts, num_classes=100 if is_100 else 10)


# -------------------------------------------------------------------------------------- image files

_FOLDERS = {"train": ("train",), "validation": ("validation", "valid", "val"), "test": ("test",)}
_SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".gif", ".ppm", ".pgm", ".tif", ".tiff", ".webp"}
# Modes of Pillow that become one or three channels of 8 bits.
_GREY, _COLOUR = {"1", "L"}, {"RGB", "P", "CMYK", "YCbCr"}


def load_folder(folder: Path, name: str) -> DataSet:
    """Image files ``train/CLASS/NAME.png`` and ``test/CLASS/NAME.png``, or without classes
    ``train/NAME.png``.

    There may be ``validation/`` or ``val/``, too. Classes are numbered in the order of their
    folders' names in ``train/``. Grey images get one channel, others three.
    """

    def class_of(path: Path) -> str:
        return "/".join(path.relative_to(folder).parts[1:-1])  # "cat" for train/cat/1.png

    files = {
        split: sorted(
            path
            for inside in names
            for path in (folder / inside).rglob("*")
            if path.suffix.lower() in _SUFFIXES
            and not any(part.startswith(".") for part in path.relative_to(folder).parts)
        )
        for split, names in _FOLDERS.items()
    }
    everything = [path for paths in files.values() for path in paths]
    classes = sorted({class_of(path) for path in files["train"]})
    is_labelled = classes != [""]
    for path in everything:
        if class_of(path) not in classes or (is_labelled and not class_of(path)):
            raise ValueError(
                f"{path} has no class with training images: images of each class lie in a folder "
                f"below {folder / 'train'}, or all lie in it"
            )

    def read(split: str) -> Iterator[tuple[str, np.ndarray, int | None]]:
        for path in files[split]:
            yield str(path), _pixels(path), classes.index(class_of(path)) if is_labelled else None

    num = {split: len(paths) for split, paths in files.items() if paths}
    num_classes = len(classes) if is_labelled else None
    return decoded(name, folder, everything, lambda: Contents(num, num_classes, read))


def _pixels(path: Path) -> np.ndarray:
    from PIL import Image  # needed by this source alone

    with Image.open(path) as image:
        if image.mode not in _GREY | _COLOUR:
            raise ValueError(
                f"{path} has pixels of type {image.mode}: convert it to 8-bit grey or opaque RGB"
            )
        pixels = np.asarray(image.convert("L" if image.mode in _GREY else "RGB"))
    return pixels if pixels.ndim == 3 else pixels[..., None]


# ---------------------------------------------------------------------- the cache of decoded images

_RECORD = "record.json"


class Contents(NamedTuple):
    """Images in files, as their publisher split them.

    Attributes:
        num_examples: Number of images by the publisher's name of the split.
        num_classes: Number of classes; None without labels.
        read: Iterates over a split: the image's place for messages, the image ``(h, w, c)`` and its
            class.
    """

    num_examples: dict[str, int]
    num_classes: int | None
    read: Callable[[str], Iterator[tuple[str, np.ndarray, int | None]]]


def decoded(
    name: str, folder: Path, files: Iterable[Path], contents: Callable[[], Contents]
) -> DataSet:
    """Decodes images once, into NumPy arrays in the user's cache folder, which are mapped into
    memory.

    The folder is ``$IRESNET_JAX_CACHE_DIR`` if that is set, else ``$XDG_CACHE_HOME/iresnet_jax`` or
    ``~/.cache/iresnet_jax``. Its content may be deleted at any time.

    Args:
        name: Name of the data set.
        folder: Folder of the files.
        files: Files that hold the images: a change of names, sizes or times of change decodes them
            anew.
        contents: Function that returns the content of the files.
    """
    state = hashlib.sha256(os.fsencode(folder.resolve()))
    for file in sorted(files):
        found = file.stat()
        state.update(
            os.fsencode(file.relative_to(folder))
            + f"\0{found.st_size}\0{found.st_mtime_ns}\n".encode()
        )
    place = user_folder() / f"decoded-{state.hexdigest()[:16]}"
    place.parent.mkdir(parents=True, exist_ok=True)
    with locked(place):  # processes that start together wait for the first
        if not place.is_dir():
            _log.info("decoding %s into %s", name, place)
            _decode(name, contents(), place)
    return _mapped(name, place, **json.loads((place / _RECORD).read_text()))


def _mapped(name: str, folder: Path, num_classes: int | None, fingerprint: str) -> DataSet:
    arrays = {path.stem: np.asarray(np.load(path, mmap_mode="r")) for path in folder.glob("*.npy")}
    labels = {} if num_classes is None else {split: arrays[f"{split}_labels"] for split in SPLITS}
    examples = {split: arrays[split] for split in SPLITS}
    return DataSet(
        name, examples, labels, num_levels=256, num_classes=num_classes, fingerprint=fingerprint
    )


def _decode(name: str, contents: Contents, place: Path) -> None:
    """Writes the arrays into a temporary folder and renames it at the end: a writer that fails
    leaves nothing.
    """
    with tempfile.TemporaryDirectory(dir=place.parent, prefix=f"{place.name}.") as temporary:
        made = Path(temporary, "decoded")
        made.mkdir()
        _write(name, contents, made)
        record = {"num_classes": contents.num_classes, "fingerprint": ""}
        record["fingerprint"] = _mapped(name, made, **record).fingerprint
        (made / _RECORD).write_text(json.dumps(record))
        # If the file system cannot lock, another process may have been faster.
        with contextlib.suppress(OSError):
            made.rename(place)


def _write(name: str, contents: Contents, folder: Path) -> None:
    """Writes ``train.npy``, ``train_labels.npy`` and so on.

    "test" is the published test split or, without one, the published validation split, as for the
    downsampled ImageNet. "validation" is the published validation split unless that became "test";
    otherwise it is carved from the training split.
    """
    num, num_classes = contents.num_examples, contents.num_classes
    test = "test" if "test" in num else "validation"
    if num.get("train", 0) < 2 or not num.get(test):
        raise ValueError(
            f"{name} needs images in the splits 'train' and 'test' or 'validation', and has {num}"
        )
    # The split of each published image.
    places = {"train": np.full(num["train"], "train"), test: np.full(num[test], "test")}
    if test == "test" and num.get("validation"):
        places["validation"] = np.full(num["validation"], "validation")
    else:
        places["train"] = np.where(validation_mask(num["train"]), "validation", "train")
    sizes = collections.Counter(np.concatenate(list(places.values())).tolist())
    arrays: dict[str, np.ndarray] = {}
    labels: dict[str, list[Any]] = {split: [] for split in SPLITS}
    for published, of_split in places.items():
        for split, (where, image, label) in zip(
            of_split.tolist(), contents.read(published), strict=True
        ):
            if not arrays:
                arrays = {
                    s: np.lib.format.open_memmap(
                        folder / f"{s}.npy", "w+", np.uint8, (size, *image.shape)
                    )
                    for s, size in sizes.items()
                }
            shape = arrays[split].shape[1:]
            if image.dtype != np.uint8 or image.shape != shape:
                raise ValueError(
                    f"{where} has {image.dtype} pixels of shape {image.shape}, and the first image "
                    f"of {name} uint8 ones of shape {shape}: give all images one size and 8-bit "
                    "pixels"
                )
            if label is not None and num_classes is not None and not 0 <= label < num_classes:
                raise ValueError(
                    f"{where} has the class {label}, and classes of {name} lie in 0 to "
                    f"{num_classes - 1}"
                )
            arrays[split][len(labels[split])] = image
            labels[split].append(label)
    if num_classes is not None:
        for split, found in labels.items():
            np.save(folder / f"{split}_labels.npy", np.array(found, np.int32))


# --------------------------------------------------------------------------------------------- TFDS

_FORMAT = "array_record"
_CHUNK = 1024  # images read at once
_OF_MNIST, _OF_CIFAR = (28, 28, 1), (32, 32, 3)
# Shape of an image and number of classes, by name.
CUSTOMARY: dict[str, tuple[tuple[int, int, int], int | None]] = {
    "mnist": (_OF_MNIST, 10),
    "fashion_mnist": (_OF_MNIST, 10),
    "kmnist": (_OF_MNIST, 10),
    "cifar10": (_OF_CIFAR, 10),
    "cifar100": (_OF_CIFAR, 100),
    "svhn_cropped": (_OF_CIFAR, 10),
    "downsampled_imagenet/32x32": (_OF_CIFAR, None),
    "downsampled_imagenet/64x64": ((64, 64, 3), None),
}


def load_tfds(name: str) -> DataSet | None:
    """A data set of TensorFlow Datasets (TFDS) by its name there, such as ``mnist``,
    ``downsampled_imagenet/32x32`` or ``cifar10:3.0.2``.

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
