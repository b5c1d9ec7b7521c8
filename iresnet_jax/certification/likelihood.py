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
error and ``K_t`` times the distance of the arguments, see `step_jacobians`. The second is a sum of weights.

Preprocessing, prior and sums are computed in `ball_arithmetic`.
"""

import contextlib
import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Key

from iresnet_jax.bijections.transforms.dequantize import enclose_volume
from iresnet_jax.branches.feedforward import FeedforwardSpec
from iresnet_jax.certification import enclosed_priors
from iresnet_jax.certification.problem import Problem, check_certified, kernels_of
from iresnet_jax.certification.step_jacobians import StepConstants, step_constants, step_jacobians
from iresnet_jax.certification.trajectory import Residuals, follow, residuals
from iresnet_jax.maths import activations
from iresnet_jax.maths.enclosures.ball_arithmetic import Ball, joined, log
from iresnet_jax.maths.enclosures.double_double import UNIT, DoubleDouble
from iresnet_jax.maths.enclosures.upward_rounding import UP
from iresnet_jax.maths.logdet import verified
from iresnet_jax.models.classifier import Classifier
from iresnet_jax.models.density import Contexts, Data, Density, DensitySpec


class Interval(NamedTuple):
    """Guaranteed bounds of a number, one an example: ``lower <= value <= upper``, and the whole line if nothing is known.

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

    def contains(self, value: Float[np.ndarray, " b"]) -> np.ndarray:
        """Whether numbers lie in the intervals."""
        return (self.lower <= value) & (value <= self.upper)

    def in_units(self, spec: DensitySpec) -> "Interval":
        """The interval of ``-log_prob`` in `DensitySpec.unit`, rounded outwards: bits/dim of images."""
        if spec.num_levels is None:
            return Interval(-self.upper, -self.lower)
        nat = (log(Ball.of(2.0)) * Ball.of(spec.flow.num_dims)).reciprocal()
        with np.errstate(invalid="ignore"):  # of infinite ends, which stay so
            return Interval(*((Ball.of(-end) * nat).bounds()[side] for side, end in enumerate((self.upper, self.lower))))


def log_prob(model: Density, x: Data, key: Key[Array, "..."] | None = None, *, context: Contexts | None = None) -> Interval:
    r"""Guaranteed interval of `Density.log_prob` in nats, one an example, rounding included.

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
    _check(model)
    spec, given = model.spec, np.asarray(x)
    key = jax.random.key(0) if key is None else key
    key_noise = jax.random.split(key)[0] if key.ndim == 0 else jax.vmap(jax.random.split)(key)[:, 0]
    noisy = np.asarray(model.dequantize(x, key_noise))
    u = given if spec.num_levels is None and spec.grid is None else noisy
    scaled = _scaled(model, context)
    if not len(u):
        return Interval(np.zeros(0), np.zeros(0))
    with _precise(), np.errstate(all="ignore"):
        y, of_transform = spec.transform.enclose_forward(u)
        latents, of_flow = _through(Problem.of(model), y.map(lambda part: part.reshape(len(u), -1)), scaled)
        log_prior = enclosed_priors.log_prob(spec.prior_family, model.prior, latents)
        if spec.num_levels is not None:
            of_transform = of_transform + enclose_volume(spec.num_levels, spec.flow.num_dims)
        elif spec.grid is not None:
            of_transform = of_transform + spec.grid.enclose_volume()
        return Interval(*(log_prior + of_flow + of_transform).bounds())


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
    _check(model)
    shape = tuple(model.spec.flow.event_shape)
    if x.shape[1:] != shape:
        raise ValueError(f"x must have the shape (b, {', '.join(map(str, shape))}) of the flow's input, got {x.shape}")
    scaled = _scaled(model, context)
    if not len(x):
        return Interval(np.zeros(0), np.zeros(0))
    with _precise(), np.errstate(all="ignore"):
        start = Ball.of(np.asarray(x, np.float64).reshape(len(x), -1))
        return Interval(*_through(Problem.of(model), start, scaled)[1].bounds())


class Followed(NamedTuple):
    """A trajectory in double-double and where the Jacobians of its steps were computed.

    Attributes:
        end: Its last point.
        errors: Bound of the distance of every point from the exact trajectory, ``(b, t + 1)``.
        moved: Bound of the distance of every point but the last from where its Jacobian was computed.
        argument_errors: Bounds of the errors of activations' arguments there.
        factors: Verified factors of ``I + J_g`` of all steps, by stage.
    """

    end: DoubleDouble
    errors: Float[np.ndarray, "b n"]
    moved: Float[np.ndarray, "b t"]
    argument_errors: Float[np.ndarray, "b t"]
    factors: tuple[verified.Factors, ...]


def _through(problem: Problem, start: Ball, contexts: np.ndarray | None) -> tuple[Ball, Ball]:
    """Balls of the latents ``(b, d)`` and of the flow's log-determinant for inputs ``(b, d)``."""
    constants, num = _unscaled_constants(problem), len(start.radius)
    latents, log_dets, size = [], [], min(problem.chunk, 2 ** math.ceil(math.log2(max(num, 1))))
    for first in range(0, num, size):
        chosen = np.minimum(np.arange(first, first + size), num - 1)  # the last part is filled up with its last example
        own = None if contexts is None else contexts[chosen]
        followed = _follow(problem, start.map(lambda part, chosen=chosen: part[chosen]), own)
        kept = slice(num - first)
        ends = followed.end.map(lambda part, kept=kept: part[kept][:, problem.entries.latents])
        latents.append(Ball(ends, np.broadcast_to(followed.errors[kept, -1:], ends.high.shape)))
        log_dets.append(_log_det(problem, constants, followed).map(lambda part, kept=kept: part[kept]))
    return joined(np.concatenate, latents), joined(np.concatenate, log_dets)


def _follow(problem: Problem, start: Ball, contexts: np.ndarray | None) -> Followed:
    shape, context = problem.spec.event_shape, None if contexts is None else jnp.asarray(contexts)
    inputs = start.middle.high
    points = follow(problem.spec, problem.weights, jnp.asarray(inputs.reshape(-1, *shape)), context)
    trajectory = DoubleDouble.of(np.array(points))
    trajectory.low[:, 0] = start.middle.low
    found = residuals(problem.stages, trajectory, contexts)
    factors, steps = [], np.zeros_like(trajectory.high)
    t = 0
    for stage, own, active, slopes in zip(
        problem.spec.layout, problem.stages, problem.entries.active, found.slopes, strict=True
    ):
        kernels = kernels_of(problem.weights[stage.name])
        matrices, of_stage = _linearize(stage.branch, kernels, slopes)
        factors.append(of_stage)
        scale = np.broadcast_to(own.scale.high[:, 0], (stage.spec.num_blocks, *stage.branch.in_shape))
        for matrix, s in zip(np.moveaxis(np.asarray(matrices), 1, 0), scale.reshape(len(scale), -1), strict=True):
            steps[:, t + 1] = steps[:, t]
            moved = np.einsum("bij,bj->bi", matrix, s * steps[:, t, active])
            steps[:, t + 1, active] = moved + found.values[:, t, active]
            t += 1
    trajectory = trajectory + DoubleDouble.of(steps)
    remaining = residuals(problem.stages, trajectory, contexts)
    errors = _errors(problem.constants, np.linalg.norm(start.radius, axis=1), remaining)
    moved = (np.linalg.norm(steps, axis=2) + UNIT * np.linalg.norm(trajectory.high, axis=2))[:, :-1] * UP
    return Followed(trajectory.map(lambda part: part[:, -1]), errors, moved, found.argument_errors, tuple(factors))


def _errors(constants: StepConstants, at_start: np.ndarray, remaining: Residuals) -> Float[np.ndarray, "b n"]:
    """The module's ``e_t``."""
    sizes = (np.linalg.norm(remaining.values, axis=2) + remaining.errors) * UP
    growth = np.maximum(1, (1 + constants.branch) * constants.largest_scale * UP)
    errors = [at_start * UP]
    for t, factor in enumerate(growth):
        errors.append((factor * errors[-1] + sizes[:, t]) * UP)
    return np.stack(errors, axis=1)


def _log_det(problem: Problem, constants: StepConstants, followed: Followed) -> Ball:
    """The flow's log-determinant ``(b,)``: those of ``I + J_g`` of all steps, and the scales."""
    away = problem.constants.largest_scale * (followed.moved + followed.errors[:, :-1])
    distance = constants.jacobian_errors(followed.argument_errors) + constants.second * away * UP
    terms, t = [], 0
    for stage, factors in zip(problem.spec.layout, followed.factors, strict=True):
        now = slice(t, t + stage.spec.num_blocks)
        terms.append(verified.log_abs_det(factors, distance[:, now], constants.inverse[now]).sum())
        positions = Ball.of(math.prod(stage.branch.in_shape[:-1]))
        log_scales = Ball.of(np.asarray(problem.weights[stage.name].actnorm.log_scale).ravel())
        terms.append(log_scales.sum() * positions)
        t = now.stop
    return functools.reduce(Ball.__add__, terms)


def _unscaled_constants(problem: Problem) -> StepConstants:
    """Constants of the maps ``I + g`` alone, without the scales of their ActNorms."""
    ones = [stage._replace(scale=DoubleDouble.of(np.ones_like(stage.scale.high))) for stage in problem.stages]
    own = [problem.weights[stage.name] for stage in problem.spec.layout]
    kernels = [kernels_of(weights) for weights in own]
    return step_constants(ones, kernels, [weights.branch.lipschitz_bound for weights in own])


@functools.partial(jax.jit, static_argnums=0)
def _linearize(branch, kernels, slopes):
    """``I + J_g`` of the blocks of a stage for every example, ``(b, k, d, d)``, and their factors."""

    def of_example(slopes):
        num = len(next(iter(kernels.values())))
        matrices = step_jacobians(branch, kernels, jnp.ones((num, math.prod(branch.in_shape))), slopes)
        return matrices, jax.lax.map(verified.factorize, matrices)

    return jax.lax.map(of_example, jax.tree.map(lambda a: jnp.moveaxis(a, 1, 0), tuple(slopes)))


def _check(model: Density | Classifier) -> None:
    check_certified(model)
    jumping = [stage.branch.activation for stage in model.spec.flow.layout if not _smooth(stage.branch)]
    if jumping:
        raise ValueError(
            f"a guaranteed log-determinant takes activations with a Lipschitz derivative, and that of {jumping[0]} jumps"
        )


def _smooth(branch: FeedforwardSpec) -> bool:
    activated = any(layer.activated for layer in branch.layers)
    return not activated or activations.get(branch.activation).slope_lipschitz is not None


def _scaled(model: Density | Classifier, context: Contexts | None) -> np.ndarray | None:
    """Contexts as the flow takes them."""
    scaled = model.scale_context(context) if isinstance(model, Density) else None
    return None if scaled is None else np.asarray(scaled, np.float64)


@contextlib.contextmanager
def _precise():
    with jax.enable_x64(), jax.default_device(jax.local_devices(backend="cpu")[0]):
        yield
