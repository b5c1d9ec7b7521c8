r"""Measurements of images: a known forward operator and noise, drawn when they are needed.

    y = A x + s n,    n ~ N(0, I)

``A`` is a Gaussian blur with reflecting borders: symmetric, with all eigenvalues in (0, 1], so that no image is amplified and a
residual block ``x + g(x)`` with ``Lip(g) < 1`` can come close to it. Its smallest eigenvalues are nearly 0, which makes the
inverse problem ill-posed. Images have pixels in [0, 1] and so have the units of measurements.
"""

import functools
import math
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Key

_REACH = 10  # standard deviations beyond which the Gaussian is 0 in float64


@dataclass(frozen=True)
class Measurement:
    """How images are measured.

    Attributes:
        width: Standard deviation of the Gaussian blur in pixels; 0 does not blur.
        noise: Standard deviation of the noise in every pixel, as a fraction of the range from black to white.
    """

    width: float
    noise: float

    def __post_init__(self):
        for name, value in (("width", self.width), ("noise", self.noise)):
            if not 0 <= value < math.inf:
                raise ValueError(f"{name} of a measurement must be at least 0 and finite, got {value}")

    def exact(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
        """``A x``, every channel by itself."""
        rows, columns = (jnp.asarray(blur_matrix(size, self.width), x.dtype) for size in x.shape[1:3])
        return jnp.einsum("ij,bjkc,lk->bilc", rows, x, columns, precision="highest")

    def draw(self, keys: Key[Array, " b"], x: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
        """``A x + s n`` with the noise of one key an example."""
        noise = jax.vmap(lambda key: jax.random.normal(key, x.shape[1:], x.dtype))(keys)
        return self.exact(x) + self.noise * noise

    def held_out(
        self, x: Float[Array, "b h w c"] | Float[np.ndarray, "b h w c"], seed: int, split: str
    ) -> Float[np.ndarray, "b h w c"]:
        """Measurements of the examples of "validation" or "test", from the first on, always the same for one seed."""
        stream = {"validation": 4, "test": 5}[split]
        key = jax.random.fold_in(jax.random.key(seed), 2**31 + stream)
        keys = jax.vmap(lambda i: jax.random.fold_in(key, i))(jnp.arange(len(x)))
        return np.asarray(self.draw(keys, jnp.asarray(x)))


@functools.lru_cache(maxsize=16)
def blur_matrix(size: int, width: float) -> Float[np.ndarray, "n n"]:
    """The Gaussian blur of a row of pixels whose mirror images continue it without end, as a symmetric matrix.

    ``K_ij = sum_m w(i - j + 2 n m) + w(i + j + 1 + 2 n m)`` with ``w`` the Gaussian at whole pixels, of sum 1. Its eigenvectors
    are those of the discrete cosine transform (DCT-II), and its eigenvalues lie in (0, 1].

    Args:
        size: Pixels ``n`` of the row.
        width: Standard deviation in pixels; 0 is the identity.
    """
    from scipy import ndimage  # needed here alone

    if width == 0:
        return np.eye(size)
    matrix = ndimage.gaussian_filter1d(np.eye(size), width, axis=0, mode="reflect", truncate=_REACH)
    matrix.flags.writeable = False  # shared by all callers
    return matrix
