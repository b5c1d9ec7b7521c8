r"""How far a scalar function of a residual network can fall in a ball, from its gradients along one trajectory.

A network has the steps ``x_{t+1} = F_t(x_t)``, ``F_t(x) = u + W_n phi(... W_1 phi(u))`` with ``u = s (x + b)``. A function
``m`` of ``x_T`` is compared between the inputs ``x_0`` and ``x'_0 = x_0 + P_0 d`` with ``|d| <= r``. Let ``h`` be the argument
of an activation, ``e = h' - h`` its displacement, ``D`` its slope at ``h``, and ``v`` the gradient of ``m`` in its output. All
gradients are those at the centre. Then

    phi(h') = phi(h) + D e + q(e),    |q(e)_k| <= S/2 e_k^2,

with ``S`` the Lipschitz constant of the slope, and ``q >= 0`` if ``phi`` is convex. Every other map is linear. Carrying
gradients backward cancels what is linear in ``e``, so for an ``m`` that is linear in ``x_T``, exactly,

    m(x') - m(x) = <P_0^T grad_0, d> + sum over activations of <v, q(e)>.                                           (1)

Let ``w_k`` be ``|v_k|``, or ``max(-v_k, 0)`` of a convex activation, for which ``v_k q_k`` lowers ``m`` only if ``v_k < 0``.

**Displacements.** ``e = A d + eps``, where ``A`` is the Jacobian of ``h`` in ``d``. ``eps`` is what the ``q`` of the
activations in front become on their way. A layer multiplies it by at most ``|W|``, a step by ``|J_t| <= max s (1 + prod |W|)``.
For 1-Lipschitz activations, bounds of all ``|e|`` and ``|eps|`` follow one after the other from

    |q(e)|_2 <= S/2 |e|_4^2 <= S/2 (|A d|_4 + |eps|_2)^2    and    |q(e)|_2 <= 2 |e|_2.

Without ``A``, products of norms bound ``|e|``, and ``|e|_4^2 <= |e|_inf |e|_2``.

**The fall.** With the symmetric matrix ``M = sum S A^T diag(w) A`` over all activations, ``sum <w, |q|>`` is at most

    1/2 sum S sum_k w_k (A d + eps)_k^2 <= 1/2 (sqrt(|M|_2) r + sqrt(sum S max_k w_k |eps|^2))^2                    (2)

by Minkowski's inequality, and at most ``1/2 sum S max_k w_k |e|_2^2``. The lesser one counts.

**Rounding.** All of this holds for computed numbers in place of exact ones if their defects are added. (1) has further terms:

- ``<g_{t+1}, r_t>`` for a computed trajectory with residuals ``r_t = F_t(x_t) - x_{t+1}``;
- ``<J_t^T g_{t+1} - g_t, e_t>`` for computed gradients ``g_t``;
- ``<v, (phi'(h) - D) e>`` for computed slopes ``D``.

``eps`` holds ``r_t``, ``(phi'(h) - D) e``, and ``(J_t P_t - P_{t+1}) d`` for computed ``P_t`` and ``A``. A pass of vectors
through a step, forward or backward, errs by at most ``c_t`` times their length, see `Step.rounding`.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from iresnet_jax.maths.enclosures.upward_rounding import UP

Array = np.ndarray


class Step(NamedTuple):
    """Guaranteed constants of a step.

    Attributes:
        scale: Largest scale of the ActNorm.
        norms: Norms of the layers.
        rows: Largest norms of a row of the layers.
        curvatures: ``S`` of the activation in front of each layer; None without one.
        rounding: ``c_t``.
    """

    scale: float
    norms: tuple[float, ...]
    rows: tuple[float, ...]
    curvatures: tuple[float | None, ...]
    rounding: float

    @property
    def stretch(self) -> float:
        """Bound of ``|J|`` for slopes of at most 1."""
        return self.scale * (1 + float(np.prod(self.norms))) * UP


class Adjoints(NamedTuple):
    """Gradients of the margins along computed trajectories, for ``b`` examples and ``k`` functions.

    Attributes:
        slope: ``|P_0^T grad_0|``.
        start_error: How far the computed ``x_0`` is from the exact one.
        points: ``|grad_t|`` at every point of the trajectory.
        weights: ``max_k w_k`` of every activation.
        residuals: Bounds of ``|r_t|``.
        slope_errors: Bounds of ``|phi'(h) - D|`` in each step.
    """

    slope: Float[Array, "b k"]
    start_error: Float[Array, " b"]
    points: Float[Array, "t+1 b k"]
    weights: Float[Array, "a b k"]
    residuals: Float[Array, "t b"]
    slope_errors: Float[Array, "t b"]


class Tangents(NamedTuple):
    """Jacobians of a trajectory's points and of the activations' arguments in ``d``.

    Attributes:
        points: Bounds of ``|P_t|_2``.
        frobenius: Frobenius norms of ``P_t``.
        arguments: Bounds of ``|A|_2``.
        fourth: Bounds of ``|A d|_4^2`` for ``|d| = 1``.
        forms: Bounds of ``|M|_2``; infinite where unknown.
    """

    points: Float[Array, "t+1 b"]
    frobenius: Float[Array, "t+1 b"]
    arguments: Float[Array, "a b"]
    fourth: Float[Array, "a b"]
    forms: Float[Array, "b k"]


class Displacements(NamedTuple):
    """Bounds in the ball, one radius for each function.

    Attributes:
        points: ``|x'_t - x_t|``.
        arguments: ``|e|_2`` of every activation.
        beyond: ``|eps|_2`` of every activation.
    """

    points: list[Float[Array, "b k"]]
    arguments: list[Float[Array, "b k"]]
    beyond: list[Float[Array, "b k"]]


@np.errstate(all="ignore")
def displacements(
    steps: Sequence[Step],
    adjoints: Adjoints,
    tangents: Tangents | None,
    first: float,
    radius: Float[Array, "b k"],
) -> Displacements:
    """How far the points and the activations' arguments can be from those of the centre.

    Args:
        steps: The steps.
        adjoints: Errors of the start, the residuals and the slopes; its gradients are not used.
        tangents: The Jacobians; None bounds them by products of norms.
        first: ``|P_0|``.
        radius: ``r``.
    """
    eps = np.broadcast_to(adjoints.start_error[:, None], radius.shape)
    moved = (first * radius + eps) * UP
    points, arguments, beyond = [moved], [], []
    for t, step in enumerate(steps):
        rounding = 0.0 if tangents is None else step.rounding * tangents.frobenius[t][:, None] * radius
        inside, reach = step.scale * eps + rounding, step.scale * moved
        injected, row = np.zeros_like(radius), np.inf
        for norm, rows, curvature in zip(step.norms, step.rows, step.curvatures, strict=True):
            if curvature is not None:
                size, square = reach, np.minimum(row, reach) * reach
                if tangents is not None:
                    a = len(arguments)
                    size = np.minimum(size, tangents.arguments[a][:, None] * radius + inside)
                    square = np.minimum(square, (np.sqrt(tangents.fourth[a])[:, None] * radius + inside) ** 2)
                arguments.append(size * UP)
                beyond.append(inside * UP)
                bent = np.minimum(curvature / 2 * square, 2 * size) + adjoints.slope_errors[t][:, None] * size
                inside, injected, reach = (inside + bent) * UP, (injected + bent) * UP, np.minimum(reach, size) * UP
            row = rows * reach
            inside, injected, reach = (norm * part * UP for part in (inside, injected, reach))
        residual = adjoints.residuals[t][:, None]
        eps = (step.stretch * eps + injected + rounding + residual) * UP
        moved = (step.stretch * moved + residual) * UP
        if tangents is not None:
            moved = np.minimum(moved, (tangents.points[t + 1][:, None] * radius + eps) * UP)
        points.append(moved)
    return Displacements(points, arguments, beyond)


@np.errstate(all="ignore")
def fall(
    steps: Sequence[Step], adjoints: Adjoints, tangents: Tangents | None, found: Displacements, radius: Float[Array, "b k"]
) -> Float[Array, "b k"]:
    """Bound of ``<grad_T, x_T - x'_T>``, by which a function that is linear in ``x_T`` can fall in the ball."""
    linear = adjoints.slope * radius + adjoints.points[0] * adjoints.start_error[:, None]
    a, bent, form, rest = 0, 0.0, 0.0, 0.0
    for t, step in enumerate(steps):
        later = adjoints.points[t + 1]
        linear = linear + later * (adjoints.residuals[t][:, None] + step.rounding * found.points[t])
        behind = np.cumprod(step.norms[::-1])[::-1]
        for norm, curvature in zip(behind, step.curvatures, strict=True):
            if curvature is None:
                continue
            linear = linear + norm * later * adjoints.slope_errors[t][:, None] * found.arguments[a]
            weight = curvature * (adjoints.weights[a] + step.rounding * later)
            bent = bent + weight * found.arguments[a] ** 2
            if tangents is not None:
                rest = rest + weight * found.beyond[a] ** 2
                form = form + curvature * step.rounding * later * tangents.arguments[a][:, None] ** 2
            a += 1
    if tangents is not None:
        bent = np.minimum(bent, (np.sqrt(tangents.forms + form) * radius + np.sqrt(rest)) ** 2)
    return (linear + bent / 2) * UP
