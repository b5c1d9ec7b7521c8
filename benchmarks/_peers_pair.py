"""One flow in two processes of `peers.py`: as it is, and with the same weights in normflows' blocks."""

import contextlib
from typing import Any, NamedTuple

from _peers_cases import architecture, write_arrays
from _peers_processes import core_counts

OURS, NORMFLOWS = "ours", "normflows"


class Pair(NamedTuple):
    """The workers, see `_peers_fixed`.

    Attributes:
        ours: Worker of `_peers_fixed.Ours`.
        theirs: Worker of `_peers_fixed.Normflows`.
        agreement: Largest difference of PyTorch's latents from those given, of those above 1 as a share, by precision.
    """

    ours: Any
    theirs: Any
    agreement: dict[str, float]


@contextlib.contextmanager
def pair(model, x, z, start, folder, *, agreement):
    """Starts the two workers on all cores that are compared; they end with the context.

    Args:
        model: `Density` whose flow it is.
        x: Inputs of the flow.
        z: Their latents.
        start: See `_peers_processes.workers`.
        folder: Where the workers find the flow and the arrays.
        agreement: Largest difference of PyTorch's latents in float64.

    Raises:
        RuntimeError: If PyTorch's latents differ by more.
    """
    cores = max(core_counts().values(), key=len)
    write_arrays(model, x, z, folder / "arrays.npz")
    arrays, file = str(folder / "arrays.npz"), str(model.save(folder / "model.npz"))
    given = {"architecture": architecture(model.spec), "arrays": arrays, "threads": len(cores)}
    ours = start(cores, "_peers_fixed", "Ours", {"model": file, "arrays": arrays})
    theirs = start(cores, "_peers_fixed", "Normflows", given)
    found = theirs.ask("check")
    if not found["float64"] <= agreement:
        raise RuntimeError(f"PyTorch's latents in float64 are those of ours up to {found['float64']:.1e}, not {agreement:.1e}")
    yield Pair(ours, theirs, found)
    for worker in (ours, theirs):
        worker.stop()
