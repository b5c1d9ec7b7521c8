"""Every setting of a run with its default and meaning.

A file in ``configs/`` changes some fields of `default_config`, a dictionary with attributes.
`parse` checks the result and makes it a `Config`, which the rest of the library takes.
"""

import dataclasses
import operator
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

import ml_collections

from iresnet_jax.arguments import (
    Count,
    CountOrNone,
    Decay,
    NotNegative,
    Positive,
    Range,
    from_plain,
)
from iresnet_jax.bijections.residual import Solver
from iresnet_jax.data.augment import check_transformations
from iresnet_jax.maths.logdet_config import LogdetConfig
from iresnet_jax.models.architecture import NoiseSpec, StageSpec
from iresnet_jax.models.free import ConstraintConfig
from iresnet_jax.models.priors import FAMILIES, MIXTURES
from iresnet_jax.training.hybrid import HybridConfig
from iresnet_jax.training.optimizers import OptimizerConfig
from iresnet_jax.training.train import STEPS, STEPS_IN_TIME


@dataclass(frozen=True)
class DataConfig:
    """Data set."""

    # A name for `iresnet_jax.data.load`: an image data set, a 2-D toy or files.
    name: str = "digits"
    # Share of the examples, for data without splits.
    validation_fraction: Annotated[float, Range("(0, 1)")] = 0.1
    test_fraction: Annotated[float, Range("[0, 1)")] = 0.1  # likewise
    # Makes the class, as a one-hot vector, the context of a density p(x | class).
    condition_on_labels: bool = False


@dataclass(frozen=True)
class ModelConfig:
    """The residual flow."""

    stages: tuple[StageSpec, ...] = (
        StageSpec(num_blocks=4, hidden=(32, 32), kernel_sizes=(3, 1, 3)),
    )  # from data to latents
    coeff: Annotated[float, Range("(0, 1)")] = 0.9  # largest operator norm c
    # c limits the norm of each layer, or the product of norms in each block.
    budget: Literal["layer", "block"] = "layer"
    # Least and largest stretch (mu, nu) of the whole flow, in place of coeff and budget: mu <=
    # |F(x) - F(y)| / |x - y| <= nu by construction, without ActNorm. Not prescribed by default.
    constants: tuple[Positive, ...] = ()
    # Distribution of the latents: "gaussian" or "logistic" entries. For densities also "mixture"
    # (normal distributions with full covariances), "scales" (a normal distribution at several
    # sizes), and "marginals" (every entry has a mixture).
    prior: str = "gaussian"
    # Components of "mixture", "scales" and "marginals", where 16 scales are many; 0 for other
    # priors.
    prior_components: CountOrNone = 0
    # Widths of a network on the contexts of a density; () uses no network.
    context_hidden: tuple[Count, ...] = ()
    last_scale: NotNegative = 1.0  # initial factor on the last layer of each branch
    # Initial sharpness of activations of the Swish family in a density, in units of one over the
    # size of their inputs; above 1 they also bend in different places. 0 keeps the activation's
    # default.
    sharpness: NotNegative = 0.0
    # Noise of integer levels: "uniform", or "variational", by a flow given the image, which is
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
    # Gives "equalize" each pixel's frequency of the most common grey level.
    entrywise: bool = False
    # Least distance of a logit's argument from 0 and 1.
    alpha: Annotated[float, Range("(0, 0.5)")] = 0.05


@dataclass(frozen=True)
class ClassifierConfig:
    """The classifier of objective "classification"."""

    # Channels of zeros after an image's channels, which widen the network.
    pad_channels: CountOrNone = 0
    mean: tuple[float, ...] = (0.5,)  # pixel mean on [0, 1], one per channel or one for all
    std: tuple[Positive, ...] = (0.5,)  # pixel standard deviation, one per channel or one for all
    label_smoothing: Decay = 0.0  # also for objective "hybrid"
    # "linear", on all features, is for certified radii with blocks that never stretch.
    head: Literal["pooled", "linear"] = "pooled"
    # Radius that training aims at, a 2-norm of pixels on [0, 1]: the loss of a linear head raises
    # the logits of wrong classes by their largest gain on the true class within the radius.
    margin: NotNegative = 0.0
    # Divisor of the logits in the loss; a value below 1 sacrifices fewer images for others.
    temperature: Positive = 1.0


@dataclass(frozen=True)
class AugmentationConfig:
    """Random changes of training examples: crops and flips for classification, noise on vectors,
    transformations.
    """

    crop_padding: CountOrNone = 0  # largest shift in pixels
    flip: bool = False  # left to right, with probability 1/2
    # Standard deviation of noise on vectors of a density, relative to each entry's.
    noise: NotNegative = 0.0
    # Half of the images in the training of a density are changed by one of these, which the context
    # names. Validation and the kept model use the density of unchanged images. "left", "right",
    # "up" and "down" move by a pixel, "turn" is by 180 degrees, "mirror" is left to right, and
    # there are "upside_down" and "transpose". None by default.
    transformations: tuple[str, ...] = ()

    def __post_init__(self):
        check_transformations(self.transformations)


@dataclass(frozen=True)
class EvaluationConfig:
    """Measurements after training."""

    # Log-determinant of test likelihoods beyond 256 dimensions; up to 256 it is exact.
    logdet: LogdetConfig = LogdetConfig(kind="roulette", num_exact_terms=20)  # noqa: RUF009 (it is frozen)
    batch_size: Count = 256  # most examples at once
    num_dequantisations: Count = 4  # noise draws per image
    num_probe_draws: Count = 4  # probe draws per noise draw
    # Noise draws of the importance-weighted bound of discrete data; 0 for no bound.
    num_importance_draws: CountOrNone = 0
    # Number of test examples with these draws, evenly spaced; 0 for all.
    num_importance_examples: CountOrNone = 0
    num_examples: Count = 20_000  # test examples of a toy; other data use their whole test split
    # Radii at which the accuracy of a classifier is verified and attacked: 2-norms of pixels on [0,
    # 1].
    radii: tuple[Positive, ...] = ()
    attack_steps: Count = 50  # steps of projected gradient descent
    attack_starts: Count = 1  # random starts of the attack on each image
    # Largest Euclidean error of each block's inverse, for every example.
    inverse_atol: Positive = 1e-6

    def solver(self) -> Solver:
        """The solver of inverses."""
        return Solver(atol=self.inverse_atol)


@dataclass(frozen=True)
class ReferencesConfig:
    """Published numbers that the report compares with."""

    values: tuple[tuple[str, float], ...] = ()  # pairs ("who", value in bits/dim, nats or % error)


@dataclass(frozen=True)
class TrainingConfig:
    """The training."""

    # Updates; warm-up and decay of the learning rate are fractions of them. 0 means 1000, or with
    # `minutes` as many as fit, with the schedule of 10,000 updates stretched over the time.
    total_steps: CountOrNone = 0
    minutes: NotNegative = 0.0  # limit of the wall-clock time, compilation included; 0 is no limit
    # Validations without an improvement after which training ends; 0 never ends it early.
    patience: CountOrNone = 0
    batch_size: Count = 128  # examples of a step over all devices
    # Parts of each device's share, computed one after the other to save memory.
    num_parts: Count = 1
    # Decay of the parameters' moving average, which evaluation uses; 0 evaluates the parameters.
    ema_decay: Decay = 0.999
    actnorm_examples: Count = 1024  # training examples that ActNorm is fitted to
    # File or folder of a saved model with these stages; training starts from its weights.
    initial_model: str = ""
    log_every_steps: Count = 50  # steps that one line of the log averages
    eval_every_steps: Count = 500  # steps between validations, each with a checkpoint
    eval_examples: Count = 2048  # largest number of validation examples
    # Has no effect: training_bias in the log says whether more terms are needed.
    max_num_terms: CountOrNone = 20
    # "auto" unrolls blocks on CPUs, where this is faster.
    blocks: Literal["auto", "scan", "unroll"] = "auto"
    rematerialize: bool = False  # recompute blocks in the backward pass: less memory, more time
    # Precision of matrix products on accelerators; "tensorfloat32" is faster, but too coarse for
    # inverses.
    matmul_precision: Literal["float32", "tensorfloat32", "highest", "high", "default"] = "float32"

    @property
    def schedule_steps(self) -> int:
        """Updates that the schedule of the learning rate is made for; a training of another length
        stretches the schedule.
        """
        return self.total_steps or (STEPS_IN_TIME if self.minutes else STEPS)


@dataclass(frozen=True)
class Config:
    """All settings of a run."""

    # Seed of all randomness; JAX would cut off further bits.
    seed: Annotated[int, Range("[0, 4294967296)")] = 0
    # "hybrid" has a prior for every class.
    objective: Literal["density", "classification", "hybrid"] = "density"
    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    preprocessing: PreprocessingConfig = field(default_factory=PreprocessingConfig)
    # Log-determinant in training; evaluation has its own.
    logdet: LogdetConfig = field(default_factory=LogdetConfig)
    constraint: ConstraintConfig = field(default_factory=ConstraintConfig)
    hybrid: HybridConfig = field(default_factory=HybridConfig)
    classifier: ClassifierConfig = field(default_factory=ClassifierConfig)
    augmentation: AugmentationConfig = field(default_factory=AugmentationConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    references: ReferencesConfig = field(default_factory=ReferencesConfig)


def default_config() -> Any:  # a ConfigDict: type checkers cannot see its fields
    """The defaults of `Config` for a config file to change."""
    config = ml_collections.ConfigDict(dataclasses.asdict(Config()))
    config.lock()
    return config


def parse(settings: Any) -> Config:
    """The checked settings of a config file, or of JSON data in the same form; missing fields keep
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


# Settings that belong to some objectives only; the others leave them at their defaults.
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
    """Raises ``ValueError`` for settings that are valid alone and contradict each other."""
    for name, objectives in _OBJECTIVES.items():
        found, default = (operator.attrgetter(name)(each) for each in (config, Config()))
        if found != default and config.objective not in objectives:
            raise ValueError(
                f"config.{name} is for {' and '.join(objectives)}: leave it at "
                f"{default!r} for {config.objective}"
            )
    model, evaluation, transform = config.model, config.evaluation, config.preprocessing.transform
    contradictions = {
        f"config.model.prior must be one of {', '.join(FAMILIES)}, got {model.prior!r}": (
            model.prior not in FAMILIES
        ),
        f"config.model.prior_components is for the priors {', '.join(MIXTURES)}, which need it, "
        f"and for no other: got {model.prior_components} for {model.prior}": (
            (model.prior in MIXTURES) != bool(model.prior_components)
        ),
        "a density needs blocks that are contractions: constraint.norms = none is for "
        "classification": (
            config.objective != "classification" and config.constraint.norms == "none"
        ),
        f"preprocessing.entrywise is for transform equalize, got {transform!r}": (
            config.preprocessing.entrywise and transform != "equalize"
        ),
        f"config.optimizer.boundaries are for schedule step, got {config.optimizer.schedule!r}: "
        "leave them out": (config.optimizer.boundaries and config.optimizer.schedule != "step"),
        f"config.model.constants must be (mu, nu), or () for none, got {model.constants}": (
            len(model.constants) not in (0, 2)
        ),
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
    """The plain data of a config with one value changed: a field's, or a group's, as a dictionary.

    `parse` checks that the fields exist and may have these values.

    Args:
        plain: Plain data.
        name: Name of the field, such as ``model.stages[0].hidden``.
        change: ``old value -> new value``; the old value is ``()`` if there is none.
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
    """Raises ``ValueError`` unless a config file knows the name after its colon."""
    if name not in (names := list(known)):
        raise ValueError(
            f"the config file knows no {name!r} after its colon: the names are {', '.join(names)}"
        )


def set_variant(config: Any, variant: str, *own: str) -> None:
    """Changes the config of a classifier to another member of its family.

    Args:
        config: Config of a classifier, which this function changes.
        variant: A coefficient c such as "0.7", or "vanilla", the network without its constraint.
        own: Variants that the config file handles; they change nothing here.
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
