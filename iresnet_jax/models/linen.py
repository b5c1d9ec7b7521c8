"""Flax modules of the networks, for Flax's users: the only file that imports Linen.

A module holds no mathematics: it gives names to the arrays that the pure functions of `free`
make and those of `flow` take, stacked over the blocks of a stage. Collections: "params", trained;
"spectral", the power iterates; "batch_stats", running averages of a classifier's BatchNorm.
"""

from flax import linen as nn
from jaxtyping import Array, Float

from iresnet_jax.bijections import reshape
from iresnet_jax.models.architecture import FlowSpec
from iresnet_jax.models.classifier import Classifier as ClassifierModel
from iresnet_jax.models.classifier import ClassifierSpec, apply_head
from iresnet_jax.models.contractions import constrain, unconstrained
from iresnet_jax.models.flow import flow_bijection
from iresnet_jax.models.free import ConstraintConfig, fresh
from iresnet_jax.models.priors import Gaussian


class ResidualFlow(nn.Module):
    """A multi-scale residual flow with a normal prior whose means and scales are learned.

    ``init(key, x)`` or ``init(key, x, context)`` fits ActNorm to ``x`` and runs the power
    iterations to convergence:

        >>> variables = ResidualFlow(spec).init(key, x)
        >>> weights = freeze(spec, variables["params"])

    Attributes:
        spec: The architecture.
        last_scale: Initial factor on a branch's last layer.
        sharpness: How sharp activations start, see `FlowSpec.initial_params`.
    """

    spec: FlowSpec
    last_scale: float = 1.0
    sharpness: float = 0.0

    @nn.compact
    def __call__(
        self, x: Float[Array, "b ..."], context: Float[Array, "b k"] | None = None
    ) -> Float[Array, "b d"]:
        """The latents of ``x``. Under ``init``, which needs a representative batch, creates all
        variables on the way.
        """
        if self.is_initializing():
            self.param("prior", lambda key: Gaussian.standard(self.spec.num_dims))
            return _create(self, self.spec, x, context, sharpness=self.sharpness)
        weights = constrain(
            self.spec, self.variables["params"], self.variables.get("spectral", {})
        ).weights
        return flow_bijection(self.spec, weights, context=context).forward(x)


class Classifier(nn.Module):
    """A residual network, invertible if it is constrained, with its head.

    ``init(key, x)`` fits ActNorm and the head's statistics to ``x``, inputs of the network.

        >>> variables = Classifier(spec).init(key, x)
        >>> logits = Classifier(spec).apply(variables, x)

    Attributes:
        spec: The architecture.
        last_scale: Initial factor on a branch's last layer.
    """

    spec: ClassifierSpec
    last_scale: float = 1.0

    @nn.compact
    def __call__(self, x: Float[Array, "b ..."]) -> Float[Array, "b k"]:
        """The logits of inputs of the network, by running averages."""
        flow, is_constrained = self.spec.flow, self.spec.constrained
        if self.is_initializing():
            z = _create(self, flow, x, is_constrained=is_constrained)
            features = reshape.unflatten(z, self.spec.feature_shape)
            head = self.param("head", lambda key: self.spec.initial_arrays(key)["head"])
            statistics = self.spec.statistics_of(features)
            for name, own in statistics.items():
                self.variable("batch_stats", name, lambda own=own: own)
            return apply_head(head, statistics, features)
        params, statistics = self.variables["params"], self.variables.get("batch_stats", {})
        scale = constrain if is_constrained else unconstrained
        weights = scale(flow, params, self.variables.get("spectral", {})).weights
        return ClassifierModel(self.spec, weights, params["head"], statistics).logits_of_input(x)


def _create(
    module: ResidualFlow | Classifier,
    spec: FlowSpec,
    x: Float[Array, "b ..."],
    context: Float[Array, "b k"] | None = None,
    *,
    sharpness: float = 0.0,
    is_constrained: bool = True,
) -> Float[Array, "b d"]:
    """Creates a flow's variables in a module, named ``stage0/blocks/conv0/kernel`` and so on.
    Returns the latents of ``x``.
    """
    constraint = ConstraintConfig() if is_constrained else ConstraintConfig(norms="none")
    params, found, z = fresh(
        spec, module.make_rng("params"), x, context, constraint, sharpness, module.last_scale
    )
    for name, stage in params.items():
        module.param(name, lambda key, stage=stage: stage)
    for name, stage in found.spectral.items() if is_constrained else ():
        module.variable("spectral", name, lambda stage=stage: stage)
    return z
