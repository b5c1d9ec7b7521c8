"""Every setting of a run with its default and meaning, and the objects that settings stand for.

A file in ``configs/`` starts from `default_config` and overrides fields; unknown fields are errors. Config objects end here:
the rest of the library takes plain arguments.
"""

import difflib
import json
import re
from collections.abc import Callable, Iterable
from typing import Any

import ml_collections
import optax
from ml_collections import config_dict

from iresnet_jax.bijections import bijection as bijections
from iresnet_jax.maths.logdet.estimator import LogdetEstimator
from iresnet_jax.maths.logdet.exact import ExactLogdet
from iresnet_jax.maths.logdet.hutchinson_series import SeriesLogdet
from iresnet_jax.maths.logdet.krylov import KrylovLogdet
from iresnet_jax.maths.logdet.roulette import RouletteLogdet
from iresnet_jax.models import flow as model
from iresnet_jax.training import optimizers

Settings = Any  # a mapping of settings by name, or a ConfigDict, which reads like one without being one


def default_config() -> Any:  # a ConfigDict, whose fields type checkers cannot see
    """All settings of a run."""
    config = ml_collections.ConfigDict(
        {
            "seed": 0,
            "objective": "density",  # or "classification", or "hybrid": a density that classifies by a prior for every class
            "data": {
                "name": "digits",  # an image data set, or a 2-D toy of data.toys
                "data_dir": config_dict.placeholder(str),  # of TensorFlow Datasets; $TFDS_DATA_DIR or its default if unset
            },
            "model": {
                # One dictionary a stage with the fields of model.StageSpec.
                "stages": ({"num_blocks": 4, "hidden": (32, 32), "kernel_sizes": (3, 1, 3)},),
                "coeff": 0.9,  # largest operator norm
                "budget": "layer",  # that coeff limits: of each "layer", or the product of the layers of each "block"
                "prior": "gaussian",  # or "logistic"
                "last_scale": 1.0,  # initial factor on the last layer of a branch
            },
            "preprocessing": {
                # "center": x - 1/2; "logit": logit(alpha + (1 - 2 alpha) x); "equalize": the logit behind the histogram of the
                # training data, see `histogram`; "none" for 2-D toys
                "transform": "center",
                "entrywise": False,  # "equalize" by each entry's own share of the commonest level
                "alpha": 0.05,
            },
            "logdet": estimator_settings(kind="series", num_terms=5, num_probes=1),
            # How training keeps blocks contractions. What is used after it is certified in any case.
            "constraint": {
                # "estimated" by power iteration, or "certified": guaranteed upper bounds at every step. "none", for
                # classification alone, is an ordinary residual network, of which no inverse is promised.
                "norms": "estimated",
                "num_steps": 1,  # power iterations a training step; on validation data they go on to the tolerance
                "rtol": 1e-3,  # of that tolerance, relative to the norm
                "num_squarings": 4,  # of the Gram iteration behind "certified"
                "twists": "auto",  # of its embedding: "all" is tighter and dearer than "one", above all on small images
            },
            # Of "hybrid" alone: lambda in cross-entropy + lambda bits/dim. D log 2 for D dimensions makes that the likelihood
            # of images and labels; a smaller one pays more attention to the labels.
            "hybrid": {
                "weight": 1.0,
                "initial_weight": 1.0,  # that it starts from, if ramp_steps is positive,
                "ramp_steps": 0,  # to reach the other in a straight line within so many steps
            },
            # Of classification, and label_smoothing of "hybrid" too; the number of classes is that of the data.
            "classifier": {
                "pad_channels": 0,  # channels of zeros behind those of an image: they make the network wider
                "mean": (0.5,),  # of pixels in [0, 1], one a channel or one for all
                "std": (0.5,),
                "label_smoothing": 0.0,
                # "actnorm" in front of every branch; or "batchnorm" inside of it, in front of every layer, for the ordinary
                # residual network to compare with, which has no constraint and no inverse.
                "normalization": "actnorm",
            },
            "augmentation": {  # of training images that are classified, on the device
                "crop_padding": 0,  # pixels that an image is shifted by at most
                "flip": False,  # left to right
            },
            "optimizer": {
                "name": "adam",  # "adamw", "adamax", "sgd"; or "muon", steepest descent in the operator norm, with momentum .95
                "learning_rate": 1e-3,  # at its peak
                "schedule": "cosine",  # or "constant", or "step", by decay_factor at each of the boundaries
                "warmup_steps": 100,
                "final_fraction": 0.0,  # of the peak, where "cosine" ends
                "boundaries": (),  # as fractions of training.total_steps
                "decay_factor": 0.1,
                "weight_decay": 0.0,  # of kernels alone; decoupled in "adamw" and "muon"
                "momentum": 0.9,  # of "sgd" and "muon"
                "nesterov": False,  # of these
                "b1": 0.9,  # of the others, and of all that is no kernel in "muon"
                "b2": 0.99,
                "clip_norm": 1.0,  # of the whole gradient; 0 for none
            },
            "training": {
                "total_steps": 1000,
                "batch_size": 128,  # over all devices
                "ema_decay": 0.999,  # of the parameters that are evaluated; 0 evaluates the parameters themselves
                "actnorm_examples": 1024,  # that ActNorm is fitted to
                "log_every_steps": 50,
                "eval_every_steps": 500,  # on validation, and a checkpoint
                "eval_examples": 2048,  # at most, of the validation split
                # Training raises logdet.num_terms up to this, as far as validation shows that it exploits what they cut off.
                "max_num_terms": 20,
                "blocks": "auto",  # "scan", "unroll", or by backend
                "rematerialize": False,  # blocks once more in the backward pass, which saves memory
                "matmul_precision": "float32",  # on accelerators; "tensorfloat32" is faster and too coarse to invert
            },
            "evaluation": {
                "logdet": estimator_settings(kind="roulette", num_exact_terms=20, num_probes=1),
                "batch_size": 256,
                "num_dequantisations": 4,  # draws of noise for each image
                "num_probe_draws": 4,  # for each dequantisation
                "num_examples": 20_000,  # of a 2-D toy's test set; image data sets use their whole test split
                "inverse_atol": 1e-6,  # of each block, of the Euclidean distance to the solution of each example
            },
            # What the report compares with: {"who": value in bits/dim or nats}.
            "references": {"values": ()},
        }
    )
    config.lock()
    return config


def check_name(name: str, known: Iterable[str]) -> None:
    """Raises ``ValueError`` unless a config file knows what follows its colon."""
    if name not in (names := list(known)):
        raise ValueError(f"the config file knows no {name!r} after its colon: the names are {', '.join(names)}")


def set_variant(config: Any, variant: str) -> None:
    """Makes the config of a classifier that of another one of its family.

    Args:
        config: The config, which is changed.
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


_LATER = ("objective", "classifier", "augmentation", "hybrid")


def with_later_defaults(plain: dict[str, Any]) -> dict[str, Any]:
    """A plain config from before some settings existed, with those at their defaults, which change nothing."""
    defaults = to_plain(default_config())
    plain = {**{name: defaults[name] for name in _LATER}, **plain}
    evaluation = {**plain["evaluation"], "logdet": {"exact_trace": False, **plain["evaluation"]["logdet"]}}
    training = {"max_num_terms": defaults["training"]["max_num_terms"], **plain["training"]}
    logdet_settings = {"exact_trace": False, **plain["logdet"]}
    preprocessing = {"entrywise": defaults["preprocessing"]["entrywise"], **plain["preprocessing"]}
    return {**plain, "logdet": logdet_settings, "evaluation": evaluation, "training": training, "preprocessing": preprocessing}


def estimator_settings(**overrides: Any) -> dict[str, Any]:
    """The fields of a log-determinant estimator; only those of its kind matter."""
    settings = {
        # "exact", "series" or "roulette"; or "krylov", for blocks that stretch or shrink as much as they may
        "kind": "series",
        "num_terms": 5,  # of "series", and products with the Jacobian of "krylov"
        "num_probes": 1,
        "probe": "rademacher",
        "exact_trace": True,  # in closed form where there is one: steadier, see benchmarks/exact_trace.py
        "distribution": "poisson",  # of "roulette": or "geometric"
        "parameter": 2.0,
        "num_exact_terms": 2,
    }
    return {**settings, **overrides}


def build_estimator(settings: Settings, num_terms: int | None = None) -> LogdetEstimator:
    """The estimator that ``estimator_settings`` describe, or the one with another number of terms."""
    kind = settings["kind"]
    count: int = settings["num_terms"] if num_terms is None else num_terms
    probes = {name: settings[name] for name in ("num_probes", "probe", "exact_trace")}
    if kind == "exact":
        return ExactLogdet()
    if kind == "series":
        return SeriesLogdet(num_terms=count, **probes)
    if kind == "roulette":
        return RouletteLogdet(
            distribution=settings["distribution"],
            parameter=settings["parameter"],
            num_exact_terms=settings["num_exact_terms"],
            **probes,
        )
    if kind == "krylov":
        return KrylovLogdet(num_steps=count, **probes)
    raise ValueError(f"logdet.kind must be exact, series, roulette or krylov, got {kind!r}")


_AT_LEAST_ONE = {
    "training": ("total_steps", "batch_size", "actnorm_examples", "log_every_steps", "eval_every_steps", "eval_examples"),
    "evaluation": ("batch_size", "num_dequantisations", "num_probe_draws", "num_examples"),
}


def check_settings(config: Any) -> None:
    """Raises ``ValueError`` for what a run would stumble over late, such as counts below 1, or ignore."""
    for section, names in _AT_LEAST_ONE.items():
        for name in names:
            if config[section][name] < 1:
                raise ValueError(f"config.{section}.{name} must be at least 1, got {config[section][name]}")
    if not config.evaluation.inverse_atol > 0:
        raise ValueError(f"config.evaluation.inverse_atol must be positive, got {config.evaluation.inverse_atol}")
    if config.objective == "density" and (config.augmentation.crop_padding or config.augmentation.flip):
        raise ValueError(
            "config.augmentation is for the objectives classification and hybrid: a density is that of the data as they are"
        )


def build_flow_spec(settings: Settings, event_shape: tuple[int, ...]) -> model.FlowSpec:
    """The architecture that ``config.model`` describes, for examples of one shape.

    Raises:
        ValueError: If a stage is none, or has fields that are unknown, missing or of the wrong kind.
    """
    known = list(model.StageSpec.__dataclass_fields__)
    stages = []
    if not isinstance(settings["stages"], list | tuple) or not all(hasattr(stage, "items") for stage in settings["stages"]):
        raise ValueError(f"config.model.stages must be a tuple of dictionaries, got {settings['stages']!r}")
    for i, stage in enumerate(settings["stages"]):
        if missing := [field for field in ("num_blocks", "hidden") if field not in stage]:
            raise ValueError(f"config.model.stages[{i}] lacks {' and '.join(missing)}")
        for field in stage:
            if field not in known:
                raise ValueError(f"config.model.stages[{i}] has an unknown field {field!r}{_did_you_mean(field, known)}")
        fields: dict[str, Any] = {key: tuple(v) if isinstance(v, list) else v for key, v in stage.items()}
        for field in ("num_blocks", "squeeze"):
            if not isinstance(fields.get(field, 1), int):
                raise ValueError(f"config.model.stages[{i}].{field} must be a whole number, got {fields[field]!r}")
        for field in ("hidden", "kernel_sizes"):
            sizes = () if fields.get(field) is None and field == "kernel_sizes" else fields[field]
            if not isinstance(sizes, tuple) or not all(isinstance(size, int) for size in sizes):
                raise ValueError(f"config.model.stages[{i}].{field} must be a tuple of whole numbers, got {sizes!r}")
        stages.append(model.StageSpec(**fields))
    return model.FlowSpec(tuple(event_shape), tuple(stages), coeff=settings["coeff"], budget=settings["budget"])


def build_constraint(settings: Settings, spec: model.FlowSpec, *, training: bool) -> Callable[[Any, Any], model.Constrained]:
    """The ``(params, spectral) -> Constrained`` that ``config.constraint`` describes, for training steps or for validation."""
    if settings["norms"] == "certified":
        bounds = {"num_squarings": settings["num_squarings"], "twists": settings["twists"]}
        return lambda params, spectral: model.constrain_certified(spec, params, spectral, **bounds)
    if settings["norms"] == "estimated":
        num_steps, rtol = settings["num_steps"] if training else None, settings["rtol"]
        return lambda params, spectral: model.constrain(spec, params, spectral, num_steps=num_steps, rtol=rtol)
    if settings["norms"] == "none":
        return lambda params, spectral: model.unconstrained(spec, params, spectral)
    raise ValueError(f"constraint.norms must be estimated, certified or none, got {settings['norms']!r}")


def build_solver(settings: Settings) -> bijections.Solver:
    """The solver that ``config.evaluation`` describes."""
    return bijections.Solver(atol=settings["inverse_atol"])


def build_schedule(settings: Settings, total_steps: int) -> optax.Schedule:
    """The learning rate that ``config.optimizer`` describes."""
    return optimizers.make_schedule(
        schedule=settings["schedule"],
        learning_rate=settings["learning_rate"],
        total_steps=total_steps,
        warmup_steps=min(settings["warmup_steps"], total_steps),
        final_fraction=settings["final_fraction"],
        boundaries=settings["boundaries"],
        decay_factor=settings["decay_factor"],
    )


def build_optimizer(settings: Settings, total_steps: int) -> optax.GradientTransformation:
    """The optimizer that ``config.optimizer`` describes."""
    return optimizers.make_optimizer(
        name=settings["name"],
        learning_rate=build_schedule(settings, total_steps),
        weight_decay=settings["weight_decay"],
        momentum=settings["momentum"],
        nesterov=settings["nesterov"],
        b1=settings["b1"],
        b2=settings["b2"],
        clip_norm=settings["clip_norm"],
    )


def to_plain(config: Any) -> Any:
    """The config as JSON data: dictionaries, lists, numbers, strings."""
    if isinstance(config, ml_collections.ConfigDict):
        config = config.to_dict()
    return json.loads(json.dumps(config))


def first_difference(ours: Any, theirs: Any, path: str = "config") -> str | None:
    """Names the first setting in which two plain configs differ, with both values; None if they agree."""
    if isinstance(ours, dict) and isinstance(theirs, dict):
        for key in sorted({*ours, *theirs}):
            if key not in ours or key not in theirs:
                return f"{path}.{key} is only in {'the old' if key in theirs else 'the new'} one"
            if difference := first_difference(ours[key], theirs[key], f"{path}.{key}"):
                return difference
        return None
    return None if ours == theirs else f"{path} is {json.dumps(ours)} now and was {json.dumps(theirs)}"


def unknown_field_message(config: ml_collections.ConfigDict, path: str) -> str:
    """One sentence about an override ``--config.PATH=...`` that names no setting, such as ``model.stages[0].hiden``."""
    node: Any = config
    done = "config"
    for name, is_index in ((part.rstrip("]"), part.endswith("]")) for part in re.split(r"[.\[]", path)):
        if is_index:
            if not (isinstance(node, list | tuple) and name.isdecimal() and int(name) < len(node)):
                return f"{done} has no entry {name}: it has {len(node) if isinstance(node, list | tuple) else 0}"
            node, done = node[int(name)], f"{done}[{name}]"
        else:
            known = list(node) if isinstance(node, dict | ml_collections.ConfigDict) else []
            if name not in known:
                return f"{done} has no field {name!r}{_did_you_mean(name, known)}"
            node, done = node[name], f"{done}.{name}"
    return f"{done} cannot be set to that value"


def _did_you_mean(name: str, known: list[str]) -> str:
    close = difflib.get_close_matches(name, known, n=1)
    if close:
        return f": did you mean {close[0]!r}?"
    return f": the fields are {', '.join(known)}" if known else ""
