"""Settings that `fit` chooses from the shape, the number and the kind of examples, and the
candidates among which validation chooses.
"""

import dataclasses
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax

from iresnet_jax.data.augment import TRANSFORMATIONS
from iresnet_jax.data.dataset import DataSet
from iresnet_jax.runs.config import Config, parse, set_field, to_plain
from iresnet_jax.starts import WHITENED_DIMS
from iresnet_jax.training.run import LONGEST, VALIDATIONS
from iresnet_jax.training.train import STEPS_IN_TIME

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
    if objective in ("classification", "hybrid") and data.num_classes is None:
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
        set_field(plain, name, value)
    return parse(plain)


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
        """The settings of this candidate in a config."""
        chosen: dict[str, Any] = {
            "model.sharpness": 0.0 if self.size == "small" else 1.0,
            "optimizer.learning_rate": SIZES[self.size][-1],
        }
        if self.size != "given":
            chosen["model.stages"] = _dense_stages(self.size)
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


def candidates(
    config: Config, data: DataSet, given: Iterable[str] = (), starts: Sequence[str] = ()
) -> list[Candidate]:
    """Candidates that validation chooses from, the likeliest start first; none for images.

    A conditional density has a second candidate with less weight decay, unless the decay is given.

    Args:
        config: Settings of all candidates.
        data: The data.
        given: Names of settings that the user has chosen.
        starts: Names of starts to train from.
    """
    if len(data.event_shape) != 1 or config.objective == "classification":
        return []
    is_density = config.objective == "density"
    num, dims = len(data.examples["train"]), data.event_shape[0]
    is_few = num < FEW and (data.contexts or not is_density)
    if "model.stages" in given:
        size = "given"
    elif num < PER_COVARIANCE * dims**2 or is_few:
        size = "small"
    else:  # with 1500 examples the medium size is as good, in half the time
        size = "medium" if is_density and num < 10_000 else "large"
    if data.contexts:
        decays = [None] if "optimizer.weight_decay" in given else [0.3, 0.1]
        return [Candidate(size, decay=decay) for decay in decays]
    noise = NOISES[0] if is_density and "augmentation.noise" not in given else None
    return [Candidate(size, start, noise) for start in starts or [""]]
