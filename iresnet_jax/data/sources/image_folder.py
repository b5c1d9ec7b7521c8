"""A folder of image files: ``train/CLASS/NAME.png`` and ``test/CLASS/NAME.png``, or without classes ``train/NAME.png``."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from iresnet_jax.data.sources.source import CHUNK, Chunk, Contents, Source, check_path

_SPLITS = {"train": ("train",), "validation": ("validation", "valid", "val"), "test": ("test",)}
_SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".gif", ".ppm", ".pgm", ".tif", ".tiff", ".webp"}
_GREY, _COLOUR = {"1", "L"}, {"RGB", "P", "CMYK", "YCbCr"}  # modes of Pillow that become one or three channels of 8 bits


def source(folder: Path, name: str) -> Source:
    """Finds images by class in ``train/`` and ``test/``, and in ``validation/`` (or ``val/``) if there is one.

    Classes are numbered in the order of their folders' names in ``train/``. Grey images get one channel, others three.

    Raises:
        ValueError: If there is no such folder, or a split under two names.
    """
    check_path(folder, name, is_folder=True)
    files = {}
    for split, names in _SPLITS.items():
        found = [folder / candidate for candidate in names if (folder / candidate).is_dir()]
        if len(found) > 1:
            raise ValueError(f"{folder} has both {found[0].name} and {found[1].name}: remove or rename one of them")
        for inside in found:
            files[split] = sorted(path for path in inside.rglob("*") if _is_image(path.relative_to(inside)))
    everything = [path for paths in files.values() for path in paths]
    return Source.of_files(name, folder, everything, lambda: _contents(folder, name, files))


def _contents(folder: Path, name: str, files: dict[str, list[Path]]) -> Contents:
    classes = sorted({_class_of(path, folder) for path in files.get("train", ())})
    labelled = classes not in ([], [""])
    number = {of_class: i for i, of_class in enumerate(classes)}
    for path in (path for paths in files.values() for path in paths):
        if labelled and not _class_of(path, folder):
            raise ValueError(f"{path} lies beside the folders of the classes: move it into one, or remove it")
        if _class_of(path, folder) not in number:
            raise ValueError(
                f"the class of {path} does not occur in {folder / 'train'}: {name} needs training images of every class"
            )

    def read(split: str) -> Iterator[Chunk]:
        for start in range(0, len(files[split]), CHUNK):
            block = files[split][start : start + CHUNK]
            labels = np.array([number[_class_of(path, folder)] for path in block]) if labelled else None
            yield [_decode(path) for path in block], labels

    num_examples = {split: len(paths) for split, paths in files.items()}
    return Contents(num_examples, len(classes) if labelled else None, read, lambda split, i: str(files[split][i]))


def _is_image(path: Path) -> bool:
    """Tells whether a file is named like an image, and neither it nor a folder above it is hidden."""
    return path.suffix.lower() in _SUFFIXES and not any(part.startswith(".") for part in path.parts)


def _class_of(path: Path, folder: Path) -> str:
    """Returns ``cat`` for ``train/cat/1.png``, and nothing for ``train/1.png``."""
    _, *classes, _ = path.relative_to(folder).parts
    return "/".join(classes)


def _decode(path: Path) -> np.ndarray:
    from PIL import Image  # needed by this source alone

    try:
        with Image.open(path) as image:
            if image.mode not in _GREY | _COLOUR:
                raise ValueError(f"{path} has pixels of type {image.mode}: convert it to 8-bit grey or opaque RGB")
            pixels = np.asarray(image.convert("L" if image.mode in _GREY else "RGB"))
    except (OSError, SyntaxError) as error:  # what Pillow raises for damaged files
        raise ValueError(f"{path} is not an intact image: {error}") from None
    return pixels if pixels.ndim == 3 else pixels[..., None]
