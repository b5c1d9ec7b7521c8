"""A multi-scale residual flow as data: its architecture, its constrained weights, and the bijection that they make.

    parameters --constrain--> weights (every block a contraction) --bijection--> F, F^-1, log-dets     in training
    parameters --freeze--> weights (every block certified a contraction) --bijection--> ...            after it

`unconstrained` is the way around both, to an ordinary residual network for comparison: no inverse is promised.

Blocks of one stage have one shape, and every array of theirs is stacked on a leading axis. All functions are pure.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from iresnet_jax.bijections import actnorm, reshape
from iresnet_jax.bijections import bijection as bijections
from iresnet_jax.bijections import compose as flow
from iresnet_jax.maths.inverse.fixed_point import Diagonal
from iresnet_jax.maths.lipschitz import BiLipschitz, branch_bound, model_bounds
from iresnet_jax.maths.logdet.estimator import LogdetEstimator
from iresnet_jax.maths.logdet.exact import ExactLogdet
from iresnet_jax.models import branch as branches
from iresnet_jax.models import constraint

Tree = Mapping[str, Any]


@dataclass(frozen=True)
class StageSpec:
    """Residual blocks of one shape, and what happens to the array before and after them.

    Attributes:
        num_blocks: Blocks, each an ActNorm and a residual branch.
        hidden: Widths of a branch's hidden layers.
        kernel_sizes: Taps of a branch's convolutions (one more than hidden widths); None for dense layers on flattened arrays.
        activation: A name in `activations.ACTIVATIONS`.
        preactivation: Whether a branch begins with the activation.
        squeeze: Space-to-depth factor in front of the blocks; 1 for none.
        factor_out: Whether half of the channels leave as latents behind the blocks.
        padding: Padding of the convolutions.
        positional_bias: Whether convolutions have a bias for every pixel instead of one a channel.
    """

    num_blocks: int
    hidden: tuple[int, ...]
    kernel_sizes: tuple[int, ...] | None = None
    activation: str = "elu"
    preactivation: bool = False
    squeeze: int = 1
    factor_out: bool = False
    padding: str = "SAME"
    positional_bias: bool = False

    def __post_init__(self):
        for name, values in (("hidden", self.hidden), ("kernel_sizes", self.kernel_sizes or ())):
            if not all(value > 0 for value in values):
                raise ValueError(f"{name} must be positive numbers, got {values}")
        if self.num_blocks < 1:
            raise ValueError(f"num_blocks must be at least 1, got {self.num_blocks}: leave the stage out instead")
        if self.squeeze < 1:
            raise ValueError(f"squeeze must be a positive factor (1 for none), got {self.squeeze}")


@dataclass(frozen=True)
class FlowSpec:
    """The architecture of a flow.

    Attributes:
        event_shape: Shape of one example, ``(h, w, c)`` or ``(d,)``.
        stages: From the data to the latents.
        coeff: Largest operator norm, in (0, 1).
        budget: What ``coeff`` limits: the norm of every "layer", or the product of the layers of every "block".
        context_dim: Length of an example's context vector, on which every branch then depends; 0 for none.
    """

    event_shape: tuple[int, ...]
    stages: tuple[StageSpec, ...]
    coeff: float = 0.9
    budget: str = "layer"
    context_dim: int = 0

    def __post_init__(self):
        constraint.check_coeff(self.coeff)
        if self.budget not in constraint.BUDGETS:
            raise ValueError(f"budget must be one of {', '.join(constraint.BUDGETS)}, got {self.budget!r}")
        if not self.stages:
            raise ValueError("a flow needs at least one stage, got none")
        self.branches  # noqa: B018 (checks every shape)

    @property
    def num_dims(self) -> int:
        """Dimensions of the data and of the latent vector."""
        return _size(self.event_shape)

    @property
    def branches(self) -> tuple[branches.BranchSpec, ...]:
        """The branch of every stage, with the shape it works on."""
        specs: list[branches.BranchSpec] = []
        shape: tuple[int, ...] = tuple(self.event_shape)
        for i, stage in enumerate(self.stages):
            shape = _squeezed(shape, stage.squeeze, i)
            if stage.kernel_sizes is None and len(shape) > 1:
                shape = (_size(shape),)
            specs.append(
                branches.BranchSpec(
                    in_shape=shape,
                    hidden=tuple(stage.hidden),
                    kernel_sizes=None if stage.kernel_sizes is None else tuple(stage.kernel_sizes),
                    activation=stage.activation,
                    preactivation=stage.preactivation,
                    padding=stage.padding,
                    positional_bias=stage.positional_bias,
                    context_dim=self.context_dim,
                )
            )
            if stage.factor_out:
                shape = _kept(shape, i)
        return tuple(specs)


class Constrained(NamedTuple):
    """Weights whose blocks are contractions, and what it took.

    Attributes:
        weights: ``{"stage0": {"actnorm", "branch", "lipschitz"}, ...}``, arrays stacked over blocks. What `bijection` runs.
        spectral: The power iterates to go on from, in the form they were given.
        norms: Operator norms before normalisation, estimated or bounded: ``{"stage0": {"conv0": (num_blocks,), ...}, ...}``.
    """

    weights: Tree
    spectral: Tree
    norms: dict[str, dict[str, Float[Array, " k"]]]


class Frozen(NamedTuple):
    """Weights to use after training: fixed, and every block a contraction by certificate.

    Attributes:
        weights: As in `Constrained`; ``lipschitz`` is the guaranteed bound of each block's ``Lip(g)``.
        bounds: Guaranteed upper bounds of the norms of these very kernels, in the form of ``Constrained.norms``.
        norms: The same before freezing.
    """

    weights: Tree
    bounds: dict[str, dict[str, Float[Array, " k"]]]
    norms: dict[str, dict[str, Float[Array, " k"]]]


def stage_names(spec: FlowSpec) -> list[str]:
    """``["stage0", "stage1", ...]``."""
    return [f"stage{i}" for i in range(len(spec.stages))]


def constrain(spec: FlowSpec, params: Tree, spectral: Tree, *, num_steps: int | None = None, rtol: float = 1e-3) -> Constrained:
    """Brings every block into the budget of ``spec.coeff``, as power iteration estimates norms.

    Args:
        spec: The architecture.
        params: ``{"stage0": {"blocks": {"actnorm": {...}, "conv0": {...}, ...}}, ...}``, unconstrained.
        spectral: ``{"stage0": {"blocks": {"conv0": v, ...}}, ...}``, the power iterates.
        num_steps: Power iterations a layer (training, warm start); None iterates to the tolerance (everything else).
        rtol: Relative tolerance of the norms.
    """
    settings = {"coeff": spec.coeff, "budget": spec.budget, "num_steps": num_steps, "rtol": rtol}

    def normalize(branch, name, blocks):
        return jax.vmap(lambda w, v: constraint.normalize(branch, w, v, **settings))(blocks, spectral[name]["blocks"])

    return _constrain(spec, params, spectral, normalize)


def constrain_certified(
    spec: FlowSpec,
    params: Tree,
    spectral: Tree,
    *,
    num_squarings: int = 4,
    twists: str = "auto",
) -> Constrained:
    """Brings every block into the budget of ``spec.coeff`` by guaranteed upper bounds of its norms, for training.

    Args:
        spec: The architecture.
        params: As in `constrain`.
        spectral: Handed on as it is: there is no state.
        num_squarings: Of the Gram iteration, see `certify.dense_norm_bound`.
        twists: "all", "one" or "auto", see `constraint.training_twists`.
    """
    settings = {"coeff": spec.coeff, "budget": spec.budget, "method": "gram", "num_squarings": num_squarings}

    def normalize(branch, name, blocks):
        del name
        chosen = constraint.training_twists(branch, twists)
        return jax.vmap(lambda w: constraint.normalize_certified(branch, w, twists=chosen, **settings))(blocks)

    return _constrain(spec, params, spectral, normalize)


def unconstrained(spec: FlowSpec, params: Tree, spectral: Tree) -> Constrained:
    """The weights as they are. Nothing is known of the blocks: their ``lipschitz`` is infinite, and no inverse converges.

    Args:
        spec: The architecture.
        params: As in `constrain`.
        spectral: Handed on as it is.
    """

    def as_they_are(branch, name, blocks):
        del branch, name
        return constraint.Normalized(blocks, {}, {}, jnp.full(len(jax.tree.leaves(blocks)[0]), jnp.inf))

    return _constrain(spec, params, spectral, as_they_are)


def _constrain(spec, params, spectral, normalize):
    weights, new_spectral, norms = {}, {}, {}
    for name, branch in zip(stage_names(spec), spec.branches, strict=True):
        blocks = dict(params[name]["blocks"])
        scale = blocks.pop("actnorm")
        normalized = normalize(branch, name, blocks)
        weights[name] = {"actnorm": scale, "branch": normalized.weights, "lipschitz": normalized.lipschitz}
        new_spectral[name] = {"blocks": normalized.vectors} if normalized.vectors else spectral[name]
        norms[name] = normalized.norms
    return Constrained(weights, new_spectral, norms)


def freeze(spec: FlowSpec, params: Tree, *, constrained: bool = True) -> Frozen:
    """The weights to use after training, whatever training used: every block certified to be within the budget.

    The bounds come from the frozen kernels themselves, once they are scaled and rounded. Blocks are taken one after the
    other, so memory does not grow with depth.

    Args:
        spec: The architecture.
        params: As in `constrain`.
        constrained: False leaves the kernels of a network without a constraint as they are, whatever their bounds.
    """
    weights, bounds, norms = {}, {}, {}
    for name, branch in zip(stage_names(spec), spec.branches, strict=True):

        def freeze_block(block, branch=branch):
            if not constrained:
                found = constraint.layer_bounds(branch, block)
                return block, found, found
            normalized = constraint.normalize_certified(branch, block, coeff=spec.coeff, budget=spec.budget)
            return normalized.weights, constraint.layer_bounds(branch, normalized.weights), normalized.norms

        blocks = dict(params[name]["blocks"])
        scale = blocks.pop("actnorm")
        kernels, bounds[name], norms[name] = jax.lax.map(freeze_block, blocks)
        lipschitz = jax.vmap(lambda layers: branch_bound(jnp.stack(list(layers.values()))))(bounds[name])
        weights[name] = {"actnorm": scale, "branch": kernels, "lipschitz": lipschitz}
    return Frozen(weights, bounds, norms)


def bilipschitz(spec: FlowSpec, weights: Tree) -> BiLipschitz:
    """Bounds of ``Lip(F)`` and ``Lip(F^-1)`` of the whole flow, guaranteed for weights from `freeze`; pessimistic in depth."""
    bounds = model_bounds([])
    for name, stage in reversed(list(zip(stage_names(spec), spec.stages, strict=True))):
        log_scales = jnp.asarray(weights[name]["actnorm"]["log_scale"])
        own = model_bounds(jnp.asarray(weights[name]["lipschitz"]), list(log_scales))
        bounds = own.compose(bounds.beside_identity() if stage.factor_out else bounds)
    return bounds


def bijection(
    spec: FlowSpec,
    weights: Tree,
    estimator: LogdetEstimator = ExactLogdet(),  # noqa: B008 (immutable)
    solver: bijections.Solver = bijections.Solver(),  # noqa: B008 (immutable)
    *,
    context: Float[Array, "b k"] | None = None,
    unroll: bool = False,
    rematerialize: bool = False,
) -> bijections.Bijection:
    """The flow ``x (b, *event_shape) -> z (b, d)`` of constrained weights.

    Args:
        spec: The architecture.
        weights: From `freeze`, `constrain` or `constrain_certified`.
        estimator: Log-determinant of the blocks.
        solver: Inverse of the blocks.
        context: The context of every example that the bijection will see, if the model is conditional.
        unroll: Write blocks out instead of scanning over them; see `unroll_by_default`.
        rematerialize: Recompute a block's inside in the backward pass instead of keeping it.
    """
    stages, shape = [], tuple(spec.event_shape)
    for name, stage, branch in zip(stage_names(spec), spec.stages, spec.branches, strict=True):
        parts = []
        if stage.squeeze > 1:
            parts.append(bijections.squeeze_bijection(stage.squeeze))
            shape = _squeezed(shape, stage.squeeze, 0)
        if len(branch.in_shape) != len(shape):
            parts.append(bijections.flatten_bijection(shape))
            shape = branch.in_shape

        def make_block(block, branch=branch):
            own = block["branch"]
            residual = bijections.residual_bijection(
                lambda x: branches.apply_branch(branch, own, x, context),
                block["lipschitz"],
                estimator,
                solver,
                trace=(lambda x: branches.trace(branch, own, x, context)) if branches.has_trace(branch) else None,
                at_zero=(lambda: branches.at_zero(branch, own)) if context is None else None,
                diagonal=_diagonal(branch, own, context) if branches.has_diagonal(branch) else None,
            )
            return flow.chain([bijections.actnorm_bijection(actnorm.ActNormParams(**block["actnorm"])), residual])

        parts.append(flow.repeat(make_block, weights[name], unroll=unroll, rematerialize=rematerialize))
        stages.append(flow.Stage(flow.chain(parts), stage.factor_out))
        if stage.factor_out:
            shape = _kept(shape, 0)
    whole = flow.multiscale(stages, tuple(spec.event_shape), batch_size=1 if context is None else len(context))
    return flow.in_float64(whole) if solver.refine else whole


def _diagonal(branch, weights, context):
    return Diagonal(
        at=lambda x: branches.jacobian_diagonal(branch, weights, x, context),
        size=branches.largest_diagonal(branch, weights),
    )


def into_stage(stage: StageSpec, branch: branches.BranchSpec, x: Float[Array, "b ..."]) -> Float[Array, "b ..."]:
    """What the stage before hands on, squeezed or flattened as the blocks of this stage take it."""
    x = reshape.squeeze(x, stage.squeeze) if stage.squeeze > 1 else x
    return reshape.flatten(x) if x.ndim - 1 != len(branch.in_shape) else x


def unroll_by_default() -> bool:
    """Whether blocks are better written out: on CPU, where a training step is then up to 1.7 times as fast."""
    return jax.default_backend() == "cpu"


def initialize_actnorm(
    branch: branches.BranchSpec, blocks: Tree, x: Float[Array, "b ..."], context: Float[Array, "b k"] | None = None
) -> tuple[Tree, Float[Array, "b ..."]]:
    """ActNorm of a stage's blocks from data: each block's from what the blocks before it make of the batch.

    Args:
        branch: The stage's branch.
        blocks: Constrained branch weights, stacked over blocks.
        x: A representative batch, already squeezed or flattened for this stage.
        context: Its contexts, if the model is conditional.

    Returns:
        ``{"bias", "log_scale"}`` stacked over blocks, and the stage's output.
    """

    def step(x, weights):
        params = actnorm.initialize(x)
        x, _ = actnorm.forward_and_logdet(params, x)
        return x + branches.apply_branch(branch, weights, x, context), params._asdict()

    x, params = jax.lax.scan(step, x, blocks)
    return params, x


def _size(shape: tuple[int, ...]) -> int:
    return math.prod(shape)


def _squeezed(shape: tuple[int, ...], factor: int, stage: int) -> tuple[int, ...]:
    if factor == 1:
        return shape
    if len(shape) != 3 or shape[0] % factor or shape[1] % factor:
        raise ValueError(f"stage {stage} cannot squeeze {shape} by {factor}: it takes images with sides divisible by {factor}")
    return (shape[0] // factor, shape[1] // factor, shape[2] * factor**2)


def _kept(shape: tuple[int, ...], stage: int) -> tuple[int, ...]:
    if shape[-1] % 2:
        raise ValueError(f"stage {stage} factors out half of its channels but has {shape[-1]}: squeeze before it")
    return (*shape[:-1], shape[-1] // 2)
