"""Settings that `fit` chooses from the shape, the number and the kind of examples, and the
candidates among which validation chooses.
"""

import contextlib
import dataclasses
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jaxtyping import Float

from iresnet_jax.checked_dataclasses import to_plain
from iresnet_jax.data.augment import TRANSFORMATIONS
from iresnet_jax.data.dataset import DataSet, some_rows
from iresnet_jax.maths.platforms import fast_compile
from iresnet_jax.models.mixtures import (
    GaussianMixture,
    ScaleMixture,
    expectation_maximisation,
    no_component_collapsed,
)
from iresnet_jax.models.priors import LOCATION_SCALE
from iresnet_jax.runs.config import Config, parse, with_field
from iresnet_jax.runs.model_from_config import density_spec
from iresnet_jax.training.run import LONGEST, VALIDATIONS
from iresnet_jax.training.train import STEPS_IN_TIME

STEPS_IN_ROUND = 1000  # updates of each candidate in the first round, and of milder candidates
WHITENED_DIMS = 1000  # most dimensions to whiten: the model stores a matrix of their square
PER_COVARIANCE = 4  # examples per entry of a covariance; with fewer the network is small
# Most dimensions for `ExactLogdet`, which needs no probes: steps at 10, 20, 30 dimensions take .3,
# .8, 1.6 times as long as with `KrylovLogdet`.
EXACT_DIMS = 32
MIXTURE_DIMS = 64  # most dimensions of a mixture, whose components each have a matrix
# Most numbers in the matrices of a kernel density, which has a component for each example.
KERNEL_NUMBERS = 500_000
# Numbers of examples that choose the prior, and a mixture's number of components.
PRIOR_EXAMPLES, MIXTURE_EXAMPLES = 10_000, 5_000
NUM_SCALES = 16  # components of the prior "scales"
NOISES = (0.0, 0.1, 0.3)  # standard deviations of the noise on examples
DECAYS = (0.1, 0.3, 1.0)  # weight decays, tuned on posteriors of simulators
# Blocks, width and learning rate of each size; "given" stands for the user's stages.
SIZES = {
    "large": (20, 128, 1e-2),
    "medium": (10, 64, 1e-2),
    "small": (4, 32, 3e-3),
    "given": (0, 0, 1e-2),
}


def choose_settings(
    data: DataSet,
    *,
    objective: str | None = None,
    minutes: float | int | None = None,
    steps: int | None = None,
    seed: int = 0,
) -> Config:
    """The settings that `fit` starts from, for the shape, number and kind of examples.

    Args:
        data: The data.
        objective: "density", "classification" or "hybrid"; by default "density" without labels, and
            with labels "classification" of images and "hybrid" of vectors.
        minutes: Limit of the wall-clock time for training.
        steps: Updates instead of a time.
        seed: Seed of the run.
    """
    is_vectors = len(data.event_shape) == 1
    objective = objective or (
        "density" if data.num_classes is None else "hybrid" if is_vectors else "classification"
    )
    if objective != "density" and data.num_classes is None:
        raise ValueError(f"the objective {objective} needs labels: give the class of each example")
    num, devices = len(data.examples["train"]), jax.local_device_count()
    chosen = _for_vectors(data, objective) if is_vectors else _for_images(data, objective)
    return with_settings(
        Config(),
        {
            **chosen,
            "seed": seed,
            "objective": objective,
            "data.name": data.name,
            "optimizer.name": "muon",
            "optimizer.momentum": 0.95,
            "optimizer.nesterov": True,
            "optimizer.warmup_steps": (steps or STEPS_IN_TIME) // 20,
            "training.batch_size": max(min(chosen["training.batch_size"], num) // devices, 1)
            * devices,
            "training.total_steps": steps or 0,
            "training.minutes": 0.0 if steps else (minutes or 3.0),
            # Without steps, the clock triggers validations, too.
            "training.eval_every_steps": max((steps or LONGEST) // VALIDATIONS, 1),
            # The average covers a tenth of a short run, and at most some hundred steps.
            "training.ema_decay": 0.99 if (steps or LONGEST) >= 1000 else 0.9,
            "training.patience": 6,
            "training.log_every_steps": 10,
            "training.eval_examples": 4096,
            "training.actnorm_examples": min(1024, num),
        },
    )


def _for_vectors(data: DataSet, objective: str) -> dict[str, Any]:
    """Common settings of all candidates, some of which `Candidate.settings` replaces."""
    dims = data.event_shape[0]
    is_exact = dims <= EXACT_DIMS
    of_hybrid = {
        "hybrid.weight": 0.1 / dims,  # weight of the log-likelihood beside the cross-entropy
        # A few validation examples may all be classified correctly; without smoothing the most
        # confident model would win.
        "classifier.label_smoothing": 0.02,
    }
    return {
        "model.stages": _dense_stages("large"),
        "model.coeff": 0.97,
        # Starts near the identity: whitening and prior alone may be the best model.
        "model.last_scale": 0.01,
        # Tuned on posteriors of simulators.
        "model.context_hidden": (128, 128, 32) if data.contexts and objective == "density" else (),
        "preprocessing.transform": "whiten" if dims <= WHITENED_DIMS else "standardize",
        "logdet.kind": "exact" if is_exact else "krylov",
        "logdet.num_terms": min(6, dims),
        **({"evaluation.logdet.kind": "exact"} if dims <= WHITENED_DIMS else {}),
        **(of_hybrid if objective == "hybrid" else {}),
        "training.batch_size": 128 if is_exact else 256,
        "training.blocks": "scan",
    }


def _for_images(data: DataSet, objective: str) -> dict[str, Any]:
    """Convolutional blocks on squeezed images, one stage per halving, down to 4 x 4 pixels or
    fewer.

    Densities of integer levels have the settings of the kept configs of digits and MNIST.
    """
    height, width, _ = data.event_shape
    is_density = objective == "density" and data.num_levels is not None
    is_few, is_small = len(data.examples["train"]) < 10_000, math.prod(data.event_shape) <= 1024
    block = {
        "num_blocks": 8 if is_density else 6,
        "hidden": (48,),
        "kernel_sizes": (3, 3),
        "activation": "clipswish",
    }
    stages, side = [], min(height, width)
    while side % 2 == 0 and height % 2 == 0 and width % 2 == 0 and side >= 8 and len(stages) < 3:
        side, height, width = side // 2, height // 2, width // 2
        stages.append({**block, "squeeze": 2, "positional_bias": is_density})
    if is_density and is_small:
        stages.append({"num_blocks": 4, "hidden": (64,), "activation": "clipswish"})
    of_density: dict[str, Any] = {
        "model.prior": "logistic",
        "model.sharpness": 1.0,
        "preprocessing.transform": "equalize",
        "preprocessing.entrywise": is_small,
        "preprocessing.alpha": 1e-6,
        "optimizer.weight_decay": 0.05,
    }
    if is_few and not data.contexts:  # a flow would learn unchanged images by heart
        changes = tuple(TRANSFORMATIONS) if height == width else ("mirror", "left", "right")
        of_density["augmentation.transformations"] = changes
    return {
        "model.stages": stages or [{**block, "num_blocks": 8}],
        "model.coeff": 0.95,
        "preprocessing.transform": "standardize" if data.num_levels is None else "logit",
        "logdet.kind": "krylov",
        "logdet.num_terms": 6,
        "optimizer.learning_rate": 3e-2 if is_density and is_few else 1e-2,
        "training.batch_size": 64,
        **(of_density if is_density else {}),
    }


def _dense_stages(size: str) -> list[dict[str, Any]]:
    num_blocks, width, _ = SIZES[size]
    return [{"num_blocks": num_blocks, "hidden": (width,), "activation": "clipswish"}]


def with_settings(config: Config, settings: Mapping[str, Any]) -> Config:
    """The config with other values, such as ``{"optimizer.learning_rate": 1e-3}``."""
    plain = to_plain(config)
    for name, value in settings.items():
        plain = with_field(plain, name, lambda _, value=value: value)
    return parse(plain)


@dataclass(frozen=True)
class Candidate:
    """A row in the table of models of vectors that validation chooses from.

    Attributes:
        size: A key of `SIZES`.
        prior: Family of the prior; None leaves it to the settings.
        components: Components of the priors "mixture" and "scales", 0 for others.
        noise: Standard deviation of noise on the examples of a density; None leaves it to the
            settings.
        decay: Weight decay of a conditional density; None leaves it to the settings.
        is_trained: Whether it is trained. A kernel density is not: training would turn each of its
            examples into a spike.
    """

    size: str
    prior: str | None = None
    components: int = 0
    noise: float | None = None
    decay: float | None = None
    is_trained: bool = True

    def __str__(self) -> str:
        if not self.is_trained:
            return "kernel density"
        parts = ["network as given" if self.size == "given" else f"{self.size} network"]
        if self.prior == "mixture":
            parts.append(f"{self.components} normal distributions as prior")
        elif self.prior is not None:
            parts.append(f"{self.prior} prior")
        if self.noise:
            parts.append(f"noise of {self.noise}")
        if self.decay is not None:
            parts.append(f"weight decay {self.decay}")
        return ", ".join(parts)

    @property
    def settings(self) -> dict[str, Any]:
        """The settings of this candidate in a config."""
        chosen: dict[str, Any] = {
            "model.sharpness": 0.0 if self.size == "small" else 1.0,
            "optimizer.learning_rate": SIZES[self.size][-1],
        }
        if self.size != "given":
            chosen["model.stages"] = _dense_stages(self.size)
        if self.prior is not None:
            chosen |= {"model.prior": self.prior, "model.prior_components": self.components}
        if self.decay is not None:
            chosen["optimizer.weight_decay"] = self.decay
        if self.noise is not None:
            chosen["augmentation.noise"] = self.noise
        return chosen

    def milder(self) -> Iterator["Candidate"]:
        """Candidates that overfit less: with more weight decay, with more noise, or smaller if
        `fit` may add no noise.
        """
        if self.decay is not None and self.decay < DECAYS[-1]:
            yield dataclasses.replace(self, decay=DECAYS[DECAYS.index(self.decay) + 1])
        if self.noise is not None and self.noise < NOISES[-1]:
            yield dataclasses.replace(self, noise=NOISES[NOISES.index(self.noise) + 1])
        if self.noise is None and self.size not in ("small", "given"):
            yield dataclasses.replace(self, size="small")


def candidates(config: Config, data: DataSet, given: Iterable[str] = ()) -> Iterator[Candidate]:
    """Candidates that validation chooses from, the plain one first; none for images.

    A conditional density has a second candidate with less weight decay, unless the decay is given.
    A density without contexts has candidates with other priors: a mixture, with the number of
    components from the Bayesian information criterion; a kernel density, if examples are few and
    likelier under it; and scales, if vectors differ much in length. Training and validation decide.

    Args:
        config: Settings of all candidates.
        data: The data.
        given: Names of settings that the user has chosen.
    """
    if len(data.event_shape) != 1 or config.objective == "classification":
        return
    is_density = config.objective == "density"
    num, dims = len(data.examples["train"]), data.event_shape[0]
    if "model.stages" in given:
        size = "given"
    elif num < PER_COVARIANCE * dims**2:
        size = "small"
    else:  # with 1500 examples the medium size is as good, in half the time
        size = "medium" if is_density and not data.contexts and num < 10_000 else "large"
    if data.contexts:
        yield from (
            Candidate(size, decay=decay)
            for decay in ([None] if "optimizer.weight_decay" in given else [0.3, 0.1])
        )
        return
    plain = Candidate(
        size, noise=NOISES[0] if is_density and "augmentation.noise" not in given else None
    )
    if not is_density or "model.prior" in given:
        yield plain
        return
    train, held_out = (_latents(config, data, split) for split in ("train", "validation"))
    prior, log_prob = likelier_prior(train)
    yield dataclasses.replace(plain, prior=prior)
    if has_scales(train, held_out, prior):
        yield dataclasses.replace(plain, prior="scales", components=NUM_SCALES)
    if dims <= MIXTURE_DIMS:
        components, of_mixture = likeliest_components(
            train[:: -(-len(train) // MIXTURE_EXAMPLES)], config.seed
        )
        if components > 1 and of_mixture > log_prob:
            log_prob = of_mixture
            yield dataclasses.replace(plain, prior="mixture", components=components)
    if (
        len(train) == num
        and num * dims**2 <= KERNEL_NUMBERS
        and GaussianMixture.kernels(train)[1] > log_prob
    ):
        yield dataclasses.replace(
            plain, prior="mixture", components=num, noise=None, is_trained=False
        )


def _latents(config: Config, data: DataSet, split: str) -> Float[np.ndarray, "n d"]:
    """Preprocessed examples: the latents before training."""
    rows = data.examples[split]
    x = np.asarray(rows[some_rows(len(rows), PRIOR_EXAMPLES)])
    z = _preprocess(density_spec(config, data), x, jax.random.key(config.seed))
    return np.asarray(z, np.float64)


_preprocess = fast_compile(lambda spec, x, key: spec.preprocess(x, key))


def likelier_prior(z: Float[np.ndarray, "n d"]) -> tuple[str, float]:
    """The prior under which latents are likelier, and their mean log-density; "logistic" has
    heavy tails.
    """
    mean, std = np.zeros(z.shape[1]), np.ones(z.shape[1])
    found = {
        name: float(np.mean(_log_prob(family.of_moments(mean, std), z)))
        for name, family in LOCATION_SCALE.items()
    }
    return max(found.items(), key=lambda item: item[1])


def has_scales(z: Float[np.ndarray, "n d"], held_out: Float[np.ndarray, "m d"], prior: str) -> bool:
    """Whether a prior of scales, for vectors whose lengths differ much, is clearly likelier on
    held-out latents.
    """
    plain = LOCATION_SCALE[prior].of_moments(np.zeros(z.shape[1]), np.ones(z.shape[1]))
    gains = _log_prob(ScaleMixture.fit(z, NUM_SCALES), held_out) - _log_prob(plain, held_out)
    # The gain must be large both in nats and in standard errors.
    return len(gains) > 1 and bool(
        gains.mean() > 0.1 + 3 * gains.std(ddof=1) / math.sqrt(len(gains))
    )


def _log_prob(prior: Any, z: Float[np.ndarray, "n d"]) -> Float[np.ndarray, " n"]:
    return np.asarray(_log_prob_of(prior, z.astype(np.float32)), np.float64)


_log_prob_of = fast_compile(lambda prior, z: prior.log_prob(z))


def likeliest_components(z: Float[np.ndarray, "n d"], seed: int) -> tuple[int, float]:
    """Number of normal distributions in a mixture by the Bayesian information criterion (Schwarz
    1978), and its mean.

    Numbers double until the criterion is worse twice, with at least 5 examples per row of means and
    covariances, and are then refined to a sixteenth. A mixture with a collapsed component is
    skipped. The mean, in nats, is the log-density minus the cost of the parameters that one normal
    distribution, as in whitening, does not have.
    """
    of_one = z.shape[1] * (z.shape[1] + 3) / 2  # parameters of a mean and a covariance
    most, found = len(z) // (5 * (z.shape[1] + 1)), {}

    def attempt(num):
        if 1 <= num <= most and num not in found:
            found[num] = -math.inf
            with contextlib.suppress(ValueError):  # raised for a collapsed component
                mixture = expectation_maximisation(z, num, random_state=seed)
                if no_component_collapsed(mixture, len(z)):
                    found[num] = (of_one * math.log(len(z)) - float(mixture.bic(z))) / (2 * len(z))
        return max(found, key=found.__getitem__, default=0)

    num = 1
    while num <= max(4 * attempt(num), 4):
        num *= 2
    step = attempt(0) // 2
    while step > attempt(0) // 16:
        best = attempt(0)
        attempt(best - step)
        step = step if attempt(best + step) != best else step // 2
    best = attempt(0)
    return best, found.get(best, -math.inf)
