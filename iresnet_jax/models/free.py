"""What training changes: the parameters of a model without their constraint, the models that they
make, and the one way to new ones, fitted to examples.
"""

import dataclasses
import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Generic, Literal, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Key

from iresnet_jax.arguments import Count
from iresnet_jax.bijections import reshape
from iresnet_jax.bijections.actnorm import ActNorm
from iresnet_jax.bijections.chain import Chain
from iresnet_jax.maths.keys import typed_key
from iresnet_jax.maths.platforms import fast_compile
from iresnet_jax.models import contractions, priors
from iresnet_jax.models.architecture import FlowSpec
from iresnet_jax.models.certificate import check_claims
from iresnet_jax.models.contexts import linear_regression, scaled, with_linear_mean
from iresnet_jax.models.contractions import ConstrainedFlow
from iresnet_jax.models.flow import (
    Block,
    FlowWeights,
    as_params,
    bounded,
    carried_bounds,
    flow_bijection,
)
from iresnet_jax.models.model import MODELS, How, Model, described, remember
from iresnet_jax.pytrees import pytree

IMAGES, VECTORS = 1024, 20_000  # examples that a new model is fitted to, at most

M = TypeVar("M", bound=Model)
# (params, iterates) -> constrained weights
Constrain = Callable[[Any, Any], ConstrainedFlow]


@dataclass(frozen=True)
class ConstraintConfig:
    """Settings that keep blocks contractions in training; a trained model is certified in any
    case.
    """

    # "estimated": norms by power iteration. "certified": guaranteed upper bounds at every step.
    # "none": an ordinary residual network without an inverse, for the objective "classification".
    norms: Literal["estimated", "certified", "none"] = "estimated"
    # power iterations per training step; validation iterates until the norm changes by less than .1
    # %
    num_steps: Count = 1


@functools.lru_cache(maxsize=64)
def exact_constraint(constraint: ConstraintConfig, spec: FlowSpec) -> Constrain:
    """``(params, iterates) ->`` the weights of a flow with norms iterated to their tolerance.

    One function for all models of one architecture, which share its program.
    """
    return fast_compile(_constraint(constraint, spec))


def _constraint(settings: ConstraintConfig, spec: FlowSpec, **iteration: Any) -> Constrain:
    if settings.norms == "none":
        return functools.partial(contractions.unconstrained, spec)
    if settings.norms == "certified":
        return functools.partial(contractions.constrain_certified, spec)
    return functools.partial(contractions.constrain, spec, **iteration)


@pytree(arrays=("params", "iterates", "statistics", "spec", "how"))
class Free(Generic[M]):
    """Parameters of a model without their constraint: what training starts from and changes, also
    in your own loops. A pytree: ``jit`` takes it as an argument.

    Attributes:
        params: What an optimizer changes: weights of the flow's stages, and whatever else the model
            learns, such as the prior.
        iterates: Power iterates of all layers, from one step to the next.
        statistics: Running averages of a classifier's BatchNorm; empty without.
        spec: All that defines the model but its weights.
        how: How the model runs.
        constraint: How its blocks are constrained.

    Example::

        free = Free.of(model)
        optimizer = optax.adam(1e-3)
        state = optimizer.init(free.params)

        @jax.jit
        def step(free, state, batch):
            def loss(params):
                model, iterates = free.constrain(params)
                return -model.log_prob(batch).mean(), iterates

            gradient, iterates = jax.grad(loss, has_aux=True)(free.params)
            updates, state = optimizer.update(gradient, state, free.params)
            params = optax.apply_updates(free.params, updates)
            return free.with_(params=params, iterates=iterates), state

        for batch in batches:
            free, state = step(free, state, batch)
        model = free.certified()
    """

    params: dict[str, Any]
    iterates: Any
    statistics: Any
    spec: Any
    how: How
    constraint: ConstraintConfig = ConstraintConfig()

    def __repr__(self) -> str:
        name, num = MODELS[type(self.spec)].__name__, num_parameters(self.params)
        return f"Free parameters, {num:,}, of a {name} of {described(self.spec)}"

    @classmethod
    def of(cls, model: M) -> "Free[M]":
        """The parameters of a model, such as one of ``Density.init`` or one that was loaded."""
        spec = model.spec
        constraint = ConstraintConfig() if spec.constrained else ConstraintConfig(norms="none")
        stages = as_params(model.weights)
        learned, iterates = model.learned, {}
        statistics = learned.pop("statistics", {})
        if spec.constrained:
            iterates = spec.flow.initial_iterates(jax.random.key(0))
            iterates = exact_constraint(constraint, spec.flow)(stages, iterates).spectral
        return cls({**stages, **learned}, iterates, statistics, spec, model.how, constraint)

    def with_(self, **changes: Any) -> "Free[M]":
        """The same with other fields, such as ``params`` or ``iterates``."""
        return dataclasses.replace(self, **changes)

    def build(
        self, weights: Any, params: Any = None, statistics: Any = None, how: How | None = None
    ) -> M:
        """The model of constrained weights.

        Args:
            weights: Weights of the flow's stages.
            params: Parameters whose part without a constraint, such as the prior, the model has;
                by default `params`.
            statistics: Running averages of BatchNorm; by default `statistics`.
            how: How the model runs; by default `how`.
        """
        params = self.params if params is None else params
        statistics = self.statistics if statistics is None else statistics
        model = MODELS[type(self.spec)]
        rest = {"statistics": statistics} if "statistics" in model.arrays else {}
        learned = {name: leaf for name, leaf in params.items() if name not in weights}
        return model(self.spec, bounded(weights, None), how=how or self.how, **learned, **rest)

    def constrain(self, params: Any = None) -> tuple[M, Any]:
        """The model whose blocks are contractions, as power iteration sees it, and the power
        iterates of the next step.

        Args:
            params: Parameters to take instead of `params`, by which the result can be
                differentiated.
        """
        params = self.params if params is None else params
        found = self.constraint_of_step(params, self.iterates)
        return self.build(found.weights, params), found.spectral

    def constraint_of_step(self, params: Any, iterates: Any) -> ConstrainedFlow:
        """The constrained weights that run in a training step."""
        settings, flow = self.constraint, self.spec.flow
        return _constraint(settings, flow, num_steps=settings.num_steps)(params, iterates)

    def validated(self, params: Any = None, iterates: Any = None, statistics: Any = None) -> M:
        """The model as validation runs it: norms are iterated to their tolerance, and blocks are
        scanned, which compiles in half the time.

        Arguments are taken instead of the fields of these names, such as averages.
        """
        params = self.params if params is None else params
        iterates = self.iterates if iterates is None else iterates
        constrain = exact_constraint(self.constraint, self.spec.flow)
        how = dataclasses.replace(self.how, unroll=False, rematerialize="nothing")
        return self.build(
            constrain(self._stages(params), iterates).weights, params, statistics, how
        )

    def certified(self, params: Any = None, statistics: Any = None) -> M:
        """The model to use after training: every block is certified to be within the budget,
        whatever training used.

        Where the model has no constraint, the weights stay as they are. Arguments are those of
        `validated`.
        """
        params, flow = self.params if params is None else params, self.spec.flow
        stages = self._stages(params)
        if not self.spec.constrained:
            weights = contractions.of_stored(flow, stages, constrained=False)
            return self.build(weights, params, statistics)
        weights = contractions.freeze(flow, stages)
        model = self.build(weights, params, statistics)
        return remember(model, carried_bounds(weights))

    def _stages(self, params: Any) -> dict[str, Any]:
        return {stage.name: params[stage.name] for stage in self.spec.flow.all_stages}


def num_parameters(params: Any) -> int:
    """Numbers in a tree of arrays."""
    return sum(leaf.size for leaf in jax.tree.leaves(params))


# ------------------------------------------------------------------------------------- new models


def initial(
    spec: Any,
    key: Key[Array, ""],
    x: Any,
    *,
    context: Any = None,
    labels: Any = None,
    prior: Any = None,
    constraint: ConstraintConfig = ConstraintConfig(),
    sharpness: float = 0.0,
    last_scale: float = 1.0,
) -> Free:
    """Fresh parameters of a model, fitted to examples.

    Norms are iterated to their tolerance, and ActNorm is fitted. A prior with components is fitted
    to latents. Behind whitening, ActNorm is the identity and the prior has variance 1, as a fit to
    the same examples would undo the shrinkage of the covariance: the density starts as a normal
    one, and one with classes as linear discriminant analysis.

    Args:
        spec: The model.
        key: Source of the weights.
        x: Examples. Of many a part is taken: 20,000 vectors or 1024 images.
        context: Their contexts, of a conditional density.
        labels: Their classes, for the priors of classes behind whitening.
        prior: Prior that the model begins with as it is; None fits one of the spec's family.
        constraint: How blocks are constrained.
        sharpness: See `FeedforwardSpec.initial_weights`.
        last_scale: Initial factor on the last layer of each branch.
    """
    key_weights, key_noise, key_learned = jax.random.split(typed_key(key), 3)
    most = VECTORS if len(spec.flow.event_shape) == 1 else IMAGES
    x, context, labels = (
        None if rows is None else rows[:: -(-len(rows) // most)] for rows in (x, context, labels)
    )
    learned = dict(spec.initial_arrays(key_learned))
    statistics = learned.pop("statistics", {})
    if prior is not None:
        learned["prior"] = priors.trainable(prior)
    u, given = _inputs(spec, learned.get("network"), x, context, key_noise)
    if not np.all(np.isfinite(u)):
        name = type(getattr(spec, "transform", None)).__name__
        raise ValueError(f"examples are out of the range of their transform, {name}")
    fits_actnorm = not getattr(spec, "is_white", False)
    params, found, z = fresh(
        spec.flow, key_weights, u, given, constraint, sharpness, last_scale, fits_actnorm
    )
    check_claims(spec.flow, found.weights, u, given)
    if learned.get("network") and not fits_actnorm:
        c = np.asarray(scaled(spec.context, jnp.asarray(context)))
        coefficients = linear_regression(c, np.asarray(u))
        learned["network"] = with_linear_mean(learned["network"], coefficients)
        params = _less_first_features(spec.flow, params)
    fitted = spec.fitted(z, labels) if prior is None else {}
    statistics = fitted.pop("statistics", statistics)
    how = MODELS[type(spec)].how
    return Free({**params, **learned, **fitted}, found.spectral, statistics, spec, how, constraint)


def abstract(spec: Any) -> Free:
    """`initial` with shapes and dtypes in place of arrays, which are not computed."""

    def create(key):
        learned = dict(spec.initial_arrays(key))
        statistics = learned.pop("statistics", {})
        params = {**spec.flow.initial_params(key), **learned}
        return params, spec.flow.initial_iterates(key), statistics

    params, iterates, statistics = jax.eval_shape(create, jax.random.key(0))
    return Free(params, iterates, statistics, spec, MODELS[type(spec)].how)


@functools.partial(fast_compile, static_argnums=(0, 4, 5, 6, 7))
def fresh(
    spec: FlowSpec,
    key: Key[Array, ""],
    x: Float[Array, "b ..."],
    context: Float[Array, "b k"] | None = None,
    constraint: ConstraintConfig = ConstraintConfig(),
    sharpness: float = 0.0,
    last_scale: float = 1.0,
    fits_actnorm: bool = True,  # noqa: FBT001, FBT002 (static)
) -> tuple[dict[str, Any], ConstrainedFlow, Float[Array, "b d"]]:
    """Random parameters of a flow, their constrained weights, and the latents of inputs that
    ActNorm is fitted to; models that differ in priors share a program.
    """
    key_params, key_iterates = jax.random.split(key)
    params = spec.initial_params(key_params, sharpness=sharpness, last_scale=last_scale)
    found = exact_constraint(constraint, spec)(params, spec.initial_iterates(key_iterates))
    if not fits_actnorm:
        return params, found, flow_bijection(spec, found.weights, context=context).forward(x)
    weights, z = fit_actnorm(spec, found.weights, x, context)
    fitted = {
        name: {"blocks": {**stage["blocks"], "actnorm": dict(vars(weights[name].actnorm))}}
        for name, stage in params.items()
    }
    return fitted, found._replace(weights=weights), z


def fit_actnorm(
    spec: FlowSpec,
    weights: FlowWeights,
    x: Float[Array, "b ..."],
    context: Float[Array, "b k"] | None = None,
) -> tuple[dict[str, Block], Float[Array, "b d"]]:
    """Weights with ActNorm from data, each block's from what the blocks before it make of the
    batch, and the batch's latents.

    Args:
        spec: The architecture. Stages without ActNorm keep their fixed scale.
        weights: Constrained weights, whose own ActNorm is not used.
        x: A representative batch.
        context: Its contexts, if the model is conditional.
    """
    fitted, latents = dict(weights), []
    for stage in spec.layout:

        def step(x, branch, stage=stage):
            params = stage.actnorm(ActNorm.fit(x))
            x = params.forward(x)
            return x + branch.given(context)(x), params

        branch = weights[stage.name].branch
        x, params = jax.lax.scan(step, Chain(stage.reshapes).forward(x), branch)
        fitted[stage.name] = Block(params, branch)
        if stage.spec.factor_out:
            x, latent = reshape.split_channels(x)
            latents.append(reshape.flatten(latent))
    return fitted, jnp.concatenate([*latents, reshape.flatten(x)], axis=-1)


@fast_compile
def _inputs(spec: Any, network: Any, x: Any, context: Any, key: Key[Array, ""]) -> Any:
    """What the flow is given of examples and of their contexts."""
    given = None if context is None else spec.scale_context(context, network)
    return spec.preprocess(x, key), given


def _less_first_features(spec: FlowSpec, params: Any) -> Any:
    """Parameters whose first block subtracts the first features of contexts from the entries, if
    its branch knows how.
    """
    stage = spec.layout[0]
    blocks = params[stage.name]["blocks"]
    first = stage.branch.less_context(jax.tree.map(lambda leaf: leaf[0], blocks))
    blocks = jax.tree.map(lambda leaf, own: leaf.at[0].set(own), blocks, first)
    return {**params, stage.name: {**params[stage.name], "blocks": blocks}}
