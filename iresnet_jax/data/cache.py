"""Images decoded once: arrays of NumPy beside their files, which later runs only map into memory.

They lie in a folder ``iresnet_jax.decoded-STATE`` beside the files, or in the user's cache folder where that is not writable:
``IRESNET_JAX_CACHE_DIR`` if it is set, which then always holds, else ``$XDG_CACHE_HOME/iresnet_jax`` or
``~/.cache/iresnet_jax``. Files that change have another ``STATE``. The folder may be deleted at any time.
"""

import contextlib
import hashlib
import json
import logging
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from iresnet_jax.atomic_files import locked
from iresnet_jax.data.dataset import DataSet
from iresnet_jax.data.splits import SPLITS, validation_mask

FOLDER_VARIABLE = "IRESNET_JAX_CACHE_DIR"
NUM_LEVELS = 256  # of images in files
_RECORD = "record.json"

_log = logging.getLogger(__name__)


class Contents(NamedTuple):
    """Images in files, as their publisher split them.

    Attributes:
        num_examples: Number of images by the publisher's name of the split.
        num_classes: Number of classes; None without labels.
        read: Function that goes through a split: where each image is, for messages, the image ``(h, w, c)`` and its class.
    """

    num_examples: dict[str, int]
    num_classes: int | None
    read: Callable[[str], Iterator[tuple[str, np.ndarray, int | None]]]


def user_folder() -> Path:
    """The user's folder for what can be made again: ``$IRESNET_JAX_CACHE_DIR``, or ``iresnet_jax`` in their cache folder."""
    default = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "iresnet_jax")
    return Path(os.environ.get(FOLDER_VARIABLE) or default).expanduser()


def decoded(name: str, folder: Path, files: Iterable[Path], contents: Callable[[], Contents]) -> DataSet:
    """Maps decoded images into memory, and decodes them first if they are not there yet.

    Args:
        name: Name of the data set.
        folder: Folder of the files.
        files: Files that hold the images: others of their names, sizes and times of change are decoded anew.
        contents: Function that finds out what the files hold.

    Raises:
        ValueError: If the data are not images of one size with labels in range, in a training and a test split.
        OSError: If the arrays cannot be written.
    """
    state = hashlib.sha256()
    for file in sorted(files):
        found = file.stat()
        state.update(os.fsencode(file.relative_to(folder)) + f"\0{found.st_size}\0{found.st_mtime_ns}\n".encode())
    beside = folder / f"iresnet_jax.decoded-{state.hexdigest()[:16]}"
    elsewhere = user_folder() / beside.name
    places = [elsewhere] if os.environ.get(FOLDER_VARIABLE) else [beside, elsewhere]
    for place in places:
        if place.is_dir():
            return _mapped(name, place)
    place = beside if beside in places and os.access(folder, os.W_OK) else elsewhere
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        with locked(place):  # of processes that start at once, the others wait for the first
            if not place.is_dir():
                _log.info("decoding %s into %s", name, place)
                _decode(name, contents(), place)
    except OSError as error:
        raise OSError(
            f"the decoded images of {name} cannot be written into {place.parent} ({error.strerror or error}): make room there, "
            f"or set {FOLDER_VARIABLE} to another folder"
        ) from error
    return _mapped(name, place)


def _mapped(name: str, folder: Path) -> DataSet:
    try:
        arrays = {path.stem: np.asarray(np.load(path, mmap_mode="r")) for path in folder.glob("*.npy")}
        record = json.loads((folder / _RECORD).read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"{folder} is damaged, delete it to have the images decoded again: {error}") from None
    examples = {split: arrays[split] for split in SPLITS}
    labels = {} if record["num_classes"] is None else {split: arrays[f"{split}_labels"] for split in SPLITS}
    return DataSet.from_arrays(name, examples, labels, num_levels=NUM_LEVELS, **record)


def _decode(name: str, contents: Contents, place: Path) -> None:
    """Writes the arrays into a temporary folder, which takes its place at the end: a writer that fails leaves nothing."""
    with tempfile.TemporaryDirectory(dir=place.parent, prefix=f"{place.name}.") as temporary:
        made = Path(temporary, "decoded")
        made.mkdir()
        _write(name, contents, made)
        record = {"num_classes": contents.num_classes, "fingerprint": None}
        (made / _RECORD).write_text(json.dumps(record))
        record["fingerprint"] = _mapped(name, made).fingerprint
        (made / _RECORD).write_text(json.dumps(record))
        try:
            made.rename(place)
        except OSError:
            if not place.is_dir():  # otherwise another process was faster, where the file system cannot lock
                raise


def _write(name: str, contents: Contents, folder: Path) -> None:
    """Writes ``train.npy``, ``train_labels.npy`` and so on.

    "test" is the published test split, or the published validation split where there is no other, as for the downsampled
    ImageNet. "validation" is the published one if that is still free, and else carved from the training split.
    """
    from tqdm import tqdm  # needed here alone

    num = contents.num_examples
    test = "test" if "test" in num else "validation"
    if num.get("train", 0) < 2 or not num.get(test):
        found = ", ".join(f"{count} in {split!r}" for split, count in num.items()) or "none"
        raise ValueError(f"{name} needs images in the splits 'train' and 'test' or 'validation', and has {found}")
    is_carved = test == "validation" or not num.get("validation")
    held_out = validation_mask(num["train"]) if is_carved else np.zeros(num["train"], bool)
    num_held_out = int(held_out.sum()) if is_carved else num["validation"]
    sizes = {"train": int((~held_out).sum()), "validation": num_held_out, "test": num[test]}
    labels: dict[str, list[Any]] = {split: [] for split in SPLITS}
    shape = None
    with contextlib.ExitStack() as stack:
        files = {split: stack.enter_context((folder / f"{split}.npy").open("wb")) for split in SPLITS}
        for published in (split for split in SPLITS if num.get(split)):
            images = tqdm(contents.read(published), f"decoding {name}", num[published], leave=False, disable=None)
            for number, (where, image, label) in enumerate(images):
                if shape is None:
                    shape = image.shape
                    for split, file in files.items():
                        header = {"descr": "|u1", "fortran_order": False, "shape": (sizes[split], *shape)}
                        np.lib.format.write_array_header_1_0(file, header)
                if image.dtype != np.uint8 or image.shape != shape:
                    raise ValueError(
                        f"{where} has {image.dtype} pixels of shape {image.shape}, and the first image of {name} uint8 ones of "
                        f"shape {shape}: give all images one size and 8-bit pixels"
                    )
                split = "test" if published == test else published
                split = "validation" if published == "train" and held_out[number] else split
                files[split].write(np.ascontiguousarray(image).data)
                labels[split].append(label)
    if (num_classes := contents.num_classes) is None:
        return
    for split, found in labels.items():
        if min(found) < 0 or max(found) >= num_classes:
            raise ValueError(f"classes of {name} must lie in 0 to {num_classes - 1}, got {min(found)} to {max(found)}")
        np.save(folder / f"{split}_labels.npy", np.array(found, np.int32))
