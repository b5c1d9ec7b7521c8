"""Samples of a trained model on all devices, and the samples whose iterative inverse failed."""

from collections.abc import Sequence
from dataclasses import dataclass

import jax
import numpy as np
from jaxtyping import Float, Num

from iresnet_jax.evaluation.round_trips import Guarantee, bound_inverses
from iresnet_jax.models.density import Density
from iresnet_jax.training import parallel


@dataclass(frozen=True)
class SampleConvergence:
    """Convergence of the inverses of a number of samples.

    Attributes:
        num: Samples.
        failed: Numbers of the samples whose inverse did not meet its tolerance.
        guarantee: Guaranteed errors of the first samples; None if not requested.
    """

    num: int
    failed: tuple[int, ...] = ()
    guarantee: Guarantee | None = None

    def __str__(self) -> str:
        line = f"samples: the inverse converged for {self.num - len(self.failed)} of {self.num}"
        return "\n".join(
            [line, *([str(self.guarantee)] if self.guarantee else []), *self.warnings()]
        )

    def warnings(self, name: str = "samples") -> list[str]:
        """A sentence that numbers the samples whose inverse did not converge."""
        if not self.failed:
            return []
        named = ", ".join(map(str, self.failed[:10])) + (", ..." if len(self.failed) > 10 else "")
        return [
            f"The inverse did not converge for {len(self.failed)} of {self.num} {name}, "
            f"numbers {named}."
        ]


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
) -> tuple[Num[np.ndarray, "n ..."], SampleConvergence]:
    """Samples of ``model.sample(jax.random.key(seed), num)`` and their convergence, on all devices.

    Args:
        num: Samples, at least 1.
        batch_size: Most samples that are inverted at once.
        temperature: Factor on the prior's scale, at least 0; 1 samples the model.
        seed: Seed of the latents.
        labels: Class of each sample, if the model's classes have priors; drawn by default.
        contexts: Context of each sample, for a conditional density; fewer contexts than samples are
            repeated.
        num_certified: Number of first samples that `certify.inverse` certifies; 0 means that one
            takes too long, None that it was not requested.

    Raises:
        ValueError: If ``num``, ``temperature``, ``seed`` or a label is out of range, the model has
            no classes, or it needs contexts and got none.

    Example:
        >>> values, convergence = draw(model, 64, 64, temperature=0.8)  # doctest: +SKIP
    """
    if not 0 <= seed < 2**32:
        raise ValueError(
            f"seed must lie in [0, 4294967296), as JAX would cut off further bits, got {seed}"
        )
    of_classes = None if labels is None else np.asarray(labels)
    latents = np.asarray(
        model.sample_latents(jax.random.key(seed), num, temperature=temperature, labels=of_classes)
    )
    taken = None if contexts is None else contexts[np.arange(num) % len(contexts)]
    data, info = parallel.over_batches(
        _decode, (model, model.bounds()), parallel.rows_of(latents, taken), num, batch_size
    )
    guarantee = (
        None
        if num_certified is None
        else bound_inverses(model, latents, data, info, num_certified, taken)
    )
    failed = np.flatnonzero(~info.converged).tolist()
    return data, SampleConvergence(num, tuple(failed), guarantee)


def _decode(own, batch):
    (model, bounds), (latents, context) = own, batch
    return model.decode(latents, context=context, bounds=bounds)
