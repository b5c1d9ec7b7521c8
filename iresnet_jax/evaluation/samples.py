"""Samples of a trained model, each with a verdict: the inverse is iterative and says where it failed."""

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import jax
import numpy as np
from jaxtyping import Bool, Float, Int, Num

from iresnet_jax.bijections.bijection import follow_inverse_info, no_inverse_error
from iresnet_jax.certification.decode import to_data
from iresnet_jax.evaluation.round_trips import Guarantee, bound_inverses
from iresnet_jax.models.density import Density
from iresnet_jax.training import parallel


@dataclass(frozen=True)
class SampleConvergence:
    """Ends of the inverses of a number of samples.

    Attributes:
        num: Samples.
        fraction_converged: Fraction whose inverse met its tolerance.
        max_error_bound: Largest product of the blocks' error bounds, Euclidean, in the units of continuous data.
        failed: Numbers of the samples that did not converge.
        guarantee: Guaranteed errors of the first samples; None if that was not asked for.
    """

    num: int
    fraction_converged: float
    max_error_bound: float
    failed: tuple[int, ...] = ()
    guarantee: Guarantee | None = None

    def __str__(self) -> str:
        line = f"samples: the inverse converged for {self.num - len(self.failed)} of {self.num}"
        return "\n".join([line, *([str(self.guarantee)] if self.guarantee else []), *self.warnings()])

    def warnings(self, name: str = "samples") -> list[str]:
        """A sentence that numbers the samples whose inverse did not converge."""
        if not self.failed:
            return []
        named = ", ".join(map(str, self.failed[:10])) + (", ..." if len(self.failed) > 10 else "")
        return [f"The inverse did not converge for {len(self.failed)} of {self.num} {name}, numbers {named}."]


class Samples(NamedTuple):
    """Images of integer levels, or points; whether each one's inverse met its tolerance; and the numbers of a report."""

    values: Num[np.ndarray, "n ..."]
    converged: Bool[np.ndarray, " n"]
    convergence: SampleConvergence


def draw(
    model: Density,
    num: int,
    batch_size: int,
    *,
    temperature: float = 1.0,
    seed: int = 0,
    labels: Sequence[int] | None = None,
    contexts: Float[np.ndarray, "_ k"] | None = None,
    num_certified: int | None = None,
) -> Samples:
    """Draws latents from the prior and inverts them on all devices, to the levels of the data.

    The latents do not depend on the number of devices.

    Args:
        num: Samples, at least 1.
        temperature: Factor on the prior's scale, at least 0; 1 samples the model.
        seed: Seed of the latents, in [0, 2^32).
        labels: Class of each sample, of a model whose classes have priors; the model draws them by default.
        contexts: Context of each sample, of a conditional density; fewer than samples are taken again and again.
        num_certified: Samples that are certified by `certify.inverse`, from the first; 0 says that one takes too long, None
            that nobody asked.

    Raises:
        ValueError: If ``num``, ``temperature``, ``seed`` or a label is out of range, the model has no classes, or it needs
            contexts and has none.

    Example:
        >>> samples = draw(model, 64, 64, temperature=0.8)  # doctest: +SKIP
    """
    if num < 1:
        raise ValueError(f"the number of samples must be at least 1, got {num}")
    if not 0 <= seed < 2**32:
        raise ValueError(f"seed must lie in [0, 4294967296), as JAX would cut off further bits, got {seed}")
    at_once = min(num, batch_size)
    key, num_batches = jax.random.key(seed), -(-num // at_once)
    batches = [None] * num_batches if labels is None else _label_batches(model, labels, num, at_once)
    keys = [jax.random.fold_in(key, i) for i in range(num_batches)]
    parts = [_latents(model, key, at_once, temperature, batch) for key, batch in zip(keys, batches, strict=True)]
    latents = np.concatenate(parts)[:num]
    taken = None if contexts is None else contexts[np.arange(num) % len(contexts)]
    whole, bounds = parallel.over_batches(_decode, model.with_bounds(), parallel.rows_of(latents, taken), num, batch_size)
    converged, found = whole.info.converged, None
    if num_certified is not None:
        found = bound_inverses(model, [whole], num_certified, taken)
    failed = tuple(np.flatnonzero(~converged).tolist())
    return Samples(whole.data, converged, SampleConvergence(num, float(converged.mean()), float(bounds.max()), failed, found))


@functools.partial(jax.jit, static_argnums=(2, 3))
def _latents(model, key, num, temperature, labels):
    return model.sample_latents(key, num, temperature=temperature, labels=labels)


def _decode(model, batch):
    """`to_data` of ``(latents, contexts)``, and the blocks' bounds in the units of continuous data."""
    latents, context = batch
    decoded = to_data(model, latents, context=context)
    preprocessing = model.spec.transform.bijection().inverse_lipschitz
    return decoded, follow_inverse_info(decoded.info, no_inverse_error(decoded.data), preprocessing).error_bound


def _label_batches(model: Density, labels: Sequence[int], num: int, at_once: int) -> list[Int[np.ndarray, " n"]]:
    """Labels in batches of one size, the last one filled up."""
    model.check_classes()
    known = model.spec.num_classes or 0
    if len(labels) != num:
        raise ValueError(f"there must be a label for each of {num} samples, got {len(labels)}")
    if wrong := [label for label in labels if not 0 <= label < known]:
        raise ValueError(f"there is no class {wrong[0]}: classes are 0 to {known - 1}")
    padded = np.resize(np.asarray(labels, np.int32), -(-num // at_once) * at_once)
    return np.split(padded, len(padded) // at_once)
