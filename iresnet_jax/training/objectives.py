"""The objectives: losses of a batch by likelihood, alone or beside a cross-entropy, and what models
do on held-out data.

The hybrid objective trains one network that classifies examples and models their density (Nalisnick
et al. 2019),

    loss = cross-entropy(label, p(y | x)) + lambda bits/dim(x),

with both from the joint density ``p(x, y) = p(y) p(x | y)`` of a model with a prior for every
class. Continuous data have nats in place of bits/dim, see `DensitySpec.unit`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int, Key, Shaped

from iresnet_jax.arguments import CountOrNone, NotNegative
from iresnet_jax.bijections.bounded import Bounded
from iresnet_jax.bijections.standardize import Identity, Standardize, Whiten
from iresnet_jax.maths.platforms import fast_compile
from iresnet_jax.models.classifier import Classifier, cross_entropy, distances
from iresnet_jax.models.density import Density
from iresnet_jax.models.density_spec import DensitySpec
from iresnet_jax.models.flow import FlowBounds
from iresnet_jax.training import parallel
from iresnet_jax.training.run import Measured
from iresnet_jax.training.step import Keys, Loss

Augment = Callable[[Key[Array, " b"], Shaped[Array, "b h w c"]], Shaped[Array, "b h w c"]]

# ---------------------------------------------------------------------------------- classification


class Margin(NamedTuple):
    """The margin that a loss asks for (Lipschitz-margin training, Tsuzuku et al. 2018).

    Attributes:
        radius: Distance in pixels of [0, 1], for a linear head. Differences of logits grow by at
            most ``|w_i - w_j|`` times it, over the divisor of pixels, if features never stretch: by
            that the loss raises the logits of wrong classes.
        temperature: Divisor of the logits then.
    """

    radius: float = 0.0
    temperature: float = 1.0

    def apply(self, model: Any, logits: Float[Array, "b k"], labels: Any) -> Float[Array, "b k"]:
        """The logits that the loss of a model sees."""
        if getattr(model.spec, "head", None) == "linear":
            logits += self.radius / min(model.spec.std) * distances(model.head)[labels]
        return logits / self.temperature


def measure_classes(
    model: Classifier, images: np.ndarray, labels: np.ndarray, batch_size: int, margin: Margin
) -> Measured:
    """Share of held-out images that are classified rightly, also with a margin, and their mean
    cross-entropy.

    The best model has the least error, of images without their margin where there is one, and
    where errors tie the least cross-entropy.
    """
    outputs = classify(model, images, labels, batch_size, margin)
    found = {
        "accuracy": float((outputs["logits"].argmax(axis=1) == labels).mean()),
        "loss": float(outputs["loss"].mean(dtype=np.float64)),
    }
    if margin.radius:
        found["accuracy_at_margin"] = float(outputs["at_margin"].mean())
    error = 1 - found.get("accuracy_at_margin", found["accuracy"])
    return Measured(found, error + 1e-6 * min(found["loss"], 10.0))


def classify(
    model: Classifier | Density,
    x: np.ndarray,
    labels: np.ndarray,
    batch_size: int,
    margin: Margin = Margin(),
) -> dict[str, np.ndarray]:
    """Cross-entropies in nats, logits, and who is right with the margin; a density takes the
    middle of grey levels.
    """
    return parallel.over_batches(
        _classify, (model, margin), parallel.rows_of(x, labels), len(x), batch_size
    )


def _classify(own: tuple[Classifier | Density, Margin], batch: tuple[Any, Any]) -> dict[str, Any]:
    (model, margin), (x, labels) = own, batch
    logits = model.logits(x)
    less = margin.apply(model, logits, labels)
    return {
        "loss": cross_entropy(less, labels),
        "logits": logits,
        "at_margin": jnp.argmax(less, axis=1) == labels,
    }


# ------------------------------------------------------------------------------------- likelihood


def density_loss(
    draw: Callable[[Any, Any], Any] | None = None,
    *,
    noise: float = 0.0,
    transform: Callable[..., Any] | None = None,
) -> Callable[[Density, Any, Keys], Loss]:
    """The loss ``(model, (examples, contexts), keys) -> Loss``: the negative log-likelihood in the
    model's unit.

    Args:
        draw: Sampler ``(key, placeholder) -> (example, context)`` of endless data; None takes those
            of the batch.
        noise: Standard deviation of noise on entries, in units of their `noise_scales`.
        transform: ``(keys, examples) -> (changed examples, contexts)``, a random change that the
            model is told of by contexts, such as `augment.transformed`; None leaves examples and
            contexts as they are.
    """

    def loss(model: Density, batch: Any, keys: Keys) -> Loss:
        key_draw, key_dequantise, key_probe = _split(keys.examples, 3)
        x, context = batch if draw is None else jax.vmap(draw)(key_draw, batch)
        if transform is not None:
            x, context = transform(key_draw, x)
        if noise:
            drawn = jax.vmap(lambda key: jax.random.normal(key, x.shape[1:]))(key_draw)
            x = _moved(model, x, noise * noise_scales(model.spec)[None] * drawn, key_probe)
        terms = model.terms(x, key_dequantise, key_probe, context=context)
        value = jnp.mean(model.spec.in_units(terms.log_prob))
        means = {"log_prior": jnp.mean(terms.log_prior), "log_det": jnp.mean(terms.log_det)}
        return Loss(value, {model.spec.metric: value, **means})

    return loss


@dataclass(frozen=True)
class HybridConfig:
    """Objective "hybrid", which minimises cross-entropy + lambda bits/dim, or nats instead for
    continuous data.

    With ``lambda = D log 2`` for images of D dimensions, or 1 for continuous data, the loss is the
    joint likelihood of data and labels. A smaller lambda emphasises the labels.
    """

    weight: NotNegative = 1.0  # lambda after the ramp
    initial_weight: NotNegative = 1.0  # lambda at step 0, if there is a ramp
    ramp_steps: CountOrNone = 0  # steps of the linear ramp between them; 0 for no ramp

    def weight_of_step(self) -> Callable[[Any], Any]:
        """``step -> lambda``: from ``initial_weight`` in a straight line to ``weight``, then
        constant.
        """
        if not self.ramp_steps:
            return optax.constant_schedule(self.weight)
        return optax.linear_schedule(self.initial_weight, self.weight, self.ramp_steps)


def hybrid_loss(
    settings: HybridConfig, *, label_smoothing: float = 0.0, augment: Augment | None = None
) -> Callable[[Density, Any, Keys], Loss]:
    """The loss ``(model, (examples, labels), keys) -> Loss``: cross-entropy and likelihood,
    weighted.

    Args:
        settings: The weight of the likelihood.
        label_smoothing: Smoothing of the labels, see `classifier.cross_entropy`.
        augment: Random change of the images that are classified, in a pass of their own: a
            likelihood is one of images as they are. None classifies those.
    """
    weight_of_step = settings.weight_of_step()

    def loss(model: Density, batch: Any, keys: Keys) -> Loss:
        x, labels = batch
        key_noise, key_probe, key_augment, key_augment_noise = _split(keys.examples, 4)
        terms = model.terms(x, key_noise, key_probe)
        bits = jnp.mean(model.spec.in_units(terms.log_prob))
        logits = terms.log_prior_by_class
        if augment is not None:
            logits = model.class_log_probs(augment(key_augment, x), key_augment_noise)
        assert logits is not None  # the model has classes
        entropy = jnp.mean(cross_entropy(logits, labels, label_smoothing=label_smoothing))
        bits_weight = weight_of_step(keys.step)
        value = entropy + bits_weight * bits
        metrics = {
            "loss": value,
            model.spec.metric: bits,
            "log_prior": jnp.mean(terms.log_prior),
            "log_det": jnp.mean(terms.log_det),
            "cross_entropy": entropy,
            "accuracy": jnp.mean(jnp.argmax(logits, axis=1) == labels),
            "bits_weight": jnp.asarray(bits_weight, bits.dtype),
        }
        return Loss(value, metrics)

    return loss


def _split(keys: Key[Array, " b"], num: int) -> Key[Array, "_ b"]:
    """So many keys for every example, by use."""
    return jnp.moveaxis(jax.vmap(lambda key: jax.random.split(key, num))(keys), 1, 0)


def _moved(model: Density, x: Any, noise: Any, key: Key[Array, " b"]) -> Array:
    """Examples with noise on the real line, so that entries stay within bounds, and values that
    own cells are some again.
    """
    transform, u = model.spec.transform, model.dequantize(x, key)
    if not isinstance(transform, Bounded):
        return model.spec.rounded(u + noise)
    line, _ = transform.to_line(u)
    return model.spec.rounded(transform.from_line(line + noise)[0])


def noise_scales(spec: DensitySpec) -> Float[Array, " d"]:
    """Standard deviations of entries, which noise of size 1 has: 1 without preprocessing.

    Those of entries within bounds or with heavy tails are in the units of the real line, see
    `Bounded.to_line`.

    Training on few examples with noise is training on a kernel density of them (Rothfuss et al.
    2019, sec. 4): it keeps the flow from enclosing each one by itself.
    """
    transform = spec.transform.then if isinstance(spec.transform, Bounded) else spec.transform
    shape = spec.flow.event_shape
    if not isinstance(transform, Identity | Standardize | Whiten) or len(shape) != 1:
        raise ValueError(
            "config.augmentation.noise is for continuous vectors with preprocessing.transform "
            f"standardize, whiten or none, got {type(transform).__name__} of examples of shape "
            f"{shape}"
        )
    scales = np.ones(shape) if isinstance(transform, Identity) else transform.entry_scales()
    return jnp.asarray(scales, jnp.float32)


def evaluate_examples(
    model: Density,
    examples: np.ndarray,
    key: jax.Array,
    batch_size: int,
    *,
    contexts: np.ndarray | None = None,
    draw: tuple[int, int] = (0, 0),
    same_probes: bool = False,
    bounds: FlowBounds | None = None,
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
        bounds: Bounds of the model's blocks, on which those of truncation rely.
    """

    def batch_of(places):
        key_noise, key_probe = evaluation_keys(key, places, *draw)
        if same_probes:
            _, key_probe = evaluation_keys(key, places, 0, draw[1])
        return *parallel.rows_of(examples, contexts)(places), key_noise, key_probe

    return parallel.over_batches(
        _evaluate_batch, (model, bounds), batch_of, len(examples), batch_size
    )


def _evaluate_batch(own: Any, batch: tuple[Any, Any, Any, Any]) -> dict[str, Any]:
    (model, bounds), (x, context, key_noise, key_probe) = own, batch
    terms = model.terms(x, key_noise, key_probe, context=context, bounds=bounds)
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
