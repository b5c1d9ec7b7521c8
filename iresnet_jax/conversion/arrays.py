"""Arrays of a network by their names: read from a file that runs no code, and taken one by one, so that none is overlooked."""

import math
import os
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

VectorPair = tuple[Float[np.ndarray, "cout s s"], Float[np.ndarray, "cin s s"]]
_PARALLEL = "module."  # what a wrapper for several GPUs puts in front of every name
_LISTED = 12  # names in a message


def read_file(path: str | os.PathLike[str]) -> dict[str, np.ndarray]:
    """The arrays of a ``.npz`` or ``.safetensors`` file by their names.

    Raises:
        ValueError: If there is no such file, it is of another kind, as a pickle is, it is damaged, or it needs the package
            safetensors, which is not installed.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"there is no file {path}: write the arrays of the network as npz or safetensors")
    is_npz = _is_npz(path)
    if not is_npz and path.suffix != ".safetensors":
        raise ValueError(
            f"{path} is neither npz nor safetensors, and a pickle, as torch.save writes, can run any program while it is read: "
            "write its arrays as npz in PyTorch, see docs/models.md"
        )
    try:
        if is_npz:
            with np.load(path, allow_pickle=False) as archive:
                return dict(archive)
        from safetensors.numpy import load_file  # late: an extra

        return load_file(path)
    except ModuleNotFoundError:
        raise ValueError(f"{path} needs a package: pip install 'iresnet_jax[safetensors]', or write npz") from None
    except Exception as error:  # there is no list of what a damaged file makes others raise
        raise ValueError(f"{path} cannot be read ({error}): write it again") from error


def _is_npz(path: Path) -> bool:
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return all(name.endswith(".npy") for name in archive.namelist())


class Arrays:
    """Arrays by their names, each of which is taken once or known to be of no use.

    What is wrong is kept until `check`, which says all of it in one error; arrays of zeros stand in until then.

    Args:
        given: Arrays by name.
        unused: Last parts of names, after a dot, of arrays that no function of the network depends on.
    """

    def __init__(self, given: Mapping[str, Any], unused: Iterable[str]):
        self._left = {name.removeprefix(_PARALLEL): np.asarray(array) for name, array in given.items()}
        self._unused = set(unused)
        self._missing: list[str] = []
        self._wrong: list[str] = []

    def take(self, name: str, *shape: int) -> Float[np.ndarray, "..."]:
        """The array of that name in float64."""
        return self._checked(name, self._take(name), shape)

    def take_vectors(self, left: str, right: str, channels: tuple[int, int]) -> VectorPair:
        """Singular vectors of a layer, flattened from ``(channels, s, s)`` with any side ``s``, which is the same for both."""
        of_left, of_right = self._take(left), self._take(right)
        side = 1 if of_right is None else math.isqrt(of_right.size // channels[1])

        def image(name, vector, num):
            return self._checked(name, vector, (num * side**2,)).reshape(num, side, side)

        return image(left, of_left, channels[0]), image(right, of_right, channels[1])

    def shape(self, name: str, default: tuple[int, ...]) -> tuple[int, ...]:
        """Shape of an array that will be taken; the default if it is missing or has another number of axes."""
        array = self._left.get(name)
        return default if array is None or array.ndim != len(default) else array.shape

    def ignore(self, *names: str) -> None:
        """Marks arrays, where they are there, as known to be of no use."""
        for name in names:
            self._left.pop(name, None)

    def check(self, source: str) -> None:
        """Raises ``ValueError`` if arrays are missing, left over, of another shape or not finite; the message names them."""
        left = [name for name in self._left if name.rpartition(".")[2] not in self._unused]
        found = {"missing": self._missing, "left over": left, "not as expected": self._wrong}
        if said := [f"{what}: {_listed(names)}" for what, names in found.items() if names]:
            raise ValueError(f"the arrays are not those of {source}; {'; '.join(said)}: give the command that trained them")

    def _take(self, name: str) -> np.ndarray | None:
        if name not in self._left:
            self._missing.append(name)
        return self._left.pop(name, None)

    def _checked(self, name: str, array: np.ndarray | None, shape: tuple[int, ...]) -> np.ndarray:
        if array is None:
            return np.zeros(shape)
        if array.shape != shape:
            self._wrong.append(f"{name} of shape {array.shape} instead of {shape}")
        elif not (np.issubdtype(array.dtype, np.floating) and np.all(np.isfinite(array))):
            self._wrong.append(f"{name} of {array.dtype}, not all finite numbers")
        else:
            return array.astype(np.float64)
        return np.zeros(shape)


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
    return ", ".join(names[:_LISTED]) + more
