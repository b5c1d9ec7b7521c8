r"""How the margins of a classifier's head vary with the features, with guaranteed bounds.

The margin of the predicted class ``i`` over class ``j`` is ``m = sum_k w_k relu(u_k) + const``, with the normalised features
``u = alpha (x - mean) + bias`` and ``w`` the difference of two columns of the head over the number of positions. With the
slopes ``D`` of the rectifiers at the centre

    m(x + e) - m(x) = <w D alpha, e> + sum w_k q_k,    0 <= q_k <= (|alpha_k e_k| - |u_k|)_+.

The rectifier is convex, so only entries with ``w_k < 0`` can lower the margin. By weak duality, for every ``lambda > 0``,

    sum c_k (|e_k| - a_k)_+ <= lambda rho^2 + sum (c_k^2 / (4 lambda) - c_k a_k)_+    for ``|e| <= rho``,

with ``c_k = |w_k alpha_k|`` and ``a_k = |u_k / alpha_k|``: ``c (t - a) - lambda t^2`` is at most ``c^2 / (4 lambda) - c a``.
"""

from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int

from iresnet_jax.certification.trajectory import places_of
from iresnet_jax.maths.enclosures.upward_rounding import UP, U, gamma
from iresnet_jax.models.classifier import Classifier
from iresnet_jax.models.head import BATCH_NORM_EPS

_DISTANCES = np.geomspace(1e-8, 1e4, 160)  # of features; a lambda is best for each, and 2 % off between two of them


class Head(NamedTuple):
    """The margins over all other classes at computed features.

    Attributes:
        predicted: The predicted class.
        margins: ``m``.
        errors: Bounds of what rounding does to the margin of any features, beside that of the features.
        gradients: ``w D alpha``, in the order of the flow's vector.
        lipschitz: Bounds of the Lipschitz constant of ``m``.
        lambdas: Some positive numbers.
        constants: ``sum (c_k^2 / (4 lambda) - c_k a_k)_+`` for each of them.
    """

    predicted: Int[np.ndarray, " b"]
    margins: Float[np.ndarray, "b k"]
    errors: Float[np.ndarray, "b k"]
    gradients: Float[np.ndarray, "b k d"]
    lipschitz: Float[np.ndarray, "b k"]
    lambdas: Float[np.ndarray, "b k l"]
    constants: Float[np.ndarray, "b k l"]

    @classmethod
    def of(cls, model: Classifier, last: Float[np.ndarray, "b d"]) -> "Head":
        """The margins at last points of trajectories, in float64.

        An entry ``u_k`` errs by at most ``8 U (|alpha_k| (|x_k| + |mean|) + |bias|)``. What that makes of the margin is counted
        twice: for the value, and for the place of the rectifier's kink.
        """
        spec, order = model.spec, places_of(model.spec.flow).latents
        norm, linear = ({name: np.asarray(a, np.float64) for name, a in model.head[key].items()} for key in ("norm", "linear"))
        mean, var = (np.asarray(model.statistics["head"][name], np.float64) for name in ("mean", "var"))
        features = last[:, order].reshape(len(last), -1, spec.feature_shape[-1])
        alpha = norm["scale"] / np.sqrt(var + BATCH_NORM_EPS)
        u = (features - mean) * alpha + norm["bias"]
        of_u = 8 * U * (np.abs(alpha) * (np.abs(features) + np.abs(mean)) + np.abs(norm["bias"]))
        positions = features.shape[1]
        pooled = np.maximum(u, 0).mean(axis=1)
        logits = pooled @ linear["kernel"] + linear["bias"]
        predicted = np.argmax(np.nan_to_num(logits, nan=-np.inf), axis=1)
        others = (
            np.stack([np.delete(np.arange(spec.num_classes), i) for i in predicted]) if len(last) else np.zeros((0, 1), int)
        )
        w = (linear["kernel"].T[predicted][:, None] - linear["kernel"].T[others]) / positions  # (b, k, c), the same everywhere
        bias = linear["bias"][predicted][:, None] - linear["bias"][others]
        w = np.broadcast_to(w[:, :, None], (*w.shape[:2], *u.shape[1:])).reshape(*w.shape[:2], -1)
        u, of_u = u.reshape(len(u), 1, -1), of_u.reshape(len(u), 1, -1)
        alpha = np.tile(alpha, positions)
        margins = np.sum(w * np.maximum(u, 0), axis=-1) + bias
        terms = np.sum(np.abs(w) * np.maximum(u, 0), axis=-1) + np.abs(linear["bias"][predicted][:, None]) + np.abs(bias)
        errors = 2 * np.sum(np.abs(w) * of_u, axis=-1) + gamma(w.shape[-1] + 8) * terms
        gradients = np.zeros((*w.shape[:2], last.shape[1]))
        gradients[..., order] = w * (u > 0) * alpha
        c = np.abs(np.minimum(w, 0) * alpha) * UP
        a = np.maximum(np.abs(u) - of_u, 0) / (np.abs(alpha) * UP + 1e-300)
        lipschitz = np.linalg.norm(w * alpha, axis=-1) * UP
        lambdas = (np.linalg.norm(c, axis=-1)[..., None] + 1e-300) / (2 * _DISTANCES)
        constants = np.zeros_like(lambdas)
        for i, of_example in enumerate(c):  # at most (k, d, l) numbers at a time
            for j, own in enumerate(of_example):
                excess = np.square(own)[:, None] / (4 * lambdas[i, j]) - (own * a[i, 0])[:, None]
                constants[i, j] = np.sum(np.maximum(excess, 0), axis=0) * UP
        return cls(predicted, margins, errors * UP, gradients, lipschitz, lambdas, constants)

    def rectified(self, distance: Float[np.ndarray, "b k"]) -> Float[np.ndarray, "b k"]:
        """Bound of ``sum |w_k| q_k`` over entries with ``w_k < 0``, and of what rounding in `gradients` makes of a move."""
        dual = self.lambdas * np.square(distance)[..., None] + self.constants
        return (np.min(dual, axis=-1) + 16 * U * self.lipschitz * distance) * UP
