"""A multi-scale residual flow: the bijection that constrained weights make.

Weights come from `contractions.constrain` in training and from `contractions.freeze` after it.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.core import Tracer
from jaxtyping import Array, Float

from iresnet_jax.bijections import actnorm, reshape
from iresnet_jax.bijections.actnorm import ActNormParams
from iresnet_jax.bijections.bijection import Bijection
from iresnet_jax.bijections.chain import (
    Rematerialize,
    Stage,
    chain,
    in_precision,
    multiscale,
    repeat,
)
from iresnet_jax.bijections.residual import Solver, residual_bijection
from iresnet_jax.branches.branch import Branch
from iresnet_jax.maths.logdet_estimator import LogdetEstimator
from iresnet_jax.maths.logdet_exact import ExactLogdet
from iresnet_jax.models.architecture import FlowSpec


class Block(NamedTuple):
    """The blocks of a stage, every array stacked over blocks; scans run over it, a slice is one
    block.

    Attributes:
        actnorm: ActNorm in front of the branch.
        branch: The residual branch.
    """

    actnorm: ActNormParams
    branch: Branch


FlowWeights = Mapping[str, Block]  # by stage


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


def is_traced(weights: Any) -> bool:
    """Whether an array of the weights is an argument of a program that is being traced."""
    return any(isinstance(leaf, Tracer) for leaf in jax.tree.leaves(weights))


def as_params(weights: FlowWeights) -> dict[str, Any]:
    """Weights in the form of the parameters of `constrain`."""
    return {
        name: {"blocks": {**block.branch.weights, "actnorm": block.actnorm._asdict()}}
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
            infinite error bounds without bounds, see `iresnet_jax.models.bounds`.
        estimator: Log-determinant of the blocks.
        solver: Inverse of the blocks.
        context: Context of every example that the bijection will see, if the model is conditional,
            or of every pixel.
        unroll: Whether blocks are unrolled instead of scanned.
        rematerialize: What the backward pass recomputes, see `repeat`.
    """
    weights = blocks_of(spec, weights)

    def make(block):
        own = residual_bijection(block.branch.given(context), estimator, solver)
        return chain([actnorm.actnorm_bijection(block.actnorm), own])

    def stage_of(stage):
        blocks = repeat(make, weights[stage.name], unroll=unroll, rematerialize=rematerialize)
        return Stage(chain([*stage.reshapes, blocks]), stage.spec.factor_out)

    batch_size = 1 if context is None else len(context)
    whole = multiscale(
        [stage_of(stage) for stage in spec.layout], spec.event_shape, batch_size=batch_size
    )
    dtype = jnp.result_type(*jax.tree.leaves(as_params(weights)))
    return in_precision(whole, dtype, jnp.float64 if solver.refine else dtype)


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
        x, _ = actnorm.forward_and_logdet(block.actnorm, x)
        return x + block.branch.given(context)(x), x

    inputs = {}
    for stage in spec.layout:
        x, inputs[stage.name] = jax.lax.scan(
            step, chain(stage.reshapes).forward(x), weights[stage.name]
        )
        if stage.spec.factor_out:
            x, _ = reshape.split_channels(x)
    return inputs
