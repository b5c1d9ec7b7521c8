"""A trained model as one small file: frozen weights with their certificate and settings, and nothing of its training.

    python -m iresnet_jax freeze --workdir runs/digits_density

writes ``frozen.npz``. `load` gives back the model's pure functions, without the workdir and without the data.
"""

import json
import os
import zipfile
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key, Num

from iresnet_jax.bijections import bijection as bijections
from iresnet_jax.files import replacing
from iresnet_jax.maths.inverse.fixed_point import FixedPointInfo
from iresnet_jax.maths.logdet.estimator import LogdetEstimator
from iresnet_jax.maths.logdet.exact import ExactLogdet
from iresnet_jax.models import classifier, density
from iresnet_jax.models import flow as model
from iresnet_jax.plain import to_plain
from iresnet_jax.training import naming
from iresnet_jax.training.building import Spec, model_spec
from iresnet_jax.training.config import parse
from iresnet_jax.training.initialization import abstract_variables
from iresnet_jax.training.source import Source

if TYPE_CHECKING:
    from iresnet_jax.evaluation.trained import Trained

FILE_NAME = "frozen.npz"
_FACTS = "facts"


@dataclass(frozen=True)
class FrozenModel:
    """A density model with fixed weights, every block of which is certified a contraction.

    Its methods are those functions of `density` on its weights: pure, and free to be jitted.

    Attributes:
        spec: The model without its weights.
        weights: The flow's frozen weights.
        prior: The prior's parameters.
        bounds: Guaranteed upper bounds of all layers' operator norms, by stage and layer, one a block.
        config: The settings it was trained with.
        step: Updates behind these parameters.
    """

    spec: density.DensitySpec
    weights: Any = field(repr=False)
    prior: Any = field(repr=False)
    bounds: Mapping[str, Mapping[str, Any]] = field(repr=False)
    config: Any = field(repr=False)
    step: int = 0

    def log_prob(
        self,
        x: Float[Array, "b ..."],
        key: Key[Array, "..."] | None = None,
        estimator: LogdetEstimator = ExactLogdet(),
    ) -> density.LogProb:
        """The log-likelihood in nats of continuous data, see `density.log_prob`; a random estimator needs a key."""
        key = jax.random.key(0) if key is None and isinstance(estimator, ExactLogdet) else key
        if key is None:
            raise ValueError(f"{type(estimator).__name__} draws probes: pass a key")
        return density.log_prob(self.spec, self.weights, self.prior, x, key, estimator)

    def encode(self, x: Float[Array, "b ..."]) -> Float[Array, "b d"]:
        """The latents of continuous data."""
        return density.encode(self.spec, self.weights, x)

    def decode(
        self,
        z: Float[Array, "b d"],
        solver: bijections.Solver = bijections.Solver(),  # noqa: B008 (immutable)
    ) -> tuple[Float[Array, "b ..."], FixedPointInfo]:
        """Continuous data of latents, and how the inverse ended."""
        return density.decode(self.spec, self.weights, z, solver)

    def sample(
        self,
        key: Key[Array, ""],
        num: int,
        *,
        temperature: float = 1.0,
        solver: bijections.Solver = bijections.Solver(),  # noqa: B008 (immutable)
        labels: Int[Array, " n"] | None = None,
    ) -> tuple[Float[Array, "n ..."], FixedPointInfo]:
        """Samples, and how the inverse ended for each; of given classes, if the model has any, see `density.sample`."""
        settings = {"temperature": temperature, "solver": solver, "labels": labels}
        return density.sample(self.spec, self.weights, self.prior, key, num, **settings)

    def class_log_probs(self, images: Num[Array, "b h w c"]) -> Float[Array, "b k"]:
        """``log p(y | x)`` of images of integer levels, of a model with classes; see `density.class_log_probs`."""
        return density.class_log_probs(self.spec, self.weights, self.prior, density.cell_centers(self.spec, images))


@dataclass(frozen=True)
class FrozenClassifier:
    """A classifier with fixed weights, every block of which is certified a contraction if it was trained as one.

    Attributes:
        spec: The model without its weights.
        weights: The flow's frozen weights.
        head: The head's parameters.
        statistics: The running averages of BatchNorm.
        bounds: As in `FrozenModel`.
        config: As in `FrozenModel`.
        step: As in `FrozenModel`.
    """

    spec: classifier.ClassifierSpec
    weights: Any = field(repr=False)
    head: Any = field(repr=False)
    statistics: Any = field(repr=False)
    bounds: Mapping[str, Mapping[str, Any]] = field(repr=False)
    config: Any = field(repr=False)
    step: int = 0

    def logits(self, images: Num[Array, "b h w c"]) -> Float[Array, "b k"]:
        """Logits of images of integer levels, see `classifier.preprocess`."""
        return classifier.head(self.head, self.statistics["head"], self.features(images))

    def features(self, images: Num[Array, "b h w c"]) -> Float[Array, "b ..."]:
        """Features of images of integer levels."""
        return classifier.features(self.spec, self.weights, classifier.preprocess(self.spec, images))

    def reconstruct(
        self,
        features: Float[Array, "b ..."],
        solver: bijections.Solver = bijections.Solver(),  # noqa: B008 (immutable)
    ) -> classifier.Reconstruction:
        """The images that features belong to, see `classifier.reconstruct`."""
        return classifier.reconstruct(self.spec, self.weights, features, solver)


def save(trained: "Trained", path: str | os.PathLike[str] | None = None) -> Path:
    """Writes the model of a run to one file, all at once.

    Args:
        trained: The model.
        path: The file; ``frozen.npz`` in the workdir by default.

    Returns:
        The file.

    Raises:
        ValueError: If it is a network with BatchNorm in its branches.
    """
    if not trained.is_bijective:
        raise ValueError(f"{trained.workdir} holds a network with BatchNorm in its branches: it has no weights to freeze")
    path = trained.workdir / FILE_NAME if path is None else Path(path)
    facts = {
        "config": to_plain(trained.config),
        "event_shape": list(trained.source.event_shape),
        "num_levels": trained.source.num_levels,
        "num_classes": trained.source.num_classes,
        "frequencies": None if trained.is_classifier else trained.spec.frequencies,
        "shares": None if trained.is_classifier else trained.spec.shares,
        "step": trained.step,
    }
    named = naming.to_named(_stacked(trained.weights, _rest(trained.prior, trained.head, trained.statistics), trained.bounds))
    arrays: dict[str, Any] = {**named, _FACTS: np.frombuffer(json.dumps(facts).encode(), np.uint8)}
    with replacing(path) as incoming, incoming.open("wb") as file:
        np.savez_compressed(file, **arrays)
    return path


def load(path: str | os.PathLike[str]) -> Any:
    """Reads a file that `save` wrote.

    Args:
        path: The file, or a workdir that holds ``frozen.npz``.

    Returns:
        A `FrozenModel` or a `FrozenClassifier`.

    Raises:
        ValueError: If there is none, or it is damaged or from another version.

    Example:
        >>> model = load("runs/digits_density")  # doctest: +SKIP
        >>> samples, info = model.sample(jax.random.key(0), 64)  # doctest: +SKIP
    """
    path = Path(path)
    path = path / FILE_NAME if path.is_dir() else path
    if not path.exists():
        raise ValueError(f"there is no frozen model {path}: write one with python -m iresnet_jax freeze --workdir DIR")
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as stored:  # checks every array's checksum
            named = {name: stored[name] for name in stored.files}
        facts = json.loads(named.pop(_FACTS).tobytes())
        config: Any = parse(facts["config"])
        source = Source(
            config.data.name,
            tuple(facts["event_shape"]),
            facts["num_levels"],
            num_classes=facts.get("num_classes"),
        )
        frequencies, shares = (tuple(facts[name]) if facts.get(name) else None for name in ("frequencies", "shares"))
        spec = model_spec(config, source, frequencies, shares)
        with jax.enable_x64(False):  # noqa: FBT003 (JAX's own signature); models are in float32, wherever they are read
            shapes = jax.eval_shape(lambda: _shapes(config, spec))
        found = naming.from_named(named, shapes)
    except (zipfile.BadZipFile, zlib.error, OSError, KeyError, AttributeError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is damaged or was written by another version ({error}): freeze the model again") from None
    found = jax.tree.map(jnp.asarray, found)
    weights, bounds = ({name: stage[naming.STACKED] for name, stage in found[key].items()} for key in ("weights", "bounds"))
    common = {"weights": weights, "bounds": bounds, "config": config, "step": facts["step"]}
    if isinstance(spec, classifier.ClassifierSpec):
        return FrozenClassifier(spec, head=found["head"], statistics=found["statistics"], **common)
    return FrozenModel(spec, prior=found["prior"], **common)


def _shapes(config: Any, spec: Spec) -> Any:
    variables = abstract_variables(config, spec)
    zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), variables)
    params = zeros["params"]
    fixed = model.freeze(spec.flow, params, constrained=config.constraint.norms != "none")
    return _stacked(fixed.weights, _rest(params.get("prior"), params.get("head"), zeros.get("batch_stats")), fixed.bounds)


def _rest(prior: Any, head: Any, statistics: Any) -> dict[str, Any]:
    """What a model has beside its flow."""
    return {"prior": prior} if head is None else {"head": head, "statistics": statistics}


def _stacked(weights: Any, rest: Mapping[str, Any], bounds: Any) -> dict[str, Any]:
    """The arrays under names that speak of one block: ``weights/stage0/block03/branch/conv1/kernel``."""
    return {
        "weights": {name: {naming.STACKED: stage} for name, stage in weights.items()},
        "bounds": {name: {naming.STACKED: stage} for name, stage in bounds.items()},
        **rest,
    }
