"""The table of figures: what each shows, and what it is made of."""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from iresnet_jax import data
from iresnet_jax.figures import densities, inverses, latents, logdets, reconstructions, singular_values, tables, trajectories
from iresnet_jax.figures.drawing import Drawing
from iresnet_jax.runs import trained_run
from iresnet_jax.runs.trained_run import Run

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"  # of a checkout; the package has no models


class Entry(NamedTuple):
    """A figure.

    Attributes:
        make: Makes it of a run, or of nothing.
        kept: Kept model that it is made of if no run is given; None if it then is made from nothing.
        takes_run: Whether it can show a run of one's own.
        look: What to look at.
    """

    make: Callable[[Run | None], Drawing]
    kept: str | None
    takes_run: bool
    look: str


def _of_examples(make: Callable[..., Drawing]) -> Callable[[Run | None], Drawing]:
    """A figure of a model and its test examples."""

    def of_run(run: Run | None) -> Drawing:
        assert run is not None
        return make(run.model, run.test_examples())

    return of_run


def _densities(run: Run | None) -> Drawing:
    return densities.figure(densities.fit() if run is None else densities.of_run(run))


def _reconstructions(run: Run | None) -> Drawing:
    if run is None:
        digits = data.load("digits")
        return reconstructions.figure(reconstructions.fit(digits), digits.examples["test"], digits.labels["test"])
    models = {"the run": reconstructions.of_run(run)}
    return reconstructions.figure(models, run.test_examples(), run.data.labels["test"])


def _latents(run: Run | None) -> Drawing:
    assert run is not None
    model = latents.of_run(run)
    return latents.figure(model, run.data.examples.get("train", run.test_examples()), run.test_examples())


def _tables(run: Run | None) -> Drawing:
    return tables.figure(RESULTS, None if run is None else run.folder)


FIGURES = {
    "trajectories": Entry(
        lambda _: trajectories.figure(),
        kept=None,
        takes_run=False,
        look="Paths of the ordinary network cross, those of the invertible one never do (Behrmann et al. 2019, Fig. 1).",
    ),
    "logdets": Entry(
        _of_examples(logdets.figure),
        kept="digits_density",
        takes_run=True,
        look="The bias falls geometrically and stays below its bound; the spread falls as one over the root of the probes.",
    ),
    "inverses": Entry(
        _of_examples(inverses.figure),
        kept="digits_density",
        takes_run=True,
        look="Errors fall faster than the rate that the Lipschitz constant guarantees, and Anderson's faster than Banach's.",
    ),
    "singular-values": Entry(
        _of_examples(singular_values.figure),
        kept="digits_density",
        takes_run=True,
        look="No singular value is above its certified bound, and no bound above the coefficient.",
    ),
    "densities": Entry(
        _densities,
        kept=None,
        takes_run=True,
        look="Each density beside its data: no negative log-likelihood is below the entropy of the data.",
    ),
    "reconstructions": Entry(
        _reconstructions,
        kept=None,
        takes_run=True,
        look="Errors stay small at every depth with the constraint; without it nothing is promised.",
    ),
    "latents": Entry(
        _latents,
        kept="digits_density",
        takes_run=True,
        look="Bits/dim along lines of latents and of pixels; how far samples are from the nearest training images.",
    ),
    "tables": Entry(
        _tables,
        kept=None,
        takes_run=True,
        look="Classification errors by coefficient, and likelihoods beside published ones, with time and hardware.",
    ),
}


def find(name: str) -> Entry:
    """The figure of a name.

    Raises:
        ValueError: If there is none.
    """
    if name not in FIGURES:
        raise ValueError(f"there is no figure {name!r}: choose one of {', '.join(FIGURES)}")
    return FIGURES[name]


def make(name: str, folder: str | Path | None = None) -> Drawing:
    """Makes a figure, of a kept model or from nothing if no run is given.

    Args:
        name: Name in `FIGURES`.
        folder: Folder of a run or of a model.

    Raises:
        ValueError: If there is no such figure, it takes no run or not this one, or the kept model is not there.
    """
    entry = find(name)
    if folder is not None and not entry.takes_run:
        raise ValueError(f"the figure {name} trains its own networks: leave --workdir out")
    if folder is None and entry.kept is not None:
        folder = RESULTS / entry.kept
        if not folder.exists():
            raise ValueError(f"kept models are in the repository, not in the package: give --workdir, as {folder} is not there")
    return entry.make(None if folder is None else trained_run.load(folder).with_data_checked())


def listing() -> str:
    """All figures, a line each."""
    width = max(map(len, FIGURES))
    return "\n".join(f"{name:{width}}  {entry.look}" for name, entry in FIGURES.items())
