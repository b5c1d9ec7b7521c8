"""Every setting of a run with its default and meaning.

A file in ``configs/`` starts from `default_config`, a dictionary of these fields with attributes,
and changes some of them. `parse` checks the result and makes it a `Config`, which the rest of the
library takes.
"""

import dataclasses
import operator
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

import ml_collections

from iresnet_jax.bijections.residual import Solver
from iresnet_jax.checked_dataclasses import (
    Count,
    CountOrNone,
    Decay,
    NotNegative,
    Positive,
    Range,
    from_plain,
)
from iresnet_jax.data.augment import check_transformations
from iresnet_jax.maths.logdet_config import LogdetConfig
from iresnet_jax.models.architecture import NoiseSpec, StageSpec
from iresnet_jax.models.priors import FAMILIES, MIXTURES
from iresnet_jax.training.constraint import ConstraintConfig
from iresnet_jax.training.hybrid import HybridConfig
from iresnet_jax.training.optimizers import OptimizerConfig
from iresnet_jax.training.trainer import TrainingConfig


@dataclass(frozen=True)
class DataConfig:
    """Data set."""

    # a name that `iresnet_jax.data.load` knows: an image data set, a 2-D toy or files
    name: str = "digits"
    # share of the examples of data without splits
    validation_fraction: Annotated[float, Range("(0, 1)")] = 0.1
    test_fraction: Annotated[float, Range("[0, 1)")] = 0.1  # likewise
    # the class, as a vector of 0 and 1, is the context of a density p(x | class)
    condition_on_labels: bool = False


@dataclass(frozen=True)
class ModelConfig:
    """The residual flow."""

    stages: tuple[StageSpec, ...] = (
        StageSpec(num_blocks=4, hidden=(32, 32), kernel_sizes=(3, 1, 3)),
    )  # from data to latents
    coeff: Annotated[float, Range("(0, 1)")] = 0.9  # largest operator norm c
    # what c limits: the norm of each layer, or their product in each block
    budget: Literal["layer", "block"] = "layer"
    # Least and largest stretch (mu, nu) of the whole flow, in place of coeff and budget: mu <=
    # |F(x) - F(y)| / |x - y| <= nu by construction, without ActNorm. None are prescribed by
    # default.
    constants: tuple[Positive, ...] = ()
    # Distribution of the latents: "gaussian" or "logistic" entries; of a density also "mixture", of
    # normal distributions with full covariances, "scales", a normal distribution at several sizes,
    # and "marginals", entries that are mixtures each.
    prior: str = "gaussian"
    # of the families with components, 16 are many scales; 0 for other priors
    prior_components: CountOrNone = 0
    # widths of a network on the contexts of a density; none leaves them as they are
    context_hidden: tuple[Count, ...] = ()
    last_scale: NotNegative = 1.0  # initial factor on the last layer of each branch
    # Initial sharpness of activations of the Swish family in a density, in units of one over the
    # size of their inputs; above 1 they also bend in different places. 0 leaves it to the
    # activation.
    sharpness: NotNegative = 0.0
    # Noise of integer levels: "uniform", or "variational", made given the image by a flow that is
    # trained with the model.
    dequantization: Literal["uniform", "variational"] = "uniform"
    noise: NoiseSpec = field(default_factory=NoiseSpec)  # flow of the noise "variational"


@dataclass(frozen=True)
class PreprocessingConfig:
    """The first bijection of a density."""

    # For pixels x in [0, 1]: "center" is x - 1/2, "logit" is logit(alpha + (1 - 2 alpha) x), and
    # "equalize" is the cumulative histogram of the training pixels, then the logit. For continuous
    # data: "standardize" each entry, or "whiten" vectors. For both: "none".
    transform: Literal["center", "logit", "equalize", "standardize", "whiten", "none"] = "center"
    # "equalize" with each pixel's own frequency of the most common grey level
    entrywise: bool = False
    # least distance of a logit's argument from 0 and 1
    alpha: Annotated[float, Range("(0, 0.5)")] = 0.05


@dataclass(frozen=True)
class ClassifierConfig:
    """The classifier of objective "classification"."""

    # channels of zeros after those of an image: they widen the network
    pad_channels: CountOrNone = 0
    mean: tuple[float, ...] = (0.5,)  # pixel mean on [0, 1], one per channel or one for all
    std: tuple[Positive, ...] = (0.5,)  # pixel standard deviation, one per channel or one for all
    label_smoothing: Decay = 0.0  # also of objective "hybrid"
    # "linear" on all features is for blocks that never stretch, and radii
    head: Literal["pooled", "linear"] = "pooled"
    # Radius that training aims at, a 2-norm of pixels on [0, 1]: the loss of a linear head raises
    # logits of wrong classes by what they can gain on the true one within it.
    margin: NotNegative = 0.0
    # divisor of the logits in the loss; below 1 fewer images are lost for the sake of others
    temperature: Positive = 1.0


@dataclass(frozen=True)
class AugmentationConfig:
    """Random changes of training examples: crops and flips of images that are classified, noise
    on vectors, transformations.
    """

    crop_padding: CountOrNone = 0  # largest shift in pixels
    flip: bool = False  # left to right, with probability 1/2
    # standard deviation of noise on vectors of a density, relative to that of each entry
    noise: NotNegative = 0.0
    # Half of the images in the training of a density are changed by one of these, and its context
    # says by which one. Validated and kept is the density of images as they are. "left", "right",
    # "up" and "down" move by a pixel, "turn" is by 180 degrees, "mirror" is left to right, and
    # there are "upside_down" and "transpose". None by default.
    transformations: tuple[str, ...] = ()

    def __post_init__(self):
        check_transformations(self.transformations)


@dataclass(frozen=True)
class EvaluationConfig:
    """Measurements after training."""

    # Log-determinant of test likelihoods beyond 256 dimensions; up to there it is exact.
    logdet: LogdetConfig = LogdetConfig(kind="roulette", num_exact_terms=20)  # noqa: RUF009 (it is frozen)
    batch_size: Count = 256  # most examples at once
    num_dequantisations: Count = 4  # noise draws per image
    num_probe_draws: Count = 4  # probe draws per noise draw
    # noise draws of the importance-weighted bound of discrete data; 0 for none
    num_importance_draws: CountOrNone = 0
    # test examples, evenly spaced, that have these draws; 0 for all
    num_importance_examples: CountOrNone = 0
    num_examples: Count = 20_000  # test examples of a toy; other data use their whole test split
    # Radii at which the accuracy of a classifier is verified and attacked: 2-norms of pixels on [0,
    # 1]. None by default.
    radii: tuple[Positive, ...] = ()
    attack_steps: Count = 50  # steps of projected gradient descent
    attack_starts: Count = 1  # random starts of the attack on each image
    # largest Euclidean error of each block's inverse, for every example
    inverse_atol: Positive = 1e-6

    def solver(self) -> Solver:
        """The solver of inverses."""
        return Solver(atol=self.inverse_atol)


@dataclass(frozen=True)
class ReferencesConfig:
    """Numbers of others that the report compares with."""

    values: tuple[tuple[str, float], ...] = ()  # pairs ("who", value in bits/dim, nats or % error)


@dataclass(frozen=True)
class Config:
    """All settings of a run."""

    # of all randomness; JAX would cut off further bits
    seed: Annotated[int, Range("[0, 4294967296)")] = 0
    # "hybrid" has a prior for every class
    objective: Literal["density", "classification", "hybrid"] = "density"
    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    preprocessing: PreprocessingConfig = field(default_factory=PreprocessingConfig)
    # in training; evaluation has its own
    logdet: LogdetConfig = field(default_factory=LogdetConfig)
    constraint: ConstraintConfig = field(default_factory=ConstraintConfig)
    hybrid: HybridConfig = field(default_factory=HybridConfig)
    classifier: ClassifierConfig = field(default_factory=ClassifierConfig)
    augmentation: AugmentationConfig = field(default_factory=AugmentationConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    references: ReferencesConfig = field(default_factory=ReferencesConfig)


def default_config() -> Any:  # a ConfigDict, whose fields type checkers cannot see
    """The defaults of `Config` for a config file to change."""
    config = ml_collections.ConfigDict(dataclasses.asdict(Config()))
    config.lock()
    return config


def parse(settings: Any) -> Config:
    """The settings of a config file, or of JSON data in the same form, checked; missing fields keep
    their default.

    Raises:
        ValueError: If a field is unknown, of the wrong kind or out of its range, or settings
            contradict each other.
    """
    config = from_plain(
        Config, settings.to_dict() if hasattr(settings, "to_dict") else settings, "config"
    )
    _check_combinations(config)
    return config


# Settings of some objectives, which the others leave at their defaults.
_OBJECTIVES = {
    "augmentation.crop_padding": ("classification", "hybrid"),
    "augmentation.flip": ("classification", "hybrid"),
    "augmentation.noise": ("density",),
    "classifier.head": ("classification",),
    "classifier.label_smoothing": ("classification", "hybrid"),
    "classifier.margin": ("classification",),
    "classifier.mean": ("classification",),
    "classifier.std": ("classification",),
    "classifier.temperature": ("classification",),
    "evaluation.radii": ("classification",),
    "augmentation.transformations": ("density",),
    "classifier.pad_channels": ("classification",),
    "evaluation.num_importance_draws": ("density", "hybrid"),
    "hybrid.initial_weight": ("hybrid",),
    "hybrid.ramp_steps": ("hybrid",),
    "hybrid.weight": ("hybrid",),
    "model.context_hidden": ("density",),
    "model.dequantization": ("density", "hybrid"),
    "model.prior": ("density", "hybrid"),
    "model.prior_components": ("density",),
    "model.sharpness": ("density", "hybrid"),
}


def _check_combinations(config: Config) -> None:
    """Raises ``ValueError`` for settings that are sound one by one and not together."""
    for name, objectives in _OBJECTIVES.items():
        found, default = (operator.attrgetter(name)(each) for each in (config, Config()))
        if found != default and config.objective not in objectives:
            raise ValueError(
                f"config.{name} is for {' and '.join(objectives)}: leave it at "
                f"{default!r} for {config.objective}"
            )
    model, evaluation, transform = config.model, config.evaluation, config.preprocessing.transform
    contradictions = {
        f"config.model.prior must be one of {', '.join(FAMILIES)}, got {model.prior!r}": model.prior
        not in FAMILIES,
        f"config.model.prior_components is for the priors {', '.join(MIXTURES)}, which need it, "
        "and for no other: got "
        f"{model.prior_components} for {model.prior}": (model.prior in MIXTURES)
        != bool(model.prior_components),
        "a density needs blocks that are contractions: constraint.norms = none is for "
        "classification": (
            config.objective != "classification" and config.constraint.norms == "none"
        ),
        f"preprocessing.entrywise is for transform equalize, got {transform!r}": (
            config.preprocessing.entrywise and transform != "equalize"
        ),
        f"config.optimizer.boundaries are for schedule step, got {config.optimizer.schedule!r}: "
        "leave them out": (config.optimizer.boundaries and config.optimizer.schedule != "step"),
        f"config.model.constants must be (mu, nu), or () for none, got {model.constants}": len(
            model.constants
        )
        not in (0, 2),
        "config.evaluation.num_importance_examples needs draws: set "
        "config.evaluation.num_importance_draws": (
            evaluation.num_importance_examples and not evaluation.num_importance_draws
        ),
        "config.evaluation.num_importance_examples must be 0, for all, or at least 2, got 1": (
            evaluation.num_importance_examples == 1
        ),
        "config.classifier.margin is a radius for config.classifier.head = linear: the logits of a "
        "pooled head have no scale": (
            config.classifier.margin and config.classifier.head != "linear"
        ),
        "config.model.stages must have at least one stage, got none": not model.stages,
    }
    for sentence, is_wrong in contradictions.items():
        if is_wrong:
            raise ValueError(sentence)


def with_field(plain: dict[str, Any], name: str, change: Callable[[Any], Any]) -> dict[str, Any]:
    """The plain data of a config with another value of one field, or of some fields of a group,
    given as a dictionary.

    Whether the fields exist, and may have these values, `parse` says.

    Args:
        plain: Plain data.
        name: Name of the field, such as ``model.stages[0].hidden``.
        change: ``old value -> new value``; the old one is ``()`` if there is none.

    Raises:
        ValueError: If the name reaches into a value that has no fields.
    """

    def changed(value: Any, keys: list[str], path: str) -> Any:
        if not keys:
            new = change(value)
            return value | new if isinstance(value, dict) and isinstance(new, dict) else new
        key, *rest = keys
        if isinstance(value, dict):
            return value | {key: changed(value.get(key, {} if rest else ()), rest, f"{path}.{key}")}
        if not isinstance(value, list):
            raise ValueError(f"{path} has no fields: it is {value!r}")
        if not (key.isdecimal() and int(key) < len(value)):
            raise ValueError(f"{path} has no entry {key}: it has {len(value)}")
        entry = changed(value[int(key)], rest, f"{path}[{key}]")
        return [entry if index == int(key) else old for index, old in enumerate(value)]

    return changed(plain, re.findall(r"[^.\[\]]+", name), "config")


def check_name(name: str, known: Iterable[str]) -> None:
    """Raises ``ValueError`` unless a config file knows what follows its colon."""
    if name not in (names := list(known)):
        raise ValueError(
            f"the config file knows no {name!r} after its colon: the names are {', '.join(names)}"
        )


def set_variant(config: Any, variant: str, *own: str) -> None:
    """Makes the config of a classifier that of another member of its family.

    Args:
        config: Config of a classifier, which this function changes.
        variant: A coefficient c such as "0.7", or "vanilla", the network without its constraint.
        own: Variants that the config file makes itself; they change nothing here.

    Raises:
        ValueError: If the variant is none of these.
    """
    if variant in own:
        return
    if variant == "vanilla":
        config.constraint.norms = "none"
        return
    try:
        config.model.coeff = float(variant)
    except ValueError:
        names = " or ".join(", ".join(("vanilla", *own)).rsplit(", ", 1))
        raise ValueError(
            f"a variant is a coefficient such as 0.7, {names}; got {variant!r}"
        ) from None
