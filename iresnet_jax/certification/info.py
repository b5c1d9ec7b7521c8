"""How a certified inverse ended, as a value; `certified_decoding` computes it."""

from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from jaxtyping import Array, Bool, Float, Int

if TYPE_CHECKING:
    from iresnet_jax.certification.inverse import InverseCertificate


class CertifiedInfo(NamedTuple):
    """How a certified inverse ended, for every example: the fields of `FixedPointInfo`, and what is guaranteed.

    Attributes:
        num_evals: Evaluations of the branches.
        residual: Largest residual of a block.
        error_bound: Guaranteed bound of the Euclidean error, preprocessing and rounding included, in the units of continuous
            data, before levels are rounded: [0, 1) for integer levels, and the scale of [0, 1] for a classifier's images.
        converged: Whether the iteration met its tolerance in all blocks.
        certain: Entries whose level, or value on a grid, is guaranteed to be that of the exact inverse; a classifier's pixels
            whose nearest level is. None for continuous data, and False at continuous entries beside those on a grid.
        certificate: The guarantee in the units of the flow's input, with ``applied``, ``beta``, ``eta``, ``K`` and ``h``.
    """

    num_evals: Int[Array, " b"]
    residual: Float[Array, " b"]
    error_bound: Float[np.ndarray, " b"]
    converged: Bool[Array, " b"]
    certain: Bool[np.ndarray, "b ..."] | None
    certificate: "InverseCertificate"
