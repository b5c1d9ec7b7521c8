"""The likelihood objective: the loss of a batch, and the likelihood of held-out data."""

import dataclasses
import logging
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key

from iresnet_jax.bijections.bounded import Bounded
from iresnet_jax.bijections.standardize import Identity, Standardize, Whiten
from iresnet_jax.maths.logdet_config import LogdetConfig
from iresnet_jax.maths.logdet_estimator import LogdetEstimator
from iresnet_jax.maths.platforms import fast_compile
from iresnet_jax.models import preprocessing
from iresnet_jax.models.density import Density
from iresnet_jax.models.density_spec import DensitySpec
from iresnet_jax.models.head import cross_entropy
from iresnet_jax.training import parallel
from iresnet_jax.training.classification import classify
from iresnet_jax.training.constraint import ConstraintConfig, validated_model
from iresnet_jax.training.step import Loss, StepKeys, TrainState, ValidationResult

# of what is trained, in bits/dim or nats; beyond it training raises its number of terms
TOLERATED_BIAS = 0.002
REFERENCE_TERMS = 60  # of the series: at an eigenvalue of -.9 they leave .0002 of -2.3
SIGNIFICANT = 3.0  # standard errors by which a bias must differ from 0 to count
ALARMING_BIAS = 0.01  # beyond it a warning is logged
MORE_TERMS = 1.5  # factor on the number of terms
WARNING = (
    "on validation data the log-determinant of training reads %s lower by %.3f than one that is "
    "not cut off: training "
    "exploited what its %d terms cut off; start with a larger logdet.num_terms, lower model.coeff "
    "or use logdet.kind = roulette"
)
_logger = logging.getLogger(__name__)


def make_loss(
    draw: Callable[[Any, Any], Any] | None = None,
    *,
    noise: float = 0.0,
    transform: Callable[..., Any] | None = None,
) -> Callable[[Density, Any, StepKeys], Loss]:
    """The loss ``(model, (examples, contexts), keys) -> Loss``: the negative log-likelihood in the
    model's unit.

    A random series length is one of the step, so blocks and devices share it.

    Args:
        draw: Sampler ``(key, placeholder) -> (example, context)`` of endless data; None takes those
            of the batch.
        noise: Standard deviation of noise on entries, in units of their `noise_scales`.
        transform: ``(keys, examples) -> (changed examples, contexts)``, a random change that the
            model is told of by contexts, such as `augment.transformed`; None leaves examples and
            contexts as they are.
    """

    def loss(model: Density, batch: Any, keys: StepKeys) -> Loss:
        key_draw, key_dequantise, key_probe = jnp.moveaxis(
            jax.vmap(lambda key: jax.random.split(key, 3))(keys.examples), 1, 0
        )
        x, context = batch if draw is None else jax.vmap(draw)(key_draw, batch)
        if transform is not None:
            x, context = transform(key_draw, x)
        if noise:
            drawn = jax.vmap(lambda key: jax.random.normal(key, x.shape[1:]))(key_draw)
            x = _moved(model, x, noise * noise_scales(model.spec)[None] * drawn, key_probe)
        model = model.with_(estimator=model.estimator.fix_length(keys.shared))
        terms = model.terms(x, key_dequantise, key_probe, context=context)
        value = jnp.mean(model.spec.in_units(terms.log_prob))
        means = {"log_prior": jnp.mean(terms.log_prior), "log_det": jnp.mean(terms.log_det)}
        return Loss(value, {model.spec.metric: value, **means})

    return loss


def _moved(model: Density, x: Any, noise: Any, key: Key[Array, " b"]) -> Array:
    """Examples with noise on the real line, so that entries stay within bounds, and values that
    own cells are some again.
    """
    transform, u = model.spec.transform, model.dequantize(x, key)
    if not isinstance(transform, Bounded):
        return preprocessing.rounded(model.spec, u + noise)
    line, _ = transform.to_line(u)
    return preprocessing.rounded(model.spec, transform.from_line(line + noise)[0])


def noise_scales(spec: DensitySpec) -> Float[Array, " d"]:
    """Standard deviations of entries, which noise of size 1 has: 1 without preprocessing.

    Those of entries within bounds or with heavy tails are in the units of the real line, see
    `Bounded.to_line`.

    Training on few examples with noise is training on a kernel density of them (Rothfuss et al.
    2019, sec. 4): it keeps the flow from enclosing each one by itself.

    Args:
        spec: The model.

    Raises:
        ValueError: If the data are not vectors whose scale the model knows.
    """
    transform = spec.transform.then if isinstance(spec.transform, Bounded) else spec.transform
    if (
        not isinstance(transform, Identity | Standardize | Whiten)
        or len(spec.flow.event_shape) != 1
    ):
        raise ValueError(
            "config.augmentation.noise is for continuous vectors with preprocessing.transform "
            "standardize, whiten or none, got "
            f"{type(transform).__name__} of examples of shape {spec.flow.event_shape}"
        )
    scales = (
        np.ones(spec.flow.event_shape)
        if isinstance(transform, Identity)
        else transform.entry_scales()
    )
    return jnp.asarray(scales, jnp.float32)


@dataclass(frozen=True)
class Validation:
    """Mean objective of held-out data under the averaged parameters, norms iterated to their
    tolerance.

    Training may learn to widen the gap between a log-determinant that is cut off and the true one,
    and nothing else shows it before the loss on held-out data rises. ``training_bias`` shows it:
    the objective by the log-determinant of training less the objective by `REFERENCE_TERMS` terms
    of the series, on one batch with the same noise and probes. While it is below `-TOLERATED_BIAS`,
    training goes on with more terms.

    Attributes:
        spec: The model.
        examples: Held-out examples.
        contexts: Their contexts, of a conditional density.
        labels: Their classes, which the objective "hybrid" measures accuracy and cross-entropy
            with; None of other objectives.
        constraint: How blocks are constrained.
        estimator: Log-determinant of the validation.
        logdet: Log-determinant of training.
        max_num_terms: Most terms that training may go on with.
        batch_size: Most examples at once.
        seed: Seed of the run.
        given: Context that the model is given, after which it takes none; None leaves it as it is.
        label_smoothing: Smoothing of the labels in the cross-entropy, as in training.
    """

    spec: DensitySpec
    examples: np.ndarray
    contexts: np.ndarray | None
    labels: np.ndarray | None
    constraint: ConstraintConfig
    estimator: LogdetEstimator
    logdet: LogdetConfig
    max_num_terms: int
    batch_size: int
    seed: int
    given: np.ndarray | None = None
    label_smoothing: float = 0.0

    def __call__(self, state: TrainState) -> ValidationResult:
        """The mean of every term, and the terms of the log-determinant that training goes on
        with.
        """
        return self.measure(state, self.model(state))

    def model(self, state: TrainState) -> Density:
        """The model of the averaged parameters."""
        template = Density(self.spec, {}, {}, estimator=self.estimator)
        return validated_model(
            template, self.constraint, state.ema, state.spectral, given=self.given
        )

    def measure(self, state: TrainState, model: Density) -> ValidationResult:
        """Result of `__call__`, under the `model` of a training state."""
        outputs = self._outputs(model)
        means = {name: float(np.mean(values, dtype=np.float64)) for name, values in outputs.items()}
        losses = outputs[model.spec.metric]
        if self.labels is not None:
            logits = classify(model, self.examples, self.labels, self.batch_size)["logits"]
            entropy = cross_entropy(
                jnp.asarray(logits), jnp.asarray(self.labels), label_smoothing=self.label_smoothing
            )
            means |= {
                "accuracy": float(np.mean(logits.argmax(axis=1) == self.labels)),
                "cross_entropy": float(entropy.mean()),
            }
            losses = np.asarray(entropy)
        num_terms = int(state.num_terms)
        if self.logdet.build().unbiased:
            return ValidationResult(means, num_terms, losses)
        bias, is_exploited = self._bias(model, num_terms)
        if bias < -ALARMING_BIAS:
            _logger.warning(WARNING, model.spec.metric, -bias, num_terms)
        if int(state.step) < int(state.horizon):
            while is_exploited and num_terms < self.max_num_terms:
                num_terms = min(math.ceil(MORE_TERMS * num_terms), self.max_num_terms)
                _, is_exploited = self._bias(model, num_terms)
            if num_terms > int(state.num_terms):
                _logger.info(
                    "training goes on with %d terms of the log-determinant: it exploits "
                    "what fewer cut off",
                    num_terms,
                )
        return ValidationResult(
            {**means, "training_bias": bias, "num_terms": num_terms}, num_terms, losses
        )

    def _bias(self, model: Density, num_terms: int) -> tuple[float, bool]:
        """Objective by so many terms less the one by many, and whether it is lower by more than
        is tolerated.
        """
        without_cut = dataclasses.replace(self.logdet, kind="series").build(REFERENCE_TERMS)
        cut, reference = (
            self._outputs(model.with_(estimator=estimator), self.batch_size)[
                model.spec.metric
            ].astype(np.float64)
            for estimator in (self.logdet.build(num_terms), without_cut)
        )
        differences = cut - reference
        bias, stderr = (
            float(differences.mean()),
            float(differences.std() / math.sqrt(len(differences))),
        )
        return bias, bias < -max(TOLERATED_BIAS, SIGNIFICANT * stderr)

    def _outputs(self, model: Density, num: int | None = None) -> dict[str, np.ndarray]:
        """Objective and terms of held-out examples: of all, or of so many, spread over all as
        they are in files' order.
        """
        rows = (
            slice(None)
            if num is None
            else np.unique(np.linspace(0, len(self.examples) - 1, num, dtype=int))
        )
        contexts = None if self.contexts is None else self.contexts[rows]
        key = jax.random.key(self.seed)
        outputs = evaluate_examples(
            model, self.examples[rows], key, self.batch_size, contexts=contexts
        )
        del outputs["truncation_bound"]
        return outputs


def evaluate_examples(
    model: Density,
    examples: np.ndarray,
    key: jax.Array,
    batch_size: int,
    *,
    contexts: np.ndarray | None = None,
    draw: tuple[int, int] = (0, 0),
    same_probes: bool = False,
) -> dict[str, np.ndarray]:
    """Objective, terms and truncation bound of all examples, by all devices.

    Args:
        model: The density.
        examples: The examples.
        key: Source of randomness; the random numbers of an example depend on the key, its place and
            the draw, not on batches.
        batch_size: Most examples at once, see `parallel.over_batches`.
        contexts: Context of each example, of a conditional density.
        draw: Number of the noise draw, and of the probe draw within it.
        same_probes: Whether all noise draws have the probes of the first one.
    """

    def batch_of(indices):
        key_noise, key_probe = evaluation_keys(key, indices, *draw)
        if same_probes:
            _, key_probe = evaluation_keys(key, indices, 0, draw[1])
        return (
            examples[indices],
            None if contexts is None else contexts[indices],
            key_noise,
            key_probe,
        )

    return parallel.over_batches(_evaluate_batch, model, batch_of, len(examples), batch_size)


def _evaluate_batch(model: Density, batch: tuple[Any, Any, Any, Any]) -> dict[str, Any]:
    x, context, key_noise, key_probe = batch
    terms = model.terms(x, key_noise, key_probe, context=context)
    return {
        model.spec.metric: model.spec.in_units(terms.log_prob),
        "log_prior": terms.log_prior,
        "log_det": terms.log_det,
        "truncation_bound": model.spec.unit_of_a_nat * terms.info.truncation_bound,
    }


@fast_compile
def evaluation_keys(
    key: Key[Array, ""],
    examples: Int[Array, " b"] | Int[np.ndarray, " b"],
    noise_draw: int | Int[Array, ""],
    probe_draw: int | Int[Array, ""],
) -> tuple[Key[Array, " b"], Key[Array, " b"]]:
    """The keys of examples' dequantisation noise, and of their probes and series lengths.

    Probe draws of one noise draw share its noise and are otherwise independent, as everything else
    is.

    Args:
        key: Source of randomness of the evaluation.
        examples: Places in the data set.
        noise_draw: Number of the dequantisation.
        probe_draw: Number of the probe draw within it.
    """

    def of_example(example):
        key_noise, key_probe = jax.random.split(
            jax.random.fold_in(jax.random.fold_in(key, example), noise_draw)
        )
        return key_noise, jax.random.fold_in(key_probe, probe_draw)

    return jax.vmap(of_example)(jnp.asarray(examples))
