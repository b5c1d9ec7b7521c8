"""The weights of a flow: within the budget of the constraint, in training and after it.

    parameters --constrain--> weights (every block a contraction, as power iteration sees it)                 in training
    parameters --freeze--> weights (every block certified a contraction)                                      after it

`unconstrained` is the way around both, to an ordinary residual network for comparison: no inverse is promised.

Blocks of one stage have one shape, and each of their arrays is stacked on a leading axis. All functions are pure.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float

from iresnet_jax.bijections.actnorm import ActNormParams
from iresnet_jax.branches.branch import Branch, BranchSpec, ConstrainedBranch
from iresnet_jax.branches.layers import training_twists
from iresnet_jax.maths.platforms import fast_compile
from iresnet_jax.models.architecture import FlowSpec, PlacedStage
from iresnet_jax.models.bounds import Block, FlowWeights, remember

Tree = Mapping[str, Any]

FlowNorms = Mapping[str, Mapping[str, Any]]  # by stage and layer, one per block


class ConstrainedFlow(NamedTuple):
    """Weights whose blocks are contractions, and the norms before the constraint.

    Attributes:
        weights: ``{"stage0": Block, ...}``: what `flow_bijection` runs.
        spectral: Power iterates for the next call, in the form they were given.
        norms: Operator norms before normalisation, estimated or bounded: ``{"stage0": {"conv0": (num_blocks,), ...}, ...}``.
    """

    weights: FlowWeights
    spectral: Tree
    norms: FlowNorms


def constrain(
    spec: FlowSpec,
    params: Tree,
    spectral: Tree,
    *,
    num_steps: int | None = None,
    rtol: float = 1e-3,
) -> ConstrainedFlow:
    """Brings every block into the budget of ``spec.coeff``, as power iteration estimates norms.

    Args:
        spec: The architecture.
        params: ``{"stage0": {"blocks": {"actnorm": {...}, "conv0": {...}, ...}}, ...}``, unconstrained.
        spectral: ``{"stage0": {"blocks": {"conv0": v, ...}}, ...}``, the power iterates.
        num_steps: Power iterations a layer (training, warm start); None iterates to the tolerance (everything else).
        rtol: Relative tolerance of the norms.
    """

    def of_stage(stage, weights):
        iterates = spectral[stage.name]["blocks"] if spectral.get(stage.name) else {}
        if num_steps is None:
            return constrain_blocks(stage.branch, weights, iterates, coeff=spec.coeff, budget=spec.budget, rtol=rtol)
        iterate = functools.partial(stage.branch.singular_vectors, num_steps=num_steps)
        scale = functools.partial(stage.branch.constrained, coeff=spec.coeff, budget=spec.budget)
        return jax.vmap(scale)(weights, jax.vmap(iterate)(lax.stop_gradient(weights), iterates))

    return _constrain(spec, params, spectral, of_stage)


@functools.partial(jax.jit, static_argnames=("branch", "coeff", "budget", "rtol"))
def constrain_blocks(
    branch: BranchSpec, weights: Tree, iterates: Tree, *, coeff: float, budget: str = "layer", rtol: float = 1e-3
) -> ConstrainedBranch:
    """Brings all blocks of a stage into the budget, iterating norms to ``rtol``; jitted, so that callers share one trace.

    Args:
        branch: Architecture of the stage's branches.
        weights: Weights of the branches, stacked over blocks.
        iterates: Power iterates, likewise.
        coeff: See `FlowSpec`.
        budget: See `FlowSpec`.
        rtol: Relative tolerance of the norms.
    """

    def of_block(weights, iterates):
        vectors = branch.singular_vectors(weights, iterates, num_steps=None, rtol=rtol)
        return branch.constrained(weights, vectors, coeff=coeff, budget=budget)

    return jax.vmap(of_block)(weights, iterates)


def constrain_certified(spec: FlowSpec, params: Tree, spectral: Tree) -> ConstrainedFlow:
    """Brings every block into the budget of ``spec.coeff`` by guaranteed upper bounds of its norms, for training.

    Args:
        spec: The architecture.
        params: Parameters as in `constrain`.
        spectral: Power iterates, returned unchanged.
    """

    def of_stage(stage, weights):
        twists = training_twists(stage.branch.in_shape[-1])

        def of_block(weights):
            bounds = stage.branch.norm_bounds(weights, num_squarings=4, twists=twists)
            return stage.branch.certified(weights, bounds, coeff=spec.coeff, budget=spec.budget)

        return jax.vmap(of_block)(weights)

    return _constrain(spec, params, spectral, of_stage)


def unconstrained(spec: FlowSpec, params: Tree, spectral: Tree) -> ConstrainedFlow:
    """Parameters and power iterates of `constrain` unchanged; the bounds are infinite, so no inverse reports convergence."""

    def as_they_are(stage, weights):
        branch = Branch(stage.branch, weights, jnp.full(stage.spec.num_blocks, jnp.inf))
        return ConstrainedBranch(branch, {}, {})

    return _constrain(spec, params, spectral, as_they_are)


def _constrain(
    spec: FlowSpec, params: Tree, spectral: Tree, of_stage: Callable[[PlacedStage, Tree], ConstrainedBranch]
) -> ConstrainedFlow:
    weights, new_spectral, norms = {}, dict(spectral), {}
    for stage in spec.all_stages:
        scale, of_branch = _parts(stage, params)
        with jax.named_scope("norms"):
            found = of_stage(stage, of_branch)
        weights[stage.name] = Block(scale, found.branch)
        if found.iterates:
            new_spectral[stage.name] = {"blocks": found.iterates}
        norms[stage.name] = found.norms
    return ConstrainedFlow(weights, new_spectral, norms)


def _parts(stage: PlacedStage, params: Tree) -> tuple[ActNormParams, Tree]:
    """ActNorm, or the fixed scale in its place, and the branch's weights among the parameters."""
    blocks = dict(params[stage.name]["blocks"])
    return stage.actnorm(ActNormParams(**blocks.pop("actnorm"))), blocks


def freeze(spec: FlowSpec, params: Tree) -> dict[str, Block]:
    """Weights to use after training, from the parameters of `constrain`: every block is certified to be within the budget.

    Kernels are scaled by guaranteed bounds of their norms; the branches' bounds are those of the scaled and rounded kernels.
    Blocks are computed one after the other, so memory does not grow with depth.
    """
    weights = _by_stage(spec, params, lambda branch, blocks: _frozen(branch, spec.coeff, spec.budget, blocks))
    for block in weights.values():
        remember(block.branch)
    return weights


def of_stored(spec: FlowSpec, params: Tree, *, constrained: bool = True) -> dict[str, Block]:
    """Weights of parameters that were stored, unchanged.

    Args:
        spec: The architecture.
        params: Parameters as `as_params` gives them.
        constrained: Whether a kind of branch that is scaled by its output is brought into the budget, as `constrain` does.
    """
    coeff = spec.coeff if constrained else math.inf
    return _by_stage(spec, params, lambda branch, blocks: _of_stored(branch, coeff, blocks))


def check_fit(spec: FlowSpec, weights: FlowWeights) -> None:
    """Raises ``ValueError`` unless weights are those of such a flow."""
    expected = jax.eval_shape(lambda: {stage.name: stage.initial_params(jax.random.key(0)) for stage in spec.all_stages})
    wanted, found = (dict(jax.tree.leaves_with_path(tree)) for tree in (expected, as_params(weights)))
    for key in {**wanted, **found}:
        shapes = [np.shape(leaves[key]) if key in leaves else None for leaves in (found, wanted)]
        if shapes[0] != shapes[1]:
            name = jax.tree_util.keystr(key, simple=True, separator="/")
            raise ValueError(
                f"the weights do not fit the new spec: {name} has shape {shapes[0]} and needs {shapes[1]}; make a new model "
                "with init"
            )


def _by_stage(spec: FlowSpec, params: Tree, of_blocks: Callable[[BranchSpec, Tree], Branch]) -> dict[str, Block]:
    """Blocks of branches by stage; stages of one architecture share a program."""
    weights = {}
    for stage in spec.all_stages:
        scale, blocks = _parts(stage, params)
        weights[stage.name] = Block(ActNormParams(*map(jnp.asarray, scale)), of_blocks(stage.branch, blocks))
    return weights


@functools.partial(fast_compile, static_argnums=(0, 1, 2))
def _frozen(branch: BranchSpec, coeff: float, budget: str, blocks: Tree) -> Branch:
    def of_block(block):
        def bound(state, is_scaled):  # pass 1 scales, pass 2 bounds the scaled kernels; a scan compiles the bound once
            weights, _ = state
            found = branch.norm_bounds(weights)
            scaled = branch.certified(weights, found, coeff=coeff, budget=budget).branch.weights
            return (jax.tree.map(lambda old, new: jnp.where(is_scaled, old, new), weights, scaled), found), None

        nothing = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), jax.eval_shape(branch.norm_bounds, block))
        weights, bounds = jax.lax.scan(bound, (block, nothing), jnp.array([False, True]))[0]
        return branch.of_stored(weights, coeff=coeff).with_bounds(bounds)

    return jax.lax.map(of_block, blocks)


@functools.partial(fast_compile, static_argnums=(0, 1))
def _of_stored(branch: BranchSpec, coeff: float, blocks: Tree) -> Branch:
    return jax.lax.map(lambda block: dataclasses.replace(branch.of_stored(block, coeff=coeff), lipschitz_bound=None), blocks)


def under_context(spec: FlowSpec, weights: FlowWeights, context: Float[Array, " k"]) -> dict[str, Block]:
    """Weights without contexts of a conditional flow given one context; kernels stay, and so do their bounds.

    Args:
        spec: The conditional flow.
        weights: Its weights.
        context: The context as the flow takes it.

    Raises:
        ValueError: If a branch does not define `BranchSpec.folded`.
    """
    found = dict(weights)
    for stage in spec.layout:
        block = weights[stage.name]
        folded = _folded(stage.branch, block.branch.weights, context)
        without = dataclasses.replace(stage.branch, context_dim=0)
        found[stage.name] = block._replace(branch=dataclasses.replace(block.branch, spec=without, weights=folded))
    return found


@functools.partial(fast_compile, static_argnums=(0,))
def _folded(branch: BranchSpec, weights: Tree, context: Float[Array, " k"]) -> Tree:
    return jax.vmap(branch.folded, in_axes=(0, None))(weights, context)


def as_params(weights: FlowWeights) -> dict[str, Any]:
    """Weights in the form of the parameters of `constrain`."""
    return {name: {"blocks": {**block.branch.weights, "actnorm": block.actnorm._asdict()}} for name, block in weights.items()}
