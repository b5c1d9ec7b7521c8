"""A multi-scale residual flow: its constrained weights, and the bijection that they make.

    parameters --constrain--> weights (every block a contraction) --bijection--> F, F^-1, log-dets     in training
    parameters --freeze--> weights (every block certified a contraction) --bijection--> ...            after it

`unconstrained` is the way around both, to an ordinary residual network for comparison: no inverse is promised.

Blocks of one stage have one shape, and every array of theirs is stacked on a leading axis. All functions are pure.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from iresnet_jax.bijections import actnorm, multiscale, reshape
from iresnet_jax.bijections.bijection import Bijection
from iresnet_jax.bijections.chain import Rematerialize, after_exact, chain, in_float64, repeat
from iresnet_jax.bijections.residual import Branch, Solver, residual_bijection
from iresnet_jax.branches import branch as branches
from iresnet_jax.branches import closed_form_jacobian, constraint, structured_logdet
from iresnet_jax.branches.branch import BranchSpec
from iresnet_jax.maths import platforms as target
from iresnet_jax.maths.inverse.fixed_point import Diagonal
from iresnet_jax.maths.lipschitz_bounds import BiLipschitz, branch_bound, model_bounds
from iresnet_jax.maths.logdet.estimator import LogdetEstimator
from iresnet_jax.maths.logdet.exact import ExactLogdet
from iresnet_jax.models.architecture import FlowSpec, Stage

Tree = Mapping[str, Any]
Norms = Mapping[str, Mapping[str, Float[Array, " k"]]]  # by stage and layer, one a block
NORMS = "norms"  # name of the constraint's operations in programs


class Constrained(NamedTuple):
    """Weights whose blocks are contractions, and the norms before the constraint.

    Attributes:
        weights: ``{"stage0": {"actnorm", "branch", "lipschitz"}, ...}``, arrays stacked over blocks: what `bijection` runs.
        spectral: Power iterates to go on from, in the form they were given.
        norms: Operator norms before normalisation, estimated or bounded: ``{"stage0": {"conv0": (num_blocks,), ...}, ...}``.
    """

    weights: Tree
    spectral: Tree
    norms: Norms


class Frozen(NamedTuple):
    """Weights to use after training: fixed, and every block a contraction by certificate.

    Attributes:
        weights: Weights as in `Constrained`; ``lipschitz`` is the guaranteed bound of each block's ``Lip(g)``.
        bounds: Guaranteed upper bounds of the norms of these very kernels, in the form of ``Constrained.norms``.
    """

    weights: Tree
    bounds: Norms


def constrain(
    spec: FlowSpec,
    params: Tree,
    spectral: Tree,
    *,
    num_steps: int | None = None,
    rtol: float = 1e-3,
    over_blocks: Callable[[Callable[..., Any]], Callable[..., Any]] = jax.vmap,
) -> Constrained:
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

    def normalize(stage, blocks):
        vectors = spectral[stage.name]["blocks"]
        if num_steps is None:
            return constraint.normalize_converged(
                stage.branch, blocks, vectors, coeff=spec.coeff, budget=spec.budget, rtol=rtol
            )

        iterate = functools.partial(constraint.layer_vectors, stage.branch, num_steps=num_steps)
        scale = functools.partial(constraint.normalize_along, stage.branch, coeff=spec.coeff, budget=spec.budget)
        return jax.vmap(scale)(blocks, over_blocks(iterate)(lax.stop_gradient(blocks), vectors))

    return _constrain(spec, params, spectral, normalize)


def constrain_certified(
    spec: FlowSpec, params: Tree, spectral: Tree, *, num_squarings: int = 4, twists: str = "auto"
) -> Constrained:
    """Brings every block into the budget of ``spec.coeff`` by guaranteed upper bounds of its norms, for training.

    Args:
        spec: The architecture.
        params: Parameters as in `constrain`.
        spectral: Power iterates, returned unchanged.
        num_squarings: Squarings of the Gram iteration, see `dense_norm_bound`.
        twists: "all", "one" or "auto", see `constraint.training_twists`.
    """

    def normalize(stage, blocks):
        chosen = constraint.training_twists(stage.branch, twists)

        def of_block(weights):
            return constraint.normalize_certified(
                stage.branch,
                weights,
                coeff=spec.coeff,
                budget=spec.budget,
                method="gram",
                num_squarings=num_squarings,
                twists=chosen,
            )

        return jax.vmap(of_block)(blocks)

    return _constrain(spec, params, spectral, normalize)


def unconstrained(spec: FlowSpec, params: Tree, spectral: Tree) -> Constrained:
    """Parameters and power iterates of `constrain` unchanged; ``lipschitz`` is infinite, so no inverse reports convergence."""

    def as_they_are(stage, blocks):
        return constraint.Normalized(blocks, {}, {}, jnp.full(stage.spec.num_blocks, jnp.inf))

    return _constrain(spec, params, spectral, as_they_are)


def _constrain(
    spec: FlowSpec, params: Tree, spectral: Tree, normalize: Callable[[Stage, Tree], constraint.Normalized]
) -> Constrained:
    weights, new_spectral, norms = {}, {}, {}
    for stage in spec.layout:
        blocks = dict(params[stage.name]["blocks"])
        scale = blocks.pop("actnorm")
        with jax.named_scope(NORMS):
            normalized = normalize(stage, blocks)
        weights[stage.name] = {"actnorm": scale, "branch": normalized.weights, "lipschitz": normalized.lipschitz}
        new_spectral[stage.name] = {"blocks": normalized.vectors} if normalized.vectors else spectral[stage.name]
        norms[stage.name] = normalized.norms
    return Constrained(weights, new_spectral, norms)


def freeze(spec: FlowSpec, params: Tree) -> Frozen:
    """Weights to use after training, from the parameters of `constrain`: every block is certified to be within the budget.

    Kernels are scaled by guaranteed bounds of their norms; the returned bounds are those of the scaled and rounded kernels.
    Blocks are computed one after the other, so memory does not grow with depth.
    """

    def bounded(stage, block):
        def bound(state, is_scaled):  # twice in a loop, which compiles the certificate once
            kernels, _ = state
            found = constraint.layer_bounds(stage.branch, kernels)
            scaled = constraint.scaled_by(found, kernels, coeff=spec.coeff, budget=spec.budget).weights
            return (jax.tree.map(lambda old, new: jnp.where(is_scaled, old, new), kernels, scaled), found), None

        nothing = {layer.name: jnp.zeros((), block[layer.name]["kernel"].dtype) for layer in stage.branch.layers}
        return jax.lax.scan(bound, (block, nothing), jnp.array([False, True]))[0]

    return _certify(spec, params, bounded)


def certify(spec: FlowSpec, params: Tree) -> Frozen:
    """The parameters of `constrain` unchanged, with guaranteed bounds of their norms, which may be 1 or more."""
    return _certify(spec, params, lambda stage, block: (block, constraint.layer_bounds(stage.branch, block)))


def _certify(spec: FlowSpec, params: Tree, bounded: Callable[[Stage, Tree], tuple[Tree, Tree]]) -> Frozen:
    weights, bounds = {}, {}
    for stage in spec.layout:

        def of_block(block, stage=stage):
            kernels, found = bounded(stage, block)
            return kernels, found, branch_bound(jnp.stack(list(found.values())))

        blocks = dict(params[stage.name]["blocks"])
        scale = blocks.pop("actnorm")
        kernels, bounds[stage.name], lipschitz = jax.lax.map(of_block, blocks)
        weights[stage.name] = {"actnorm": scale, "branch": kernels, "lipschitz": lipschitz}
    return Frozen(weights, bounds)


def rounded_to_bfloat16(weights: Tree) -> dict[str, Any]:
    """The weights as `bijection` runs them in bfloat16: kernels are rounded, and their dtype stays."""

    def rounded(layer):
        kernel = jnp.asarray(layer["kernel"])
        return {**layer, "kernel": kernel.astype(jnp.bfloat16).astype(kernel.dtype)}

    return {
        name: {**stage, "branch": {layer: rounded(own) for layer, own in stage["branch"].items()}}
        for name, stage in weights.items()
    }


def as_params(weights: Tree) -> dict[str, Any]:
    """Weights in the form of the parameters of `constrain`."""
    return {name: {"blocks": {**stage["branch"], "actnorm": stage["actnorm"]}} for name, stage in weights.items()}


def bilipschitz(spec: FlowSpec, weights: Tree) -> BiLipschitz:
    """Bounds of ``Lip(F)`` and ``Lip(F^-1)`` of the whole flow, guaranteed for weights from `freeze`; pessimistic in depth."""
    bounds = model_bounds([])
    for stage in reversed(spec.layout):
        log_scales = jnp.asarray(weights[stage.name]["actnorm"]["log_scale"])
        own = model_bounds(jnp.asarray(weights[stage.name]["lipschitz"]), list(log_scales))
        bounds = own.compose(bounds.beside_identity() if stage.spec.factor_out else bounds)
    return bounds


def bijection(
    spec: FlowSpec,
    weights: Tree,
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
        unroll: Write blocks out instead of scanning over them; see `unroll_by_default`.
        rematerialize: What the backward pass computes anew, see `repeat`.
        bfloat16: Whether branches compute in bfloat16 on the way forward and in products with its Jacobian, see `apply_layer`.
            The inverse, traces and Jacobians in closed form, and bounds of truncation are those of the weights as they are.
    """

    def blocks_of(stage):
        def make(block):
            scale = actnorm.actnorm_bijection(actnorm.ActNormParams(**block["actnorm"]))
            branch = known_branch(stage.branch, block["branch"], block["lipschitz"], context)
            block_bijection = residual_bijection(branch, estimator, solver)
            if bfloat16:
                rounded = lambda x: branches.apply_branch(stage.branch, block["branch"], x, context, bfloat16=True)  # noqa: E731
                fast = residual_bijection(branch._replace(g=rounded), estimator, solver)
                block_bijection = block_bijection._replace(forward=fast.forward, forward_and_logdet=fast.forward_and_logdet)
            return after_exact(scale, block_bijection)

        blocks = repeat(make, weights[stage.name], unroll=unroll, rematerialize=rematerialize)
        return multiscale.Stage(chain([*stage.entry, blocks]), stage.spec.factor_out)

    batch_size = 1 if context is None else len(context)
    whole = multiscale.multiscale([blocks_of(stage) for stage in spec.layout], spec.event_shape, batch_size=batch_size)
    return in_float64(whole) if solver.refine else whole


def known_branch(spec: BranchSpec, weights: Tree, lipschitz_bound: Any, context: Float[Array, "b k"] | None = None) -> Branch:
    """A branch of these weights with all that has a closed form."""
    has_trace, has_diagonal = closed_form_jacobian.has_trace(spec), closed_form_jacobian.has_diagonal(spec)
    has_jacobian = closed_form_jacobian.has_jacobian(spec)
    has_logdet = structured_logdet.has_logdet(spec) and not has_jacobian
    return Branch(
        g=lambda x: branches.apply_branch(spec, weights, x, context),
        lipschitz_bound=lipschitz_bound,
        trace=(lambda x: closed_form_jacobian.trace(spec, weights, x, context)) if has_trace else None,
        jacobian=(lambda x: closed_form_jacobian.jacobian(spec, weights, x, context)) if has_jacobian else None,
        logdet=(lambda x: structured_logdet.logdet(spec, weights, x, context)) if has_logdet else None,
        at_zero=(lambda: branches.at_zero(spec, weights)) if context is None else None,
        diagonal=Diagonal(
            at=lambda x: closed_form_jacobian.jacobian_diagonal(spec, weights, x, context),
            size=closed_form_jacobian.largest_diagonal(spec, weights),
        )
        if has_diagonal
        else None,
    )


def branch_inputs(
    spec: FlowSpec,
    weights: Tree,
    x: Float[Array, "b ..."],
    context: Float[Array, "b k"] | None = None,
    *,
    bfloat16: bool = False,
) -> dict[str, Float[Array, "k b ..."]]:
    """What the branch of every block takes on the way of ``x`` through the flow, by stage, stacked over blocks.

    Arguments are those of `bijection`.
    """
    inputs = {}
    for stage in spec.layout:

        def step(x, block, stage=stage):
            x, _ = actnorm.forward_and_logdet(actnorm.ActNormParams(**block["actnorm"]), x)
            return x + branches.apply_branch(stage.branch, block["branch"], x, context, bfloat16=bfloat16), x

        x, inputs[stage.name] = jax.lax.scan(step, chain(stage.entry).forward(x), weights[stage.name])
        if stage.spec.factor_out:
            x, _ = reshape.split_channels(x)
    return inputs


def unroll_by_default() -> bool:
    """Whether blocks are better written out: on CPUs, where a training step is then up to 1.7 times as fast."""
    return target.platform() == "cpu"


def initialize_actnorm(
    branch: BranchSpec,
    blocks: Tree,
    x: Float[Array, "b ..."],
    context: Float[Array, "b k"] | None = None,
    *,
    axis_name: str | None = None,
) -> tuple[Tree, Float[Array, "b ..."]]:
    """ActNorm of a stage's blocks from data: each block's from what the blocks before it make of the batch.

    Args:
        branch: The stage's branch.
        blocks: Constrained branch weights, stacked over blocks.
        x: A representative batch, already squeezed or flattened for this stage.
        context: Contexts of the batch, if the model is conditional.
        axis_name: Mapped axis of devices that the batch is spread over, see `actnorm.initialize`.

    Returns:
        ``{"bias", "log_scale"}`` stacked over blocks, and the stage's output.
    """

    def step(x, weights):
        params = actnorm.initialize(x, axis_name=axis_name)
        x, _ = actnorm.forward_and_logdet(params, x)
        return x + branches.apply_branch(branch, weights, x, context), params._asdict()

    x, params = jax.lax.scan(step, x, blocks)
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
        x, blocks = chain(stage.entry).forward(x), weights[stage.name]["branch"]
        fitted[stage.name], x = initialize_actnorm(stage.branch, blocks, x, context, axis_name=axis_name)
        if stage.spec.factor_out:
            x, latent = reshape.split_channels(x)
            latents.append(reshape.flatten(latent))
    return fitted, jnp.concatenate([*latents, reshape.flatten(x)], axis=-1)
