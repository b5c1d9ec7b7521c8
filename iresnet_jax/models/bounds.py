"""Guaranteed bounds of a flow's weights: computed from the weights that are given, when somebody
asks.

Models carry no bounds, so that new weights cannot have old ones. Methods that need them compute
them outside of programs, and hand them to programs as arrays of the branches. A program that is
handed none promises nothing.
"""

import dataclasses
import functools
import weakref
from typing import Any

import jax
import jax.numpy as jnp
from jax.core import Tracer

from iresnet_jax.branches.branch import Branch, Norms
from iresnet_jax.maths.lipschitz_bounds import BiLipschitz, model_bounds
from iresnet_jax.maths.platforms import fast_compile
from iresnet_jax.models.architecture import FlowSpec
from iresnet_jax.models.flow import Block, FlowWeights, blocks_of, is_traced


def with_bounds(spec: FlowSpec, weights: FlowWeights) -> dict[str, Block]:
    """The weights as they are, with guaranteed bounds of their norms, which may be 1 or more.

    Bounds that the weights carry do not count. Within another program the computation is a part of
    it; outside, bounds of the very same arrays of JAX are remembered.
    """
    blocks = blocks_of(spec, weights)
    return {name: block._replace(branch=_bounded(block.branch)) for name, block in blocks.items()}


def without_bounds(weights: Any) -> Any:
    """The weights without their bounds; traced ones as they are."""
    if is_traced(weights):
        return weights
    unbounded = functools.partial(dataclasses.replace, lipschitz_bound=None, norms=None)
    return {name: block._replace(branch=unbounded(block.branch)) for name, block in weights.items()}


def bilipschitz(spec: FlowSpec, weights: FlowWeights) -> BiLipschitz:
    """Bounds of ``Lip(F)`` and ``Lip(F^-1)`` of a whole flow, guaranteed for weights
    `with_bounds`; pessimistic in depth.
    """
    bounds = model_bounds([])
    for stage in reversed(spec.layout):
        block = weights[stage.name]
        blocks = [
            stage.branch.block_bounds(lipschitz_bound)
            for lipschitz_bound in jnp.asarray(block.branch.lipschitz_bound)
        ]
        own = model_bounds(blocks, list(jnp.asarray(block.actnorm.log_scale)))
        bounds = own.compose(bounds.beside_identity() if stage.spec.factor_out else bounds)
    return bounds


# bounds of branches, by the identity of their arrays
_remembered: dict[Any, tuple[Any, Norms | None]] = {}


def remember(branch: Branch) -> None:
    """Remembers the bounds that branches carry, which were computed from their very arrays.

    JAX's arrays do not change, so they are known by their identity. NumPy's do, and are not
    remembered.
    """
    leaves = jax.tree.leaves((branch.weights, branch.gain, branch.lipschitz_bound, branch.norms))
    if all(isinstance(leaf, jax.Array) and not isinstance(leaf, Tracer) for leaf in leaves):
        key, arrays = _identity(branch)
        _remembered[key] = branch.lipschitz_bound, branch.norms
        for array in arrays:
            # before another array can have its identity
            weakref.finalize(array, _remembered.pop, key, None)


def _identity(branch: Branch) -> tuple[Any, list[Any]]:
    arrays, structure = jax.tree.flatten((branch.weights, branch.gain))
    return (branch.spec, structure, tuple(map(id, arrays))), arrays


def _bounded(branch: Branch) -> Branch:
    """The branches of a stage with bounds of their weights."""
    known = _remembered.get(_identity(branch)[0])
    lipschitz_bound, norms = known or _bounds(branch.spec, branch.weights, branch.gain)
    found = dataclasses.replace(branch, lipschitz_bound=lipschitz_bound, norms=norms)
    if known is None:
        remember(found)
    return found


@functools.partial(fast_compile, static_argnums=(0,))
def _bounds(spec: Any, weights: Any, gain: Any) -> tuple[Any, Norms | None]:
    def of_block(block):
        found = Branch(spec, block[0], gain=block[1]).with_bounds(spec.norm_bounds(block[0]))
        return found.lipschitz_bound, found.norms

    return jax.lax.map(of_block, (weights, gain))
