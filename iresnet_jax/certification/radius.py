r"""The radius around an image in which a classifier's decision cannot change, from global and from local bounds.

The margin of the predicted class over another one is ``m = sum_k w_k relu(u_k) + const`` with ``u`` the normalised features and
``w`` the difference of two columns of the head over the number of positions. Both radii are certified:

- global: ``m >= m(x) - |w alpha| Lip(F) / min std r`` with ``alpha`` the scales of the head's normalisation;
- local: ``m(x) - m`` is at most the fall of the function ``<grad_T, x_T>``, see `iresnet_jax.maths.chains.margin_bounds`, and
  what the head's rectifiers add, see `iresnet_jax.certification.head`.

Trajectories are computed in float64 with residuals in double-double, as for `certified_inverse`, and all rounding is bounded.
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Num

from iresnet_jax.certification.head import Head
from iresnet_jax.certification.problem import check_layers, kernels_of
from iresnet_jax.certification.step_passes import Group, backward, forward, group_and_steps, weights_of
from iresnet_jax.certification.trajectory import PreciseStage, Residuals, follow, in_float64, precise_stages, residuals
from iresnet_jax.maths.chains import margin_bounds
from iresnet_jax.maths.chains.margin_bounds import Adjoints, Step, Tangents
from iresnet_jax.maths.enclosures.double_double import DoubleDouble
from iresnet_jax.maths.enclosures.precise_activations import SLOPE_ERROR
from iresnet_jax.maths.enclosures.upward_rounding import UP, U
from iresnet_jax.models.classifier import Classifier
from iresnet_jax.models.flow import bilipschitz

Images = Num[Array, "b h w c"] | Num[np.ndarray, "b h w c"]

MOST_ENTRIES = 256  # of an image whose Jacobians are computed by default
_CHUNK = 16  # images whose trajectories are computed together
_NUM_BISECTIONS = 40


class CertifiedRadius(NamedTuple):
    """What is guaranteed of a classifier's decisions, one entry an image. Radii are 2-norms, of pixels on the scale of [0, 1].

    Attributes:
        radius: No perturbation of a smaller norm changes the predicted class, whether or not it leaves [0, 1].
        global_radius: What follows from the Lipschitz constant of the whole network.
        local_radius: What follows from gradients and curvatures at the image; 0 for activations whose slopes jump.
        predicted: The predicted class.
        margin: Logit of the predicted class less the largest other one.
    """

    radius: Float[np.ndarray, " b"]
    global_radius: Float[np.ndarray, " b"]
    local_radius: Float[np.ndarray, " b"]
    predicted: Int[np.ndarray, " b"]
    margin: Float[np.ndarray, " b"]


def radius(model: Classifier, images: Images, *, num_forms: int | None = None) -> CertifiedRadius:
    r"""Guaranteed radii around images in which the predicted class stays the same, rounding included.

    The classifier is the map of the model's weights in exact arithmetic. Both radii of this module's docstring are computed for
    each other class, and the larger one counts.

    Args:
        model: A classifier with bounds, as `freeze` and `load` give it.
        images: Images of integer levels.
        num_forms: Classes whose quadratic form is computed, those with the least radii without it. 0 leaves Jacobians out:
            products of norms stand for them, at the price of a gradient of each margin. By default all classes for images of up
            to `MOST_ENTRIES` entries, and 0 beyond.

    Raises:
        ValueError: If the model has no bounds or BatchNorm in its branches, if images do not fit, or ``num_forms`` is negative.

    Example:
        >>> certify.radius(model, images).radius  # doctest: +SKIP
    """
    model.require_bijection()
    check_layers(model)
    if num_forms is not None and num_forms < 0:
        raise ValueError(f"num_forms must be at least 0, got {num_forms}")
    num_others = model.spec.num_classes - 1
    if num_forms is None:
        num_forms = num_others if math.prod(model.spec.image_shape) <= MOST_ENTRIES else 0
    num_forms = min(num_forms, num_others)
    with jax.enable_x64(), jax.default_device(jax.local_devices(backend="cpu")[0]), np.errstate(all="ignore"):
        problem = Problem.of(model)
        inputs = np.asarray(model.preprocess(np.asarray(images)))  # checks the images' shape and levels
        parts = [_radii(problem, inputs[i : i + _CHUNK], num_forms) for i in range(0, len(inputs), _CHUNK)]
    return CertifiedRadius(*(np.concatenate(values) for values in zip(*parts, strict=True)))


class Problem(NamedTuple):
    """A classifier prepared for certification, in float64.

    Attributes:
        model: The classifier.
        weights: Weights of its flow.
        stages: Its steps in double-double.
        groups: Its steps for passes of vectors.
        steps: Guaranteed constants of the steps.
        lipschitz: Guaranteed Lipschitz constant of the flow.
    """

    model: Classifier
    weights: Any
    stages: tuple[PreciseStage, ...]
    groups: tuple[Group, ...]
    steps: tuple[Step, ...]
    lipschitz: float

    @classmethod
    def of(cls, model: Classifier) -> "Problem":
        """Prepares a classifier."""
        spec, weights = model.spec.flow, in_float64(model.weights)
        stages, groups, steps = precise_stages(spec, weights), [], []
        for stage, own in zip(spec.layout, stages, strict=True):
            kernels = kernels_of(weights[stage.name])
            group, of_stage = group_and_steps(own, kernels)
            groups.append(group)
            steps += of_stage
        return cls(model, weights, stages, tuple(groups), tuple(steps), float(bilipschitz(spec, weights).forward))

    @property
    def smooth(self) -> bool:
        """Whether every slope has a Lipschitz constant."""
        return all(math.isfinite(curvature or 0) for step in self.steps for curvature in step.curvatures)

    @property
    def first(self) -> float:
        """``|P_0|``, of the map from pixels to the flow's input."""
        return 1 / min(self.model.spec.std) * UP


def _radii(problem: Problem, inputs: Float[np.ndarray, "b h w c"], num_forms: int) -> tuple[np.ndarray, ...]:
    """The fields of `CertifiedRadius`."""
    spec = problem.model.spec
    points = np.array(follow(spec.flow, problem.weights, jnp.asarray(inputs), None))
    found = residuals(problem.stages, DoubleDouble.of(points))
    sizes = np.nan_to_num((np.linalg.norm(found.values, axis=2) + found.errors) * UP, nan=np.inf).T
    start_error = 8 * U * (1 + max(map(abs, spec.mean))) * problem.first * math.sqrt(inputs[0].size)
    head = Head.of(problem.model, points[:, -1])
    globally = _global(problem, head, sizes, start_error)
    locally = np.zeros_like(globally)
    if problem.smooth:
        adjoints, weights = _adjoints(problem, head, found, sizes, start_error)
        locally = _largest(problem, head, adjoints, None, globally)
        if num_forms:
            order = np.argsort(np.maximum(locally, globally), axis=1)[:, :num_forms]
            tangents = _tangents(problem, found, weights, order, locally.shape[1])
            locally = np.maximum(locally, _largest(problem, head, adjoints, tangents, locally))
    best = np.maximum(globally, locally)
    return best.min(axis=1), globally.min(axis=1), locally.min(axis=1), head.predicted, head.margins.min(axis=1)


def _global(problem: Problem, head: Head, residual_sizes: Float[np.ndarray, "t b"], start_error: float) -> np.ndarray:
    """The radii by the Lipschitz constant of the network, whose computed features are off by at most ``error``."""
    error = np.full(residual_sizes.shape[1], start_error)
    for step, size in zip(problem.steps, residual_sizes, strict=True):
        error = (step.stretch * error + size) * UP
    sure = head.margins - (head.errors + head.lipschitz * error[:, None]) * UP
    return np.maximum(np.nan_to_num(sure / (head.lipschitz * problem.lipschitz * problem.first) / UP), 0)


def _adjoints(problem: Problem, head: Head, found: Residuals, sizes, start_error) -> tuple[Adjoints, list[list[Any]]]:
    """Gradients of the margins along the trajectories, and ``S w`` of the activations, by stage and layer."""
    spec = problem.model.spec
    passed = backward(spec.flow, problem.groups, _by_example(found.slopes), jnp.asarray(head.gradients))
    points = np.moveaxis(np.asarray(jnp.linalg.norm(passed.points, axis=-1)), 1, 0) * UP
    start = np.asarray(passed.points[:, 0]).reshape(*head.margins.shape, *spec.flow.event_shape)
    start = start[..., : spec.image_shape[-1]] / np.asarray(spec.std)
    slope = np.sqrt(np.sum(start**2, axis=(-3, -2, -1))) * UP
    weights, largest, steepest, steps = [], [], [], iter(problem.steps)
    for stage, outputs in zip(spec.flow.layout, passed.outputs, strict=True):
        own = [next(steps) for _ in range(stage.spec.num_blocks)]
        curved = [None if v is None else weights_of(v, stage.branch.activation) for v in outputs]
        of_stage = [None if w is None else jnp.max(w, axis=tuple(range(3, w.ndim))) for w in curved]
        for k in range(stage.spec.num_blocks):
            largest += [np.asarray(w[:, k]) for w in of_stage if w is not None]
        factors = [jnp.array([step.curvatures[i] or 0.0 for step in own]) for i in range(len(curved))]
        weights.append([None if w is None else w * _like(f, w) for w, f in zip(curved, factors, strict=True)])
        steepest += [max((c for c in step.curvatures if c is not None), default=0.0) for step in own]
    slope_errors = 2 * SLOPE_ERROR + np.array(steepest)[:, None] * found.argument_errors.T
    start_errors = np.full(len(start), start_error)
    return Adjoints(slope, start_errors, points, np.array(largest), sizes, slope_errors * UP), weights


def _tangents(problem: Problem, found: Residuals, weights, order: Int[np.ndarray, "b c"], num_others: int) -> Tangents:
    """Norms of Jacobians, and of the quadratic forms of some classes of each example."""
    spec = problem.model.spec
    h, w, c = spec.image_shape
    entries = np.arange(spec.flow.num_dims).reshape(spec.flow.event_shape)[..., :c].ravel()
    first = np.zeros((len(entries), spec.flow.num_dims))
    first[np.arange(len(entries)), entries] = np.broadcast_to(1 / np.asarray(spec.std), (h, w, c)).ravel()
    chosen = [[None if v is None else _classes(v, order) for v in group] for group in weights]
    norms = forward(spec.flow, problem.groups, _by_example(found.slopes), chosen, jnp.asarray(first))
    forms = np.full((len(order), num_others), np.inf)
    np.put_along_axis(forms, order, np.asarray(norms.forms), axis=1)
    points, frobenius, arguments, fourth = (np.asarray(values).T for values in norms[:4])
    return Tangents(points, frobenius, arguments, fourth, forms)


def _by_example(slopes):
    """Slopes ``(k, b, ...)`` as ``(b, k, ...)``."""
    return tuple(tuple(None if s is None else jnp.moveaxis(jnp.asarray(s), 1, 0) for s in group) for group in slopes)


def _classes(weights: Float[Array, "b k c ..."], order: Int[np.ndarray, "b m"]) -> Float[Array, "b k m ..."]:
    return jnp.take_along_axis(weights, jnp.asarray(order).reshape(len(order), 1, -1, *[1] * (weights.ndim - 3)), axis=2)


def _like(factors: Float[Array, " k"], weights: Float[Array, "b k ..."]) -> Array:
    return factors.reshape(1, -1, *[1] * (weights.ndim - 2))


def _largest(problem: Problem, head: Head, adjoints: Adjoints, tangents: Tangents | None, known) -> np.ndarray:
    """The largest radii that the local bound certifies, by bisection; what is returned was certified, or is 0."""
    low, high = np.zeros_like(known), np.nan_to_num(head.margins / adjoints.slope, posinf=0.0)
    for _ in range(_NUM_BISECTIONS):
        middle = (low + high) / 2
        certified = _holds(problem, head, adjoints, tangents, middle)
        low, high = np.where(certified, middle, low), np.where(certified, high, middle)
    return low


def _holds(problem: Problem, head: Head, adjoints: Adjoints, tangents: Tangents | None, radii) -> np.ndarray:
    """Whether no margin falls to 0 in balls of these radii, one for each other class."""
    moved = margin_bounds.displacements(problem.steps, adjoints, tangents, problem.first, radii)
    fallen = margin_bounds.fall(problem.steps, adjoints, tangents, moved, radii)
    return head.margins > (fallen + head.rectified(moved.points[-1]) + head.errors) * UP
