"""Images decoded once: NumPy arrays in the user's cache folder, which later runs map into memory.

The folder is ``$IRESNET_JAX_CACHE_DIR`` if that is set, else ``$XDG_CACHE_HOME/iresnet_jax`` or
``~/.cache/iresnet_jax``. Its content may be deleted at any time.
"""

import hashlib
import json
import logging
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from iresnet_jax.atomic_files import FOLDER_VARIABLE, locked, user_folder
from iresnet_jax.data.dataset import SPLITS, DataSet, validation_mask

_RECORD = "record.json"

_log = logging.getLogger(__name__)


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
    """Maps decoded images into memory, and decodes them first if they are not there yet.

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
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        with locked(place):  # processes that start together wait for the first
            if not place.is_dir():
                _log.info("decoding %s into %s", name, place)
                _decode(name, contents(), place)
    except OSError as error:
        raise OSError(
            f"the decoded images of {name} cannot be written into {place.parent} "
            f"({error.strerror or error}): make room there, or set {FOLDER_VARIABLE} to another "
            "folder"
        ) from error
    try:
        return _mapped(name, place, **json.loads((place / _RECORD).read_text()))
    except (KeyError, OSError, TypeError, ValueError) as error:
        raise ValueError(
            f"{place} is damaged, delete it to have the images decoded again: {error}"
        ) from None


def _mapped(name: str, folder: Path, num_classes: int | None, fingerprint: str | None) -> DataSet:
    arrays = {path.stem: np.asarray(np.load(path, mmap_mode="r")) for path in folder.glob("*.npy")}
    labels = {} if num_classes is None else {split: arrays[f"{split}_labels"] for split in SPLITS}
    examples = {split: arrays[split] for split in SPLITS}
    return DataSet.from_arrays(
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
        record = {"num_classes": contents.num_classes, "fingerprint": None}
        record["fingerprint"] = _mapped(name, made, **record).fingerprint
        (made / _RECORD).write_text(json.dumps(record))
        try:
            made.rename(place)
        except OSError:
            # If the file system cannot lock, another process may have been faster.
            if not place.is_dir():
                raise


def _write(name: str, contents: Contents, folder: Path) -> None:
    """Writes ``train.npy``, ``train_labels.npy`` and so on.

    "test" is the published test split or, without one, the published validation split, as for the
    downsampled ImageNet. "validation" is the published validation split unless that became "test";
    otherwise it is carved from the training split.
    """
    num = contents.num_examples
    test = "test" if "test" in num else "validation"
    if num.get("train", 0) < 2 or not num.get(test):
        found = ", ".join(f"{count} in {split!r}" for split, count in num.items()) or "none"
        raise ValueError(
            f"{name} needs images in the splits 'train' and 'test' or 'validation', and has {found}"
        )
    places = {
        split: np.full(num[split], "test" if split == test else split)
        for split in SPLITS
        if num.get(split)
    }
    if test == "validation" or "validation" not in places:
        places["train"] = np.where(validation_mask(num["train"]), "validation", "train")
    sizes = {
        split: sum(int(np.sum(of_split == split)) for of_split in places.values())
        for split in SPLITS
    }
    arrays: dict[str, np.ndarray] = {}
    labels: dict[str, list[Any]] = {split: [] for split in SPLITS}
    for published, of_split in places.items():
        for split, (where, image, label) in zip(
            of_split.tolist(), contents.read(published), strict=True
        ):
            if not arrays:
                shapes = {split: (size, *image.shape) for split, size in sizes.items()}
                arrays = {
                    s: np.lib.format.open_memmap(folder / f"{s}.npy", "w+", np.uint8, shapes[s])
                    for s in SPLITS
                }
            shape = arrays[split].shape[1:]
            if image.dtype != np.uint8 or image.shape != shape:
                raise ValueError(
                    f"{where} has {image.dtype} pixels of shape {image.shape}, and the first image "
                    f"of {name} uint8 ones of shape {shape}: give all images one size and 8-bit "
                    "pixels"
                )
            arrays[split][len(labels[split])] = image
            labels[split].append(label)
    if (num_classes := contents.num_classes) is None:
        return
    for split, found in labels.items():
        if min(found) < 0 or max(found) >= num_classes:
            raise ValueError(
                f"classes of {name} must lie in 0 to {num_classes - 1}, got {min(found)} to "
                f"{max(found)}"
            )
        np.save(folder / f"{split}_labels.npy", np.array(found, np.int32))
