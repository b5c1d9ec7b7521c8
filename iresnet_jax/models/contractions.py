"""The weights of a flow: within the budget of the constraint, in training and after it.

    parameters --constrain--> weights (every block a contraction, as power iteration sees it)
    in training parameters --freeze--> weights (every block certified a contraction)
    after it

`unconstrained` is the way around both, to an ordinary residual network for comparison: no inverse
is promised.

Blocks of one stage have one shape, and each of their arrays is stacked on a leading axis. All
functions are pure.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float

from iresnet_jax.bijections.actnorm import ActNorm
from iresnet_jax.branches.branch import Branch, BranchSpec, ConstrainedBranch
from iresnet_jax.branches.layers import training_twists
from iresnet_jax.maths.platforms import fast_compile
from iresnet_jax.models.architecture import FlowSpec, PlacedStage
from iresnet_jax.models.flow import Block, FlowWeights, as_params

Tree = Mapping[str, Any]

# by stage and part of its branches, such as a layer, one per block
FlowNorms = Mapping[str, Mapping[str, Any]]


class ConstrainedFlow(NamedTuple):
    """Weights whose blocks are contractions, and the norms before the constraint.

    Attributes:
        weights: ``{"stage0": Block, ...}``: what `flow_bijection` runs.
        spectral: Power iterates for the next call, in the form they were given.
        norms: Operator norms before normalisation, estimated or bounded: ``{"stage0": {"conv0":
            (num_blocks,), ...}, ...}``.
    """

    weights: FlowWeights
    spectral: Tree
    norms: FlowNorms


def constrain(
    spec: FlowSpec, params: Tree, spectral: Tree, *, num_steps: int | None = None
) -> ConstrainedFlow:
    """Brings every block into the budget of ``spec.coeff``, as power iteration estimates norms.

    Args:
        spec: The architecture.
        params: ``{"stage0": {"blocks": {"actnorm": {...}, "conv0": {...}, ...}}, ...}``,
            unconstrained.
        spectral: ``{"stage0": {"blocks": {"conv0": v, ...}}, ...}``, the power iterates.
        num_steps: Power iterations a layer (training, warm start); None iterates until norms change
            by less than .1 % (everything else).
    """

    def of_stage(stage, weights):
        def of_block(weights, iterates):
            vectors = stage.branch.singular_vectors(
                lax.stop_gradient(weights), iterates, num_steps=num_steps
            )
            return stage.branch.constrained(weights, vectors, coeff=spec.coeff, budget=spec.budget)

        iterates = spectral[stage.name]["blocks"] if spectral.get(stage.name) else {}
        return jax.vmap(of_block)(weights, iterates)

    return _constrain(spec, params, spectral, of_stage)


def constrain_certified(spec: FlowSpec, params: Tree, spectral: Tree) -> ConstrainedFlow:
    """Brings every block into the budget of ``spec.coeff`` by guaranteed upper bounds of its norms,
    for training.

    Arguments are those of `constrain`; power iterates are returned unchanged.
    """

    def of_stage(stage, weights):
        twists = training_twists(stage.branch.in_shape[-1])

        def of_block(weights):
            bounds = stage.branch.norm_bounds(weights, num_squarings=4, twists=twists)
            return stage.branch.certified(weights, bounds, coeff=spec.coeff, budget=spec.budget)

        return jax.vmap(of_block)(weights)

    return _constrain(spec, params, spectral, of_stage)


def unconstrained(spec: FlowSpec, params: Tree, spectral: Tree) -> ConstrainedFlow:
    """Parameters and power iterates of `constrain` unchanged; the bounds are infinite, so no
    inverse reports convergence.
    """

    def as_they_are(stage, weights):
        branch = Branch(stage.branch, weights, jnp.full(stage.spec.num_blocks, jnp.inf))
        return ConstrainedBranch(branch, {}, {})

    return _constrain(spec, params, spectral, as_they_are)


def _constrain(
    spec: FlowSpec,
    params: Tree,
    spectral: Tree,
    of_stage: Callable[[PlacedStage, Tree], ConstrainedBranch],
) -> ConstrainedFlow:
    weights, new_spectral, norms = {}, dict(spectral), {}
    for stage, scale, of_branch in _parts(spec, params):
        with jax.named_scope("norms"):
            found = of_stage(stage, of_branch)
        weights[stage.name] = Block(scale, found.branch)
        if found.iterates:
            new_spectral[stage.name] = {"blocks": found.iterates}
        norms[stage.name] = found.norms
    return ConstrainedFlow(weights, new_spectral, norms)


def _parts(spec: FlowSpec, params: Tree) -> Iterator[tuple[PlacedStage, ActNorm, Tree]]:
    """Of each stage ActNorm, or the fixed scale in its place, and weights of the branch."""
    for stage in spec.all_stages:
        blocks = dict(params[stage.name]["blocks"])
        scale = ActNorm(**jax.tree.map(jnp.asarray, blocks.pop("actnorm")))
        yield stage, stage.actnorm(scale), blocks


def freeze(spec: FlowSpec, params: Tree) -> dict[str, Block]:
    """Weights to use after training, from the parameters of `constrain`: every block is certified
    to be within the budget.

    Kernels are scaled by guaranteed bounds of their norms; the branches' bounds are those of the
    scaled and rounded kernels. Blocks are computed one after the other, so memory does not grow
    with depth.
    """
    return {
        stage.name: Block(scale, _frozen(stage.branch, spec.coeff, spec.budget, blocks))
        for stage, scale, blocks in _parts(spec, params)
    }


def of_stored(spec: FlowSpec, params: Tree, *, constrained: bool = True) -> dict[str, Block]:
    """Weights of parameters that were stored as `flow.as_params` gives them, unchanged.

    If they are ``constrained``, a kind of branch that is scaled by its output is brought into the
    budget, as `constrain` does.
    """
    coeff = spec.coeff if constrained else math.inf
    return {
        stage.name: Block(scale, _of_stored(stage.branch, coeff, blocks))
        for stage, scale, blocks in _parts(spec, params)
    }


def check_fit(spec: FlowSpec, weights: FlowWeights) -> None:
    """Raises ``ValueError`` unless weights are those of such a flow."""
    found = jax.tree.map(np.shape, as_params(weights))
    wanted = jax.tree.map(np.shape, jax.eval_shape(spec.initial_params, jax.random.key(0)))
    if found != wanted:
        raise ValueError(
            f"the weights do not fit the new spec: they have the shapes {found} and need {wanted}; "
            "make a new model with init"
        )


@functools.partial(fast_compile, static_argnums=(0, 1, 2))
def _frozen(branch: BranchSpec, coeff: float, budget: str, blocks: Tree) -> Branch:
    def of_block(block):
        # pass 1 scales, pass 2 bounds the scaled kernels; a scan compiles the bound once
        def bound(state, is_scaled):
            weights, _ = state
            found = branch.norm_bounds(weights)
            scaled = branch.certified(weights, found, coeff=coeff, budget=budget).branch.weights
            return (
                jax.tree.map(lambda old, new: jnp.where(is_scaled, old, new), weights, scaled),
                found,
            ), None

        nothing = jax.tree.map(
            lambda a: jnp.zeros(a.shape, a.dtype), jax.eval_shape(branch.norm_bounds, block)
        )
        weights, bounds = jax.lax.scan(bound, (block, nothing), jnp.array([False, True]))[0]
        return branch.of_stored(weights, coeff=coeff).with_bounds(bounds)

    return jax.lax.map(of_block, blocks)


@functools.partial(fast_compile, static_argnums=(0, 1))
def _of_stored(branch: BranchSpec, coeff: float, blocks: Tree) -> Branch:
    return jax.lax.map(
        lambda block: dataclasses.replace(
            branch.of_stored(block, coeff=coeff), lipschitz_bound=None
        ),
        blocks,
    )


def under_context(
    spec: FlowSpec, weights: FlowWeights, context: Float[Array, " k"]
) -> dict[str, Block]:
    """Weights without contexts of a conditional flow given one context, as it takes it; kernels
    stay, and so do their bounds.
    """
    found = dict(weights)
    for stage in spec.layout:
        block = weights[stage.name]
        folded = jax.vmap(stage.branch.folded, in_axes=(0, None))(block.branch.weights, context)
        without = dataclasses.replace(stage.branch, context_dim=0)
        found[stage.name] = block._replace(
            branch=dataclasses.replace(block.branch, spec=without, weights=folded)
        )
    return found
