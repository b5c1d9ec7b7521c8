"""What a config means for its data: the data set, the model and the settings built from them, for training and after it."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from iresnet_jax import data, density, likelihood, model, modules
from iresnet_jax.data import toys
from iresnet_jax.training import config as config_lib


@dataclass(frozen=True)
class Source:
    """The data of a run.

    Attributes:
        name: Its name.
        event_shape: Shape of one example.
        num_levels: Grey levels; None for a 2-D toy.
        images: The image data set, or None.
        toy: The toy, or None.
        frequencies: Of the grey levels in the training split, if anything has counted them, see `density_spec`.
    """

    name: str
    event_shape: tuple[int, ...]
    num_levels: int | None
    images: data.ImageData | None = None
    toy: toys.Toy | None = None
    frequencies: tuple[float, ...] | None = None

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


def load_source(name: str, data_dir: str | None = None) -> Source:
    """The data set or toy of that name.

    Raises:
        ValueError: If there is none; the message lists those there are.
    """
    if name in toys.TOYS:
        return Source(name, (2,), None, toy=toys.get(name))
    images = data.load(name, data_dir=data_dir)
    return Source(name, images.image_shape, images.num_levels, images=images)


def density_spec(config: Any, source: Source) -> density.DensitySpec:
    """The model that a config describes for its data."""
    frequencies = source.frequencies
    if config.preprocessing.transform == "equalize" and frequencies is None and source.images is not None:
        frequencies = likelihood.level_frequencies(source.images.images["train"], source.images.num_levels)
    return density.DensitySpec(
        flow=config_lib.build_flow_spec(config.model, source.event_shape),
        prior=config.model.prior,
        transform=config.preprocessing.transform,
        alpha=config.preprocessing.alpha,
        num_levels=source.num_levels,
        frequencies=frequencies if config.preprocessing.transform == "equalize" else None,
    )


def unroll(config: Any) -> bool:
    """Whether blocks are written out."""
    choice = config.training.blocks
    if choice not in ("auto", "scan", "unroll"):
        raise ValueError(f"training.blocks must be auto, scan or unroll, got {choice!r}")
    return model.unroll_by_default() if choice == "auto" else choice == "unroll"


def apply_matmul_precision(config: Any) -> None:
    """Sets the precision of matrix products and convolutions in this process, on accelerators.

    Their default there has 11 bits or fewer: an inverse could not be better than 1e-3, nor norms be trusted.
    """
    if jax.default_backend() != "cpu":
        jax.config.update("jax_default_matmul_precision", config.training.matmul_precision)


def device_summary() -> str:
    """The devices of this process, such as ``2 x cpu``."""
    devices = jax.local_devices()
    return f"{len(devices)} x {devices[0].device_kind}"


def num_parameters(params: Any) -> int:
    """Numbers in a tree of arrays."""
    return sum(leaf.size for leaf in jax.tree.leaves(params))


def _module(config: Any, spec: density.DensitySpec) -> modules.ResidualFlow:
    return modules.ResidualFlow(spec.flow, prior=spec.prior, last_scale=config.model.last_scale)


def abstract_variables(config: Any, spec: density.DensitySpec) -> Any:
    """Shapes and dtypes of the variables, without computing them."""
    example = jax.ShapeDtypeStruct((2, *spec.flow.event_shape), np.float32)
    return jax.eval_shape(_module(config, spec).init, jax.random.key(0), example)


def initial_variables(config: Any, spec: density.DensitySpec, source: Source) -> Any:
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
        x, _ = density.transform(spec, density.to_continuous(spec, key_noise, examples))
        return module.init(key, x)

    return jax.jit(initialize)(key_init, key_noise, examples)
