"""Images decoded once: every source is read through a cache that later runs only map into memory.

The cache lies next to the data, or under the user's cache folder where that is not writable: ``IRESNET_JAX_CACHE_DIR`` if it is
set, which then always holds, else ``$XDG_CACHE_HOME/iresnet_jax`` or ``~/.cache/iresnet_jax``. It may be deleted at any time.
"""

import hashlib
import itertools
import logging
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from iresnet_jax.atomic_files import locked
from iresnet_jax.data import cache, splits
from iresnet_jax.data.dataset import DataSet
from iresnet_jax.data.sources.source import NUM_LEVELS, Source, checked

_log = logging.getLogger(__name__)


def load(source: Source) -> DataSet:
    """Maps a source's decoded images into memory, decoding them first if there is no valid cache of them.

    A cache that is incomplete, altered or made from other source files is made again. Of processes that start at once, the
    others wait for the first where the file system can lock, and else each decodes.

    Raises:
        ValueError: If the data are not images of one size with labels in range, in a training and a test split.
        OSError: If the cache cannot be written anywhere.
    """
    places = cache_places(source.cache_path)
    if found := _find(places, source):
        return found
    place = _first_writable(places, source)
    with locked(place):
        found = _find([place], source, quiet=True)  # another process may have been first
        if found is None:
            _decode(source, place)
            found = _find([place], source)
    if found is None:
        raise OSError(f"the cache {place} was replaced while it was written: is another program using the folder?")
    return found


def cache_places(beside: Path) -> list[Path]:
    """Folders where the cache may lie, the preferred one first."""
    digest = hashlib.sha256(os.fsencode(beside.resolve())).hexdigest()[:12]
    elsewhere = cache.user_folder() / "-".join([*beside.parent.parts[-2:], digest]).lstrip("/")
    return [elsewhere] if os.environ.get(cache.FOLDER_VARIABLE) else [beside, elsewhere]


def _find(places: list[Path], source: Source, *, quiet: bool = False) -> DataSet | None:
    for place in places:
        try:
            cached = cache.read(place)
        except cache.DamagedCacheError as error:
            if not quiet:
                _log.warning("%s; %s is decoded again", error, source.name)
            continue
        if cached and cached.facts.source_state == source.state:
            return DataSet.from_arrays(
                source.name,
                _by_split("examples", cached.arrays),
                _by_split("labels", cached.arrays),
                num_levels=cached.facts.num_levels,
                num_classes=cached.facts.num_classes,
                fingerprint=cached.fingerprint,
            )
    return None


def _by_split(kind: str, arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Picks ``{split: array}`` from arrays named ``split_kind``."""
    return {name.removesuffix(f"_{kind}"): array for name, array in arrays.items() if name.endswith(f"_{kind}")}


def _first_writable(places: list[Path], source: Source) -> Path:
    for place in places:
        folder = place.parent
        try:
            folder.mkdir(parents=True, exist_ok=True)
            # A folder without any permission to write was meant to stay as it is, even where root could.
            if os.access(folder, os.W_OK) and folder.stat().st_mode & 0o222:
                return place
        except OSError:
            continue
    tried = " and ".join(str(place.parent) for place in places)
    raise OSError(
        f"cannot write the decoded images of {source.name} into {tried}: set IRESNET_JAX_CACHE_DIR to a writable folder"
    )


def _decode(source: Source, place: Path) -> None:
    """Reads the source once, in pieces, and writes the cache."""
    from tqdm import tqdm  # needed here alone

    _log.info("decoding %s into %s", source.name, place)
    contents = source.open()
    routes = splits.routes(contents.num_examples, source.name)
    train = checked(source.name, contents, "train")
    first = next(train, None)
    if first is None:
        raise ValueError(f"split 'train' of {source.name} turned out to be empty: its files are damaged, fetch them again")
    image_shape = first[0].shape[1:]

    def pieces() -> Iterator[tuple[str, np.ndarray]]:
        for published, masks in routes.items():
            if published == "train":
                chunks = itertools.chain([first], train)
            else:
                chunks = checked(source.name, contents, published, image_shape)
            start = 0
            for images, labels in chunks:
                rows = slice(start, start := start + len(images))
                progress.update(len(images))
                for split, mask in masks.items():
                    yield f"{split}_examples", images[mask[rows]]
                    if labels is not None:
                        yield f"{split}_labels", labels[mask[rows]]

    layout = {}
    for masks in routes.values():
        for split, mask in masks.items():
            layout[f"{split}_examples"] = cache.Layout("uint8", (int(mask.sum()), *image_shape))
            if contents.num_classes is not None:
                layout[f"{split}_labels"] = cache.Layout("int32", (int(mask.sum()),))
    facts = cache.Facts(source.state, NUM_LEVELS, contents.num_classes)
    total = sum(contents.num_examples[published] for published in routes)
    with tqdm(total=total, desc=f"decoding {source.name}", unit=" images", leave=False, disable=None) as progress:
        cache.write(place, facts, layout, pieces())
