"""Anderson's method (1965, type II): the last few steps of an iteration predict the next.
Examples are vectors.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float


class History(NamedTuple):
    """The last ``m`` steps of an iteration, in rings: the newest step takes the place of the
    oldest.

    Attributes:
        image: ``y - g(x)`` at the last evaluation.
        r: Residual at the last evaluation.
        images: Steps of ``image``, ``(b, m, d)``.
        residuals: Steps of ``r``, ``(b, m, d)``.
        gram: Inner products of the steps of ``r``, ``(b, m, m)``.
    """

    image: Array
    r: Array
    images: Array
    residuals: Array
    gram: Array

    @classmethod
    def empty(cls, x: Float[Array, "b d"], memory: int) -> "History":
        """Room for ``memory`` steps of examples like ``x``, all zero."""
        nothing, steps = jnp.zeros_like(x), jnp.zeros((len(x), memory, x.shape[1]), x.dtype)
        return cls(nothing, nothing, steps, steps, jnp.zeros((len(x), memory, memory), x.dtype))

    def extend(self, step: Array, image: Array, r: Array) -> "History":
        """Adds the step from the last evaluation to this one."""
        slot = step % self.images.shape[1]
        # the first evaluation is no step, and a zero step explains nothing
        moved = (step > 0).astype(r.dtype)
        latest = moved * (r - self.r)
        residuals = self.residuals.at[:, slot].set(latest)
        products = _inner_products(residuals, latest)
        return History(
            image=image,
            r=r,
            images=self.images.at[:, slot].set(moved * (image - self.image)),
            residuals=residuals,
            gram=self.gram.at[:, slot].set(products).at[:, :, slot].set(products),
        )

    def extrapolate(self) -> tuple[Array, Array]:
        """``image`` less what past steps explain of it, and the part of ``|r|^2`` that they
        explain, one per example.

        The explained part is NaN if the least-squares problem for ``gamma`` has no solution.
        """
        products = _inner_products(self.residuals, self.r)
        gamma = _solve_regularized(self.gram, products)

        explained = sum(gamma[:, j, None] * self.images[:, j] for j in range(gamma.shape[1]))
        return self.image - explained, jnp.sum(gamma * products, axis=1)


def _inner_products(steps: Float[Array, "b m d"], r: Float[Array, "b d"]) -> Float[Array, "b m"]:
    return jnp.einsum("bmd,bd->bm", steps, r, precision="highest")


def _solve_regularized(gram: Float[Array, "b m m"], b: Float[Array, "b m"]) -> Float[Array, "b m"]:
    """Solves ``(gram + ridge I) gamma = b`` for every example; the ridge is a few units of
    rounding.

    Gauss-Jordan elimination in which each entry is a vector over examples; a library's solver would
    run once an example. The matrix is positive definite, so no pivots are needed.
    """
    m, dtype = b.shape[1], b.dtype
    ridge = 10 * jnp.finfo(dtype).eps * sum(gram[:, i, i] for i in range(m)) + jnp.finfo(dtype).tiny
    rows = [
        [gram[:, i, j] + (ridge if i == j else 0) for j in range(m)] + [b[:, i]] for i in range(m)
    ]
    for k in range(m):
        scaled = [entry / rows[k][k] for entry in rows[k]]
        rows = [
            scaled
            if i == k
            else [entry - row[k] * above for entry, above in zip(row, scaled, strict=True)]
            for i, row in enumerate(rows)
        ]
    return jnp.stack([row[m] for row in rows], axis=1)
