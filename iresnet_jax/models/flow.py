"""A multi-scale residual flow: the bijection that constrained weights make, and ActNorm from data.

Weights come from `contractions.constrain` in training and from `contractions.freeze` after it.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from iresnet_jax.bijections import actnorm, reshape
from iresnet_jax.bijections.bijection import Bijection
from iresnet_jax.bijections.chain import Rematerialize, Stage, after_exact, chain, in_precision, multiscale, repeat
from iresnet_jax.bijections.residual import Solver, residual_bijection
from iresnet_jax.branches.branch import Branch
from iresnet_jax.maths import platforms
from iresnet_jax.maths.logdet_estimator import LogdetEstimator
from iresnet_jax.maths.logdet_exact import ExactLogdet
from iresnet_jax.models.architecture import FlowSpec, PlacedStage
from iresnet_jax.models.bounds import FlowWeights, blocks_of
from iresnet_jax.models.contractions import Tree, as_params


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
        weights: Weights from `freeze`, `constrain` or `constrain_certified`. Inverses report infinite error bounds without
            bounds, see `iresnet_jax.models.bounds`.
        estimator: Log-determinant of the blocks.
        solver: Inverse of the blocks.
        context: Context of every example that the bijection will see, if the model is conditional, or of every pixel.
        unroll: Whether blocks are unrolled instead of scanned; see `unroll_by_default`.
        rematerialize: What the backward pass recomputes, see `repeat`.
    """
    weights = blocks_of(spec, weights)

    def make(block):
        own = residual_bijection(block.branch.given(context), estimator, solver)
        return after_exact(actnorm.actnorm_bijection(block.actnorm), own)

    def stage_of(stage):
        blocks = repeat(make, weights[stage.name], unroll=unroll, rematerialize=rematerialize)
        return Stage(chain([*stage.reshapes, blocks]), stage.spec.factor_out)

    batch_size = 1 if context is None else len(context)
    whole = multiscale([stage_of(stage) for stage in spec.layout], spec.event_shape, batch_size=batch_size)
    return in_precision(whole, jnp.float64 if solver.refine else jnp.result_type(*jax.tree.leaves(as_params(weights))))


def branch_inputs(
    spec: FlowSpec,
    weights: FlowWeights,
    x: Float[Array, "b ..."],
    context: Float[Array, "b k"] | None = None,
) -> dict[str, Float[Array, "k b ..."]]:
    """Inputs of the blocks' branches as ``x`` passes through the flow, by stage, stacked over blocks.

    Arguments are those of `flow_bijection`.
    """

    def step(x, block):
        x, _ = actnorm.forward_and_logdet(block.actnorm, x)
        return x + block.branch.given(context)(x), x

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
    stage: PlacedStage,
    branch: Branch,
    x: Float[Array, "b ..."],
    context: Float[Array, "b k"] | None = None,
    *,
    axis_name: str | None = None,
) -> tuple[Tree, Float[Array, "b ..."]]:
    """ActNorm of a stage's blocks from data: each block's from what the blocks before it make of the batch.

    Args:
        stage: The stage; if it has no ActNorm, its parameters are those of a fixed scale.
        branch: The constrained branches of the stage, stacked over blocks.
        x: A representative batch, already squeezed or flattened for this stage.
        context: Contexts of the batch, if the model is conditional.
        axis_name: Mapped axis of devices that the batch is spread over, see `actnorm.initialize`.

    Returns:
        ``{"bias", "log_scale"}`` stacked over blocks, and the stage's output.
    """

    def step(x, branch):
        params = stage.actnorm(actnorm.initialize(x, axis_name=axis_name))
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
        fitted[stage.name], x = initialize_actnorm(stage, branch, x, context, axis_name=axis_name)
        if stage.spec.factor_out:
            x, latent = reshape.split_channels(x)
            latents.append(reshape.flatten(latent))
    return fitted, jnp.concatenate([*latents, reshape.flatten(x)], axis=-1)
