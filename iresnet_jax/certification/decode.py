"""The certified inverse in the units of the data: what `Density.decode` and its like compute, with
what is guaranteed of it.

`certify.inverse` bounds the error of the flow's input, and the transform's ``enclose_inverse`` what
becomes of it.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Num

from iresnet_jax.bijections.cells import Cells
from iresnet_jax.bijections.dequantize import certain_levels
from iresnet_jax.bijections.enclosure import enclosing
from iresnet_jax.bijections.standardize import Standardize
from iresnet_jax.certification.inverse import InverseCertificate, inverse
from iresnet_jax.certification.prepared import check, on_host, vectors_of
from iresnet_jax.maths.fixed_point import FixedPointInfo
from iresnet_jax.maths.platforms import fast_compile
from iresnet_jax.models import preprocessing
from iresnet_jax.models.classifier import Classifier
from iresnet_jax.models.contexts import Contexts
from iresnet_jax.models.density import Density


class CertifiedInfo(NamedTuple):
    """End of a certified inverse, for every example: the fields of `FixedPointInfo`, and what is
    guaranteed.

    Attributes:
        num_evals: Evaluations of the branches.
        residual: Largest residual of a block.
        error_bound: Guaranteed bound of the Euclidean error, preprocessing and rounding included,
            in the units of continuous data, before levels are rounded: [0, 1) for integer levels,
            and the scale of [0, 1] for images of a classifier.
        converged: Whether the iteration met its tolerance in all blocks.
        certain: Entries whose level, or value with a cell, is guaranteed to be that of the exact
            inverse; pixels of a classifier whose nearest level is. None for continuous data, and
            False at continuous entries beside others.
        certificate: The guarantee in the units of the flow's input.
    """

    num_evals: Int[Array, " b"]
    residual: Float[Array, " b"]
    error_bound: Float[np.ndarray, " b"]
    converged: Bool[Array, " b"]
    certain: Bool[np.ndarray, "b ..."] | None
    certificate: InverseCertificate


class Decoded(NamedTuple):
    """Latents on their way to data, as arrays of JAX, or of NumPy once they are fetched.

    Attributes:
        latents: The latents or features as vectors, in the order of the flow's outputs.
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


def decode(
    model: Density | Classifier,
    z: Float[Array, "b ..."] | Float[np.ndarray, "b ..."],
    *,
    context: Contexts | None = None,
) -> tuple[Num[Array, "b ..."], CertifiedInfo]:
    """Data of latents, with a guaranteed bound of the whole error and the levels that it cannot
    change.

    The data are those of `Density.decode`, or the images of `Classifier.reconstruct`. An
    example takes from some milliseconds at 64 dimensions to many seconds at 784, on the host and
    outside of ``jit``. ``certificate.error_bound`` also bounds the error of
    `Reconstruction.padding_residual` of a classifier.

    Args:
        model: A model with certified bounds, as `freeze` and `load` give it.
        z: Latents, such as `Density.sample_latents` draws; features of a classifier.
        context: Contexts of a conditional density, one for all or one for each.

    Raises:
        ValueError: Under ``jit``, or for a model that cannot be certified, see `certify.inverse`.

    Example:
        >>> x, info = certify.decode(model, z)  # doctest: +SKIP
        >>> info.error_bound, info.certain.all(), info.certificate.applied  # doctest: +SKIP
    """
    model, context = check(model, z, context=context)
    decoded = _decoded(model, jnp.asarray(z), context)
    # the model may round latents, and the certificate is of those that were given
    with jax.enable_x64():
        latents = np.asarray(vectors_of(model, np.asarray(z)))
    return decoded.data, certified(model, decoded._replace(latents=latents), context=context)


def to_data(
    model: Density | Classifier, z: Float[Array, "b ..."], *, context: Contexts | None = None
) -> Decoded:
    """The model's own operations from latents to data, under ``jit`` too, with all that `certified`
    needs.

    Args:
        model: The model.
        z: Latents or features, in their own shape or as vectors in the order of the flow's outputs.
        context: Contexts of a conditional density.
    """
    latents = model.promoted(vectors_of(model, z))
    if isinstance(model, Density):
        x, info = model.flow(context).inverse(latents)
        u = preprocessing.transform(model.spec).inverse(x)[0]
        return Decoded(latents, x, u, preprocessing.rounded(model.spec, u), info)
    x, info = model.flow().inverse(latents)
    images = model.spec.unpad(x)
    return Decoded(latents, x, images, images, info)


@fast_compile  # one program: outside of ``jit``, every loop would be one at every call
def _decoded(model: Any, z: Array, context: Any) -> Decoded:
    return to_data(model, z, context=context)


@on_host()
def certified(
    model: Density | Classifier, decoded: Decoded, *, context: Contexts | None = None
) -> CertifiedInfo:
    """Guarantees of decoded latents; on the host, outside of ``jit``.

    Raises:
        ValueError: For the reasons of `decode`.
    """
    certificate = inverse(model, decoded.latents, decoded.flow_input, context=context)
    x, u, data = (
        np.asarray(part) for part in (decoded.flow_input, decoded.continuous, decoded.data)
    )
    x = x.astype(np.float64)
    if isinstance(model, Classifier):
        spec = model.spec
        channels, steps = spec.image_shape[-1], spec.num_levels - 1.0
        mean, std = (values * (channels // len(values)) for values in (spec.mean, spec.std))
        with jax.enable_x64():  # the numbers of `spec` as they are
            standardize, levels = Standardize(mean, std), Cells.of([(0.0, 1 / steps)] * channels)
        enclosure = enclosing(standardize)(x[..., :channels], certificate.error_bound)
        certain = levels.certain(np.rint(data * steps) / steps, enclosure)
    else:
        spec = model.spec
        enclosure = enclosing(spec.transform)(x, certificate.error_bound)
        if spec.num_levels is not None:
            certain = certain_levels(data, enclosure, spec.num_levels)
        else:
            certain = None if spec.cells is None else spec.cells.certain(data, enclosure)
    bound = enclosure.distance_bound(u, certificate.error_bound)
    info = decoded.info
    return CertifiedInfo(info.num_evals, info.residual, bound, info.converged, certain, certificate)
