"""Images in their published formats: scikit-learn's digits, IDX files, CIFAR's binary files, image
files.
"""

import gzip
import math
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from jaxtyping import Int, Integer

from iresnet_jax.data.arrays import Arrays, from_arrays
from iresnet_jax.data.cache import Contents, decoded
from iresnet_jax.data.dataset import DataSet, by_digest

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

_PREFIXES = {"train": ("train",), "test": ("t10k", "test")}  # of the usual file names


def load_idx(folder: Path, name: str) -> DataSet:
    """MNIST and its relatives: ``train-images-idx3-ubyte``, ``train-labels-idx1-ubyte``,
    ``t10k-...`` or ``.gz``.
    """
    images, labels = (
        {split: read_idx(_find_idx(folder, split, kind, name)) for split in _PREFIXES}
        for kind in ("images-idx3", "labels-idx1")
    )
    num_classes = 1 + max(int(found.max(initial=0)) for found in labels.values())
    return from_arrays(
        name,
        {split: Arrays(images[split][..., None], labels[split]) for split in images},
        num_classes=num_classes,
    )


def read_idx(path: Path) -> np.ndarray:
    """Reads one IDX file of unsigned bytes, plain or compressed with gzip.

    The file is two zero bytes, a byte for the type (8: unsigned byte), a byte for the number of
    dimensions, each dimension as a big-endian 32-bit integer, and then the bytes
    (http://yann.lecun.com/exdb/mnist).
    """
    content = path.read_bytes()
    if content[:2] == b"\x1f\x8b":
        try:
            content = gzip.decompress(content)
        except (EOFError, OSError, zlib.error) as error:
            raise ValueError(
                f"{path} is not an intact gzip file: {error}; fetch it again"
            ) from None
    if len(content) < 4 or content[:3] != b"\0\0\x08":
        raise ValueError(
            f"{path} is not an IDX file of unsigned bytes, which begins with 0, 0, 8; "
            "fetch it again"
        )
    start = 4 + 4 * content[3]
    shape = np.frombuffer(content[4:start].ljust(start - 4, b"\0"), ">u4").tolist()
    if len(content) - start != math.prod(shape):
        raise ValueError(
            f"{path} should hold {' x '.join(map(str, shape))} = {math.prod(shape)} bytes after "
            f"its header but holds {len(content) - start}: fetch it again"
        )
    return np.frombuffer(content, np.uint8, offset=start).reshape(shape)


def _find_idx(folder: Path, split: str, kind: str, name: str) -> Path:
    """Finds a file of a split; an unpacked file takes precedence over its archive."""
    names = [f"{prefix}-{kind}-ubyte" for prefix in _PREFIXES[split]]
    # Some archives unpack to train-images.idx3-ubyte.
    patterns = [of_name.replace("-idx", "?idx") for of_name in names]
    for ending in ("", ".gz"):
        found = sorted(
            {path for pattern in patterns for path in folder.glob(f"*{pattern}{ending}")}
        )
        if len(found) > 1:
            raise ValueError(f"{folder} has {found[0].name} and {found[1].name}: keep one of them")
        if found:
            return found[0]
    raise ValueError(
        f"{name} needs the file {' or '.join(names)}[.gz] in {folder} for its {split} split"
    )


# -------------------------------------------------------------------------------------------- CIFAR

_PIXELS = 3 * 32 * 32
_CIFAR10 = {"train": [f"data_batch_{i}.bin" for i in range(1, 6)], "test": ["test_batch.bin"]}
_CIFAR100 = {"train": ["train.bin"], "test": ["test.bin"]}


def load_cifar(folder: Path, name: str) -> DataSet:
    """CIFAR-10 or CIFAR-100 from the unpacked archive of the authors' binary version.

    A record is the label (CIFAR-100: the coarse and the fine one) and 3 x 32 x 32 bytes, one colour
    plane after the other (https://www.cs.toronto.edu/~kriz/cifar.html).
    """
    found = {file.name: file for file in folder.rglob("*.bin")}
    is_100 = "train.bin" in found
    if is_100 and "test_batch.bin" in found:
        raise ValueError(
            f"{folder} holds both CIFAR-10 and CIFAR-100: give the folder of one of them"
        )
    num_labels = 2 if is_100 else 1
    size, parts = num_labels + _PIXELS, {}
    for split, files in (_CIFAR100 if is_100 else _CIFAR10).items():
        if missing := [file for file in files if file not in found]:
            raise ValueError(
                f"{folder} lacks {', '.join(missing)}: the binary version of CIFAR is needed, as "
                "cifar-10-binary.tar.gz unpacks"
            )
        content = b"".join(found[file].read_bytes() for file in files)
        if not content or len(content) % size:
            raise ValueError(
                f"{split} files in {folder} have {len(content)} bytes, not a multiple "
                f"of {size}: fetch them again"
            )
        records = np.frombuffer(content, np.uint8).reshape(-1, size)
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
    files = {}
    for split, names in _FOLDERS.items():
        found = [folder / candidate for candidate in names if (folder / candidate).is_dir()]
        if len(found) > 1:
            raise ValueError(
                f"{folder} has both {found[0].name} and {found[1].name}: remove or "
                "rename one of them"
            )
        for inside in found:
            files[split] = sorted(
                path for path in inside.rglob("*") if _is_image(path.relative_to(inside))
            )
    everything = [path for paths in files.values() for path in paths]
    classes = sorted({_class_of(path, folder) for path in files.get("train", ())})
    is_labelled = classes not in ([], [""])
    for path in everything:
        if is_labelled and not _class_of(path, folder):
            raise ValueError(
                f"{path} lies beside the folders of the classes: move it into one, or remove it"
            )
        if classes and _class_of(path, folder) not in classes:
            raise ValueError(
                f"the class of {path} does not occur in {folder / 'train'}: {name} needs training "
                "images of every class"
            )

    def read(split: str) -> Iterator[tuple[str, np.ndarray, int | None]]:
        for path in files[split]:
            yield (
                str(path),
                _pixels(path),
                classes.index(_class_of(path, folder)) if is_labelled else None,
            )

    num = {split: len(paths) for split, paths in files.items()}
    return decoded(
        name, folder, everything, lambda: Contents(num, len(classes) if is_labelled else None, read)
    )


def _is_image(path: Path) -> bool:
    """Whether a file is named like an image, and neither file nor folders are hidden."""
    return path.suffix.lower() in _SUFFIXES and not any(part.startswith(".") for part in path.parts)


def _class_of(path: Path, folder: Path) -> str:
    """Returns ``cat`` for ``train/cat/1.png``, and nothing for ``train/1.png``."""
    _, *classes, _ = path.relative_to(folder).parts
    return "/".join(classes)


def _pixels(path: Path) -> np.ndarray:
    from PIL import Image  # needed by this source alone

    try:
        with Image.open(path) as image:
            if image.mode not in _GREY | _COLOUR:
                raise ValueError(
                    f"{path} has pixels of type {image.mode}: convert it to 8-bit "
                    "grey or opaque RGB"
                )
            pixels = np.asarray(image.convert("L" if image.mode in _GREY else "RGB"))
    except (OSError, SyntaxError) as error:  # raised by Pillow for damaged files
        raise ValueError(f"{path} is not an intact image: {error}") from None
    return pixels if pixels.ndim == 3 else pixels[..., None]
