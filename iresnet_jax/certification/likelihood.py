r"""Log-likelihoods with guaranteed intervals, rounding included, where a dense Jacobian of every step is affordable.

What is enclosed is the log-density of the model's exact map: its float32 weights, and the constants of its preprocessing, count
as the real numbers that they are.

**Trajectory.** The flow's trajectory from an input is computed in float64, its residuals in double-double, and one Newton step
takes it to some 80 bits. With ``r_t`` the residuals that remain, the exact trajectory stays within ``e_t`` of the refined one:

    e_{t+1} <= max(1, (1 + L_t) max s_t) e_t + |r_t|,

``L_t`` being the constant of the branch and ``s_t`` the scales of the ActNorm. The step's branch has its argument within
``max s_t (e_t + m_t)`` of where its Jacobian was computed, ``m_t`` being the length of the Newton step there.

**Determinants.** ``log|det dF_t| = log|det(I + J_g)| + sum log s_t``. The first term is that of
`iresnet_jax.maths.logdet.verified`, with ``|(I + J_g)^-1| <= 1 / (1 - L_t)`` and a distance of the Jacobians that is their own
error and ``K_t`` times the distance of the arguments, see `StepConstants`. The second is a sum of weights.

Preprocessing, prior and sums are computed in `ball_arithmetic`.
"""

import functools
import math
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Key

from iresnet_jax.bijections.transforms.dequantize import enclose_volume
from iresnet_jax.bijections.transforms.enclosure import enclosing
from iresnet_jax.certification.jacobians import LinearSteps, step_jacobians
from iresnet_jax.certification.passes import FlowSlopes, forward_correction
from iresnet_jax.certification.prepared import MOST_DIMS, PreparedFlow, check, in_parts, inputs_of, prepared
from iresnet_jax.certification.residuals import residuals
from iresnet_jax.certification.trajectory import follow
from iresnet_jax.maths import activations
from iresnet_jax.maths.enclosures.ball_arithmetic import Ball, log
from iresnet_jax.maths.enclosures.double_double import UNIT, DoubleDouble
from iresnet_jax.maths.enclosures.upward_rounding import UP
from iresnet_jax.maths.keys import typed_key
from iresnet_jax.maths.logdet import verified
from iresnet_jax.models import priors
from iresnet_jax.models.classifier import Classifier
from iresnet_jax.models.density import Contexts, Data, Density
from iresnet_jax.models.density_spec import DensitySpec


class Interval(NamedTuple):
    """Guaranteed bounds of a number, one per example: ``lower <= value <= upper``, and the whole line if nothing is known.

    Attributes:
        lower: Number that the value is not below.
        upper: Number that the value is not above.
    """

    lower: Float[np.ndarray, " b"]
    upper: Float[np.ndarray, " b"]

    @property
    def width(self) -> Float[np.ndarray, " b"]:
        """``upper - lower``."""
        return self.upper - self.lower

    def in_units(self, spec: DensitySpec) -> "Interval":
        """The interval of ``-log_prob`` in `DensitySpec.unit`, rounded outwards: bits/dim of images."""
        if spec.num_levels is None:
            return Interval(-self.upper, -self.lower)
        nat = (log(Ball.of(2.0)) * Ball.of(spec.flow.num_dims)).reciprocal()
        with np.errstate(invalid="ignore"):  # of infinite ends, which stay so
            return Interval(*((Ball.of(-end) * nat).bounds()[side] for side, end in enumerate((self.upper, self.lower))))


def log_prob(model: Density, x: Data, key: Key[Array, "..."] | None = None, *, context: Contexts | None = None) -> Interval:
    r"""Guaranteed interval of `Density.log_prob` in nats, one per example, rounding included.

    It holds the log-density of the exact map at the numbers that are given. Integer levels and values on a grid become numbers
    by `Density.dequantize`, with the noise of ``model.log_prob(x, key)``, and contexts by `Density.scale_context`; from then on
    everything is exact. The model's estimator plays no part. Takes time and memory for a Jacobian and a factorisation
    ``(d, d)`` of every block, up to 4096 dimensions.

    Args:
        model: A density with certified bounds, as `freeze` and `load` give it, whose activations have a Lipschitz derivative.
        x: Data, as `Density.log_prob` takes them.
        key: Source of dequantisation noise, as `Density.log_prob` takes it.
        context: Contexts of a conditional density.

    Returns:
        The intervals; the whole line where nothing can be promised, as for data that are no numbers.

    Raises:
        ValueError: If the model has no certified bounds, a block is no contraction, the slope of an activation jumps, there are
            too many dimensions, or data are refused by `Density.log_prob`.

    Example:
        >>> interval = certify.log_prob(model, images)  # doctest: +SKIP
        >>> interval.in_units(model.spec).upper  # bits/dim, guaranteed  # doctest: +SKIP
    """
    if not isinstance(model, Density):
        raise ValueError(f"a log-likelihood is that of a Density, got a {type(model).__name__}: certify.log_det takes it")
    check(model, x, context=context, most_dims=MOST_DIMS)
    _check_smooth(model)
    if model.spec.prior_family == priors.OWN:
        raise ValueError(priors.NO_ENCLOSURE)
    if model.spec.flow.noise is not None:
        raise ValueError(
            "there is no interval of the density of variational noise: model.continuous has one of the density of the "
            "dequantised data that model.dequantize gives"
        )
    spec, given = model.spec, np.asarray(model.numbers(x))
    key = jax.random.key(0) if key is None else typed_key(key)
    key_noise = jax.random.split(key)[0] if key.ndim == 0 else jax.vmap(jax.random.split)(key)[:, 0]
    noisy = np.asarray(model.dequantize(x, key_noise))  # refuses another shape or type
    model.check_ranges(given)
    u = given if spec.num_levels is None else noisy
    if spec.grid is not None:
        u = np.where(np.asarray(spec.grid.spacing) > 0, noisy, given)  # the other columns get no noise
    with prepared(model, x, context=context, most_dims=MOST_DIMS) as (flow, contexts):
        y, log_det = enclosing(spec.transform, "enclose_forward")(u)
        latents, of_flow = _through(flow, y.map(lambda part: part.reshape(len(part), spec.flow.num_dims)), contexts)
        log_det = log_det + of_flow
        if spec.num_levels is not None:
            log_det = log_det + enclose_volume(spec.num_levels, spec.flow.num_dims)
        elif spec.grid is not None:
            log_det = log_det + spec.grid.enclose_volume()
        return Interval(*(priors.enclose_log_prob(spec.prior_family, model.prior, latents) + log_det).bounds())


def log_det(
    model: Density | Classifier, x: Float[Array, "b ..."] | Float[np.ndarray, "b ..."], *, context: Contexts | None = None
) -> Interval:
    """Guaranteed interval of ``log|det dF/dx|`` of a model's flow at its inputs, natural log, rounding included.

    The flow is `Density.flow` or `Classifier.flow`, without preprocessing; see `log_prob`.

    Args:
        model: A model as `log_prob` takes it, or a classifier.
        x: Inputs of the flow.
        context: Contexts of a conditional density.

    Raises:
        ValueError: As in `log_prob`, or if the shape is not that of the flow's input.
    """
    _check_smooth(model)
    with prepared(model, x, context=context, most_dims=MOST_DIMS) as (flow, contexts):
        return Interval(*_through(flow, Ball.of(inputs_of(model, x)), contexts)[1].bounds())


def _through(flow: PreparedFlow, start: Ball, contexts: np.ndarray | None) -> tuple[Ball, Ball]:
    """Balls of the latents ``(b, d)`` and of the flow's log-determinant for inputs ``(b, d)``."""
    return in_parts(functools.partial(_enclose, flow), flow.chunk, start, contexts)


def _enclose(flow: PreparedFlow, start: Ball, contexts: np.ndarray | None) -> tuple[Ball, Ball]:
    """`_through` for a part of the examples."""
    inputs = start.middle.high.reshape(-1, *flow.spec.event_shape)
    trajectory = DoubleDouble.of(np.array(follow(flow.spec, flow.weights, inputs, contexts)))
    trajectory.low[:, 0] = start.middle.low
    found = residuals(flow.stages, trajectory, contexts)
    factors = _factors(flow.steps, found.slopes)
    moves = np.array(forward_correction(flow.steps, found.slopes, found.values))
    trajectory = trajectory + DoubleDouble.of(moves)
    remaining = residuals(flow.stages, trajectory, contexts)
    errors = _errors(flow.constants.stretch, np.linalg.norm(start.radius, axis=1), remaining.sizes)
    moved = (np.linalg.norm(moves, axis=2) + UNIT * np.linalg.norm(trajectory.high, axis=2)) * UP
    end = trajectory.map(lambda part: part[:, -1, flow.places.latents])
    away = flow.constants.largest_scale * (moved + errors)[:, :-1]
    alone = flow.constants.unscaled
    distances = alone.jacobian_errors(found.argument_errors) + alone.second * away * UP
    return Ball(end, np.broadcast_to(errors[:, -1:], end.high.shape)), _log_det(flow, factors, distances)


def _errors(stretch: Float[np.ndarray, " t"], at_start: Float[np.ndarray, " b"], sizes: Float[np.ndarray, "b t"]) -> np.ndarray:
    """The module's ``e_t`` of every point, ``(b, t + 1)``."""
    errors = [at_start * UP]
    for factor, size in zip(np.maximum(1, stretch), sizes.T, strict=True):
        errors.append((factor * errors[-1] + size) * UP)
    return np.stack(errors, axis=1)


def _log_det(flow: PreparedFlow, factors: Sequence[verified.Factors], distances: Float[np.ndarray, "b t"]) -> Ball:
    """The flow's log-determinant ``(b,)``: those of ``I + J_g`` of all steps, and the scales."""
    terms, t, inverse = [], 0, flow.constants.unscaled.inverse
    for stage, own in zip(flow.stages, factors, strict=True):
        now = slice(t, t + stage.num_blocks)
        terms.append(verified.log_abs_det(own, distances[:, now], inverse[now]).sum())
        terms.append(Ball.of(stage.log_scale.ravel()).sum() * Ball.of(math.prod(stage.place.in_shape[:-1])))
        t = now.stop
    return functools.reduce(Ball.__add__, terms)


@jax.jit
def _factors(steps: Sequence[LinearSteps], slopes: FlowSlopes) -> tuple[verified.Factors, ...]:
    """Verified factors of ``I + J_g`` of all steps for every example, by stage."""

    def of_example(slopes):
        unscaled = [maps._replace(scale=jnp.ones_like(maps.scale)) for maps in steps]
        return tuple(
            jax.lax.map(verified.factorize, step_jacobians(maps, own)) for maps, own in zip(unscaled, slopes, strict=True)
        )

    return jax.lax.map(of_example, slopes)


def _check_smooth(model: Density | Classifier) -> None:
    """Raises ``ValueError`` where the slope of an activation jumps."""
    for stage in model.spec.flow.layout:
        names = [layer.activation for layer in stage.branch.chain if layer.activation is not None]
        jumping = [name for name in names if activations.get(name).slope_lipschitz is None]
        if jumping:
            raise ValueError(
                f"a guaranteed log-determinant takes activations with a Lipschitz derivative, and that of {jumping[0]} jumps"
            )
