"""The table of figures: what each shows, and what it is made of."""

from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

from iresnet_jax.figures import densities, inverses, latents, logdets, reconstructions, singular_values, tables, trajectories
from iresnet_jax.figures.drawing import Drawing
from iresnet_jax.figures.tables import RESULTS
from iresnet_jax.runs import trained_run


class Entry(NamedTuple):
    """A figure.

    Attributes:
        make: Makes it of a run, or of None from nothing.
        kept: Kept model that it is made of if no run is given; None if it then is made from nothing.
        look: What to look at.
        needs_data: Whether it takes the data of the run.
    """

    make: Callable[..., Drawing]
    kept: str | None
    look: str
    needs_data: bool = True


FIGURES = {
    "trajectories": Entry(
        trajectories.figure,
        kept=None,
        look="Paths of the ordinary network cross, those of the invertible one never do (Behrmann et al. 2019, Fig. 1).",
    ),
    "logdets": Entry(
        logdets.figure,
        kept="digits_density",
        look="The bias falls geometrically and stays below its bound; the spread falls as one over the root of the probes.",
    ),
    "inverses": Entry(
        inverses.figure,
        kept="digits_density",
        look="Errors fall faster than the rate that the Lipschitz constant guarantees, and Anderson's faster than Banach's.",
    ),
    "singular-values": Entry(
        singular_values.figure,
        kept="digits_density",
        look="No singular value is above its certified bound, nor, with a budget of layers, a bound above the coefficient.",
    ),
    "densities": Entry(
        densities.figure,
        kept=None,
        look="Each density beside its data: no negative log-likelihood is below the entropy by more than its error.",
    ),
    "reconstructions": Entry(
        reconstructions.figure,
        kept=None,
        look="Errors stay small at every depth with the constraint; without it nothing is promised.",
    ),
    "latents": Entry(
        latents.figure,
        kept="digits_density",
        look="Bits/dim along lines of latents and of pixels; how far samples are from the nearest training images.",
    ),
    "tables": Entry(
        tables.figure,
        kept=None,
        look="Classification errors by coefficient, and likelihoods beside published ones, with time and hardware.",
        needs_data=False,
    ),
}


def make(name: str, folder: str | Path | None = None, data: str | None = None) -> tuple[Drawing, tuple[str, ...]]:
    """Makes a figure, of a kept model or from nothing if no run is given; also the run's `Run.notes`.

    Args:
        name: Name in `FIGURES`.
        folder: Folder of a run or of a model.
        data: Name of other data than those that the run was trained on.

    Raises:
        ValueError: If there is no such figure, it takes no run or not this one, or the kept model is not there.
        RuntimeError: If matplotlib is not installed.
    """
    if name not in FIGURES:
        raise ValueError(f"there is no figure {name!r}: choose one of {', '.join(FIGURES)}")
    if find_spec("matplotlib") is None:
        raise RuntimeError("figures are drawn by matplotlib, which is not installed: pip install 'iresnet_jax[train]'")
    entry = FIGURES[name]
    if folder is None and entry.kept is not None:
        folder = RESULTS / entry.kept
        if not folder.exists():
            raise ValueError(f"kept models are in the repository, not in the package: give --workdir, as {folder} is not there")
    if folder is None:
        if data:
            raise ValueError(f"the figure {name} is made from nothing, or of the run that --workdir names: leave --data out")
        return entry.make(None), ()
    run = trained_run.load(folder)
    run = run.with_data(data) if data else run
    run = run.with_data_checked() if entry.needs_data else run
    return entry.make(run), run.notes


def listing() -> str:
    """All figures, a line each."""
    width = max(map(len, FIGURES))
    return "\n".join(f"{name:{width}}  {entry.look}" for name, entry in FIGURES.items())
