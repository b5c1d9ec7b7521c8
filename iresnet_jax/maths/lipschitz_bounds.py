"""Guaranteed Lipschitz constants of branches, residual blocks and whole models.

All of it follows from upper bounds of the layers' norms, see `convolution_certificate`. Results are
rounded up.
"""

import functools
import math
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Shaped

from iresnet_jax.maths.upward_rounding import UP, at_least, lipschitz_at_least, rounded_up

Scalar = float | Shaped[Array, ""]


class BiLipschitz(NamedTuple):
    """Upper bounds of the Lipschitz constants of a bijection and of its inverse, in the l2 norm.

    Attributes:
        forward: Bound for the map.
        inverse: Bound for the inverse map; infinite where nothing is known.
    """

    forward: Shaped[Array, ""]
    inverse: Shaped[Array, ""]

    @classmethod
    def of(cls, forward: float, inverse: float) -> "BiLipschitz":
        """Bounds that were computed in float64, rounded up."""
        return cls(at_least(forward * UP), at_least(inverse * UP))

    def compose(self, other: "BiLipschitz") -> "BiLipschitz":
        """Bounds of the composition of both maps, in either order: the products."""
        return BiLipschitz(
            product_bound(self.forward, other.forward), product_bound(self.inverse, other.inverse)
        )

    def beside_identity(self) -> "BiLipschitz":
        """Bounds of the map that acts on some coordinates and leaves the others alone, as after
        a multi-scale split.
        """
        return BiLipschitz(jnp.maximum(self.forward, 1), jnp.maximum(self.inverse, 1))


@jax.jit
def product_bound(a: Scalar, b: Scalar) -> Shaped[Array, ""]:
    """A bound of the product, 0 only if a factor is: small numbers underflow."""
    product = rounded_up(a * b, num_roundings=1)
    return jnp.where(
        jnp.logical_and(a > 0, b > 0), jnp.maximum(product, jnp.finfo(product.dtype).tiny), product
    )


def branch_bound(layer_bounds: Sequence[Scalar] | Float[Array, " k"]) -> Shaped[Array, ""]:
    """Bounds the Lipschitz constant of a branch with 1-Lipschitz activations: the product of its
    layers' bounds, rounded up.

    Args:
        layer_bounds: One upper bound per linear layer.

    Returns:
        The bound; infinite if one of its factors is negative or NaN.

    Example:
        >>> branch_bound([0.9, 0.9, 0.9])  # 0.729
    """
    product = functools.reduce(
        product_bound, [lipschitz_at_least(bound) for bound in layer_bounds] or [jnp.ones(())]
    )
    return jnp.nan_to_num(product, nan=jnp.inf, posinf=jnp.inf)  # 0 times infinity promises nothing


def branch_jacobian_bound(layer_bounds: Sequence[float], slope_lipschitz: Sequence[float]) -> float:
    r"""Bounds the Lipschitz constant of the Jacobian of ``g = W_n phi_n ... W_1 phi_1`` with
    1-Lipschitz activations.

    ``J = W_n D_n ... W_1 D_1``, where ``D_i`` is the Jacobian of ``phi_i`` at its argument ``h_i``.
    Between two inputs

    ``J - J' = sum_i (W_n D_n ... W_i) (D_i - D'_i) (W_{i-1} D'_{i-1} ... D'_1)``

    (every other factor at one of the two), and ``|D_i| <= 1``. With ``S_i`` the Lipschitz constant
    of the slope of ``phi_i``, ``|D_i - D'_i| <= S_i |h_i - h'_i| <= S_i |W_{i-1}| ... |W_1| |x -
    x'|``. Together

    ``Lip(J) <= sum_i |W_n| ... |W_1| * S_i * |W_{i-1}| ... |W_1|``.

    Args:
        layer_bounds: Upper bounds of ``|W_1|, ..., |W_n|``.
        slope_lipschitz: ``S_1, ..., S_n``; 0 where there is no activation, infinite where a slope
            jumps.

    Returns:
        The bound, rounded up; infinite if a slope jumps.

    Example:
        >>> branch_jacobian_bound([0.9, 0.9], [0.0, 1.0])  # 0.9^3
    """
    if any(map(math.isinf, slope_lipschitz)):
        return math.inf
    moved = sum(slope * math.prod(layer_bounds[:i]) for i, slope in enumerate(slope_lipschitz))
    return math.prod(layer_bounds) * moved * UP


def block_bounds(lipschitz_bound: Scalar) -> BiLipschitz:
    r"""Bounds of ``F(x) = x + g(x)`` with ``Lip(g) <= L``: ``Lip(F) <= 1 + L`` and ``Lip(F^-1) <=
    1/(1 - L)``.

    Both follow from ``(1 - L) |x - x'| <= |F(x) - F(x')| <= (1 + L) |x - x'|`` (Behrmann et al.
    2019, Lemma 2).

    Args:
        lipschitz_bound: ``L``, a guaranteed bound of the branch.

    Returns:
        The two bounds, rounded up; ``inverse`` is infinite if ``L >= 1``, both if ``L`` is negative
        or NaN.
    """
    return _of_block(lipschitz_at_least(lipschitz_bound))


@jax.jit
def _of_block(bound: Shaped[Array, ""]) -> BiLipschitz:
    gap = jnp.where(bound < 1, 1 - bound, 1)
    return BiLipschitz(rounded_up(1 + bound), jnp.where(bound < 1, rounded_up(1 / gap), jnp.inf))


def model_bounds(
    blocks: Sequence[BiLipschitz], log_scales: Sequence[Float[Array, " _"]] = ()
) -> BiLipschitz:
    r"""Bounds of a chain of residual blocks and ActNorms: ``prod_k (1 + L_k) prod_l max_c
    exp(s_lc)``, and of its inverse.

    The inverse's bound is ``prod_k 1/(1 - L_k) prod_l max_c exp(-s_lc)``. Squeezing is a
    permutation and padding with zero channels an isometry, so neither appears. With a multi-scale
    split compose from the last stage on: ``first.compose(second.beside_identity())``. Guaranteed,
    and pessimistic in depth: a chain's factors multiply.

    Args:
        blocks: Bounds of every block, see `block_bounds`.
        log_scales: One vector of natural log scales per ActNorm.

    Returns:
        The two bounds, rounded up; infinite where they exceed the dtype's range.

    Example:
        >>> model_bounds([block_bounds(0.5)] * 2, [jnp.zeros(3)])  # forward 2.25, inverse 4
    """
    bounds = BiLipschitz(jnp.ones(()), jnp.ones(()))
    for block in blocks:
        bounds = bounds.compose(block)
    for log_scale in log_scales:
        bounds = bounds.compose(scaling_bounds(log_scale))
    return bounds


def scaling_bounds(log_scale: Float[Array, " _"]) -> BiLipschitz:
    """Bounds of ``y = x exp(log_scale)``, rounded up: the largest scale, and the inverse of the
    least one.
    """
    scales = jnp.exp(jnp.max(log_scale)), jnp.exp(-jnp.min(log_scale))
    tiny = jnp.finfo(log_scale.dtype).tiny
    return BiLipschitz(*(rounded_up(jnp.maximum(scale, tiny)) for scale in scales))
