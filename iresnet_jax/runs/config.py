"""Every setting of a run with its default and meaning, and how it is read and changed.

A file in ``configs/`` changes some fields of `default_config`, a dictionary with attributes.
`parse` checks the result and makes it a `Config`, which the rest of the library takes.
"""

import ast
import dataclasses
import difflib
import json
import re
import runpy
from argparse import Namespace
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import ml_collections
import pydantic

from iresnet_jax.arguments import Count, CountOrNone, Decay, NotNegative, Parser, Positive, Range
from iresnet_jax.bijections.residual import Solver
from iresnet_jax.data import conditioned_on_labels, padded
from iresnet_jax.data import load as load_data
from iresnet_jax.data.dataset import DataSet
from iresnet_jax.maths.logdet_config import LogdetConfig
from iresnet_jax.models.architecture import NoiseSpec, StageSpec
from iresnet_jax.models.free import ConstraintConfig
from iresnet_jax.storage import path_of
from iresnet_jax.training.objectives import HybridConfig
from iresnet_jax.training.optimizers import OptimizerConfig
from iresnet_jax.training.train import STEPS, STEPS_IN_TIME


@dataclass(frozen=True)
class DataConfig:
    """Data set."""

    # A name for `iresnet_jax.data.load`: an image data set, a 2-D toy or files.
    name: str = "digits"
    # Share of the validation examples, for data without splits.
    validation_fraction: Annotated[float, Range("(0, 1)")] = 0.1
    # Share of the test examples, for data without splits.
    test_fraction: Annotated[float, Range("[0, 1)")] = 0.1
    # Pixels of zeros that are added on each side of an image.
    padding: CountOrNone = 0
    # Copies of an image's channels, one behind the other.
    copies: Count = 1
    # Makes the class, as a one-hot vector, the context of a density p(x | class).
    condition_on_labels: bool = False

    def load(self, num_classes: int | None = None) -> DataSet:
        """The data set; ``num_classes`` is the number of classes of an existing model."""
        fractions = self.validation_fraction, self.test_fraction
        return self.changed(load_data(self.name, fractions=fractions, num_classes=num_classes))

    def changed(self, data: DataSet) -> DataSet:
        """The loaded data set with padding, copies, and labels as contexts."""
        if self.padding or self.copies > 1:
            data = padded(data, self.padding, self.copies)
        return conditioned_on_labels(data) if self.condition_on_labels else data


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
    prior: Literal["gaussian", "logistic", "mixture", "scales", "marginals"] = "gaussian"
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
    # Share of a label's probability that goes to all classes alike, also for objective "hybrid".
    label_smoothing: Decay = 0.0
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
    # "transpose" is for square images. None by default.
    transformations: tuple[
        Literal["left", "right", "up", "down", "mirror", "upside_down", "turn", "transpose"], ...
    ] = ()


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
    # Limit on the time of training, compilation included; a compilation, a step or a validation
    # that has begun then still ends. 0 is no limit.
    minutes: NotNegative = 0.0
    # Validations without an improvement after which training ends; 0 never ends it early.
    patience: CountOrNone = 0
    batch_size: Count = 128  # examples of a step over all devices
    # Parts of each device's share, computed one after the other to save memory.
    num_parts: Count = 1
    # Decay of the parameters' moving average, which evaluation uses; 0 evaluates the parameters.
    ema_decay: Decay = 0.999
    actnorm_examples: Count = 1024  # training examples that ActNorm is fitted to
    # File or folder of a saved model with these stages, from whose weights training starts: to go
    # on with other settings or for longer. A 20 times smaller learning rate suffices.
    initial_model: str = ""
    log_every_steps: Count = 50  # steps that one line of the log averages
    # Steps between validations, each with a checkpoint; with `minutes` at most a twentieth of the
    # steps that are expected to fit, whose number is estimated anew as training goes on.
    eval_every_steps: Count = 500
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

    __pydantic_config__ = pydantic.ConfigDict(extra="forbid", allow_inf_nan=False)

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


_CONFIG = pydantic.TypeAdapter(Config)


def default_config() -> Any:  # a ConfigDict: type checkers cannot see its fields
    """The defaults of `Config` for a config file to change."""
    config = ml_collections.ConfigDict(dataclasses.asdict(Config()))
    config.lock()
    return config


def to_plain(settings: Any) -> dict[str, Any]:
    """A `Config`, or the dictionary with attributes of a config file, as JSON data."""
    as_dict = dataclasses.asdict
    plain = as_dict(settings) if isinstance(settings, Config) else settings.to_dict()
    number = lambda value: value.item() if hasattr(value, "item") else as_dict(value)  # noqa: E731
    return json.loads(json.dumps(plain, default=number))


def parse(settings: Any) -> Config:
    """The checked settings of a config file, or of JSON data in the same form; missing fields keep
    their default.

    Raises:
        ValueError: If a field is unknown, of the wrong kind or out of its range, or settings
            contradict each other.
    """
    settings = settings.to_dict() if hasattr(settings, "to_dict") else settings
    try:
        config = _CONFIG.validate_python(settings)
    except pydantic.ValidationError as error:
        raise ValueError(_sentence(error.errors()[0])) from None
    if contradiction := _contradiction(config):
        raise ValueError(contradiction)
    return config


def _sentence(error: Any) -> str:
    """One of pydantic's errors, with the setting's name and value."""
    keys = error["loc"]
    place = "config" + "".join(f"[{key}]" if isinstance(key, int) else f".{key}" for key in keys)
    if error["type"] == "unexpected_keyword_argument":
        return f"there is no {place}{_suggestion(keys[-1])}"
    got = "" if isinstance(error["input"], Mapping) else f", got {error['input']!r}"
    return f"{place}: {error['msg'].removeprefix('Value error, ')}{got}"


def _suggestion(name: str) -> str:
    """The setting that a misspelt name may mean."""
    groups = Config(), StageSpec, *vars(Config()).values()
    known = [
        f.name
        for group in groups
        if dataclasses.is_dataclass(group)
        for f in dataclasses.fields(group)
    ]
    close = difflib.get_close_matches(name, known, n=1)
    return f": did you mean {close[0]!r}?" if close else ""


def _contradiction(config: Config) -> str:
    """What is wrong with settings that are valid alone; empty if nothing is."""
    if config.objective != "hybrid" and config.hybrid != HybridConfig():
        return f"settings config.hybrid are for the objective hybrid, not for {config.objective}"
    if config.objective == "density" and config.classifier != ClassifierConfig():
        return "settings config.classifier are for classification and hybrid, not for density"
    if config.objective != "classification" and config.constraint.norms == "none":
        return "config.constraint.norms = none is for classification: a density needs contractions"
    if len(config.model.constants) not in (0, 2):
        return f"config.model.constants must be (mu, nu) or (), got {config.model.constants}"
    if config.classifier.margin and config.classifier.head != "linear":
        return "config.classifier.margin needs config.classifier.head = linear"
    return ""


# --- the command line ------------------------------------------------------------------------


def parse_train_flags(argv: Sequence[str]) -> Namespace:
    """Reads the flags of `train.py`, which are described there, the config file, and overrides of
    its settings, such as ``--config.model.stages[0].num_blocks=8``.

    A variant follows the file after a colon, as in ``configs/toy_2d.py:moons``. ``--config.FIELD``
    is true, ``--noconfig.FIELD`` false.

    Args:
        argv: The command line, program name first.

    Returns:
        The flags by name: a `Config`, the workdir as a path, ``debug``, and the arguments of
            `hosts.initialize`.
    """
    program, *arguments = argv
    overrides = [argument for argument in arguments if re.match(r"--?(no)?config\.", argument)]
    parser = Parser(prog=program, add_help=False, allow_abbrev=False)
    parser.add_argument("--config", default="configs/digits_density.py")
    parser.add_argument("--workdir")
    parser.add_argument("--debug", action="store_true")
    parser.add_argument("--coordinator_address")
    parser.add_argument("--num_processes", type=int)
    parser.add_argument("--process_id", type=int)
    given = parser.parse_args([argument for argument in arguments if argument not in overrides])
    path, _, variant = given.config.partition(":")
    name = "_".join(filter(None, (Path(path).stem, variant)))
    given.workdir = path_of(given.workdir or Path("runs", name))
    try:
        get_config = runpy.run_path(path)["get_config"]
        settings = to_plain(get_config(*([variant] if variant else [])))
    except Exception as error:  # a config file may raise anything
        raise ValueError(
            f"the config file {path} fails: {type(error).__name__}: {error}"
        ) from error
    for override in overrides:
        field_name, has_value, text = override.lstrip("-").partition("=")
        root, _, field_name = field_name.partition(".")
        set_field(settings, field_name, _read(text) if has_value else root == "config")
    given.config = parse(settings)
    return given


def _read(text: str) -> Any:
    """A number, a tuple or whatever else Python reads; other texts are strings."""
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def set_field(plain: Any, name: str, value: Any) -> None:
    """Changes a field in the plain data of a config, or fields of a group by a dictionary; `parse`
    checks the values.

    Args:
        plain: Plain data, which this function changes.
        name: Name of the field, such as ``model.stages[0].hidden``.
        value: Its new value.
    """
    if isinstance(value, Mapping):
        for key, entry in value.items():
            set_field(plain, f"{name}.{key}", entry)
        return
    *groups, last = (int(key) if key.isdecimal() else key for key in re.findall(r"[^.\[\]]+", name))
    try:
        for key in groups:
            plain = plain[key]
        plain[last] = value
    except (KeyError, IndexError, TypeError) as error:
        raise ValueError(f"there is no config.{name}{_suggestion(str(error.args[0]))}") from None


# --- variants of config files --------------------------------------------------------------------


def check_name(name: str, known: Iterable[str]) -> None:
    """Raises ``ValueError`` unless a config file knows the name after its colon."""
    if name not in (names := list(known)):
        raise ValueError(f"there is no variant {name!r}: the variants are {', '.join(names)}")


def set_variant(config: Any, variant: str, *own: str) -> None:
    """Changes the config of a classifier to another member of its family.

    Args:
        config: Config of a classifier, which this function changes.
        variant: A coefficient c such as "0.7", or "vanilla", the network without its constraint.
        own: Variants that the config file handles; they change nothing here.
    """
    if re.fullmatch(r"[\d.]+", variant):
        config.model.coeff = float(variant)
        return
    check_name(variant, ("vanilla", *own, "a coefficient such as 0.7"))
    if variant == "vanilla":
        config.constraint.norms = "none"
