"""What an image source says before anything is decoded, and the checks that the examples of all sources pass.

A source knows where its files are and whether they have changed; only `Source.open` reads them, and only if there is no decoded
copy yet. A mistake in the data is a ``ValueError`` of one sentence that names the file, or the source and the example.
"""

import hashlib
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Integer, UInt8

CHUNK = 1024  # images decoded at once: a few MB
NUM_LEVELS = 256  # all sources hold 8-bit pixels

Chunk = tuple[np.ndarray, np.ndarray | None]  # images (n, h, w, c), and labels (n,) where there are any


class Contents(NamedTuple):
    """Examples of a source, as its publisher split them.

    Attributes:
        num_examples: Number of examples by the publisher's name of the split, "train" among them.
        num_classes: Number of classes; None without labels.
        read: Function that goes through a split once, in order, a chunk at a time.
    """

    num_examples: dict[str, int]
    num_classes: int | None
    read: Callable[[str], Iterator[Chunk]]


class Source(NamedTuple):
    """Images that lie on disk in some format.

    Attributes:
        name: Name in messages.
        cache_path: Folder for the decoded copy, next to the data.
        state: State of the files, which changes when they do, see `state_of`.
        open: Function that finds out what the files hold; it imports what the format needs.
    """

    name: str
    cache_path: Path
    state: str
    open: Callable[[], Contents]


def source_in_folder(name: str, folder: Path, files: Iterable[Path], opener: Callable[[], Contents]) -> Source:
    """Makes a source of files in a folder, with its cache there."""
    return Source(name, folder / "iresnet_jax.decoded", state_of(folder, files), opener)


def source_of_file(name: str, path: Path, opener: Callable[[], Contents]) -> Source:
    """Makes a source of one file, with its cache beside it."""
    return Source(name, path.with_name(path.name + ".decoded"), state_of(path.parent, [path]), opener)


def state_of(root: Path, paths: Iterable[Path]) -> str:
    """Hashes the files' names, sizes and times of change: cheap, and different whenever a file was replaced or edited."""
    digest = hashlib.sha256()
    for path in sorted(paths):
        found = path.stat()
        digest.update(os.fsencode(path.relative_to(root)) + f"\0{found.st_size}\0{found.st_mtime_ns}\n".encode())
    return digest.hexdigest()


def check_is_folder(path: Path, name: str) -> None:
    """Raises a ValueError unless ``path`` is a folder."""
    if not path.is_dir():
        problem = "is a file, not a folder" if path.exists() else "does not exist"
        raise ValueError(f"the folder {path} for {name} {problem}: check the path")


def check_is_file(path: Path, name: str) -> None:
    """Raises a ValueError unless ``path`` is a file."""
    if not path.is_file():
        problem = "is a folder, not a file" if path.exists() else "does not exist"
        raise ValueError(f"the file {path} for {name} {problem}: check the path")


def stack(images: Sequence[UInt8[np.ndarray, "_ _ _"]], name_of: Callable[[int], str]) -> UInt8[np.ndarray, "n h w c"]:
    """Joins images of one size.

    Args:
        images: Images, at least one.
        name_of: Function that names the ``i``-th of them in a message.

    Raises:
        ValueError: If their sizes differ.
    """
    for i, image in enumerate(images):
        if image.shape != images[0].shape:
            raise ValueError(_wrong_size(name_of(i), image.shape, images[0].shape))
    return np.stack(images)


def checked(name: str, contents: Contents, split: str, image_shape: tuple[int, ...] | None = None) -> Iterator[Chunk]:
    """Goes through a split as `Contents.read` does and checks every example.

    Args:
        name: Name of the source, for messages.
        contents: Contents of the source.
        split: Split by the publisher's name.
        image_shape: Height, width and channels; by default those of the split's first image.

    Raises:
        ValueError: If images are not uint8 or not of one size, labels are out of range or missing, or there are more or fewer
            examples than the source said.
    """
    where, start, expected = f"split {split!r} of {name}", 0, contents.num_examples[split]
    for images, labels in contents.read(split):
        if images.dtype != np.uint8 or images.ndim != 4:
            raise ValueError(
                f"{where} must hold uint8 images of height x width x channels with levels 0 to 255, "
                f"got {images.dtype} of shape {images.shape[1:]}: convert them first"
            )
        image_shape = image_shape or images.shape[1:]
        if images.shape[1:] != image_shape:
            raise ValueError(_wrong_size(f"image {start} of {where}", images.shape[1:], image_shape))
        if contents.num_classes is None:
            labels = None
        elif labels is None:
            raise ValueError(f"{where} has no labels although the training images have: give all splits labels, or none")
        else:
            _check_labels(labels, len(images), contents.num_classes, start, where)
            labels = labels.astype(np.int32)
        start += len(images)
        if start > expected:
            break
        yield images, labels
    if start != expected:
        holds = f"{start}" if start < expected else "more"
        raise ValueError(f"{where} should hold {expected} examples but holds {holds}: its files are damaged, fetch them again")


def _check_labels(labels: Integer[np.ndarray, " _"], num_images: int, num_classes: int, start: int, where: str) -> None:
    if len(labels) != num_images:
        raise ValueError(f"{where} has {len(labels)} labels for {num_images} images: every image needs one")
    wrong = np.flatnonzero((labels < 0) | (labels >= num_classes))
    if len(wrong):
        raise ValueError(
            f"label {labels[wrong[0]]} of example {start + wrong[0]} of {where} is out of range: "
            f"there are {num_classes} classes, so labels run from 0 to {num_classes - 1}"
        )


def _wrong_size(which: str, shape: Sequence[int], expected: Sequence[int]) -> str:
    got, wanted = ("x".join(map(str, sizes)) for sizes in (shape, expected))
    return f"{which} is {got} where {wanted} was expected: all images must have one size, so resize them first"
