"""A multi-scale residual flow: the bijection that constrained weights make.

Weights come from `contractions.constrain` in training and from `contractions.freeze` after it.
Guaranteed bounds are computed from the weights when somebody asks, and handed to the flow beside
them: new weights cannot have old ones, and a flow without bounds promises nothing.
"""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.core import Tracer
from jaxtyping import Array, Float

from iresnet_jax.bijections import reshape
from iresnet_jax.bijections.actnorm import ActNorm
from iresnet_jax.bijections.bijection import Bijection
from iresnet_jax.bijections.chain import (
    Chain,
    Multiscale,
    Promoted,
    Rematerialize,
    Repeat,
    Stage,
)
from iresnet_jax.bijections.residual import Residual, Solver
from iresnet_jax.branches.branch import Branch, Norms
from iresnet_jax.maths.lipschitz_bounds import BiLipschitz, model_bounds
from iresnet_jax.maths.logdet_estimator import LogdetEstimator
from iresnet_jax.maths.logdet_exact import ExactLogdet
from iresnet_jax.maths.platforms import fast_compile
from iresnet_jax.models.architecture import FlowSpec


class Block(NamedTuple):
    """The blocks of a stage, every array stacked over blocks; scans run over it, a slice is one
    block.

    Attributes:
        actnorm: ActNorm in front of the branch.
        branch: The residual branch.
    """

    actnorm: ActNorm
    branch: Branch


class Bounds(NamedTuple):
    """Guaranteed bounds of the branches of a stage, stacked over its blocks.

    Attributes:
        lipschitz: Lipschitz constants, which may be 1 or more.
        norms: Constants of the parts, see `BranchSpec.parts`; None of a kind without.
    """

    lipschitz: Array
    norms: Norms | None


FlowWeights = Mapping[str, Block]  # by stage
FlowBounds = Mapping[str, Bounds]


def blocks_of(spec: FlowSpec, weights: FlowWeights) -> dict[str, Block]:
    """The blocks as ``spec`` has them: it alone says what branches compute, and which ActNorm is
    a fixed scale.
    """
    return {
        stage.name: Block(
            stage.actnorm(block.actnorm), dataclasses.replace(block.branch, spec=stage.branch)
        )
        for stage in spec.all_stages
        if (block := weights.get(stage.name)) is not None
    }


def is_traced(tree: Any) -> bool:
    """Whether an array, such as one of weights, is an argument of a program that is being
    traced.
    """
    return any(isinstance(leaf, Tracer) for leaf in jax.tree.leaves(tree))


def as_params(weights: FlowWeights) -> dict[str, Any]:
    """Weights in the form of the parameters of `constrain`."""
    return {
        name: {"blocks": {**block.branch.weights, "actnorm": dict(vars(block.actnorm))}}
        for name, block in weights.items()
    }


def flow_bijection(
    spec: FlowSpec,
    weights: FlowWeights,
    estimator: LogdetEstimator = ExactLogdet(),
    solver: Solver = Solver(),
    *,
    context: Float[Array, "b ... k"] | None = None,
    unroll: bool = False,
    rematerialize: Rematerialize = "nothing",
) -> Bijection:
    """The flow ``x (b, *event_shape) -> z (b, d)`` of constrained weights.

    Args:
        spec: The architecture.
        weights: Weights from `freeze`, `constrain` or `constrain_certified`. Inverses report
            infinite error bounds of branches without bounds, see `bounded`.
        estimator: Log-determinant of the blocks.
        solver: Inverse of the blocks.
        context: Context of every example that the bijection will see, if the model is conditional,
            or of every pixel.
        unroll: Whether blocks are unrolled instead of scanned.
        rematerialize: What the backward pass recomputes, see `Repeat`.
    """
    weights = blocks_of(spec, weights)

    def make(block):
        own = Residual(block.branch.given(context), estimator, solver)
        return Chain([block.actnorm, own])

    def stage_of(stage):
        blocks = Repeat(make, weights[stage.name], unroll=unroll, rematerialize=rematerialize)
        return Stage(Chain([*stage.reshapes, blocks]), stage.spec.factor_out)

    batch_size = 1 if context is None else len(context)
    whole = Multiscale(
        [stage_of(stage) for stage in spec.layout], spec.event_shape, batch_size=batch_size
    )
    # without blocks it moves entries, in any precision
    dtype = jnp.result_type(*jax.tree.leaves(as_params(weights)) or [jnp.float16])
    return Promoted(whole, dtype, jnp.float64 if solver.refine else dtype)


def bounds_of(spec: FlowSpec, weights: FlowWeights) -> dict[str, Bounds]:
    """Guaranteed bounds of weights, whatever bounds these carry."""
    blocks = blocks_of(spec, weights)
    return {
        name: _bounds(block.branch.spec, block.branch.weights, block.branch.gain)
        for name, block in blocks.items()
    }


@functools.partial(fast_compile, static_argnums=(0,))
def _bounds(spec: Any, weights: Any, gain: Any) -> Bounds:
    def of_block(block):
        found = Branch(spec, block[0], gain=block[1]).with_bounds(spec.norm_bounds(block[0]))
        return Bounds(found.lipschitz_bound, found.norms)

    return jax.lax.map(of_block, (weights, gain))


def bounded(weights: FlowWeights, bounds: FlowBounds | None) -> dict[str, Block]:
    """Weights whose branches have these bounds in place of any that they carry, or none."""

    def of_stage(name, block):
        lipschitz, norms = (None, None) if bounds is None else bounds[name]
        own = dataclasses.replace(block.branch, lipschitz_bound=lipschitz, norms=norms)
        return block._replace(branch=own)

    return {name: of_stage(name, block) for name, block in weights.items()}


def carried_bounds(weights: FlowWeights) -> dict[str, Bounds]:
    """Bounds that weights carry, as `contractions.freeze` gives them."""
    return {
        name: Bounds(block.branch.lipschitz_bound, block.branch.norms)
        for name, block in weights.items()
    }


def bilipschitz(spec: FlowSpec, weights: FlowWeights) -> BiLipschitz:
    """Bounds of ``Lip(F)`` and ``Lip(F^-1)`` of a whole flow, by those that its branches have;
    pessimistic in depth.
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


def branch_inputs(
    spec: FlowSpec,
    weights: FlowWeights,
    x: Float[Array, "b ..."],
    context: Float[Array, "b k"] | None = None,
) -> dict[str, Float[Array, "k b ..."]]:
    """Inputs of the blocks' branches as ``x`` passes through the flow, by stage, stacked over
    blocks.

    Arguments are those of `flow_bijection`.
    """

    def step(x, block):
        x = block.actnorm.forward(x)
        return x + block.branch.given(context)(x), x

    inputs = {}
    for stage in spec.layout:
        x, inputs[stage.name] = jax.lax.scan(
            step, Chain(stage.reshapes).forward(x), weights[stage.name]
        )
        if stage.spec.factor_out:
            x, _ = reshape.split_channels(x)
    return inputs
