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

CHUNK = 1024  # images decoded at once: a few MB
NUM_LEVELS = 256  # all sources hold 8-bit pixels

Chunk = tuple[Sequence[np.ndarray] | np.ndarray, np.ndarray | None]  # images (h, w, c), and their labels if there are any


class Contents(NamedTuple):
    """Examples of a source, as its publisher split them.

    Attributes:
        num_examples: Number of examples by the publisher's name of the split, "train" among them.
        num_classes: Number of classes; None without labels.
        read: Function that goes through a split once, in order, a chunk at a time.
        name_of: Function that names an example of a split in messages; None counts them.
    """

    num_examples: dict[str, int]
    num_classes: int | None
    read: Callable[[str], Iterator[Chunk]]
    name_of: Callable[[str, int], str] | None = None

    @classmethod
    def of_arrays(
        cls, name: str, images: dict[str, np.ndarray], labels: dict[str, np.ndarray], num_classes: int | None = None
    ) -> "Contents":
        """Contents that are in memory.

        Args:
            images: Images ``(n, h, w, c)`` or ``(n, h, w)`` by split.
            labels: Labels by split; splits may lack them.
            num_classes: Number of classes; by default one more than the largest label of the training images.

        Raises:
            ValueError: If labels are no integers, one per image.
        """
        for split, found in labels.items():
            if found.shape != (len(images[split]),) or not np.issubdtype(found.dtype, np.integer):
                raise ValueError(
                    f"split {split!r} of {name} needs one integer as label of each of its {len(images[split])} images, "
                    f"got {found.dtype} of shape {found.shape}"
                )

        def read(split: str) -> Iterator[Chunk]:
            for start in range(0, len(images[split]), CHUNK):
                block = images[split][start : start + CHUNK]
                of_block = labels[split][start : start + CHUNK] if split in labels else None
                yield block[..., None] if block.ndim == 3 else block, of_block

        if num_classes is None and "train" in labels:
            num_classes = 1 + int(labels["train"].max(initial=0))
        return cls({split: len(array) for split, array in images.items()}, num_classes, read)


class Source(NamedTuple):
    """Images that lie on disk in some format.

    Attributes:
        name: Name in messages.
        cache_path: Folder for the decoded copy, next to the data.
        state: State of the files, which changes when they do.
        open: Function that finds out what the files hold; it imports what the format needs.
    """

    name: str
    cache_path: Path
    state: str
    open: Callable[[], Contents]

    @classmethod
    def of_files(cls, name: str, path: Path, files: Iterable[Path], opener: Callable[[], Contents]) -> "Source":
        """Makes a source of files in a folder, with its cache there, or of one file, with its cache beside it.

        The state is a hash of the files' names, sizes and times of change: cheap, and different whenever a file was replaced or
        edited.
        """
        root = path if path.is_dir() else path.parent
        cache_path = path / "iresnet_jax.decoded" if path.is_dir() else path.with_name(path.name + ".decoded")
        state = hashlib.sha256()
        for file in sorted(files):
            found = file.stat()
            state.update(os.fsencode(file.relative_to(root)) + f"\0{found.st_size}\0{found.st_mtime_ns}\n".encode())
        return cls(name, cache_path, state.hexdigest(), opener)


def check_path(path: Path, name: str, *, is_folder: bool) -> None:
    """Raises a ValueError unless ``path`` is a folder, or unless it is a file."""
    if not (path.is_dir() if is_folder else path.is_file()):
        wanted, found = ("folder", "file") if is_folder else ("file", "folder")
        problem = f"is a {found}, not a {wanted}" if path.exists() else "does not exist"
        raise ValueError(f"the {wanted} {path} for {name} {problem}: check the path")


def checked(name: str, contents: Contents, splits: Iterable[str]) -> Iterator[tuple[str, slice, np.ndarray, np.ndarray | None]]:
    """Goes through splits as `Contents.read` does, one after the other, and checks every example.

    Returns:
        Iterator over the split, the rows of a chunk in it, uint8 images ``(n, h, w, c)`` and int32 labels ``(n,)``.

    Raises:
        ValueError: If images are not uint8 or not of one size, labels are out of range or missing, or there are more or fewer
            examples than the source said.
    """
    image_shape, num_classes = None, contents.num_classes
    for split in splits:
        where, start, expected = f"split {split!r} of {name}", 0, contents.num_examples[split]
        for images, labels in contents.read(split):
            for i, image in enumerate(images, start):
                if image.dtype != np.uint8 or image.ndim != 3:
                    raise ValueError(
                        f"{where} must hold uint8 images of height x width x channels with levels 0 to 255, "
                        f"got {image.dtype} of shape {image.shape}: convert them first"
                    )
                image_shape = image_shape or image.shape
                if image.shape != image_shape:
                    got, wanted = ("x".join(map(str, shape)) for shape in (image.shape, image_shape))
                    which = contents.name_of(split, i) if contents.name_of else f"image {i} of {where}"
                    raise ValueError(
                        f"{which} is {got} where {wanted} was expected: all images must have one size, so resize them"
                    )
            if (labels is None) != (num_classes is None):
                has = "no labels" if labels is None else "labels"
                raise ValueError(f"{where} has {has}, unlike the training images: give all splits labels, or none")
            if labels is not None and num_classes is not None:
                if len(wrong := np.flatnonzero((labels < 0) | (labels >= num_classes))):
                    raise ValueError(
                        f"label {labels[wrong[0]]} of example {start + wrong[0]} of {where} is out of range: "
                        f"there are {num_classes} classes, so labels run from 0 to {num_classes - 1}"
                    )
                labels = labels.astype(np.int32)
            rows = slice(start, start := start + len(images))
            if start > expected:
                break
            yield split, rows, np.asarray(images), labels
        if start != expected:
            holds = f"{start}" if start < expected else "more"
            raise ValueError(
                f"{where} should hold {expected} examples but holds {holds}: its files are damaged, fetch them again"
            )
