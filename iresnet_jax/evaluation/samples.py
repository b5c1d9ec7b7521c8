"""Samples of a trained model, each with a verdict: the inverse is iterative and says where it failed."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float, Int, Num

from iresnet_jax.bijections import likelihood
from iresnet_jax.evaluation.results import SampleQuality
from iresnet_jax.evaluation.trained import Trained, require_density
from iresnet_jax.models import density
from iresnet_jax.training.config import build_solver


class Samples(NamedTuple):
    """Samples and how their inverse ended.

    Attributes:
        values: Images of integer levels, or points.
        converged: Whether each sample's inverse met its tolerance.
        error_bound: Error bound of each sample, Euclidean, in the units of the flow's input, by the certified norms.
    """

    values: Num[np.ndarray, "n ..."]
    converged: Bool[np.ndarray, " n"]
    error_bound: Float[np.ndarray, " n"]

    @property
    def quality(self) -> SampleQuality:
        """The numbers of a report."""
        failed = np.flatnonzero(~self.converged)
        return SampleQuality(
            num=len(self.values),
            fraction_converged=float(self.converged.mean()),
            max_error_bound=float(self.error_bound.max()),
            failed=tuple(failed.tolist()),
        )


def draw(
    model: Trained,
    num: int,
    settings: Any,
    *,
    temperature: float = 1.0,
    seed: int = 0,
    labels: Sequence[int] | None = None,
) -> Samples:
    """Draws latents from the prior and inverts them, to the levels of the data.

    Args:
        model: A density.
        num: Samples, at least 1.
        settings: Settings of evaluation: batch size and solver.
        temperature: Factor on the prior's scale, at least 0; 1 samples the model.
        seed: Seed of the latents, at least 0.
        labels: Class of each sample, of a model whose classes have priors; the model draws them by default.

    Raises:
        ValueError: If ``num``, ``temperature``, ``seed`` or a label is out of range, or the model has no classes.

    Example:
        >>> samples = draw(model, 64, config.evaluation, temperature=0.8)  # doctest: +SKIP
    """
    if num < 1:
        raise ValueError(f"the number of samples must be at least 1, got {num}")
    if seed < 0:
        raise ValueError(f"seed must not be negative, got {seed}")
    require_density(model, "samples")
    spec, solver = model.spec, build_solver(settings)
    at_once = min(num, settings.batch_size)

    @jax.jit
    def batch(weights, prior, key, labels):
        how = {"temperature": temperature, "solver": solver, "labels": labels}
        return density.sample(spec, weights, prior, key, at_once, **how)

    key = jax.random.key(seed)
    num_batches = -(-num // at_once)
    batch_labels = [None] * num_batches if labels is None else _label_batches(spec, labels, num, at_once)
    parts = [batch(model.weights, model.prior, jax.random.fold_in(key, i), batch_labels[i]) for i in range(num_batches)]
    x, info = jax.tree.map(lambda *arrays: np.concatenate(arrays)[:num], *jax.device_get(parts))
    if spec.num_levels is not None:
        x = np.asarray(likelihood.quantize(jnp.asarray(x), spec.num_levels))
    return Samples(x, info.converged, info.error_bound)


def _label_batches(spec: density.DensitySpec, labels: Sequence[int], num: int, at_once: int) -> list[Int[np.ndarray, " n"]]:
    """Labels in batches of one size, the last one filled up."""
    density.check_classes(spec)
    assert spec.num_classes is not None
    if len(labels) != num:
        raise ValueError(f"there must be a label for each of {num} samples, got {len(labels)}")
    if wrong := [label for label in labels if not 0 <= label < spec.num_classes]:
        raise ValueError(f"there is no class {wrong[0]}: classes are 0 to {spec.num_classes - 1}")
    padded = np.resize(np.asarray(labels, np.int32), -(-num // at_once) * at_once)
    return np.split(padded, len(padded) // at_once)
