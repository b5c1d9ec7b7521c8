"""A bijection as a value: four functions on weights in their closure, and how knowledge of errors
adds up.

Along a chain standard errors add in quadrature, truncation bounds and evaluations by sum. The error
bound of an inverse is multiplied by ``Lip(F^-1)`` of each bijection whose inverse is applied after
it.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from iresnet_jax.maths.fixed_point import FixedPointInfo
from iresnet_jax.maths.keys import typed_key
from iresnet_jax.maths.lipschitz_bounds import BiLipschitz
from iresnet_jax.maths.logdet_estimator import LogdetInfo
from iresnet_jax.maths.upward_rounding import at_least


class Bijection(NamedTuple):
    """An invertible map of batches.

    Attributes:
        forward: ``x -> y``.
        forward_and_logdet: ``(x, key) -> (y, log|det dy/dx|, LogdetInfo)``; one key, or one per
            example.
        inverse: ``y -> (x, FixedPointInfo)``.
        inverse_and_logdet: ``(y, key) -> (x, log|det dx/dy|, LogdetInfo, FixedPointInfo)``.
        inverse_lipschitz: Upper bound of ``Lip(F^-1)``, guaranteed if the bounds of its parts are.
    """

    forward: Callable[[Array], Array]
    forward_and_logdet: Callable[[Array, Array], tuple[Array, Array, LogdetInfo]]
    inverse: Callable[[Array], tuple[Array, FixedPointInfo]]
    inverse_and_logdet: Callable[[Array, Array], tuple[Array, Array, LogdetInfo, FixedPointInfo]]
    inverse_lipschitz: float | Float[Array, ""]


class Onward(NamedTuple):
    """A batch on its way through bijections: ``y``, the log-determinant so far, and what is
    known about its error.
    """

    y: Array
    logdet: Array
    info: LogdetInfo

    @classmethod
    def start(cls, x: Array) -> "Onward":
        """The way from ``x``, no step taken."""
        return cls(x, jnp.zeros(len(x), x.dtype), no_logdet_error(x))

    def through(self, bijection: Bijection, key: Array | None) -> "Onward":
        """One bijection further; without a key the log-determinant is left alone."""
        if key is None:
            return self._replace(y=bijection.forward(self.y))
        y, logdet, info = bijection.forward_and_logdet(self.y, key)
        return Onward(y, self.logdet + logdet, add_logdet_info(self.info, info))


class Back(NamedTuple):
    """A batch on its way back: ``x``, the log-determinant of the way so far, and how the
    inverses ended.
    """

    x: Array
    logdet: Array
    logdet_info: LogdetInfo
    info: FixedPointInfo

    @classmethod
    def start(cls, y: Array) -> "Back":
        """The way back from ``y``, no step taken."""
        return cls(y, jnp.zeros(len(y), y.dtype), no_logdet_error(y), no_inverse_error(y))

    def through(self, bijection: Bijection, key: Array | None) -> "Back":
        """One inverse further; without a key the log-determinant is left alone."""
        if key is None:
            x, own = bijection.inverse(self.x)
            return self._replace(
                x=x, info=follow_inverse_info(self.info, own, bijection.inverse_lipschitz)
            )
        x, logdet, logdet_info, own = bijection.inverse_and_logdet(self.x, key)
        return Back(
            x,
            self.logdet + logdet,
            add_logdet_info(self.logdet_info, logdet_info),
            follow_inverse_info(self.info, own, bijection.inverse_lipschitz),
        )


def from_walks(
    onward: Callable[[Onward, Array | None], Onward],
    back: Callable[[Back, Array | None], Back],
    inverse_lipschitz: float | Float[Array, ""],
) -> Bijection:
    """A bijection from its two ways, each with a key or, where no log-determinant is wanted,
    without.
    """

    def forward_and_logdet(x, key):
        end = onward(Onward.start(x), typed_key(key))
        return end.y, end.logdet, end.info

    def inverse(y):
        end = back(Back.start(y), None)
        return end.x, end.info

    def inverse_and_logdet(y, key):
        end = back(Back.start(y), typed_key(key))
        return end.x, end.logdet, end.logdet_info, end.info

    return Bijection(
        forward=lambda x: onward(Onward.start(x), None).y,
        forward_and_logdet=forward_and_logdet,
        inverse=inverse,
        inverse_and_logdet=inverse_and_logdet,
        inverse_lipschitz=inverse_lipschitz,
    )


def no_logdet_error(batch: Array) -> LogdetInfo:
    """The information of a log-determinant known exactly."""
    zeros = jnp.zeros(batch.shape[0], batch.dtype)
    return LogdetInfo(stderr=zeros, truncation_bound=zeros)


def no_inverse_error(batch: Array) -> FixedPointInfo:
    """The information of an inverse in closed form."""
    zeros = jnp.zeros(batch.shape[0], batch.dtype)
    nothing = jnp.zeros(batch.shape[0], jnp.int32)
    return FixedPointInfo(
        num_evals=nothing, residual=zeros, error_bound=zeros, converged=nothing == 0
    )


def add_logdet_info(a: LogdetInfo, b: LogdetInfo) -> LogdetInfo:
    """The information of a sum of two log-determinants with independent probes."""
    return LogdetInfo(jnp.sqrt(a.stderr**2 + b.stderr**2), a.truncation_bound + b.truncation_bound)


def follow_inverse_info(
    later: FixedPointInfo, own: FixedPointInfo, inverse_lipschitz
) -> FixedPointInfo:
    """The information of ``F^-1`` applied to the result of an inverse that ended as `later` says.

    An error bound of 0 stays 0 under an infinite ``Lip(F^-1)``; one that is not a number stays
    that.
    """
    constant = at_least(inverse_lipschitz, later.error_bound.dtype)
    inherited = jnp.where(later.error_bound == 0, 0, constant * later.error_bound)
    return FixedPointInfo(
        num_evals=later.num_evals + own.num_evals,
        residual=jnp.maximum(later.residual, own.residual),
        error_bound=own.error_bound + inherited,
        converged=later.converged & own.converged,
    )


def fold_in(key: Key[Array, "..."], data: int | Array) -> Key[Array, "..."]:
    """``jax.random.fold_in`` for one key or one per example."""
    if key.ndim == 0:
        return jax.random.fold_in(key, data)
    return jax.vmap(lambda k: jax.random.fold_in(k, data))(key)


def keys_of_links(key: Key[Array, "..."] | None, num: int) -> Key[Array, "k ..."] | list[None]:
    """``fold_in(key, i)`` for ``i < num``, made at once: one by one they compile longer; no keys
    if there is none.
    """
    return [None] * num if key is None else jax.vmap(lambda i: fold_in(key, i))(jnp.arange(num))


def exact_bijection(
    forward_and_logdet: Callable,
    inverse_and_logdet: Callable,
    inverse_lipschitz: float | Array = 1.0,
    inverse_error: Callable[[Array], FixedPointInfo] = no_inverse_error,
) -> Bijection:
    """A bijection in closed form from ``x -> (y, logdet)``, ``y -> (x, logdet)``, and the error
    of an inverse ``x``.
    """

    def inverse(y):
        x, _ = inverse_and_logdet(y)
        return x, inverse_error(x)

    def inverse_with_info(y, key):
        del key
        x, logdet = inverse_and_logdet(y)
        return x, logdet, no_logdet_error(x), inverse_error(x)

    return Bijection(
        forward=lambda x: forward_and_logdet(x)[0],
        forward_and_logdet=lambda x, key: (*forward_and_logdet(x), no_logdet_error(x)),
        inverse=inverse,
        inverse_and_logdet=inverse_with_info,
        inverse_lipschitz=inverse_lipschitz,
    )


class ClosedForm:
    """A transform with ``forward_and_logdet(x)``, ``inverse_and_logdet(y)`` and
    ``bilipschitz()``, as a bijection.
    """

    forward_and_logdet: Callable[[Array], tuple[Array, Array]]
    inverse_and_logdet: Callable[[Array], tuple[Array, Array]]
    bilipschitz: Callable[[], BiLipschitz]

    def bijection(self) -> Bijection:
        """The map of batches."""
        return exact_bijection(
            self.forward_and_logdet,
            self.inverse_and_logdet,
            inverse_lipschitz=self.bilipschitz().inverse,
        )


def isometric_bijection(
    forward: Callable[[Array], Array], inverse: Callable[[Array], Array]
) -> Bijection:
    """A bijection that preserves distances and volume, as a permutation of entries or a shift."""

    def with_zero(function):
        return lambda x: (function(x), jnp.zeros(x.shape[0], x.dtype))

    return exact_bijection(with_zero(forward), with_zero(inverse))
