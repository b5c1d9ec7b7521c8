"""Names and collections of the networks: the only file that imports Linen.

A module holds no mathematics: it creates the parameters and power iterates that the pure functions of `model` take, stacked
over the blocks of a stage, and hands them over. Collections: "params", trained; "spectral", the power iterates; "batch_stats",
running averages of a classifier's BatchNorm.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float, Key

from iresnet_jax.bijections import bijection as bijections
from iresnet_jax.bijections import likelihood, reshape
from iresnet_jax.maths.logdet.estimator import LogdetEstimator
from iresnet_jax.maths.logdet.exact import ExactLogdet
from iresnet_jax.models import branch as branches
from iresnet_jax.models import classifier, constraint
from iresnet_jax.models import flow as model


class Blocks(nn.Module):
    """The residual blocks of one stage: parameters and power iterates, every array stacked over blocks.

    Attributes:
        num_blocks: Blocks.
        branch: Their branch.
        coeff: Of the constraint, for the data-dependent start.
        budget: What ``coeff`` limits.
        last_scale: Initial factor on a branch's last layer.
        constrained: Whether the constraint holds; False for an ordinary residual network.
    """

    num_blocks: int
    branch: branches.BranchSpec
    coeff: float
    budget: str = "layer"
    last_scale: float = 1.0
    constrained: bool = True

    @nn.compact
    def __call__(self, x: Float[Array, "b ..."], context: Float[Array, "b k"] | None = None) -> Float[Array, "b ..."]:
        """Creates all variables, ActNorm fitted to ``x``. Returns the stage's output, for the next one."""

        def stack(create):
            return lambda key: jax.vmap(create)(jax.random.split(key, self.num_blocks))

        weights = {}
        initial = stack(lambda key: branches.initial_weights(self.branch, key, last_scale=self.last_scale))
        starts = stack(lambda key: constraint.initial_vectors(self.branch, key))
        for layer in self.branch.layers:
            weights[layer.name] = self.param(layer.name, lambda key, name=layer.name: initial(key)[name])
        vectors = starts(self.make_rng("params"))
        settings = {"coeff": self.coeff, "budget": self.budget}
        if self.constrained:
            start = jax.vmap(lambda w, v: constraint.normalize(self.branch, w, v, **settings))(weights, vectors)
        else:
            start = constraint.Normalized(weights, vectors, {}, jnp.full((), jnp.inf))
        for layer in self.branch.layers:  # converged already, so the first training step is as constrained as any
            self.variable("spectral", layer.name, lambda name=layer.name: start.vectors[name])
        fitted, y = model.initialize_actnorm(self.branch, start.weights, x, context)
        self.param("actnorm", lambda key: fitted)
        return y


class ResidualFlow(nn.Module):
    """A multi-scale residual flow with a learned diagonal prior.

    ``init(key, x)`` or ``init(key, x, context)`` fits ActNorm to ``x`` and runs the power iterations to convergence; the
    methods then take the variables:

        >>> module = ResidualFlow(spec)
        >>> variables = module.init(key, x)
        >>> z, logdet, info = module.apply(variables, x, key, method="forward_and_logdet")

    Attributes:
        spec: The architecture.
        prior: "gaussian" or "logistic".
        last_scale: Initial factor on a branch's last layer.
        num_classes: Classes that have a prior each; None for one prior of all.
    """

    spec: model.FlowSpec
    prior: str = "gaussian"
    last_scale: float = 1.0
    num_classes: int | None = None

    @nn.compact
    def __call__(self, x: Float[Array, "b ..."], context: Float[Array, "b k"] | None = None) -> Float[Array, "b d"]:
        """The latents of ``x``. Under ``init``, which needs a representative batch, creates all variables on the way."""
        if not self.is_initializing():
            return model.bijection(self.spec, self.constrain().weights, context=context).forward(x)
        latents = []
        for name, stage, branch in zip(model.stage_names(self.spec), self.spec.stages, self.spec.branches, strict=True):
            x = model.into_stage(stage, branch, x)
            x = StageModule(stage.num_blocks, branch, self.spec.coeff, self.spec.budget, self.last_scale, name=name)(x, context)
            if stage.factor_out:
                kept = x.shape[-1] // 2
                latents.append(reshape.flatten(x[..., kept:]))
                x = x[..., :kept]
        self.param("prior", lambda key: initial_prior(self.prior, self.spec.num_dims, self.num_classes))
        return jnp.concatenate([*latents, reshape.flatten(x)], axis=-1)

    def constrain(self, *, num_steps: int | None = None, rtol: float = 1e-3) -> model.Constrained:
        """The constrained weights, from `model.constrain`."""
        variables = self.variables
        return model.constrain(self.spec, variables["params"], variables["spectral"], num_steps=num_steps, rtol=rtol)

    def forward_and_logdet(
        self,
        x: Float[Array, "b ..."],
        key: Key[Array, "..."],
        estimator: LogdetEstimator = ExactLogdet(),  # noqa: B008
        context: Float[Array, "b k"] | None = None,
    ) -> tuple[Float[Array, "b d"], Float[Array, " b"], Any]:
        """Latents and log-determinant; norms are iterated to their tolerance."""
        return model.bijection(self.spec, self.constrain().weights, estimator, context=context).forward_and_logdet(x, key)

    def inverse(
        self,
        z: Float[Array, "b d"],
        solver: bijections.Solver = bijections.Solver(),  # noqa: B008
        context: Float[Array, "b k"] | None = None,
    ) -> tuple[Float[Array, "b ..."], Any]:
        """Examples of latents, and how the inverse ended."""
        return model.bijection(self.spec, self.constrain().weights, solver=solver, context=context).inverse(z)


class StageModule(nn.Module):
    """A stage, so that its blocks' arrays are named ``stage0/blocks/conv0/kernel``."""

    num_blocks: int
    branch: branches.BranchSpec
    coeff: float
    budget: str
    last_scale: float
    constrained: bool = True

    @nn.compact
    def __call__(self, x: Float[Array, "b ..."], context: Float[Array, "b k"] | None = None) -> Float[Array, "b ..."]:
        """See `Blocks`."""
        settings = (self.num_blocks, self.branch, self.coeff, self.budget, self.last_scale, self.constrained)
        return Blocks(*settings, name="blocks")(x, context)


class Classifier(nn.Module):
    """A residual network, invertible if it is constrained, with the head of `classifier`.

    ``init(key, x)`` fits ActNorm and the head's statistics to ``x``, inputs from `classifier.preprocess`.

        >>> variables = Classifier(spec).init(key, x)
        >>> logits = Classifier(spec).apply(variables, x)

    Attributes:
        spec: The architecture.
        last_scale: Initial factor on a branch's last layer.
    """

    spec: classifier.ClassifierSpec
    last_scale: float = 1.0

    @nn.compact
    def __call__(self, x: Float[Array, "b ..."]) -> Float[Array, "b k"]:
        """The logits of ``x``, with running averages in the head."""
        flow_spec = self.spec.flow
        if not self.is_initializing():
            params, statistics = self.variables["params"], self.variables["batch_stats"]
            return classifier.logits(self.spec, self.constrain().weights, params["head"], statistics, x)
        for name, stage, branch in zip(model.stage_names(flow_spec), flow_spec.stages, flow_spec.branches, strict=True):
            x = model.into_stage(stage, branch, x)
            if not self.spec.is_bijective:
                x = BatchNormStage(stage.num_blocks, branch, self.last_scale, name=name)(x)
                continue
            settings = (stage.num_blocks, branch, flow_spec.coeff, flow_spec.budget, self.last_scale, self.spec.constrained)
            x = StageModule(*settings, name=name)(x)
        head = self.param("head", lambda key: initial_head(key, x.shape[-1], self.spec.num_classes))
        statistics = self.variable("batch_stats", "head", lambda: classifier.batch_statistics(x))
        return classifier.head(head, statistics.value, x)

    def constrain(self, *, num_steps: int | None = None, rtol: float = 1e-3) -> model.Constrained:
        """The weights that run: constrained by `model.constrain`, or as they are."""
        variables = self.variables
        if not self.spec.is_bijective:
            return model.Constrained(variables["params"], {}, {})
        if not self.spec.constrained:
            return model.unconstrained(self.spec.flow, variables["params"], variables["spectral"])
        return model.constrain(self.spec.flow, variables["params"], variables["spectral"], num_steps=num_steps, rtol=rtol)


class BatchNormStage(nn.Module):
    """A stage of the network to compare with: BatchNorm in front of every layer, no ActNorm, no constraint.

    Attributes:
        num_blocks: Blocks.
        branch: Their branch.
        last_scale: Initial factor on a branch's last layer.
    """

    num_blocks: int
    branch: branches.BranchSpec
    last_scale: float

    @nn.compact
    def __call__(self, x: Float[Array, "b ..."]) -> Float[Array, "b ..."]:
        """Creates all variables, running averages those of ``x``. Returns the stage's output, for the next one."""

        def initial(key):
            keys = jax.random.split(key, self.num_blocks)
            weights = jax.vmap(lambda key: branches.initial_weights(self.branch, key, last_scale=self.last_scale))(keys)
            widths = zip(self.branch.layers, (self.branch.in_shape[-1], *self.branch.hidden), strict=True)
            shapes = {layer.name: (self.num_blocks, width) for layer, width in widths}
            norms = {name: {"scale": jnp.ones(shape), "bias": jnp.zeros(shape)} for name, shape in shapes.items()}
            return {**weights, "batchnorm": norms}

        blocks = self.param("blocks", initial)
        y, statistics = classifier.batchnorm_blocks(self.branch, blocks, x)
        self.variable("batch_stats", "blocks", lambda: statistics)
        return y


def initial_prior(kind: str, num_dims: int, num_classes: int | None = None) -> dict[str, Array]:
    """Parameters of the standard distribution; with classes, of one for each, all equally likely."""
    priors = {"gaussian": likelihood.GaussianPrior, "logistic": likelihood.LogisticPrior}
    if kind not in priors:
        raise ValueError(f"prior must be one of {', '.join(priors)}, got {kind!r}")
    zeros = jnp.zeros(num_dims if num_classes is None else (num_classes, num_dims))
    classes = {} if num_classes is None else {"class_logits": jnp.zeros(num_classes)}
    return {**priors[kind](zeros, zeros)._asdict(), **classes}


def initial_head(key: Key[Array, ""], num_channels: int, num_classes: int) -> dict[str, dict[str, Array]]:
    """A head that normalises, with logits of variance about one half."""
    kernel = jax.random.normal(key, (num_channels, num_classes)) / jnp.sqrt(num_channels)
    norm = {"scale": jnp.ones(num_channels), "bias": jnp.zeros(num_channels)}
    return {"norm": norm, "linear": {"kernel": kernel, "bias": jnp.zeros(num_classes)}}
