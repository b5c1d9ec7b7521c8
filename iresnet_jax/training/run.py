"""What a config means for its data: the data set, the model and the settings built from them, for training and after it."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from iresnet_jax import data
from iresnet_jax.bijections import equalize as histogram
from iresnet_jax.models import classifier, density
from iresnet_jax.models import flow as model
from iresnet_jax.models import linen as modules
from iresnet_jax.training import config as config_lib

CONFIG_FILE = "config.json"  # in a workdir: the settings it was trained with

Spec = density.DensitySpec | classifier.ClassifierSpec


class Images(NamedTuple):
    """Images and labels by split."""

    num_levels: int
    images: dict[str, np.ndarray]
    labels: dict[str, np.ndarray]


@dataclass(frozen=True)
class Source:
    """The data of a run.

    Attributes:
        name: Its name.
        event_shape: Shape of one example.
        num_levels: Grey levels; None for a 2-D toy.
        images: The image data set, or None.
        toy: The toy, or None.
        num_classes: Classes of its labels; None without labels.
        frequencies: Of the grey levels in the training split, if anything has counted them, see `density_spec`.
        shares: Of the commonest of them at each entry, likewise.
    """

    name: str
    event_shape: tuple[int, ...]
    num_levels: int | None
    images: Images | None = None
    toy: data.Toy | None = None
    num_classes: int | None = None
    frequencies: tuple[float, ...] | None = None
    shares: tuple[float, ...] | None = None

    @property
    def draw(self) -> Callable[[Any, Any], Any] | None:
        """For endless data, ``(key, placeholder) -> example``."""
        toy = self.toy
        return None if toy is None else lambda key, _: toy.sample(key, 1)[0]

    def held_out(self, split: str, num: int, seed: int) -> np.ndarray:
        """Up to ``num`` examples of "validation" or "test"; a toy's are drawn from a key of their own."""
        if self.toy is not None:
            stream = {"validation": 1, "test": 2}[split]
            key = jax.random.fold_in(jax.random.key(seed), 2**31 + stream)
            return np.asarray(self.toy.sample(key, num))
        assert self.images is not None
        return self.images.images[split][:num]

    def labels(self, split: str, num: int | None = None) -> np.ndarray:
        """The labels of those examples, or of all."""
        assert self.images is not None
        return self.images.labels[split][:num]


def load_source(name: str, data_dir: str | None = None) -> Source:
    """The data set or toy of that name.

    Raises:
        ValueError: If there is none; the message lists those there are.
    """
    found = data.load(name, data_dir)
    images = None if found.num_levels is None else Images(found.num_levels, found.examples, found.labels)
    return Source(name, found.event_shape, found.num_levels, images, found.toy, found.num_classes)


def density_spec(config: Any, source: Source) -> density.DensitySpec:
    """The density that a config describes for its data, with a prior for every class if its objective is hybrid.

    Raises:
        ValueError: If the data have no labels that it needs, or settings do not fit them.
    """
    if config.objective == "hybrid" and source.num_classes is None:
        raise ValueError(f"a hybrid needs labelled images, and {source.name} has none: choose another data.name")
    frequencies, shares = source.frequencies, source.shares
    if config.preprocessing.transform != "equalize":
        if config.preprocessing.entrywise:
            raise ValueError(f"preprocessing.entrywise is for transform equalize, got {config.preprocessing.transform!r}")
        frequencies = shares = None
    elif frequencies is None and source.images is not None:
        images = source.images.images["train"]
        frequencies = histogram.level_frequencies(images, source.images.num_levels)
        if config.preprocessing.entrywise:
            shares = tuple(histogram.entry_shares(images, frequencies).ravel().tolist())
    return density.DensitySpec(
        flow=config_lib.build_flow_spec(config.model, source.event_shape),
        prior=config.model.prior,
        transform=config.preprocessing.transform,
        alpha=config.preprocessing.alpha,
        num_levels=source.num_levels,
        frequencies=frequencies,
        shares=shares,
        num_classes=source.num_classes if config.objective == "hybrid" else None,
    )


def classifier_spec(config: Any, source: Source) -> classifier.ClassifierSpec:
    """The classifier that a config describes for its data.

    Raises:
        ValueError: If the data have no labels, or settings do not fit them.
    """
    if source.num_classes is None:
        raise ValueError(f"classification needs labelled images, and {source.name} has none: choose another data.name")
    settings = config.classifier
    height, width, channels = source.event_shape
    return classifier.ClassifierSpec(
        flow=config_lib.build_flow_spec(config.model, (height, width, channels + settings.pad_channels)),
        image_shape=(height, width, channels),
        num_classes=source.num_classes,
        num_levels=source.num_levels or 256,
        pad_channels=settings.pad_channels,
        mean=tuple(settings.mean),
        std=tuple(settings.std),
        constrained=config.constraint.norms != "none",
        normalization=settings.normalization,
    )


def model_spec(config: Any, source: Source) -> Spec:
    """The model that a config describes for its data, whatever its objective."""
    return classifier_spec(config, source) if config.objective == "classification" else density_spec(config, source)


def unroll(config: Any) -> bool:
    """Whether blocks are written out."""
    choice = config.training.blocks
    if choice not in ("auto", "scan", "unroll"):
        raise ValueError(f"training.blocks must be auto, scan or unroll, got {choice!r}")
    return model.unroll_by_default() if choice == "auto" else choice == "unroll"


def prepare_backend(config: Any) -> None:
    """Sets the precision of matrix products and convolutions in this process, on accelerators.

    Their default there has 11 bits or fewer: an inverse could not be better than 1e-3, nor norms be trusted.

    Raises:
        ValueError: If JAX makes float64 of everything, in which runs are neither trained nor read.
    """
    if jnp.result_type(float) == jnp.float64:
        raise ValueError("runs are trained and read in float32: unset JAX_ENABLE_X64, or call this outside of jax.enable_x64")
    if jax.default_backend() != "cpu":
        jax.config.update("jax_default_matmul_precision", config.training.matmul_precision)


def device_summary() -> str:
    """The devices of this process, such as ``2 x cpu``."""
    devices = jax.local_devices()
    return f"{len(devices)} x {devices[0].device_kind}"


def num_parameters(params: Any) -> int:
    """Numbers in a tree of arrays."""
    return sum(leaf.size for leaf in jax.tree.leaves(params))


def _module(config: Any, spec: Spec) -> modules.ResidualFlow | modules.Classifier:
    if isinstance(spec, classifier.ClassifierSpec):
        return modules.Classifier(spec, last_scale=config.model.last_scale)
    return modules.ResidualFlow(spec.flow, prior=spec.prior, last_scale=config.model.last_scale, num_classes=spec.num_classes)


def abstract_variables(config: Any, spec: Spec) -> Any:
    """Shapes and dtypes of the variables, without computing them."""
    example = jax.ShapeDtypeStruct((2, *spec.flow.event_shape), np.float32)
    return jax.eval_shape(_module(config, spec).init, jax.random.key(0), example)


def initial_variables(config: Any, spec: Spec, source: Source) -> Any:
    """Fresh variables, ActNorm fitted to training data."""
    key_init, key_noise, key_data = jax.random.split(jax.random.fold_in(jax.random.key(config.seed), 2**31), 3)
    num = config.training.actnorm_examples
    if source.toy is not None:
        examples = source.toy.sample(key_data, num)
    else:
        assert source.images is not None
        train = source.images.images["train"]
        chosen = np.asarray(jax.random.permutation(key_data, len(train)))[:num]
        examples = jnp.asarray(train[chosen])
    module = _module(config, spec)

    def initialize(key, key_noise, examples):
        return module.init(key, network_input(spec, key_noise, examples)[1])

    return jax.jit(initialize)(key_init, key_noise, examples)


def network_input(spec: Spec, key: jax.Array, examples: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Examples as the model sees them: continuous, with images in [0, 1], and as the input of its network.

    Args:
        spec: The model.
        key: Of a density's dequantisation.
        examples: Images of integer levels, or points.
    """
    if isinstance(spec, classifier.ClassifierSpec):
        return examples / (spec.num_levels - 1), classifier.preprocess(spec, examples)
    x = density.to_continuous(spec, key, examples)
    return x, density.transform(spec, x)[0]


def from_network_input(spec: Spec, there: jax.Array) -> jax.Array:
    """The inverse of the second step of `network_input`."""
    return classifier.unpad(spec, there) if isinstance(spec, classifier.ClassifierSpec) else density.untransform(spec, there)
