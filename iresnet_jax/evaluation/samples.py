"""Samples of a trained model, with a verdict on every one: the inverse is iterative and says where it failed."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float, Int, Num

from iresnet_jax.bijections import likelihood
from iresnet_jax.evaluation.trained import Trained, require_density
from iresnet_jax.files import replacing
from iresnet_jax.models import density
from iresnet_jax.report import plots
from iresnet_jax.training.building import build_solver


class Samples(NamedTuple):
    """Samples and how their inverse ended.

    Attributes:
        values: Images of integer levels, or points.
        converged: Whether each sample's inverse met its tolerance.
        error_bound: Of each sample, Euclidean, in the units of the flow's input, by the certified norms.
    """

    values: Num[np.ndarray, "n ..."]
    converged: Bool[np.ndarray, " n"]
    error_bound: Float[np.ndarray, " n"]


def draw(
    trained: Trained, num: int, *, temperature: float = 1.0, seed: int = 0, labels: Sequence[int] | None = None
) -> Samples:
    """Draws from the model: latents from the prior, through the inverse, to the levels of the data.

    Args:
        trained: The model.
        num: Samples, at least 1.
        temperature: Factor on the prior's scale, at least 0; 1 samples the model.
        seed: Of the latents.
        labels: A class for each sample, of a model whose classes have priors; drawn by the model by default.

    Raises:
        ValueError: If ``num``, ``temperature``, ``seed`` or a label is out of range, or the model has no classes.

    Example:
        >>> samples = draw(load("runs/digits_density"), 64, temperature=0.8)  # doctest: +SKIP
    """
    if num < 1:
        raise ValueError(f"the number of samples must be at least 1, got {num}")
    if seed < 0:
        raise ValueError(f"seed must not be negative, got {seed}")
    require_density(trained, "samples")
    spec = trained.spec
    solver = build_solver(trained.config.evaluation)
    at_once = min(num, trained.config.evaluation.batch_size)

    @jax.jit
    def batch(weights, prior, key, labels):
        settings = {"temperature": temperature, "solver": solver, "labels": labels}
        return density.sample(spec, weights, prior, key, at_once, **settings)

    key = jax.random.key(seed)
    num_batches = -(-num // at_once)
    of_batch = [None] * num_batches if labels is None else _label_batches(trained, labels, num, at_once)
    parts = [batch(trained.weights, trained.prior, jax.random.fold_in(key, i), of_batch[i]) for i in range(num_batches)]
    x, info = jax.tree.map(lambda *arrays: np.concatenate(arrays)[:num], *jax.device_get(parts))
    if spec.num_levels is not None:
        x = np.asarray(likelihood.quantize(jnp.asarray(x), spec.num_levels))
    return Samples(x, info.converged, info.error_bound)


def _label_batches(trained: Trained, labels: Sequence[int], num: int, at_once: int) -> list[Int[np.ndarray, " n"]]:
    """Labels in batches, the last one filled up."""
    density.check_classes(trained.spec)
    known = trained.spec.num_classes
    if len(labels) != num:
        raise ValueError(f"there must be a label for each of {num} samples, got {len(labels)}")
    if wrong := [label for label in labels if not 0 <= label < known]:
        raise ValueError(f"there is no class {wrong[0]}: classes are 0 to {known - 1}")
    padded = np.resize(np.asarray(labels, np.int32), -(-num // at_once) * at_once)
    return np.split(padded, len(padded) // at_once)


def figure(trained: Trained, values: Num[np.ndarray, "n ..."]) -> Any:
    """Images side by side, or points in the plane."""
    if trained.spec.num_levels is None:
        return plots.scatter(values)
    return plots.image_grid(grey_values(trained, values))


def grey_values(trained: Trained, levels: Num[np.ndarray, "n h w c"]) -> Float[np.ndarray, "n h w c"]:
    """Integer levels as grey values from 0, black, to 1, white."""
    assert trained.spec.num_levels is not None
    return levels.astype(np.float64) / (trained.spec.num_levels - 1)


def write(trained: Trained, samples: Samples, folder: str | os.PathLike[str]) -> tuple[Path, Path]:
    """Writes ``samples.png`` and ``samples.npy`` (levels as uint8, points as float32) into a folder."""
    png, npy = Path(folder) / "samples.png", Path(folder) / "samples.npy"
    with replacing(png) as incoming:
        figure(trained, samples.values).savefig(incoming, format="png", dpi=150)
    with replacing(npy) as incoming, incoming.open("wb") as file:
        np.save(file, samples.values)
    return png, npy


def warnings(samples: Samples) -> list[str]:
    """What went wrong, in sentences that name the samples."""
    failed = np.flatnonzero(~samples.converged)
    if not len(failed):
        return []
    named = ", ".join(map(str, failed[:10])) + (", ..." if len(failed) > 10 else "")
    return [f"The inverse did not converge for {len(failed)} of {len(samples.converged)} samples, numbers {named}."]


def describe(samples: Samples) -> str:
    """How sampling went, in a line or two."""
    line = (
        f"samples: the inverse converged for {samples.converged.sum()} of {len(samples.converged)}; "
        f"largest error bound {samples.error_bound.max():.2g} (Euclidean)"
    )
    return "\n".join([line, *warnings(samples)])
