"""The certified inverse in the units of the data: what `Density.decode` and `Classifier.reconstruct` do with ``certify=True``.

`certification.inverse` bounds the error of the flow's input, and the transform's ``enclose_inverse`` what becomes of it.
"""

from typing import Any, NamedTuple

import jax
import jax.core
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Num

from iresnet_jax.bijections.reshape import flatten
from iresnet_jax.bijections.transforms.dequantize import Grid, certain_levels
from iresnet_jax.bijections.transforms.logit import Identity
from iresnet_jax.bijections.transforms.standardize import Standardize
from iresnet_jax.certification.info import CertifiedInfo
from iresnet_jax.certification.inverse import inverse
from iresnet_jax.certification.problem import check_certified
from iresnet_jax.maths.inverse.fixed_point import FixedPointInfo
from iresnet_jax.models.classifier import Classifier
from iresnet_jax.models.density import Contexts, Density
from iresnet_jax.models.reconstructor import Reconstructor


class Decoded(NamedTuple):
    """Latents on their way to data, as arrays of JAX, or of NumPy once they are fetched.

    Attributes:
        latents: The latents, or features as vectors.
        flow_input: What the flow's inverse made of them.
        continuous: Data before levels are rounded.
        data: Data as the model gives them.
        info: How the inverse ended.
    """

    latents: Num[Array, "b d"]
    flow_input: Num[Array, "b ..."]
    continuous: Num[Array, "b ..."]
    data: Num[Array, "b ..."]
    info: FixedPointInfo


def check(model: Density | Classifier | Reconstructor, *arrays: Any) -> None:
    """Raises ``ValueError`` in one sentence under ``jit``, and for models that `certify.inverse` does not take."""
    if any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves((model, arrays))):
        raise ValueError(
            "certify=True computes on the host, outside of jit, vmap and grad: leave it out there, and certify what comes out "
            "with certify.inverse(model, z, x)"
        )
    check_certified(model)


def decode(model: Density, z: Float[Array, "b d"], *, context: Contexts | None = None) -> Decoded:
    """`Density.decode` with all that a certificate needs; the same operations, under ``jit`` too."""
    x, info = model.flow(context).inverse(z)
    u = model.continuous_of_input(x)
    return Decoded(z, x, u, model.round_to_data(u), info)


def reconstruct(model: Classifier, features: Float[Array, "b ..."]) -> Decoded:
    """`Classifier.reconstruct` with all that a certificate needs."""
    y = flatten(features)
    x, info = model.flow().inverse(y)
    images = model.spec.unpad(x)
    return Decoded(y, x, images, images, info)


def invert(model: Reconstructor, y: Float[Array, "b d"]) -> Decoded:
    """`Reconstructor.invert` with all that a certificate needs, from measurements as vectors."""
    x, info = model.flow().inverse(y)
    return Decoded(y, x, x, x, info)


def certified(
    model: Density | Classifier | Reconstructor, decoded: Decoded, *, context: Contexts | None = None
) -> CertifiedInfo:
    """What is guaranteed of decoded latents; on the host, outside of ``jit``.

    Raises:
        ValueError: For the reasons of `check`.
    """
    check(model, decoded, context)
    context = None if context is None else jnp.asarray(context)
    certificate = inverse(model, decoded.latents, decoded.flow_input, context=context)
    x, u, data = (np.asarray(part) for part in (decoded.flow_input, decoded.continuous, decoded.data))
    transform: Any = Identity()
    if isinstance(model, Classifier):
        spec = model.spec
        channels = spec.image_shape[-1]
        mean, std = (values * (channels // len(values)) for values in (spec.mean, spec.std))
        x, transform = x[..., :channels], Standardize(mean, std)
    elif isinstance(model, Density):
        transform = model.spec.transform
    enclosure = transform.enclose_inverse(x.astype(np.float64), certificate.error_bound)
    if not isinstance(model, Density):
        levels = model.spec.num_levels
        certain = _pixels(levels, data.shape[-1]).certain(np.rint(data * (levels - 1.0)) / (levels - 1.0), enclosure)
    elif model.spec.num_levels is not None:
        certain = certain_levels(data, enclosure, model.spec.num_levels)
    else:
        certain = None if model.spec.grid is None else model.spec.grid.certain(data, enclosure)
    bound = enclosure.distance_bound(u, certificate.error_bound)
    info = decoded.info
    return CertifiedInfo(info.num_evals, info.residual, bound, info.converged, certain, certificate)


def _pixels(num_levels: int, channels: int) -> Grid:
    """Levels on the scale of [0, 1], where all but densities put the last one at 1."""
    return Grid((0.0,) * channels, (1 / (num_levels - 1),) * channels)
