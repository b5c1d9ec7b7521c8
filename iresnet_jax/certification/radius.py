r"""The radius around an image in which a classifier's decision cannot change, from global and from local bounds.

The margin of the predicted class over another one is ``m = sum_k w_k relu(u_k) + const`` with ``u`` the normalised features and
``w`` the difference of two columns of the head over the number of positions. Both radii are certified:

- global: ``m >= m(x) - |w alpha| Lip(F) / min std r`` with ``alpha`` the scales of the head's normalisation;
- local: ``m(x) - m`` is at most the fall of the function ``<grad_T, x_T>``, see `iresnet_jax.maths.trajectories.margin_bounds`,
  and what the head's rectifiers add, see `iresnet_jax.certification.head`.

Trajectories are computed in float64 with residuals in double-double, as for `certify.inverse`, and all rounding is bounded.
"""

import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Num

from iresnet_jax.certification.head import Head
from iresnet_jax.certification.passes import backward, forward, weights_of
from iresnet_jax.certification.prepared import PreparedFlow, in_parts, prepared
from iresnet_jax.certification.residuals import Residuals, residuals
from iresnet_jax.certification.trajectory import follow
from iresnet_jax.maths.enclosures.double_double import DoubleDouble
from iresnet_jax.maths.enclosures.upward_rounding import UP, U
from iresnet_jax.maths.trajectories import margin_bounds
from iresnet_jax.maths.trajectories.margin_bounds import Adjoints, Step, Tangents
from iresnet_jax.models.classifier import Classifier
from iresnet_jax.models.contractions import bilipschitz

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
    if not isinstance(model, Classifier):
        raise ValueError(f"radii are certified for classifiers, got a {type(model).__name__}")
    if num_forms is not None and num_forms < 0:
        raise ValueError(f"num_forms must be at least 0, got {num_forms}")
    num_others = model.spec.num_classes - 1
    if num_forms is None:
        num_forms = num_others if math.prod(model.spec.image_shape) <= MOST_ENTRIES else 0
    with prepared(model, images, contraction=False) as (flow, _):
        inputs = np.asarray(model.preprocess(np.asarray(images)))  # checks the images' shape and levels
        return in_parts(functools.partial(_radii, flow, model, min(num_forms, num_others)), _CHUNK, inputs)


def _radii(flow: PreparedFlow, model: Classifier, num_forms: int, inputs: Float[np.ndarray, "b h w c"]) -> CertifiedRadius:
    """The radii around a part of the images."""
    points = np.array(follow(flow.spec, flow.weights, inputs, None))
    found = residuals(flow.stages, DoubleDouble.of(points))
    first = 1 / min(model.spec.std) * UP  # the norm of the map from pixels to the flow's input
    start_error = 8 * U * (1 + max(map(abs, model.spec.mean))) * first * math.sqrt(inputs[0].size)
    head = Head.of(model, points[:, -1])
    globally = _global(flow, head, first, np.full(len(inputs), start_error), found)
    locally = np.zeros_like(globally)
    if flow.smooth:
        adjoints, weights = _adjoints(flow, model, head, found, start_error)
        locally = _largest(flow, head, adjoints, None, first)
        if num_forms:
            order = np.argsort(np.maximum(locally, globally), axis=1)[:, :num_forms]
            tangents = _tangents(flow, model, found, weights, order, locally.shape[1])
            locally = np.maximum(locally, _largest(flow, head, adjoints, tangents, first))
    best = np.maximum(globally, locally)
    return CertifiedRadius(
        best.min(axis=1), globally.min(axis=1), locally.min(axis=1), head.predicted, head.margins.min(axis=1)
    )


def _global(flow: PreparedFlow, head: Head, first: float, error: Float[np.ndarray, " b"], found: Residuals) -> np.ndarray:
    """The radii by the Lipschitz constant of the network, for inputs that are off by at most ``error``."""
    for step, size in zip(flow.margin_steps, _sizes(found), strict=True):
        error = (step.stretch * error + size) * UP
    sure = head.margins - (head.errors + head.lipschitz * error[:, None]) * UP
    lipschitz = float(bilipschitz(flow.spec, flow.weights).forward)
    return np.maximum(np.nan_to_num(sure / (head.lipschitz * lipschitz * first) / UP), 0)


def _sizes(found: Residuals) -> Float[np.ndarray, "t b"]:
    return np.nan_to_num(found.sizes, nan=np.inf).T


def _adjoints(
    flow: PreparedFlow, model: Classifier, head: Head, found: Residuals, start_error: float
) -> tuple[Adjoints, list[list[Any]]]:
    """Gradients of the margins along the trajectories, and ``S w`` of the activations, by stage and layer."""
    passed, outputs = backward(flow.steps, found.slopes, head.gradients)
    points = np.moveaxis(np.asarray(jnp.linalg.norm(passed, axis=-1)), 1, 0) * UP
    start = np.asarray(passed[:, 0]).reshape(*head.margins.shape, *flow.spec.event_shape)
    start = start[..., : model.spec.image_shape[-1]] / np.asarray(model.spec.std)
    slope = np.sqrt(np.sum(start**2, axis=(-3, -2, -1))) * UP
    weights, largest, t = [], [], 0
    for stage, of_layers in zip(flow.stages, outputs, strict=True):
        own = flow.margin_steps[t : t + stage.num_blocks]
        of_stage = [None if v is None else weights_of(layer.spec, v) for layer, v in zip(stage.layers, of_layers, strict=True)]
        most = [jnp.max(w, axis=tuple(range(3, w.ndim))) for w in of_stage if w is not None]
        largest += [np.asarray(w[:, k]) for k in range(stage.num_blocks) for w in most]
        curvatures = [jnp.array([step.curvatures[i] or 0.0 for step in own]) for i in range(len(of_stage))]
        weights.append(
            [
                None if w is None else w * s.reshape(1, -1, *[1] * (w.ndim - 2))
                for w, s in zip(of_stage, curvatures, strict=True)
            ]
        )
        t += stage.num_blocks
    slope_errors = flow.constants.slope_errors(found.argument_errors).T * UP
    start_errors = np.full(len(start), start_error)
    return Adjoints(slope, start_errors, points, np.array(largest), _sizes(found), slope_errors), weights


def _tangents(
    flow: PreparedFlow, model: Classifier, found: Residuals, weights, order: Int[np.ndarray, "b c"], num_others: int
) -> Tangents:
    """Norms of Jacobians, and of the quadratic forms of some classes of each example."""
    h, w, c = model.spec.image_shape
    entries = np.arange(flow.spec.num_dims).reshape(flow.spec.event_shape)[..., :c].ravel()
    first = np.zeros((len(entries), flow.spec.num_dims))
    first[np.arange(len(entries)), entries] = np.broadcast_to(1 / np.asarray(model.spec.std), (h, w, c)).ravel()
    chosen = jax.tree.map(
        lambda v: jnp.take_along_axis(v, order.reshape(len(order), 1, -1, *[1] * (v.ndim - 3)), axis=2), weights
    )
    *norms, of_chosen = forward(flow.steps, found.slopes, chosen, first)
    forms = np.full((len(order), num_others), np.inf)
    np.put_along_axis(forms, order, np.asarray(of_chosen), axis=1)
    points, frobenius, arguments, fourth = (np.asarray(values).T for values in norms)
    return Tangents(points, frobenius, arguments, fourth, forms)


def _largest(flow: PreparedFlow, head: Head, adjoints: Adjoints, tangents: Tangents | None, first: float) -> np.ndarray:
    """The largest radii that the local bound certifies, by bisection; what is returned was certified, or is 0."""
    low, high = np.zeros_like(head.margins), np.nan_to_num(head.margins / adjoints.slope, posinf=0.0)
    for _ in range(_NUM_BISECTIONS):
        middle = (low + high) / 2
        certified = _holds(flow.margin_steps, head, adjoints, tangents, first, middle)
        low, high = np.where(certified, middle, low), np.where(certified, high, middle)
    return low


def _holds(steps: Sequence[Step], head: Head, adjoints: Adjoints, tangents: Tangents | None, first: float, radii) -> np.ndarray:
    """Whether no margin falls to 0 in balls of these radii, one for each other class."""
    moved = margin_bounds.displacements(steps, adjoints, tangents, first, radii)
    fallen = margin_bounds.fall(steps, adjoints, tangents, moved, radii)
    return head.margins > (fallen + head.rectified(moved.points[-1]) + head.errors) * UP
