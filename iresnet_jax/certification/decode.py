"""The certified inverse in the units of the data: what `Density.decode` or `Classifier.decode`
computes, with guarantees.

`certify.inverse` bounds the error of the flow's input, and the transform's ``enclose_inverse``
carries the bound on to the data.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Num

from iresnet_jax.bijections.dequantize import certain_levels
from iresnet_jax.bijections.marginals import Marginals
from iresnet_jax.bijections.standardize import Standardize
from iresnet_jax.certification.inverse import InverseCertificate, inverse
from iresnet_jax.certification.prepared import check, on_host, vectors_of
from iresnet_jax.models.classifier import Classifier
from iresnet_jax.models.contexts import Contexts
from iresnet_jax.models.density import Density
from iresnet_jax.models.model import DecodeInfo
from iresnet_jax.pytrees import in_words, largest, share


class CertifiedInfo(NamedTuple):
    """End of a certified inverse, for every example: the fields of `FixedPointInfo`, and
    guarantees.

    Attributes:
        num_evals: Evaluations of the branches.
        residual: Largest residual of a block.
        error_bound: Guaranteed bound of the Euclidean error, preprocessing and rounding included,
            in the units of continuous data, before levels are rounded: the scale of [0, 1) for
            integer levels and for images of a classifier.
        converged: Whether the iteration met its tolerance in all blocks.
        certain: Entries whose level (or value with a cell, or nearest level of a classifier's
            pixel) is guaranteed to equal the exact inverse's. None for continuous data; False at
            continuous entries of mixed data.
        certificate: The guarantee in the units of the flow's input.
    """

    num_evals: Int[Array, " b"]
    residual: Float[Array, " b"]
    error_bound: Float[np.ndarray, " b"]
    converged: Bool[Array, " b"]
    certain: Bool[np.ndarray, "b ..."] | None
    certificate: InverseCertificate

    def __repr__(self) -> str:
        return in_words(
            self,
            lambda: (
                f"{share(self.converged)} converged, guaranteed error at most "
                f"{largest(self.error_bound)}"
                + ("" if self.certain is None else f", {share(self.certain)} entries certain")
            ),
        )


def decode(
    model: Density | Classifier,
    z: Float[Array, "b ..."] | Float[np.ndarray, "b ..."],
    *,
    context: Contexts | None = None,
) -> tuple[Num[Array, "b ..."], CertifiedInfo]:
    """Decodes latents, with a guaranteed bound of the whole error and the levels that it cannot
    change.

    The data are those of `Density.decode`, or of `Classifier.decode`. An
    example takes from some milliseconds at 64 dimensions to many seconds at 784, on the host and
    outside of ``jit``. ``certificate.error_bound`` also bounds the error of
    `DecodeInfo.padding_residual` of a classifier.

    Args:
        model: A model with certified bounds, from `freeze` or `load`.
        z: Latents, such as `Density.sample_latents` draws; features of a classifier.
        context: Contexts of a conditional density, one for all or one for each.

    Example:
        >>> x, info = certify.decode(model, z)  # doctest: +SKIP
        >>> info.error_bound, info.certain.all(), info.certificate.applied  # doctest: +SKIP
    """
    _, context = check(model, z, context=context)
    data, info = model.decode(vectors_of(model, jnp.asarray(z)), context=context)
    # the model may round latents, and the certificate is of those that were given
    with jax.enable_x64():
        latents = np.asarray(vectors_of(model, np.asarray(z)))
    return data, certified(model, latents, data, info, context=context)


@on_host()
def certified(
    model: Density | Classifier,
    latents: Any,
    data: Any,
    info: DecodeInfo,
    *,
    context: Contexts | None = None,
) -> CertifiedInfo:
    """Guarantees of what `Model.decode` made of latents as vectors; on the host, outside of
    ``jit``.
    """
    certificate = inverse(model, latents, info.flow_input, context=context)
    x, u, data = (np.asarray(part) for part in (info.flow_input, info.continuous, data))
    x = x.astype(np.float64)
    if isinstance(model, Classifier):
        spec = model.spec
        channels, steps = spec.image_shape[-1], spec.num_levels - 1.0
        mean, std = (values * (channels // len(values)) for values in (spec.mean, spec.std))
        with jax.enable_x64():  # keeps the numbers of `spec` unrounded
            standardize, levels = (
                Standardize(mean, std),
                Marginals.lines([1 / steps] * channels),
            )
        enclosure = standardize.enclose_inverse(x[..., :channels], certificate.error_bound)
        certain = levels.certain(np.rint(data * steps) / steps, enclosure)
    else:
        spec = model.spec
        enclosure = spec.transform.enclose_inverse(x, certificate.error_bound)
        if spec.num_levels is not None:
            certain = certain_levels(data, enclosure, spec.num_levels)
        else:
            certain = None if spec.cells is None else spec.cells.certain(data, enclosure)
    bound = enclosure.distance_bound(u, certificate.error_bound)
    return CertifiedInfo(info.num_evals, info.residual, bound, info.converged, certain, certificate)
