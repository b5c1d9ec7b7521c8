r"""Reconstructions without learning, for batches of images in float64: Tikhonov and total variation.

    Tikhonov:         argmin_x |A x - y|^2 / 2 + w |x|^2 / 2   or   ... + w |grad x|^2 / 2,    then projected onto [0, 1]
    total variation:  argmin_x |A x - y|^2 / 2 + w TV(x)   over x in [0, 1]

The blur ``A`` and the Laplacian with reflecting borders have the eigenvectors of the discrete cosine transform, so quadratic
problems are solved exactly. Total variation is isotropic, with forward differences.
"""

from typing import NamedTuple

import numpy as np
from scipy import fft

from iresnet_jax.data.measurements import blur_matrix

RELAXATION = 1.7  # of ADMM
TYPICAL_EDGE = 0.05  # step between pixels that one iteration of ADMM leaves alone: w / rho


class Spectra(NamedTuple):
    """Eigenvalues of ``A`` and of minus the Laplacian, ``grad^T grad``, in the basis of the cosine transform, ``(h, w)``."""

    blur: np.ndarray
    laplacian: np.ndarray

    @classmethod
    def of(cls, height: int, width: int, blur_width: float) -> "Spectra":
        """The eigenvalues for images of one size."""
        blurs, laplacians = [], []
        for size in (height, width):
            basis = np.asarray(fft.dct(np.eye(size), axis=0, norm="ortho"))
            blurs.append(np.einsum("ki,ij,kj->k", basis, blur_matrix(size, blur_width), basis))
            laplacians.append(4 * np.sin(np.pi * np.arange(size) / (2 * size)) ** 2)
        return cls(np.multiply.outer(*blurs), np.add.outer(*laplacians))

    def apply(self, values: np.ndarray, x: np.ndarray) -> np.ndarray:
        """The operator with these eigenvalues."""
        return np.asarray(fft.idctn(values * fft.dctn(x, axes=(1, 2), norm="ortho"), axes=(1, 2), norm="ortho"))


def gradient(x):
    """Forward differences ``(2, n, h, w)``, 0 across the border."""
    found = np.zeros((2, *x.shape))
    found[0, :, :-1] = np.diff(x, axis=1)
    found[1, :, :, :-1] = np.diff(x, axis=2)
    return found


def gradient_transposed(p):
    """The adjoint of `gradient`."""
    found = np.zeros(p.shape[1:])
    for axis, q in ((1, p[0]), (2, p[1])):
        inner = np.moveaxis(q, axis, 0)[:-1]
        into = np.moveaxis(found, axis, 0)
        into[:-1] -= inner
        into[1:] += inner
    return found


def tikhonov(spectra: Spectra, y, weight: float, penalty: str):
    """Tikhonov's reconstructions; the penalty is "norm" or "gradient"."""
    of_penalty = {"norm": np.ones_like(spectra.laplacian), "gradient": spectra.laplacian}[penalty]
    return np.clip(spectra.apply(spectra.blur / (spectra.blur**2 + weight * of_penalty), y), 0, 1)


def minimize_total_variation(spectra: Spectra, y, weight: float, num_steps: int = 400):
    """Images of least total variation that fit, by ADMM (Boyd et al. 2011, sec. 3) with ``z = grad x`` and ``v = x``."""
    rho = weight / TYPICAL_EDGE
    inverse = 1 / (spectra.blur**2 + rho * (spectra.laplacian + 1))
    data = spectra.apply(spectra.blur, y)
    v = np.clip(y, 0, 1)
    z, dual_z, dual_v = gradient(v), np.zeros((2, *y.shape)), np.zeros_like(y)
    for _ in range(num_steps):
        x = spectra.apply(inverse, data + rho * (gradient_transposed(z - dual_z) + v - dual_v))
        relaxed_z = RELAXATION * gradient(x) + (1 - RELAXATION) * z
        relaxed_v = RELAXATION * x + (1 - RELAXATION) * v
        shifted = relaxed_z + dual_z
        size = np.sqrt((shifted**2).sum(axis=0))
        z = shifted * np.maximum(1 - TYPICAL_EDGE / np.maximum(size, 1e-30), 0)
        v = np.clip(relaxed_v + dual_v, 0, 1)
        dual_z, dual_v = shifted - z, dual_v + relaxed_v - v
    return v
