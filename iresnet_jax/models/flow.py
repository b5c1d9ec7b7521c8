"""A multi-scale residual flow: its constrained weights, and the bijection that they make.

    parameters --constrain--> weights (every block a contraction) --flow_bijection--> F, F^-1, log-dets     in training
    parameters --freeze--> weights (every block certified a contraction) --flow_bijection--> ...            after it

`unconstrained` is the way around both, to an ordinary residual network for comparison: no inverse is promised.

Blocks of one stage have one shape, and each of their arrays is stacked on a leading axis. All functions are pure.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from iresnet_jax.bijections import actnorm, multiscale, reshape
from iresnet_jax.bijections.actnorm import ActNormParams
from iresnet_jax.bijections.bijection import Bijection
from iresnet_jax.bijections.chain import Rematerialize, after_exact, chain, in_float64, repeat
from iresnet_jax.bijections.residual import Solver, residual_bijection
from iresnet_jax.branches.branch import Branch, BranchSpec, ConstrainedBranch
from iresnet_jax.branches.layers import training_twists
from iresnet_jax.maths import platforms
from iresnet_jax.maths.lipschitz_bounds import BiLipschitz, model_bounds
from iresnet_jax.maths.logdet.estimator import LogdetEstimator
from iresnet_jax.maths.logdet.exact import ExactLogdet
from iresnet_jax.models.architecture import FlowSpec, PlacedStage

Tree = Mapping[str, Any]
NORMS = "norms"  # name of the constraint's operations in programs


class Block(NamedTuple):
    """The blocks of a stage, every array stacked over blocks; scans run over it, a slice is one block.

    Attributes:
        actnorm: ActNorm in front of the branch.
        branch: The residual branch.
    """

    actnorm: ActNormParams
    branch: Branch


FlowWeights = Mapping[str, Block]  # by stage
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
    over_blocks: Callable[[Callable[..., Any]], Callable[..., Any]] = jax.vmap,
) -> ConstrainedFlow:
    """Brings every block into the budget of ``spec.coeff``, as power iteration estimates norms.

    Args:
        spec: The architecture.
        params: ``{"stage0": {"blocks": {"actnorm": {...}, "conv0": {...}, ...}}, ...}``, unconstrained.
        spectral: ``{"stage0": {"blocks": {"conv0": v, ...}}, ...}``, the power iterates.
        num_steps: Power iterations a layer (training, warm start); None iterates to the tolerance (everything else).
        rtol: Relative tolerance of the norms.
        over_blocks: How power iteration of one block becomes that of all blocks of a stage: ``jax.vmap``, or a map that shares
            the blocks among devices. Used with ``num_steps``; no gradient goes through it.
    """

    def of_stage(stage, weights):
        iterates = spectral[stage.name]["blocks"] if spectral.get(stage.name) else {}
        if num_steps is None:
            return constrain_blocks(stage.branch, weights, iterates, coeff=spec.coeff, budget=spec.budget, rtol=rtol)
        iterate = functools.partial(stage.branch.singular_vectors, num_steps=num_steps)
        scale = functools.partial(stage.branch.constrained, coeff=spec.coeff, budget=spec.budget)
        return jax.vmap(scale)(weights, over_blocks(iterate)(lax.stop_gradient(weights), iterates))

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


def constrain_certified(
    spec: FlowSpec, params: Tree, spectral: Tree, *, num_squarings: int = 4, twists: str = "auto"
) -> ConstrainedFlow:
    """Brings every block into the budget of ``spec.coeff`` by guaranteed upper bounds of its norms, for training.

    Args:
        spec: The architecture.
        params: Parameters as in `constrain`.
        spectral: Power iterates, returned unchanged.
        num_squarings: Squarings of the Gram iteration, see `dense_norm_bound`.
        twists: "all", "one" or "auto", see `training_twists`.
    """

    def of_stage(stage, weights):
        chosen = training_twists(stage.branch.in_shape[-1], twists)

        def of_block(weights):
            bounds = stage.branch.norm_bounds(weights, method="gram", num_squarings=num_squarings, twists=chosen)
            return stage.branch.certified(weights, bounds, coeff=spec.coeff, budget=spec.budget)

        return jax.vmap(of_block)(weights)

    return _constrain(spec, params, spectral, of_stage)


def unconstrained(spec: FlowSpec, params: Tree, spectral: Tree) -> ConstrainedFlow:
    """Parameters and power iterates of `constrain` unchanged; the bounds are infinite, so no inverse reports convergence."""

    def as_they_are(stage, weights):
        branch = Branch(stage.branch, weights, jnp.full(stage.spec.num_blocks, jnp.inf), "none")
        return ConstrainedBranch(branch, {}, {})

    return _constrain(spec, params, spectral, as_they_are)


def _constrain(
    spec: FlowSpec, params: Tree, spectral: Tree, of_stage: Callable[[PlacedStage, Tree], ConstrainedBranch]
) -> ConstrainedFlow:
    weights, new_spectral, norms = {}, dict(spectral), {}
    for stage in spec.layout:
        scale, of_branch = _parts(params[stage.name])
        with jax.named_scope(NORMS):
            found = of_stage(stage, of_branch)
        weights[stage.name] = Block(scale, found.branch)
        if found.iterates:
            new_spectral[stage.name] = {"blocks": found.iterates}
        norms[stage.name] = found.norms
    return ConstrainedFlow(weights, new_spectral, norms)


def _parts(stage: Tree) -> tuple[ActNormParams, Tree]:
    """ActNorm and the branch's weights among the parameters of a stage."""
    blocks = dict(stage["blocks"])
    return ActNormParams(**blocks.pop("actnorm")), blocks


def freeze(spec: FlowSpec, params: Tree) -> dict[str, Block]:
    """Weights to use after training, from the parameters of `constrain`: every block is certified to be within the budget.

    Kernels are scaled by guaranteed bounds of their norms; the branches' ``norms`` are those of the scaled and rounded kernels.
    Blocks are computed one after the other, so memory does not grow with depth.
    """

    def of_block(branch, block):
        def bound(state, is_scaled):  # pass 1 scales, pass 2 bounds the scaled kernels; a scan compiles the bound once
            weights, _ = state
            found = branch.norm_bounds(weights)
            scaled = branch.certified(weights, found, coeff=spec.coeff, budget=spec.budget).branch.weights
            return (jax.tree.map(lambda old, new: jnp.where(is_scaled, old, new), weights, scaled), found), None

        nothing = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), jax.eval_shape(branch.norm_bounds, block))
        weights, bounds = jax.lax.scan(bound, (block, nothing), jnp.array([False, True]))[0]
        return branch.with_bounds(weights, bounds, coeff=spec.coeff)

    return _with_bounds(spec, params, of_block)


def with_bounds(spec: FlowSpec, params: Tree) -> dict[str, Block]:
    """The parameters of `constrain` unchanged, with guaranteed bounds of their norms, which may be 1 or more."""
    of_block = lambda branch, block: branch.with_bounds(block, branch.norm_bounds(block), coeff=spec.coeff)  # noqa: E731
    return _with_bounds(spec, params, of_block)


def _with_bounds(spec: FlowSpec, params: Tree, of_block: Callable[[BranchSpec, Tree], Branch]) -> dict[str, Block]:
    weights = {}
    for stage in spec.layout:
        scale, of_branch = _parts(params[stage.name])
        weights[stage.name] = Block(scale, jax.lax.map(functools.partial(of_block, stage.branch), of_branch))
    return weights


def rounded_to_bfloat16(weights: FlowWeights) -> dict[str, Block]:
    """The weights as `flow_bijection` runs them in bfloat16: kernels are rounded, and their dtype stays."""

    def rounded(path, leaf):
        is_kernel = jax.tree_util.keystr(path[-1:], simple=True) == "kernel"
        return jnp.asarray(leaf).astype(jnp.bfloat16).astype(leaf.dtype) if is_kernel else leaf

    return {
        name: block._replace(
            branch=dataclasses.replace(block.branch, weights=jax.tree.map_with_path(rounded, block.branch.weights))
        )
        for name, block in weights.items()
    }


def as_params(weights: FlowWeights) -> dict[str, Any]:
    """Weights in the form of the parameters of `constrain`."""
    return {name: {"blocks": {**block.branch.weights, "actnorm": block.actnorm._asdict()}} for name, block in weights.items()}


def bilipschitz(spec: FlowSpec, weights: FlowWeights) -> BiLipschitz:
    """Bounds of ``Lip(F)`` and ``Lip(F^-1)`` of the whole flow, guaranteed for weights from `freeze`; pessimistic in depth."""
    bounds = model_bounds([])
    for stage in reversed(spec.layout):
        block = weights[stage.name]
        own = model_bounds(jnp.asarray(block.branch.lipschitz_bound), list(jnp.asarray(block.actnorm.log_scale)))
        bounds = own.compose(bounds.beside_identity() if stage.spec.factor_out else bounds)
    return bounds


def flow_bijection(
    spec: FlowSpec,
    weights: FlowWeights,
    estimator: LogdetEstimator = ExactLogdet(),
    solver: Solver = Solver(),
    *,
    context: Float[Array, "b k"] | None = None,
    unroll: bool = False,
    rematerialize: Rematerialize = "nothing",
    bfloat16: bool = False,
) -> Bijection:
    """The flow ``x (b, *event_shape) -> z (b, d)`` of constrained weights.

    Args:
        spec: The architecture.
        weights: Weights from `freeze`, `constrain` or `constrain_certified`.
        estimator: Log-determinant of the blocks.
        solver: Inverse of the blocks.
        context: Context of every example that the bijection will see, if the model is conditional.
        unroll: Whether blocks are unrolled instead of scanned; see `unroll_by_default`.
        rematerialize: What the backward pass recomputes, see `repeat`.
        bfloat16: Whether branches compute in bfloat16 on the way forward and in products with their Jacobians, see
            `Branch.in_bfloat16`. The inverse, closed forms and bounds of truncation are those of the weights as they are.
    """

    def make(block):
        branch = block.branch.given(context)
        own = residual_bijection(branch, estimator, solver)
        if bfloat16:
            fast = residual_bijection(branch.in_bfloat16(), estimator, solver)
            own = own._replace(forward=fast.forward, forward_and_logdet=fast.forward_and_logdet)
        return after_exact(actnorm.actnorm_bijection(block.actnorm), own)

    def stage_of(stage):
        blocks = repeat(make, weights[stage.name], unroll=unroll, rematerialize=rematerialize)
        return multiscale.Stage(chain([*stage.reshapes, blocks]), stage.spec.factor_out)

    batch_size = 1 if context is None else len(context)
    whole = multiscale.multiscale([stage_of(stage) for stage in spec.layout], spec.event_shape, batch_size=batch_size)
    return in_float64(whole) if solver.refine else whole


def branch_inputs(
    spec: FlowSpec,
    weights: FlowWeights,
    x: Float[Array, "b ..."],
    context: Float[Array, "b k"] | None = None,
    *,
    bfloat16: bool = False,
) -> dict[str, Float[Array, "k b ..."]]:
    """Inputs of the blocks' branches as ``x`` passes through the flow, by stage, stacked over blocks.

    Arguments are those of `flow_bijection`.
    """

    def step(x, block):
        x, _ = actnorm.forward_and_logdet(block.actnorm, x)
        branch = block.branch.given(context)
        return x + (branch.in_bfloat16() if bfloat16 else branch)(x), x

    inputs = {}
    for stage in spec.layout:
        x, inputs[stage.name] = jax.lax.scan(step, chain(stage.reshapes).forward(x), weights[stage.name])
        if stage.spec.factor_out:
            x, _ = reshape.split_channels(x)
    return inputs


def unroll_by_default() -> bool:
    """Whether it is better to unroll blocks: on CPUs, where a training step is then up to 1.7 times as fast."""
    return platforms.platform() == "cpu"


def initialize_actnorm(
    branch: Branch,
    x: Float[Array, "b ..."],
    context: Float[Array, "b k"] | None = None,
    *,
    axis_name: str | None = None,
) -> tuple[Tree, Float[Array, "b ..."]]:
    """ActNorm of a stage's blocks from data: each block's from what the blocks before it make of the batch.

    Args:
        branch: The constrained branches of the stage, stacked over blocks.
        x: A representative batch, already squeezed or flattened for this stage.
        context: Contexts of the batch, if the model is conditional.
        axis_name: Mapped axis of devices that the batch is spread over, see `actnorm.initialize`.

    Returns:
        ``{"bias", "log_scale"}`` stacked over blocks, and the stage's output.
    """

    def step(x, branch):
        params = actnorm.initialize(x, axis_name=axis_name)
        x, _ = actnorm.forward_and_logdet(params, x)
        return x + branch.given(context)(x), params._asdict()

    x, params = jax.lax.scan(step, x, branch)
    return params, x


def fit_actnorm(
    spec: FlowSpec,
    weights: Tree,
    x: Float[Array, "b ..."],
    context: Float[Array, "b k"] | None = None,
    *,
    axis_name: str | None = None,
) -> tuple[dict[str, Tree], Float[Array, "b d"]]:
    """ActNorm of all stages from data, see `initialize_actnorm`.

    Args:
        spec: The architecture.
        weights: Constrained weights, whose own ActNorm is not used.
        x: A representative batch.
        context: Contexts of the batch, if the model is conditional.
        axis_name: Mapped axis of devices that the batch is spread over.

    Returns:
        ``{"stage0": {"bias", "log_scale"}, ...}``, stacked over blocks, and the latents of the batch.
    """
    fitted, latents = {}, []
    for stage in spec.layout:
        x, branch = chain(stage.reshapes).forward(x), weights[stage.name].branch
        fitted[stage.name], x = initialize_actnorm(branch, x, context, axis_name=axis_name)
        if stage.spec.factor_out:
            x, latent = reshape.split_channels(x)
            latents.append(reshape.flatten(latent))
    return fitted, jnp.concatenate([*latents, reshape.flatten(x)], axis=-1)
