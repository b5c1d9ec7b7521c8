"""Every setting of a run with its default and meaning.

A file in ``configs/`` starts from `default_config`, a dictionary of these fields with attributes, and changes some of them.
`parse` checks the result and makes it a `Config`, which the rest of the library takes.
"""

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

import ml_collections
from ml_collections import config_dict

from iresnet_jax.json_dataclasses import Range, from_plain
from iresnet_jax.maths.logdet.estimator import LogdetEstimator
from iresnet_jax.maths.logdet.exact import ExactLogdet
from iresnet_jax.maths.logdet.hutchinson_series import SeriesLogdet
from iresnet_jax.maths.logdet.krylov import KrylovLogdet
from iresnet_jax.maths.logdet.roulette import RouletteLogdet
from iresnet_jax.models.architecture import StageSpec

Count = Annotated[int, Range("[1, inf)")]
CountOrNone = Annotated[int, Range("[0, inf)")]  # 0 switches something off
Positive = Annotated[float, Range("(0, inf)")]
NotNegative = Annotated[float, Range("[0, inf)")]
Decay = Annotated[float, Range("[0, 1)")]  # decay of an average, which would never move at 1


@dataclass(frozen=True)
class DataConfig:
    """What is learnt."""

    name: str = "digits"  # a name that `iresnet_jax.data.load` knows: an image data set, a 2-D toy or a simulator
    data_dir: str | None = None  # folder of TensorFlow Datasets; None is $TFDS_DATA_DIR or its default
    # Shares of arrays in a file that has not split them; image data sets come with their splits.
    validation_fraction: Annotated[float, Range("(0, 1)")] = 0.1
    test_fraction: Annotated[float, Range("[0, 1)")] = 0.1
    condition_on_labels: bool = False  # "density" is p(x | class): the class, as a vector of 0 and 1, is the context


@dataclass(frozen=True)
class ModelConfig:
    """The residual flow."""

    stages: tuple[StageSpec, ...] = (StageSpec(num_blocks=4, hidden=(32, 32), kernel_sizes=(3, 1, 3)),)
    coeff: Annotated[float, Range("(0, 1)")] = 0.9  # largest operator norm c
    # c limits each layer's norm; the product of the layers of each block; or "network", the Lipschitz constants L_b of all
    # blocks by prod (1 - L_b) = 1 - c, so that Lip(F^-1) <= 1 / (1 - c) without ActNorm.
    budget: Literal["layer", "block", "network"] = "layer"
    prior: Literal["gaussian", "logistic"] = "gaussian"
    last_scale: NotNegative = 1.0  # initial factor on the last layer of each branch
    sharp: bool = False  # whether the Swish family starts sharper in a density the wider its layers are


@dataclass(frozen=True)
class PreprocessingConfig:
    """The first bijection of a density."""

    # Pixels in [0, 1]: "center", x - 1/2; "logit", logit(alpha + (1 - 2 alpha) x); "equalize", the cumulative histogram of the
    # training pixels, then the logit. Continuous data: "standardize" each entry, or "whiten" vectors. Either: "none".
    transform: Literal["center", "logit", "equalize", "standardize", "whiten", "none"] = "center"
    entrywise: bool = False  # "equalize" with each pixel's own frequency of the most common grey level
    alpha: Annotated[float, Range("(0, 0.5)")] = 0.05


@dataclass(frozen=True)
class LogdetConfig:
    """An estimator of log-determinants; each kind reads only the fields that name it."""

    # "series" is cut off after num_terms; "roulette" is a series without bias; "krylov" suits blocks that stretch or shrink as
    # much as they may; "exact" takes the whole Jacobian.
    kind: Literal["exact", "series", "roulette", "krylov"] = "series"
    num_terms: Count = 5  # terms of "series", Jacobian products of "krylov"
    num_probes: Count = 1  # probe vectors an example; all kinds but "exact"
    probe: Literal["rademacher", "gaussian"] = "rademacher"
    exact_trace: bool = True  # the trace in closed form where there is one: less noise, see benchmarks/exact_trace.py
    distribution: Literal["poisson", "geometric"] = "poisson"  # random length of "roulette"
    parameter: Positive = 2.0  # mean of "poisson", or success probability of "geometric"
    num_exact_terms: CountOrNone = 2  # terms of "roulette" before its random ones

    def __post_init__(self):
        self.build()  # raises where a parameter does not suit its distribution

    def build(self, num_terms: int | None = None) -> LogdetEstimator:
        """The estimator, or the one with another number of terms."""
        count = num_terms or self.num_terms
        probes: dict[str, Any] = {"num_probes": self.num_probes, "probe": self.probe, "exact_trace": self.exact_trace}
        if self.kind == "exact":
            return ExactLogdet()
        if self.kind == "roulette":
            return RouletteLogdet(self.distribution, self.parameter, self.num_exact_terms, **probes)
        return KrylovLogdet(count, **probes) if self.kind == "krylov" else SeriesLogdet(count, **probes)


@dataclass(frozen=True)
class ConstraintConfig:
    """How training keeps blocks contractions; a trained model is certified in any case."""

    # "estimated": norms by power iteration. "certified": guaranteed upper bounds at every step. "none": an ordinary residual
    # network without inverse, for classification alone.
    norms: Literal["estimated", "certified", "none"] = "estimated"
    num_steps: Count = 1  # power iterations a training step; validation iterates until rtol
    rtol: Positive = 1e-3  # relative tolerance of the norm in validation
    num_squarings: Annotated[int, Range("[0, 20]")] = 4  # Gram iterations of "certified"
    # Twists of the embedding behind "certified": "all" is tighter than "one" below 8 x 8 pixels, and four times as dear.
    twists: Literal["auto", "all", "one"] = "auto"


@dataclass(frozen=True)
class HybridConfig:
    """Objective "hybrid", which minimises cross-entropy + lambda bits/dim, or nats instead for continuous data.

    A weight lambda of ``D log 2`` for images of D dimensions, and of 1 for continuous data, is the likelihood of data and
    labels; a smaller weight pays more attention to the labels.
    """

    weight: NotNegative = 1.0  # lambda after the ramp
    initial_weight: NotNegative = 1.0  # lambda at step 0, if there is a ramp
    ramp_steps: CountOrNone = 0  # steps of the straight line between them; 0 for no ramp
    # Priors start from the moments of their class' latents instead of equal: the first step has an LDA to improve on.
    fitted_priors: bool = False


@dataclass(frozen=True)
class ClassifierConfig:
    """The classifier of objective "classification"."""

    pad_channels: CountOrNone = 0  # channels of zeros behind those of an image: they widen the network
    mean: tuple[float, ...] = (0.5,)  # pixel mean on [0, 1], one a channel or one for all
    std: tuple[Positive, ...] = (0.5,)  # pixel standard deviation, one a channel or one for all
    label_smoothing: Decay = 0.0  # also of objective "hybrid"
    # "actnorm" in front of every branch; "batchnorm" in front of every layer inside it makes the ordinary residual network to
    # compare with, which has neither constraint nor inverse.
    normalization: Literal["actnorm", "batchnorm"] = "actnorm"


@dataclass(frozen=True)
class InverseProblemConfig:
    """Objective "inversion": images are measured, and a network ``F`` learns to reconstruct them by its inverse.

    The loss is ``(1 - a) |P(F^-1(y)) - x|^2 + a |F(x) - y|^2``, with ``y`` the blurred image ``x`` with noise, ``P`` the
    projection onto pixels in [0, 1] and ``a`` the ``forward_share``.
    """

    width: NotNegative = 1.0  # standard deviation of the Gaussian blur in pixels; 0 does not blur
    noise: NotNegative = 0.05  # standard deviation of the noise, as a fraction of the range from black to white
    # 0 trains the reconstruction (Arndt et al. 2024), 1 the forward operator alone, without an inverse (Arndt et al. 2023).
    forward_share: Annotated[float, Range("[0, 1]")] = 0.0
    training_atol: Positive = 1e-3  # largest Euclidean error of each block's inverse in training, in units of pixels


@dataclass(frozen=True)
class AugmentationConfig:
    """Random changes of training examples: crops and flips of images that are classified, noise on vectors."""

    crop_padding: CountOrNone = 0  # largest shift in pixels
    flip: bool = False  # left to right, every other time
    noise: NotNegative = 0.0  # on vectors whose density is learned: its standard deviation, in those of their entries


@dataclass(frozen=True)
class OptimizerConfig:
    """The update rule and its learning rate."""

    # "muon" is steepest descent in the operator norm; .95 is its usual momentum.
    name: Literal["adam", "adamw", "adamax", "muon", "sgd"] = "adam"
    learning_rate: Positive = 1e-3  # peak
    schedule: Literal["constant", "cosine", "step"] = "cosine"
    warmup_steps: CountOrNone = 100  # straight line from 0 to the peak
    final_fraction: Annotated[float, Range("[0, 1]")] = 0.0  # end of "cosine", as a fraction of the peak
    boundaries: tuple[Annotated[float, Range("(0, 1)")], ...] = ()  # decays of "step", as fractions of training.total_steps
    decay_factor: Annotated[float, Range("(0, 1]")] = 0.1  # factor of "step" at each boundary
    weight_decay: NotNegative = 0.0  # kernels alone decay; decoupled from the gradient in "adamw" and "muon"
    momentum: Decay = 0.9  # "sgd" and "muon"
    nesterov: bool = False  # "sgd" and "muon"
    b1: Decay = 0.9  # decay of the first moment in the Adam family, and of "muon" for all but kernels
    b2: Decay = 0.99  # decay of the second moment in the Adam family, and of "muon" for all but kernels
    clip_norm: NotNegative = 1.0  # largest norm of the whole gradient; 0 does not clip


@dataclass(frozen=True)
class TrainingConfig:
    """The run."""

    total_steps: Count = 1000  # updates; warm-up and decay of the learning rate are fractions of them
    minutes: NotNegative = 0.0  # most wall-clock time, compilation included; 0 is no limit
    patience: CountOrNone = 0  # validations without an improvement after which training ends; 0 never ends it early
    batch_size: Count = 128  # examples of a step over all devices
    num_parts: Count = 1  # parts of each device's share, computed one after the other: a large batch in the memory of a part
    ema_decay: Decay = 0.999  # moving average of the parameters, which evaluation uses; 0 evaluates the parameters themselves
    actnorm_examples: Count = 1024  # training examples that ActNorm is fitted to
    log_every_steps: Count = 50
    eval_every_steps: Count = 500  # steps between validations, each with a checkpoint
    eval_examples: Count = 2048  # most validation examples
    # If validation shows that training exploits what its log-determinant cuts off, logdet.num_terms is raised up to this.
    max_num_terms: CountOrNone = 20
    blocks: Literal["auto", "scan", "unroll"] = "auto"  # "auto" unrolls blocks on CPUs, where that is faster
    rematerialize: bool = False  # recompute blocks in the backward pass: less memory, more time
    # Branches in bfloat16 in training steps. Parameters, norms and sums stay in float32, as does everything after training.
    bfloat16: bool = False
    # Products on accelerators; "tensorfloat32" is faster and too coarse to invert.
    matmul_precision: Literal["float32", "tensorfloat32", "highest", "high", "default"] = "float32"


@dataclass(frozen=True)
class EvaluationConfig:
    """What is measured after training."""

    logdet: LogdetConfig = LogdetConfig(kind="roulette", num_exact_terms=20)
    batch_size: Count = 256
    num_dequantisations: Count = 4  # noise draws an image
    num_probe_draws: Count = 4  # probe draws a noise draw
    # Largest error of an example's likelihood from its log-determinants, |bias| + standard error in bits/dim or nats, root mean
    # square over examples: the cheapest exact or estimated log-determinants that reach it replace ``logdet``, which checks
    # them, and num_probe_draws. 0 evaluates by ``logdet``, or exactly up to 256 dimensions.
    target_stderr: NotNegative = 0.0
    num_examples: Count = 20_000  # test examples of a toy or simulator; other data use their whole test split
    # Test contexts of a simulator whose posterior samples a classifier tries to tell from the model's; 0 for none.
    num_posteriors: CountOrNone = 10
    num_posterior_samples: Annotated[int, Range("[10, inf)")] = 1000  # samples of the model, and of the truth, a context
    inverse_atol: Positive = 1e-6  # largest Euclidean error of each block's inverse, for every example


@dataclass(frozen=True)
class ReferencesConfig:
    """What the report compares with."""

    values: tuple[tuple[str, float], ...] = ()  # pairs ("who", value in bits/dim, nats or % error)


@dataclass(frozen=True)
class Config:
    """All settings of a run."""

    seed: Annotated[int, Range("[0, 4294967296)")] = 0  # JAX would cut off further bits
    # "hybrid" is a density with a prior for every class, "inversion" reconstructs images from measurements.
    objective: Literal["density", "classification", "hybrid", "inversion"] = "density"
    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    preprocessing: PreprocessingConfig = field(default_factory=PreprocessingConfig)
    logdet: LogdetConfig = field(default_factory=LogdetConfig)  # in training; evaluation has its own
    constraint: ConstraintConfig = field(default_factory=ConstraintConfig)
    hybrid: HybridConfig = field(default_factory=HybridConfig)
    classifier: ClassifierConfig = field(default_factory=ClassifierConfig)
    inverse_problem: InverseProblemConfig = field(default_factory=InverseProblemConfig)
    augmentation: AugmentationConfig = field(default_factory=AugmentationConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    references: ReferencesConfig = field(default_factory=ReferencesConfig)


def default_config() -> Any:  # a ConfigDict, whose fields type checkers cannot see
    """The defaults of `Config` for a config file to change."""
    plain = dataclasses.asdict(Config())
    plain["data"]["data_dir"] = config_dict.placeholder(str)
    config = ml_collections.ConfigDict(plain)
    config.lock()
    return config


def estimator_settings(**overrides: Any) -> dict[str, Any]:
    """The fields of a `LogdetConfig` for a config file."""
    return {**dataclasses.asdict(LogdetConfig()), **overrides}


def parse(settings: Any) -> Config:
    """The settings of a config file, or of JSON data in the same form, checked; missing fields keep their default.

    Raises:
        ValueError: If a field is unknown, of the wrong kind or out of its range, or settings contradict each other.
    """
    config = from_plain(Config, settings.to_dict() if hasattr(settings, "to_dict") else settings, "config")
    _check_combinations(config)
    return config


def _check_combinations(config: Config) -> None:
    """Raises ``ValueError`` for settings that are sound one by one and not together."""
    augmented = config.augmentation.crop_padding or config.augmentation.flip
    boundaries = config.optimizer.boundaries
    if config.objective == "density" and augmented:
        raise ValueError(
            "crops and flips of config.augmentation are for the objectives classification and hybrid: a density is that of the "
            "data as they are"
        )
    if config.objective == "inversion":
        _check_inversion(config)
    if config.objective != "density" and config.augmentation.noise:
        raise ValueError(f"config.augmentation.noise is for the objective density, got {config.augmentation.noise}")
    if config.objective in ("classification", "inversion") and config.model.sharp:
        raise ValueError(f"config.model.sharp is for the objectives density and hybrid: leave it false for {config.objective}")
    if config.objective in ("density", "hybrid") and config.constraint.norms == "none":
        raise ValueError(
            "a density needs blocks that are contractions: constraint.norms = none is for classification and inversion"
        )
    if config.training.num_parts > 1 and config.classifier.normalization == "batchnorm":
        raise ValueError("BatchNorm in the branches needs the whole batch at once: set training.num_parts to 1")
    if config.training.bfloat16 and config.classifier.normalization == "batchnorm":
        raise ValueError(
            "training.bfloat16 is for networks with ActNorm: set it to false, or classifier.normalization to actnorm"
        )
    if config.preprocessing.entrywise and config.preprocessing.transform != "equalize":
        raise ValueError(f"preprocessing.entrywise is for transform equalize, got {config.preprocessing.transform!r}")
    if list(boundaries) != sorted(set(boundaries)):
        raise ValueError(f"config.optimizer.boundaries must increase, got {boundaries}")
    if not config.model.stages:
        raise ValueError("config.model.stages must have at least one stage, got none")


def _check_inversion(config: Config) -> None:
    if config.augmentation.crop_padding or config.augmentation.flip:
        raise ValueError("crops and flips of config.augmentation are for the objectives classification and hybrid")
    if config.classifier.normalization == "batchnorm":
        raise ValueError("the objective inversion has no normalization: leave classifier.normalization at actnorm")
    if config.training.bfloat16:
        raise ValueError(
            "training.bfloat16 is for the way forward, and the objective inversion trains the inverse: set it to false"
        )
    if config.constraint.norms == "none" and config.inverse_problem.forward_share:
        raise ValueError(
            "without a constraint there is no inverse, and the network maps measurements to images: set "
            "inverse_problem.forward_share to 0, or constraint.norms to estimated"
        )


def check_name(name: str, known: Iterable[str]) -> None:
    """Raises ``ValueError`` unless a config file knows what follows its colon."""
    if name not in (names := list(known)):
        raise ValueError(f"the config file knows no {name!r} after its colon: the names are {', '.join(names)}")


def set_variant(config: Any, variant: str) -> None:
    """Makes the config of a classifier that of another member of its family.

    Args:
        config: Config of a classifier, which this function changes.
        variant: A coefficient c such as "0.7"; "vanilla", the network without its constraint; or "batchnorm", an ordinary
            residual network with BatchNorm in its branches.

    Raises:
        ValueError: If the variant is none of these.
    """
    if variant in ("vanilla", "batchnorm"):
        config.constraint.norms = "none"
        config.classifier.normalization = "actnorm" if variant == "vanilla" else "batchnorm"
        return
    try:
        config.model.coeff = float(variant)
    except ValueError:
        raise ValueError(f"a variant is a coefficient such as 0.7, vanilla or batchnorm; got {variant!r}") from None
