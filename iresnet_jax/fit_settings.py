"""Settings that `fit` chooses from the shape, the number and the kind of examples, and the
candidates among which validation chooses.
"""

import dataclasses
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, get_type_hints

import jax

from iresnet_jax.arguments import Count, CountOrNone, Decay, NotNegative, Positive, checked
from iresnet_jax.bijections.equalize import Equalize
from iresnet_jax.bijections.logit import Logit
from iresnet_jax.data.augment import TRANSFORMATIONS
from iresnet_jax.data.dataset import DataSet
from iresnet_jax.maths.logdet_config import LogdetConfig
from iresnet_jax.models.architecture import StageSpec
from iresnet_jax.models.density_spec import Transform
from iresnet_jax.starts import WHITENED_DIMS

STEPS_IN_ROUND = 1000  # updates of each candidate in the first round, and of milder candidates
# Examples per entry of a covariance, and with classes, with fewer of which the network is small.
PER_COVARIANCE, FEW = 4, 1000
# Most dimensions for `ExactLogdet`, which needs no probes: steps at 10, 20, 30 dimensions take .3,
# .8, 1.6 times as long as with `KrylovLogdet`.
EXACT_DIMS = 32
NOISES = (0.0, 0.1, 0.3)  # standard deviations of the noise on examples
DECAYS = (0.1, 0.3, 1.0)  # weight decays, tuned on posteriors of simulators
# Blocks, width and learning rate of each size; "given" stands for the user's stages.
SIZES = {
    "large": (20, 128, 1e-2),
    "medium": (10, 64, 1e-2),
    "small": (4, 32, 3e-3),
    "given": (0, 0, 1e-2),
}


@dataclass(frozen=True)
class Settings:
    """What `fit` chooses and takes by name.

    Attributes:
        objective: "density", "classification" or "hybrid".
        stages: Stages of the flow.
        coeff: Largest operator norm of layers, see `FlowSpec`.
        prior: Family of the prior, see `Density.init`; also ``num_components``.
        transform: Preprocessing, or "standardize" or "whiten".
        context_hidden: Widths of a network on contexts.
        last_scale: Initial factor on the last layer of each branch, see `Density.init`; also
            ``sharpness``.
        logdet: Log-determinant of training.
        learning_rate: Peak of the learning rate of Muon, which warms up and falls to 0.
        weight_decay: Decay of kernels.
        batch_size: Examples of a step.
        patience: Validations without an improvement after which training ends; 0 never ends it.
        noise: Standard deviation of noise on vectors of a density, relative to each entry's.
        transformations: Changes of images that a density is trained on, see `augment.transformed`.
        likelihood_weight: Weight of the likelihood beside the cross-entropy of "hybrid".
        label_smoothing: Smoothing of labels.
    """

    objective: str
    stages: tuple[StageSpec, ...]
    coeff: float
    transform: Transform | str
    logdet: LogdetConfig
    learning_rate: Positive = 1e-2
    batch_size: Count = 64
    prior: str = "gaussian"
    num_components: int | None = None
    context_hidden: tuple[int, ...] = ()
    last_scale: NotNegative = 1.0
    sharpness: NotNegative = 0.0
    weight_decay: NotNegative = 0.0
    patience: CountOrNone = 6
    noise: NotNegative = 0.0
    transformations: tuple[str, ...] = ()
    likelihood_weight: NotNegative = 1.0
    label_smoothing: Decay = 0.0

    def with_(self, **changes: Any) -> "Settings":
        """These settings with others in their place."""
        return dataclasses.replace(self, **changes)


def checked_settings(given: Mapping[str, Any]) -> dict[str, Any]:
    """Settings that a user has given, numbers within their ranges."""
    kinds = get_type_hints(Settings, include_extras=True)
    return {
        name: checked(kinds[name], value, name)
        if hasattr(kinds.get(name), "__metadata__")
        else value
        for name, value in given.items()
    }


def choose_settings(data: DataSet, objective: str | None = None) -> Settings:
    """The settings that `fit` starts from, for the shape, number and kind of examples.

    Args:
        data: The data.
        objective: "density", "classification" or "hybrid"; by default "density" without labels, and
            with labels "classification" of images and "hybrid" of vectors.
    """
    is_vectors = len(data.event_shape) == 1
    objective = objective or (
        "density" if data.num_classes is None else "hybrid" if is_vectors else "classification"
    )
    if objective not in ("density", "classification", "hybrid"):
        raise ValueError(f"objective must be density, classification or hybrid, got {objective!r}")
    if objective != "density" and (data.num_classes is None or data.contexts):
        raise ValueError(
            f"the objective {objective} needs labels, the class of each example, and no contexts"
        )
    if objective == "classification" and (is_vectors or data.num_levels is None):
        raise ValueError(
            "the objective classification is for images of integer levels: take hybrid"
        )
    chosen = (_for_vectors if is_vectors else _for_images)(data, objective)
    num, devices = len(data.examples["train"]), jax.local_device_count()
    return chosen.with_(
        batch_size=max(min(chosen.batch_size, num) // devices, 1) * devices,
    )


def _for_vectors(data: DataSet, objective: str) -> Settings:
    """Common settings of all candidates, some of which `Candidate.settings` replaces."""
    dims = data.event_shape[0]
    is_exact = dims <= EXACT_DIMS
    settings = Settings(
        objective,
        _dense_stages("large"),
        0.97,
        "whiten" if dims <= WHITENED_DIMS else "standardize",
        LogdetConfig("exact") if is_exact else LogdetConfig("krylov", min(6, dims)),
        # Starts near the identity: whitening and prior alone may be the best model.
        last_scale=0.01,
        # Tuned on posteriors of simulators.
        context_hidden=(128, 128, 32) if data.contexts and objective == "density" else (),
        batch_size=128 if is_exact else 256,
    )
    if objective == "hybrid":
        # A few validation examples may all be classified correctly; without smoothing the most
        # confident model would win.
        settings = settings.with_(likelihood_weight=0.1 / dims, label_smoothing=0.02)
    return settings


def _for_images(data: DataSet, objective: str) -> Settings:
    """Convolutional blocks on squeezed images, one stage per halving, down to 4 x 4 pixels or
    fewer.

    Densities of integer levels have the settings of the kept configs of digits and MNIST.
    """
    height, width, _ = data.event_shape
    is_density = objective == "density" and data.num_levels is not None
    is_few, is_small = len(data.examples["train"]) < 10_000, math.prod(data.event_shape) <= 1024
    num_blocks = 8 if is_density else 6
    block = StageSpec(num_blocks, (48,), kernel_sizes=(3, 3), activation="clipswish")
    stages, side = [], min(height, width)
    while side % 2 == 0 and height % 2 == 0 and width % 2 == 0 and side >= 8 and len(stages) < 3:
        side, height, width = side // 2, height // 2, width // 2
        stages.append(dataclasses.replace(block, squeeze=2, positional_bias=is_density))
    if is_density and is_small:
        stages.append(StageSpec(4, (64,), activation="clipswish"))
    settings = Settings(
        objective,
        tuple(stages) or (dataclasses.replace(block, num_blocks=8),),
        0.95,
        "standardize" if data.num_levels is None else Logit(),
        LogdetConfig("krylov", 6),
    )
    if not is_density:
        return settings
    # A flow would learn few unchanged images by heart.
    changes = (
        tuple(TRANSFORMATIONS)
        if data.event_shape[0] == data.event_shape[1]
        else ("mirror", "left", "right")
    )
    return settings.with_(
        prior="logistic",
        sharpness=1.0,
        transform=Equalize.fit(
            data.examples["train"], data.num_levels or 0, entrywise=is_small, alpha=1e-6
        ),
        learning_rate=3e-2 if is_few else 1e-2,
        weight_decay=0.05,
        transformations=changes if is_few and not data.contexts else (),
    )


def _dense_stages(size: str) -> tuple[StageSpec, ...]:
    num_blocks, width, _ = SIZES[size]
    return (StageSpec(num_blocks, (width,), activation="clipswish"),)


@dataclass(frozen=True)
class Candidate:
    """A row in the table of models of vectors that validation chooses from.

    Attributes:
        size: A key of `SIZES`.
        start: Name of its start, see `iresnet_jax.starts`; empty leaves it to the settings.
        noise: Standard deviation of noise on the examples of a density; None leaves it to the
            settings.
        decay: Weight decay of a conditional density; None leaves it to the settings.
    """

    size: str
    start: str = ""
    noise: float | None = None
    decay: float | None = None

    def __str__(self) -> str:
        parts = ["network as given" if self.size == "given" else f"{self.size} network"]
        if self.start:
            parts.append(f"from {self.start}")
        if self.noise:
            parts.append(f"noise of {self.noise}")
        if self.decay is not None:
            parts.append(f"weight decay {self.decay}")
        return ", ".join(parts)

    @property
    def settings(self) -> dict[str, Any]:
        """The settings of this candidate that differ from others'."""
        chosen: dict[str, Any] = {
            "sharpness": 0.0 if self.size == "small" else 1.0,
            "learning_rate": SIZES[self.size][-1],
        }
        if self.size != "given":
            chosen["stages"] = _dense_stages(self.size)
        if self.decay is not None:
            chosen["weight_decay"] = self.decay
        if self.noise is not None:
            chosen["noise"] = self.noise
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


def candidates(
    settings: Settings, data: DataSet, given: Iterable[str] = (), starts: Sequence[str] = ()
) -> list[Candidate]:
    """Candidates that validation chooses from, the likeliest start first; none for images.

    A conditional density has a second candidate with less weight decay, unless the decay is given.

    Args:
        settings: Settings of all candidates.
        data: The data.
        given: Names of settings that the user has chosen.
        starts: Names of starts to train from.
    """
    if len(data.event_shape) != 1 or settings.objective == "classification":
        return []
    is_density = settings.objective == "density"
    num, dims = len(data.examples["train"]), data.event_shape[0]
    is_few = num < FEW and (data.contexts or not is_density)
    if "stages" in given:
        size = "given"
    elif num < PER_COVARIANCE * dims**2 or is_few:
        size = "small"
    else:  # with 1500 examples the medium size is as good, in half the time
        size = "medium" if is_density and num < 10_000 else "large"
    if data.contexts:
        decays = [None] if "weight_decay" in given else [0.3, 0.1]
        return [Candidate(size, decay=decay) for decay in decays]
    noise = NOISES[0] if is_density and "noise" not in given else None
    return [Candidate(size, start, noise) for start in starts or [""]]
