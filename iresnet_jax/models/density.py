r"""A density model as a value: data through preprocessing and a residual flow into a simple prior.

    log p(x) = log p_Z(F(t(u))) + log|det dF| + log|det dt| + log|det du/dx|            (Behrmann et
    al. 2019, eq. 3)

``u`` is the data made continuous (integer levels with noise, in [0, 1), uniform or made by a flow,
see `noise`) and ``t`` maps it to where the flow ``F`` starts.

With a prior for every class the model is one of data and labels, which classifies by Bayes' rule
(Izmailov et al. 2020):

    p_Z(z) = sum_y p(y) p_Z(z | y),    p(y | x) = p(y) p_Z(F(t(u)) | y) / p_Z(F(t(u)))

as the determinants are the same for all classes.
"""

import dataclasses
import functools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Key, Num, Shaped

from iresnet_jax.arguments import Count, NotNegative, checked
from iresnet_jax.bijections.bijection import (
    Bijection,
    add_logdet_info,
    fold_in,
    follow_inverse_info,
)
from iresnet_jax.bijections.chain import Chain
from iresnet_jax.bijections.logit import Logit
from iresnet_jax.bijections.standardize import Standardize
from iresnet_jax.maths.fixed_point import FixedPointInfo
from iresnet_jax.maths.keys import keys_of_examples, typed_key
from iresnet_jax.maths.lipschitz_bounds import model_bounds
from iresnet_jax.maths.logdet_estimator import LogdetEstimator, LogdetInfo
from iresnet_jax.maths.logdet_exact import ExactLogdet
from iresnet_jax.maths.platforms import fast_compile
from iresnet_jax.models import contexts, priors
from iresnet_jax.models import noise as noises
from iresnet_jax.models.architecture import FlowSpec, NoiseSpec, StageSpec
from iresnet_jax.models.certificate import Certificate, certificate_of
from iresnet_jax.models.columns import Frame, table_of
from iresnet_jax.models.contexts import Contexts, Network
from iresnet_jax.models.contractions import under_context
from iresnet_jax.models.density_spec import (
    DensitySpec,
    Transform,
    check_told_apart,
    examples,
)
from iresnet_jax.models.flow import FlowBounds, FlowWeights, as_params, bounded
from iresnet_jax.models.free import initial
from iresnet_jax.models.model import DecodeInfo, History, How, Model

# folded into the key of probes for the flow of noise; stages of the other flow fold in their
# numbers
OF_NOISE = 2**16

Data = Shaped[Array, "..."] | Shaped[np.ndarray, "..."] | Frame
Keys = Key[Array, "..."]
Labels = Shaped[Array, " m"] | Shaped[np.ndarray, " m"]


class LogProb(NamedTuple):
    """A log-likelihood and its terms, in nats, one per example.

    Attributes:
        log_prob: Sum of all terms.
        log_prior: Log-density of the latents.
        log_det: Log-determinant of the flow.
        log_det_transform: Log-determinant of the preprocessing, with the cells of integer levels,
            and ``-log q`` of their noise if that is not uniform.
        info: Error of the log-determinants of the flow and of that of noise.
        log_prior_by_class: ``log p(y) + log p_Z(z | y)`` for every class; None without classes.
    """

    log_prob: Float[Array, "..."]
    log_prior: Float[Array, "..."]
    log_det: Float[Array, "..."]
    log_det_transform: Float[Array, "..."]
    info: LogdetInfo
    log_prior_by_class: Float[Array, "... k"] | None = None


class Samples(NamedTuple):
    """Samples with their log-densities.

    Attributes:
        x: The samples.
        log_prob: Log-density of each, in nats.
        info: How the inverse ended, see `Density.decode`.
        logdet_info: Error of the log-determinant in ``log_prob``.
    """

    x: Float[Array, "n ..."]
    log_prob: Float[Array, " n"]
    info: FixedPointInfo
    logdet_info: LogdetInfo


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["spec", "weights", "prior", "how", "network", "noise_network"],
    meta_fields=[],
    drop_fields=["history"],
)
@dataclass(frozen=True, eq=False, repr=False)
class Density(Model, spec=DensitySpec):
    """A density with its weights, and how to run it. A pytree: ``jit``, ``vmap`` and ``grad`` take
    it as an argument.

    Methods take and give data as the data set has them: integer levels for models of images, floats
    for continuous data. The density of an image model on [0, 1) itself is `continuous`.

    `log_prob`, `terms`, `class_log_probs`, `encode` and `decode` take one example, a batch or any
    leading axes, which their results have too. The axes of contexts broadcast against those of
    examples, so that one context serves a whole batch. There is one key, or there are keys of the
    result's leading axes. Other methods take batches.

    Attributes:
        spec: All that defines the model but its weights.
        weights: Constrained weights of the flow, as `contractions.freeze` or
            `contractions.constrain` give them.
        prior: Density of the latents, see `priors`.
        how: How it runs: log-determinant and inverse of the blocks.
        history: What the training of a fitted model saw; programs and ``tree.map`` drop it.
        network: Weights of the network on contexts, see `contexts.apply_network`; empty without
            one.
        noise_network: Weights of the network that noise depends on, see `noise.features`; empty if
            it is uniform.
    """

    arrays: ClassVar[tuple[str, ...]] = ("prior", "network", "noise_network")

    spec: DensitySpec
    weights: FlowWeights
    prior: Any
    how: How = How(ExactLogdet())
    history: History | None = None
    network: Network = field(default_factory=dict)
    noise_network: Network = field(default_factory=dict)

    @classmethod
    def init(
        cls,
        key: Key[Array, ""],
        x: Data,
        *,
        stages: Sequence[StageSpec],
        coeff: float = 0.97,
        budget: str = "layer",
        constants: tuple[float, float] | None = None,
        sharpness: float = 1.0,
        last_scale: float = 1.0,
        prior: Any = "gaussian",
        num_components: int | None = None,
        num_classes: int | None = None,
        num_levels: int | None = None,
        transform: Transform | None = None,
        context: Contexts | None = None,
        context_hidden: tuple[int, ...] = (),
        labels: Labels | None = None,
        noise: NoiseSpec | None = None,
        estimator: LogdetEstimator | None = None,
    ) -> "Density":
        """A density with random weights, ActNorm and preprocessing fitted to examples: certified,
        and ready to train.

        Args:
            key: Source of the weights.
            x: Examples as the model will see them, some hundred or more: vectors, or images with
                channels last. For a model that is trained without data, draws from a rough guess.
            stages: Stages of the flow, from the data to the latents.
            coeff: See `FlowSpec`, also for ``budget``.
            constants: Least and largest stretch ``(mu, nu)`` of the flow, which take the place of
                ``coeff`` and ``budget``, see `FlowSpec.bilipschitz`; None prescribes none.
            sharpness: How sharp activations of the Swish family start, see
                `FeedforwardSpec.initial_weights`: sharper ones learn sooner what is narrow.
            last_scale: Initial factor on the last layer of each branch; a small one starts near the
                identity.
            prior: A prior, see `iresnet_jax.models.priors`, or the name of a family: "gaussian" and
                "logistic" start standard; "mixture", "scales" and "marginals" have components, and
                are fitted to the examples.
            num_components: Components of a family that has them; 16 are many scales.
            num_classes: Classes, if each has a prior of its own.
            num_levels: Integer levels of images of integers, 256 by default.
            transform: Preprocessing; by default `Standardize` of floats and of vectors, and `Logit`
                of images of integers.
            context: Contexts of the examples, of a conditional density.
            context_hidden: Widths of a network on them, see `DensitySpec`.
            labels: Classes of the examples, to which the priors of classes behind whitening are
                fitted.
            noise: Variational dequantisation of integer levels, which starts uniform; uniform by
                default.
            estimator: Log-determinant of the blocks; exact by default, which takes time and memory
                of images.

        Example:
            >>> stages = [StageSpec(6, (64,), activation="clipswish")]
            >>> model = Density.init(jax.random.key(0), x[:256], stages=stages)
        """
        x, num_levels = examples(x, num_levels)
        if context is not None:
            context = contexts.for_examples(context, len(x))
            check_told_apart(context, jnp.result_type(float), "entry {} of context".format)
        if transform is None:
            transform = Standardize.fit(x) if num_levels is None else Logit()
        given = None if isinstance(prior, str) else prior
        family = prior if given is None else priors.family_of(given)
        if given is not None:
            num_components = given.num_components if family in priors.MIXTURES else None
        width = 0 if context is None else (*context.shape[1:], *context_hidden)[-1]
        if constants is None:
            flow = FlowSpec(x.shape[1:], tuple(stages), coeff, budget, width)
        else:
            mu, nu = constants
            flow = FlowSpec.bilipschitz(x.shape[1:], stages, mu=mu, nu=nu, context_dim=width)
        spec = DensitySpec(
            dataclasses.replace(flow, noise=noise),
            prior_family=family,
            transform=transform,
            num_levels=num_levels,
            num_classes=num_classes,
            context=None if context is None else Standardize.fit_contexts(context),
            num_components=num_components,
            context_hidden=tuple(context_hidden),
        )
        spec.checked(x)
        free = initial(
            spec,
            key,
            x,
            context=context,
            labels=labels,
            prior=given,
            sharpness=checked(NotNegative, sharpness, "sharpness"),
            last_scale=checked(NotNegative, last_scale, "last_scale"),
        )
        model = free.certified().with_(estimator=estimator or ExactLogdet())
        latents = jax.ShapeDtypeStruct((len(x), flow.num_dims), jnp.float32)
        jax.eval_shape(model.log_prior, latents)  # raises for a prior of other vectors
        return model

    @property
    def learned(self) -> dict[str, Any]:
        """The fields in `arrays`; a prior of one's own without its constants."""
        return {**super().learned, "prior": priors.trainable(self.prior)}

    @property
    def continuous(self) -> "Density":
        """The density of the dequantised data: of points of [0, 1) instead of integer levels, of
        the line instead of cells.
        """
        spec = dataclasses.replace(
            self.spec,
            flow=dataclasses.replace(self.spec.flow, noise=None),
            num_levels=None,
            cells=None,
        )
        own = {stage.name: self.weights[stage.name] for stage in spec.flow.layout}
        return self.with_(spec=spec, weights=own, noise_network={})

    def given(self, context: Contexts) -> "Density":
        """The density ``x -> p(x | context)`` of a conditional model as a model that takes no
        contexts.

        It is the same function: the shift of a layer by the context is added to its bias. Branches
        of one's own have none.
        """
        dim = self.spec.context_dim
        vector = contexts.as_vectors(self.spec.context_numbers(context), dim)
        scaled: Any = self.scale_context(vector if vector.shape == (1, dim) else vector[None])
        weights = under_context(self.spec.flow, self.weights, scaled[0])
        flow = dataclasses.replace(self.spec.flow, context_dim=0)
        spec = dataclasses.replace(
            self.spec, flow=flow, context=None, context_columns=None, context_hidden=()
        )
        return self.with_(spec=spec, weights=weights, network={})

    # ----------------------------------------------------------------------------------- likelihood

    def log_prob(
        self, x: Data, key: Keys | None = None, *, context: Contexts | None = None
    ) -> Float[Array, "..."]:
        """Log-likelihood in nats, one per example; of integer levels a lower bound for one draw of
        noise, see `terms`.

        Args:
            x: Data.
            key: Source of noise and probes; by default each example's own bits, so that its result
                depends on nothing else.
            context: Contexts of a conditional model: the result is ``log p(x | context)``.
        """
        examples = self._examples(x, context)
        return examples.restore(_log_prob(self, examples.x, examples.context, examples.keys(key)))

    def terms(
        self,
        x: Data,
        key_noise: Keys,
        key_probe: Keys,
        *,
        context: Contexts | None = None,
        bounds: FlowBounds | None = None,
    ) -> LogProb:
        """The log-likelihood with all its terms, by keys of the noise of integer levels and of
        the estimator's probes.

        Truncation bounds rely on ``bounds``, see `Model.bounds`.
        """
        examples, bounds = self._examples(x, context), self._own(bounds)
        keys = examples.keys(key_noise), examples.keys(key_probe)
        return examples.restore(_terms(self, examples.x, examples.context, *keys, bounds))

    def log_prior(
        self, z: Float[Array, "n d"], labels: Shaped[Array, " n"] | None = None
    ) -> Float[Array, " n"]:
        """Log-density of latents, given their classes if there are labels."""
        found = jnp.asarray(
            self.prior.log_prob(z) if labels is None else self.prior.log_prob(z, labels)
        )
        if found.shape != z.shape[:1]:
            raise ValueError(
                f"log_prob of the prior must give one number for each of {len(z)} latents of "
                f"{z.shape[1]} dimensions, got "
                f"shape {found.shape}: it is the density of whole vectors, with an event of one "
                "axis"
            )
        return found.astype(z.dtype)

    def logits(
        self, x: Data, key: Keys | None = None, *, context: Contexts | None = None
    ) -> Float[Array, "... k"]:
        """``log p(y) + log p_Z(z | y)`` for every class ``y``: one pass through the flow, no
        determinants. Arguments are those of `encode`.
        """
        z = self.encode(x, key, context=context)
        by_class = self.prior.log_prob_by_class(z.reshape(-1, z.shape[-1]))
        return by_class.reshape(*z.shape[:-1], by_class.shape[1])

    # ------------------------------------------------------------------------------------- samples

    def sample(
        self,
        key: Key[Array, ""],
        num: int,
        *,
        temperature: float = 1.0,
        context: Contexts | None = None,
        labels: Labels | None = None,
        bounds: FlowBounds | None = None,
    ) -> tuple[Num[Array, "n ..."], DecodeInfo]:
        """Samples: latents from the prior through the inverse, and how that ended, see `decode`.

        Args:
            key: Source of the latents.
            num: Number of samples, at least 1.
            temperature: Factor on the prior's scale, at least 0; 1 samples the model.
            context: One context for all samples, or one for each.
            labels: Class of each sample, where classes have priors; drawn from ``p(y)`` by default.
                Classes that do not exist give an inverse that did not converge.
            bounds: See `Model.bounds`.
        """
        z = self.sample_latents(key, num, temperature=temperature, labels=labels)
        return self.decode(z, context=context, bounds=bounds)

    def sample_and_log_prob(
        self,
        key: Key[Array, ""],
        num: int,
        *,
        context: Contexts | None = None,
        labels: Labels | None = None,
        bounds: FlowBounds | None = None,
    ) -> Samples:
        """The samples that `sample` draws from the same key, and their log-densities, by one pass
        through the inverse.

        Both are differentiable functions of weights, prior and context, by the implicit function
        theorem, as variational objectives and importance weights need. With labels the log-density
        is ``log p(x | label)``. Arguments are those of `sample`.
        """
        self.spec.check_continuous()
        if labels is not None:
            labels = self.prior.checked_labels(labels, num)
        latents = self._latents(self.sample_latents(key, num, labels=labels), context)
        # latents are drawn from the key itself, or from its first two parts
        key_probe = jax.random.fold_in(typed_key(key), 2)
        bounds = self._own(bounds)
        return latents.restore(
            _decode_and_log_prob(self, latents.x, latents.context, labels, key_probe, bounds)
        )

    def sample_latents(
        self,
        key: Key[Array, ""],
        num: int,
        *,
        temperature: float = 1.0,
        labels: Labels | None = None,
    ) -> Float[Array, "n d"]:
        """Latents from the prior; arguments are those of `sample`."""
        num, key = checked(Count, num, "num"), typed_key(key)
        options: dict[str, Any] = {"temperature": checked(NotNegative, temperature, "temperature")}
        if self.spec.prior_family == priors.OWN and temperature == 1:
            options = {}  # those of one's own have none
        if labels is not None:
            options["labels"] = self.prior.checked_labels(labels, num)
        return _sample(self.prior, key, num, options)

    # ------------------------------------------------------------------------------------ its parts

    def scale_context(self, context: Contexts | None) -> Float[Array, "b ..."] | None:
        """Contexts as the flow takes them, see `DensitySpec.scale_context`."""
        return self.spec.scale_context(context, self.network)

    def preprocess(self, x: Data, key: Keys | None = None) -> Float[Array, "b ..."]:
        """The flow's input for data: noise from the key, or none."""
        return self.spec.to_flow.forward(self.dequantize(x, key))

    def to_data(
        self, x: Float[Array, "b ..."], info: FixedPointInfo
    ) -> tuple[Num[Array, "b ..."], DecodeInfo]:
        """Data of inputs of the flow that its inverse found, and `info` of that in their units."""
        to_flow = self.spec.to_flow
        u, own = to_flow.inverse(x)
        whole = follow_inverse_info(info, own, to_flow.inverse_lipschitz)
        return self.spec.rounded(u), DecodeInfo(*whole[:4], x, info.error_bound, u)

    def dequantize(self, x: Data, key: Keys | None = None) -> Float[Array, "b ..."]:
        """Continuous data: levels as points of [0, 1) with noise from the key, or in the middle
        of their cells without one.
        """
        if key is not None:
            return self.dequantize_and_logdet(x, key, key)[0]
        return self.promoted(self.spec.dequantizer.forward(self.spec.checked(x)))

    def dequantize_and_logdet(
        self, x: Data, key_noise: Keys, key_probe: Keys, bounds: FlowBounds | None = None
    ) -> tuple[Float[Array, "b ..."], Float[Array, " b"], LogdetInfo]:
        """`dequantize`, what it adds to the log-likelihood, and the error of that: of levels
        ``-log q - d log(num_levels)``.
        """
        x, levels = self.spec.checked(x), self.spec.num_levels
        if self.spec.flow.noise is not None and levels is not None:
            dtype = jnp.result_type(*jax.tree.leaves(as_params(self.weights)))
            key_probe = fold_in(typed_key(key_probe), OF_NOISE)
            return noises.place_and_logdet(
                self.noise_flow(x, bounds), x, key_noise, key_probe, levels, dtype
            )
        u, log_det, info = self.spec.dequantizer.forward_and_logdet(x, key_noise)
        return self.promoted(u), log_det, info

    def noise_flow(self, x: Data, bounds: FlowBounds | None = None) -> Bijection:
        """The flow from logistic numbers to the logits of the noise of these levels, see
        `iresnet_jax.models.noise`; of a model whose noise is not uniform.
        """
        flow, levels = self.spec.flow.noise_flow, self.spec.num_levels
        assert flow is not None
        assert levels is not None
        features = noises.features(self.spec.flow, self.noise_network, self.spec.checked(x), levels)
        weights = noises.weights_of(bounded(self.weights, bounds))
        return self.flow_of(flow, weights, features)

    def noise_certificate(self) -> Certificate | None:
        """The `certificate` of the flow of noise, of a map from logistic numbers to logits; None
        if noise is uniform.
        """
        flow = self.spec.flow.noise_flow
        if flow is None:
            return None
        weights, bounds = noises.weights_of(self.weights), noises.weights_of(self.bounds())
        return certificate_of(flow, weights, bounds, model_bounds([]))

    def to_frame(self, x: Data) -> Any:
        """Samples, or other arrays of data, as a pandas data frame with the columns and types that
        the model was fitted to.
        """
        if self.spec.columns is None:
            raise ValueError("this model was not fitted to a data frame: its samples are arrays")
        return table_of(np.asarray(x), self.spec.columns)


# One program each: outside of ``jit``, every operation would be one of its own, and every loop one
# at every call.


@fast_compile
def _log_prob(model: Density, x: Array, context: Any, key: Keys | None) -> Float[Array, " b"]:
    key = keys_of_examples(x) if key is None else key
    key_noise, key_probe = (
        jax.random.split(key)
        if key.ndim == 0
        else jnp.moveaxis(jax.vmap(jax.random.split)(key), 0, 1)
    )
    return _terms(model, x, context, key_noise, key_probe).log_prob


@fast_compile
def _terms(
    model: Density, x: Array, context: Any, key_noise: Keys, key_probe: Keys, bounds: Any = None
) -> LogProb:
    u, log_det_cells, info_of_noise = model.dequantize_and_logdet(x, key_noise, key_probe, bounds)
    y, log_det_transform, _ = model.spec.to_flow.forward_and_logdet(u)
    z, log_det, info = model.flow(context, bounds=bounds).forward_and_logdet(y, key_probe)
    by_class = None if model.spec.num_classes is None else model.prior.log_prob_by_class(z)
    log_prior = model.log_prior(z) if by_class is None else jax.nn.logsumexp(by_class, axis=1)
    log_det_transform += log_det_cells
    info = add_logdet_info(info, info_of_noise)
    return LogProb(
        log_prior + log_det + log_det_transform,
        log_prior,
        log_det,
        log_det_transform,
        info,
        by_class,
    )


@fast_compile
def _decode_and_log_prob(
    model: Density, z: Array, context: Any, labels: Any, key_probe: Keys, bounds: Any
) -> Samples:
    whole = Chain([model.spec.to_flow, model.flow(context, bounds=bounds)])
    x, log_det, logdet_info, info = whole.inverse_and_logdet(z, key_probe)
    return Samples(x, model.log_prior(z, labels) - log_det, info, logdet_info)


@functools.partial(fast_compile, static_argnums=(2,))
def _sample(prior: Any, key: Key[Array, ""], num: int, options: Any) -> Array:
    return jnp.asarray(prior.sample(key, (num,), **options))
