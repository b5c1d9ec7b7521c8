"""The Lipschitz constraint of a residual branch: the norms of its layers, and weights scaled down to the budget.

``g = W_n phi ... W_1`` with 1-Lipschitz activations has ``Lip(g) <= |W_n| ... |W_1|`` (Behrmann et al. 2019, sec. 2.1). Norms
are estimated by power iteration, as in the paper, or bounded from above. `normalize` and `normalize_certified` return weights
of the same form: what runs is always a plain network whose layers already satisfy the constraint.
"""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from iresnet_jax.branches.branch import BranchSpec, Weights, linear_map
from iresnet_jax.maths.norms.circulant_embedding import TWISTS, Twist
from iresnet_jax.maths.norms.convolution_certificate import conv_norm_bound, dense_norm_bound
from iresnet_jax.maths.norms.power_iteration import norm_along, singular_vectors, soft_normalize

Vectors = dict[str, Float[Array, "..."]]
VectorPair = tuple[Float[Array, "..."], Float[Array, "..."]]

BUDGETS = ("layer", "block")

# Allowance a layer for the rounding of its scaled kernel. Entry by entry it is eps / 2, by which a norm grows by at most
# sqrt(taps * min(cin, cout)) eps / 2: 7e-6 for 5 x 5 taps and 512 channels.
_SCALING_MARGIN = 1e-5


class Normalized(NamedTuple):
    """A branch whose layers satisfy the constraint, and the norms before it.

    Attributes:
        weights: Weights of the branch, scaled into the budget by `norms`.
        vectors: The new power iterates, one a layer; empty if none were used.
        norms: The operator norm of every layer before normalisation: estimated, or bounded from above.
        lipschitz: The product of the norms after it: an estimate of the branch's Lipschitz constant, or a bound.
    """

    weights: Weights
    vectors: Vectors
    norms: dict[str, Float[Array, ""]]
    lipschitz: Float[Array, ""]


def normalize(
    spec: BranchSpec,
    weights: Weights,
    vectors: Vectors,
    *,
    coeff: float,
    budget: str = "layer",
    num_steps: int | None = None,
    rtol: float = 1e-3,
) -> Normalized:
    """Constrains a branch by norms that power iteration estimates, starting from ``vectors``.

    Args:
        spec: The architecture.
        weights: Unconstrained weights, as an optimizer holds them.
        vectors: Power iterates, one a layer, of shape ``layer.in_shape``.
        coeff: Largest norm of a layer (budget "layer") or product of the norms of all layers ("block"), in (0, 1).
        budget: "layer" or "block".
        num_steps: Power iterations a layer; None iterates to the tolerance.
        rtol: Relative tolerance of the norms.

    Raises:
        ValueError: If ``coeff`` is not in (0, 1) or the budget is unknown.
    """
    pairs = layer_vectors(spec, weights, vectors, num_steps=num_steps, rtol=rtol)
    return normalize_along(spec, weights, pairs, coeff=coeff, budget=budget)


def layer_vectors(
    spec: BranchSpec, weights: Weights, vectors: Vectors, *, num_steps: int | None = None, rtol: float = 1e-3
) -> dict[str, VectorPair]:
    """The singular vectors ``(u, v)`` of every layer's norm, by power iteration, without a gradient; see `normalize`."""
    pairs = {}
    for layer in spec.layers:
        apply = linear_map(layer, spec.padding, single=True)
        u, v, _ = singular_vectors(apply, weights[layer.name]["kernel"], vectors[layer.name], num_steps=num_steps, rtol=rtol)
        pairs[layer.name] = (u, v)
    return pairs


def normalize_along(
    spec: BranchSpec, weights: Weights, pairs: dict[str, VectorPair], *, coeff: float, budget: str = "layer"
) -> Normalized:
    """`normalize` by singular vectors that are known, from `layer_vectors`."""
    norms = {
        layer.name: norm_along(linear_map(layer, spec.padding, single=True), weights[layer.name]["kernel"], *pairs[layer.name])
        for layer in spec.layers
    }
    return _within_budget(weights, {name: v for name, (_, v) in pairs.items()}, norms, coeff=coeff, budget=budget)


@functools.partial(jax.jit, static_argnames=("spec", "coeff", "budget", "rtol"))
def normalize_converged(
    spec: BranchSpec, weights: Weights, vectors: Vectors, *, coeff: float, budget: str = "layer", rtol: float = 1e-3
) -> Normalized:
    """`normalize` to the tolerance of all blocks of a stage, stacked; all programs that contain it share its trace."""
    return jax.vmap(lambda w, v: normalize(spec, w, v, coeff=coeff, budget=budget, rtol=rtol))(weights, vectors)


def normalize_certified(
    spec: BranchSpec,
    weights: Weights,
    *,
    coeff: float,
    budget: str = "layer",
    method: str = "exact",
    num_squarings: int = 4,
    twists: Sequence[Twist] | None = None,
) -> Normalized:
    """Constrains a branch by guaranteed upper bounds of its layers' norms: ``Lip(g)`` is within the budget by construction.

    There is no state, so this holds from the first step on, after any update and for any weights. Arguments and errors that
    are not listed are those of `normalize`.

    Args:
        method: "exact", or "gram", which is cheaper and looser; see `dense_norm_bound`.
        num_squarings: Squarings of "gram".
        twists: Twists of the convolutions' embedding, see `conv_norm_bound`; None takes the default.

    Raises:
        ValueError: If the method is unknown.
    """
    check_coeff(coeff)
    bounds = layer_bounds(spec, weights, method=method, num_squarings=num_squarings, twists=twists)
    return scaled_by(bounds, weights, coeff=coeff, budget=budget)


def scaled_by(bounds: dict[str, Float[Array, ""]], weights: Weights, *, coeff: float, budget: str = "layer") -> Normalized:
    """`normalize_certified` by upper bounds that are known."""
    allowance = len(bounds) * _SCALING_MARGIN
    normalized = _within_budget(weights, {}, bounds, coeff=coeff * (1 - allowance - _SCALING_MARGIN), budget=budget)
    return normalized._replace(lipschitz=normalized.lipschitz * (1 + allowance))


def layer_bounds(
    spec: BranchSpec,
    weights: Weights,
    *,
    method: str = "exact",
    num_squarings: int = 4,
    twists: Sequence[Twist] | None = None,
) -> dict[str, Float[Array, ""]]:
    """Guaranteed upper bound of every layer's operator norm; nan if a weight is not finite."""
    bounds = {}
    for layer in spec.layers:
        kernel = weights[layer.name]["kernel"]
        if kernel.ndim == 2:
            bounds[layer.name] = dense_norm_bound(kernel, method=method, num_squarings=num_squarings)
        else:
            size = (layer.in_shape[0], layer.in_shape[1])
            bounds[layer.name] = conv_norm_bound(
                kernel, size, padding=spec.padding, method=method, num_squarings=num_squarings, twists=twists
            )
    return bounds


def training_twists(spec: BranchSpec, choice: str = "auto") -> tuple[Twist, ...]:
    """Twists of the embedding by which a training step bounds norms, see `conv_norm_bound`.

    All four cost four times as much as one. On 8 x 8 and larger images the antiperiodic one alone is within 2 % of their
    minimum, on 4 x 4 images trained kernels lose up to a quarter of their budget to it.

    Args:
        spec: The architecture.
        choice: "all", "one", or "auto", which takes all where a 3 x 3 layer's Gram matrices have up to 8 rows.

    Raises:
        ValueError: If the choice is unknown.
    """
    if choice not in ("auto", "all", "one"):
        raise ValueError(f"twists must be auto, all or one, got {choice!r}")
    return TWISTS if choice == "all" or (choice == "auto" and spec.in_shape[-1] <= 8) else ((1, 1),)


def _within_budget(weights, vectors, norms, *, coeff, budget) -> Normalized:
    """Scales kernels down to the budget, never up: each to norm ``coeff``, or all by one factor to a product of ``coeff``."""
    check_coeff(coeff)
    if budget not in BUDGETS:
        raise ValueError(f"budget must be one of {', '.join(BUDGETS)}, got {budget!r}")
    sizes = jnp.stack(list(norms.values()))
    if budget == "layer":
        excess = sizes / coeff
    else:  # the geometric mean, which cannot overflow; a zero layer makes the product zero
        all_positive = jnp.all(sizes > 0)
        mean = jnp.exp(jnp.mean(jnp.log(jnp.where(all_positive, sizes, 1))))
        excess = jnp.broadcast_to(jnp.where(all_positive, mean, 0) / coeff ** (1 / len(norms)), sizes.shape)
    normalized = {
        name: {**weights[name], "kernel": soft_normalize(weights[name]["kernel"], excess[i], 1.0)}
        for i, name in enumerate(norms)
    }
    lipschitz = jnp.prod(sizes / jnp.maximum(excess, 1))
    return Normalized(normalized, vectors, norms, lax.stop_gradient(lipschitz))


def check_coeff(coeff: float) -> None:
    """Raises ``ValueError`` unless ``coeff`` is in (0, 1)."""
    if not 0 < coeff < 1:
        raise ValueError(f"coeff must lie in (0, 1), got {coeff}: the inverse only exists for a contraction")


def initial_vectors(spec: BranchSpec, key: Array) -> Vectors:
    """Random starts of the power iterations."""
    keys = jax.random.split(key, len(spec.layers))
    return {layer.name: jax.random.normal(k, layer.in_shape) for layer, k in zip(spec.layers, keys, strict=True)}
