"""Guarantees for computed numbers, as functions: inverses, radii of classifiers, and norms of
layers.

Its users call this folder `certify`: ``from iresnet_jax import certify``.
"""

from iresnet_jax.certification.decode import CertifiedInfo, decode
from iresnet_jax.certification.inverse import InverseCertificate, inverse
from iresnet_jax.certification.radius import CertifiedRadius, radius
from iresnet_jax.maths.convolution_certificate import conv_norm_bound, dense_norm_bound

__all__ = [
    "CertifiedInfo",
    "CertifiedRadius",
    "InverseCertificate",
    "conv_norm_bound",
    "decode",
    "dense_norm_bound",
    "inverse",
    "radius",
]
