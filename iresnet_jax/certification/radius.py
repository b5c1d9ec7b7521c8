r"""The radius around an image in which a classifier's decision cannot change, from a margin and a
Lipschitz constant.

The margin of the predicted class over class ``j`` is ``m = w . h + const``, with ``w`` the
difference of two columns of the head, so the class stays the same within ``m / Lip(m)`` (Tsuzuku et
al. 2018, Proposition 1, for each pair of classes). A linear head has ``h = F(x)`` and, in pixels,
``Lip(m) <= |w| Lip(F) / min std``. A pooled one has means of ``relu(u)`` over positions with ``u =
alpha (F(x) - mean) + bias``; rectifiers are 1-Lipschitz, so ``|w alpha|`` takes the place of
``|w|``.

``Lip(F)`` is the product of the blocks' constants. Only blocks that never stretch, of kind
"potential" without ActNorm, keep it at 1. For other blocks it is thousands to billions, and radii
are smaller than attacks suggest by the same factor.
"""

import functools
import math
from typing import NamedTuple

import numpy as np
from jaxtyping import Array, Float, Int, Num

from iresnet_jax.certification.prepared import PreparedFlow, in_parts, prepared
from iresnet_jax.certification.residuals import residuals
from iresnet_jax.certification.steps import follow
from iresnet_jax.maths.double_double import DoubleDouble
from iresnet_jax.maths.upward_rounding import UP, U, gamma
from iresnet_jax.models.classifier import BATCH_NORM_EPS, Classifier
from iresnet_jax.models.flow import bilipschitz
from iresnet_jax.pytrees import in_words, largest

_CHUNK = 16  # images that are certified together


class CertifiedRadius(NamedTuple):
    """Guarantees of a classifier's decisions, one entry per image.

    Attributes:
        radius: No perturbation of a smaller 2-norm changes the predicted class, for pixels on the
            scale of [0, 1]; perturbed pixels may leave this interval.
        predicted: The predicted class.
        margin: Logit of the predicted class less the largest other one.
        lipschitz: Certified Lipschitz constant, in pixels, of the margin that gives the radius.
    """

    radius: Float[np.ndarray, " b"]
    predicted: Int[np.ndarray, " b"]
    margin: Float[np.ndarray, " b"]
    lipschitz: Float[np.ndarray, " b"]

    def __repr__(self) -> str:
        return in_words(
            self,
            lambda: (
                f"{np.size(self.radius)} images, radii {np.min(self.radius):.2g} to "
                f"{largest(self.radius)}"
            ),
        )


def radius(
    model: Classifier, images: Num[Array, "b h w c"] | Num[np.ndarray, "b h w c"]
) -> CertifiedRadius:
    """Guaranteed radii around images in which the predicted class stays the same, rounding
    included.

    The classifier is the map of the model's weights in exact arithmetic.

    Args:
        model: A classifier with bounds, from `freeze` or `load`.
        images: Images of integer levels.

    Example:
        >>> certify.radius(model, images).radius  # doctest: +SKIP
    """
    with prepared(model, images, contraction=False) as (flow, _):
        # `preprocess` checks the images' shape and levels.
        inputs = np.asarray(model.preprocess(np.asarray(images)))
        return in_parts(functools.partial(_radii, flow, model), _CHUNK, inputs)


def _radii(
    flow: PreparedFlow, model: Classifier, inputs: Float[np.ndarray, "b h w c"]
) -> CertifiedRadius:
    """The radii around a part of the images."""
    points = np.array(follow(flow.spec, flow.weights, inputs, None))
    found = residuals(flow.stages, DoubleDouble.of(points))
    # This is the Lipschitz constant of the map from pixels to the flow's input.
    from_pixels = 1 / min(model.spec.std) * UP
    start_error = (
        8 * U * (1 + max(map(abs, model.spec.mean))) * from_pixels * math.sqrt(inputs[0].size)
    )
    # Error of the features, from the errors of the rounded input and of each step.
    error = np.full(len(inputs), start_error)
    for stretch, size in zip(flow.chained(flow.constants.stretch), found.sizes.T, strict=True):
        error = (stretch * error + size) * UP
    predicted, margins, margin_errors, lipschitz = _margins(
        model, points[:, -1, flow.places.latents]
    )
    sure = margins - (margin_errors + lipschitz * error[:, None]) * UP
    of_flow = float(bilipschitz(flow.spec, flow.weights).forward) * from_pixels * UP
    radii = np.maximum(np.nan_to_num(sure / (lipschitz * of_flow) / UP, posinf=np.inf), 0)
    of_margin = (
        np.take_along_axis(lipschitz, radii.argmin(axis=1)[:, None], axis=1)[:, 0] * of_flow * UP
    )
    return CertifiedRadius(radii.min(axis=1), predicted, margins.min(axis=1), of_margin)


def _margins(model: Classifier, features: Float[np.ndarray, "b d"]) -> tuple[np.ndarray, ...]:
    """Predicted classes; margins over all other classes, their rounding errors and Lipschitz
    constants in the features.
    """
    linear = {name: np.asarray(a, np.float64) for name, a in model.head["linear"].items()}
    if model.spec.head == "linear":
        h, h_errors, slopes = features, np.zeros_like(features), 1.0
        columns = (linear["kernel"] / np.linalg.norm(linear["kernel"], axis=0)).T
    else:
        h, h_errors, slopes = _pooled(model, features)
        columns = linear["kernel"].T
    num_classes = model.spec.num_classes
    predicted = np.argmax(np.nan_to_num(h @ columns.T + linear["bias"], nan=-np.inf), axis=1)
    others = np.array([np.delete(np.arange(num_classes), i) for i in predicted]).reshape(
        -1, num_classes - 1
    )
    own, other = columns[predicted][:, None], columns[others]  # (b, 1, d) and (b, k, d)
    bias, other_bias = linear["bias"][predicted][:, None], linear["bias"][others]
    margins = np.sum((own - other) * h[:, None], axis=-1) + (bias - other_bias)
    both = np.abs(own) + np.abs(other)
    terms = np.sum(both * np.abs(h)[:, None], axis=-1) + np.abs(bias) + np.abs(other_bias)
    # Rounding of sums, of the mean over positions and of unit columns.
    rounding = gamma(features[0].size + 16)
    errors = np.sum(both * h_errors[:, None], axis=-1) + rounding * terms
    lipschitz = np.linalg.norm((own - other) * slopes, axis=-1) + rounding * np.linalg.norm(
        both * slopes, axis=-1
    )
    return predicted, margins, errors * UP, lipschitz * UP


def _pooled(model: Classifier, features: Float[np.ndarray, "b d"]) -> tuple[np.ndarray, ...]:
    """Means of rectified features over positions, bounds of the errors of their terms, and their
    Lipschitz constants.

    An entry ``u_k`` errs by at most ``8 U (|alpha_k| (|x_k| + |mean|) + |bias|)``.
    """
    norm = {name: np.asarray(a, np.float64) for name, a in model.head["norm"].items()}
    mean, var = (np.asarray(model.statistics["head"][name], np.float64) for name in ("mean", "var"))
    x = features.reshape(len(features), -1, model.spec.feature_shape[-1])  # (b, positions, c)
    alpha = norm["scale"] / np.sqrt(var + BATCH_NORM_EPS)
    u = np.maximum((x - mean) * alpha + norm["bias"], 0)
    u_errors = 8 * U * (np.abs(alpha) * (np.abs(x) + np.abs(mean)) + np.abs(norm["bias"]))
    return u.mean(axis=1), u_errors.mean(axis=1), np.abs(alpha) / math.sqrt(x.shape[1])
