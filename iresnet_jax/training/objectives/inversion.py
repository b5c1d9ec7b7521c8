r"""The objective "inversion": images are reconstructed from measurements by the inverse of a network (Arndt et al. 2023, 2024).

    loss = (1 - a) |P(F^-1(y)) - x|^2 + a |F(x) - y|^2,    y = A x + s n

At ``a = 0`` the inverse itself is trained, through implicit gradients of every block's fixed point: at its best it is the
posterior mean among the maps whose Lipschitz constant is at most ``1 / (1 - L)``. At ``a = 1`` the network learns the forward
operator, and its inverse regularises by ``L`` alone. The errors of round trips through a network are in `evaluation.inversion`.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from iresnet_jax.bijections.residual import Solver
from iresnet_jax.maths.inverse.fixed_point import example_norm
from iresnet_jax.models.reconstructor import Reconstructor, ReconstructorSpec
from iresnet_jax.training import parallel
from iresnet_jax.training.constraint import ConstraintConfig, validated_model
from iresnet_jax.training.step import Loss, StepKeys, TrainState, ValidationResult


def make_loss(
    measure: Callable[[Any, Any], Any], *, forward_share: float = 0.0
) -> Callable[[Reconstructor, Any, StepKeys], Loss]:
    """The loss ``(model, images, keys) -> Loss`` of images of integer levels, which are measured anew in every step.

    Args:
        measure: ``(keys, images in [0, 1]) ->`` their measurements.
        forward_share: ``a`` of the loss.
    """

    def loss(model: Reconstructor, images: Any, keys: StepKeys) -> Loss:
        x = model.preprocess(images)
        return loss_of_measurements(model, x, measure(keys.examples, x), forward_share=forward_share)

    return loss


def loss_of_measurements(model: Reconstructor, x: jax.Array, y: jax.Array, *, forward_share: float) -> Loss:
    """The loss of images in [0, 1] and their measurements, and its parts as far as they are computed."""
    value, metrics = jnp.zeros((), x.dtype), {}
    if forward_share < 1:
        found, info = model.reconstruct(y)
        squared = jnp.mean(_squared_norm(found - x))
        value += (1 - forward_share) * squared
        metrics |= {"reconstruction": squared, "solver_evals": jnp.mean(info.num_evals.astype(x.dtype))}
    if forward_share > 0:
        squared = jnp.mean(_squared_norm(model.measure(x) - y))
        value += forward_share * squared
        metrics |= {"forward": squared}
    return Loss(value, {"loss": value, **metrics})


def relative_error(found: jax.Array, x: jax.Array) -> jax.Array:
    """``|found - x| / |x|`` of every image; of one that is black all over, ``|found|`` in units of one white pixel."""
    norm = example_norm(x)
    return example_norm(found - x) / jnp.where(norm > 0, norm, 1)


def make_validation(
    spec: ReconstructorSpec,
    x: np.ndarray,
    y: np.ndarray,
    *,
    constraint: ConstraintConfig,
    solver: Solver,
    forward_share: float,
    batch_size: int,
) -> Callable[[TrainState], ValidationResult]:
    """Errors of held-out images, always measured alike, under averaged parameters with norms iterated to their tolerance.

    Args:
        spec: The model.
        x: Held-out images with pixels in [0, 1].
        y: Their measurements.
        constraint: How blocks are constrained.
        solver: Inverse of the blocks.
        forward_share: ``a`` of the loss.
        batch_size: Most images at once.
    """

    def validate(state: TrainState) -> ValidationResult:
        model = validated_model(Reconstructor(spec, {}, solver=solver), constraint, state.ema, state.spectral)
        outputs = parallel.over_batches(_measured_errors, model, parallel.rows_of(x, y), len(x), batch_size)
        means = {name: float(values.mean(dtype=np.float64)) for name, values in outputs.items()}
        value = (1 - forward_share) * means["reconstruction"] + forward_share * means.get("forward", 0.0)
        return ValidationResult({"loss": value, **means})

    return validate


def _measured_errors(model: Reconstructor, batch: tuple[Any, Any]) -> dict[str, Any]:
    """Squared and relative errors of the reconstructions of ``(images in [0, 1], measurements)``."""
    x, y = batch
    found, info = model.reconstruct(y)
    squared = _squared_norm(found - x)
    errors = {"reconstruction": squared, "relative_error": relative_error(found, x), "converged": info.converged}
    return {**errors, "forward": _squared_norm(model.measure(x) - y)} if model.spec.constrained else errors


def _squared_norm(x: jax.Array) -> jax.Array:
    return jnp.sum(jnp.square(x), axis=tuple(range(1, x.ndim)))
