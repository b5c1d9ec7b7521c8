"""Names and collections of the networks: the only file that imports Linen.

A module holds no mathematics: it creates the parameters and power iterates that the pure functions of `flow` take, stacked over
the blocks of a stage, and hands them over. Collections: "params", trained; "spectral", the power iterates; "batch_stats",
running averages of a classifier's BatchNorm.
"""

import functools

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float

from iresnet_jax.bijections import reshape
from iresnet_jax.bijections.chain import chain
from iresnet_jax.branches.branch import Branch
from iresnet_jax.models.architecture import FlowSpec, PlacedStage
from iresnet_jax.models.classifier import Classifier as ClassifierModel
from iresnet_jax.models.classifier import ClassifierSpec
from iresnet_jax.models.contractions import constrain, constrain_blocks, unconstrained
from iresnet_jax.models.flow import flow_bijection, initialize_actnorm
from iresnet_jax.models.head import apply_head, batch_statistics, initial_head
from iresnet_jax.models.priors import Gaussian


class Blocks(nn.Module):
    """The residual blocks of one stage: parameters and power iterates, every array stacked over blocks.

    Attributes:
        flow: Architecture of the flow that the stage belongs to.
        stage: The stage.
        last_scale: Initial factor on a branch's last layer.
        constrained: Whether the constraint holds; False for an ordinary residual network.
        sharp: Whether activations start sharper, see `BranchSpec.initial_weights`.
        fitted: Whether power iterates are converged and ActNorm is fitted; False leaves that to the caller.
    """

    flow: FlowSpec
    stage: PlacedStage
    last_scale: float | Float[Array, ""] = 1.0
    constrained: bool = True
    sharp: bool = False
    fitted: bool = True

    @nn.compact
    def __call__(self, x: Float[Array, "b ..."], context: Float[Array, "b k"] | None = None) -> Float[Array, "b ..."]:
        """Creates all variables, ActNorm fitted to ``x``. Returns the stage's output, for the next one."""
        branch = self.stage.branch
        initial = functools.partial(self.stage.initial_weights, last_scale=self.last_scale, sharp=self.sharp)
        names = jax.eval_shape(initial, jax.random.key(0))
        weights = {name: self.param(name, lambda key, name=name: initial(key)[name]) for name in names}
        iterates = self.stage.initial_iterates(self.make_rng("params"))
        start = Branch(branch, weights)
        if self.constrained and self.fitted:
            start, iterates, _ = constrain_blocks(branch, weights, iterates, coeff=self.flow.coeff, budget=self.flow.budget)
        for name, iterate in iterates.items():  # converged already, so the first training step is as constrained as any
            self.variable("spectral", name, lambda iterate=iterate: iterate)
        fit = functools.partial(initialize_actnorm, self.stage, start, x, context)
        fitted, y = fit() if self.fitted else jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), jax.eval_shape(fit))
        self.param("actnorm", lambda key: fitted)
        return y


class StageModule(nn.Module):
    """A stage, so that its blocks' arrays are named ``stage0/blocks/conv0/kernel``; attributes as in `Blocks`."""

    flow: FlowSpec
    stage: PlacedStage
    last_scale: float | Float[Array, ""] = 1.0
    constrained: bool = True
    sharp: bool = False
    fitted: bool = True

    @nn.compact
    def __call__(self, x: Float[Array, "b ..."], context: Float[Array, "b k"] | None = None) -> Float[Array, "b ..."]:
        """The stage's output for what the stage before hands on, see `Blocks`."""
        x = chain(self.stage.reshapes).forward(x)
        settings = (self.last_scale, self.constrained, self.sharp, self.fitted)
        return Blocks(self.flow, self.stage, *settings, name="blocks")(x, context)


class ResidualFlow(nn.Module):
    """A multi-scale residual flow with a normal prior whose means and scales are learned.

    ``init(key, x)`` or ``init(key, x, context)`` fits ActNorm to ``x`` and runs the power iterations to convergence:

        >>> variables = ResidualFlow(spec).init(key, x)
        >>> weights = freeze(spec, variables["params"])

    Attributes:
        spec: The architecture.
        last_scale: Initial factor on a branch's last layer.
        sharp: Whether activations start sharper, see `BranchSpec.initial_weights`.
        fitted: Whether ``init`` converges power iterates and fits ActNorm; False creates variables of the same shapes.
    """

    spec: FlowSpec
    last_scale: float | Float[Array, ""] = 1.0
    sharp: bool = False
    fitted: bool = True

    @nn.compact
    def __call__(self, x: Float[Array, "b ..."], context: Float[Array, "b k"] | None = None) -> Float[Array, "b d"]:
        """The latents of ``x``. Under ``init``, which needs a representative batch, creates all variables on the way."""
        if not self.is_initializing():
            weights = constrain(self.spec, self.variables["params"], self.variables.get("spectral", {})).weights
            return flow_bijection(self.spec, weights, context=context).forward(x)
        latents = []
        for stage in self.spec.layout:
            made = StageModule(self.spec, stage, self.last_scale, sharp=self.sharp, fitted=self.fitted, name=stage.name)
            x = made(x, context)
            if stage.spec.factor_out:
                x, latent = reshape.split_channels(x)
                latents.append(reshape.flatten(latent))
        self.param("prior", lambda key: Gaussian.standard(self.spec.num_dims))
        return jnp.concatenate([*latents, reshape.flatten(x)], axis=-1)


class Classifier(nn.Module):
    """A residual network, invertible if it is constrained, with the head of `head`.

    ``init(key, x)`` fits ActNorm and the head's statistics to ``x``, inputs of the network.

        >>> variables = Classifier(spec).init(key, x)
        >>> logits = Classifier(spec).apply(variables, x)

    Attributes:
        spec: The architecture.
        last_scale: Initial factor on a branch's last layer.
        fitted: Whether ``init`` converges power iterates and fits ActNorm; False creates variables of the same shapes.
    """

    spec: ClassifierSpec
    last_scale: float | Float[Array, ""] = 1.0
    fitted: bool = True

    @nn.compact
    def __call__(self, x: Float[Array, "b ..."]) -> Float[Array, "b k"]:
        """The logits of inputs of the network, by running averages."""
        if not self.is_initializing():
            params, statistics = self.variables["params"], self.variables["batch_stats"]
            scale = constrain if self.spec.constrained else unconstrained
            weights = scale(self.spec.flow, params, self.variables.get("spectral", {})).weights
            return ClassifierModel(self.spec, weights, params["head"], statistics).logits_of_input(x)
        for stage in self.spec.flow.layout:
            has_norms, flow = self.spec.constrained, self.spec.flow
            x = StageModule(flow, stage, self.last_scale, has_norms, fitted=self.fitted, name=stage.name)(x)
        head = self.param("head", lambda key: initial_head(key, x.shape[-1], self.spec.num_classes))
        statistics = self.variable("batch_stats", "head", lambda: batch_statistics(x))
        return apply_head(head, statistics.value, x)
