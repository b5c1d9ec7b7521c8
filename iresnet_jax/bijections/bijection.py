"""Bijections of batches, and the errors that add up along them.

Along a chain, standard errors add in quadrature; truncation bounds and evaluations are summed. The
error bound of an inverse is multiplied by ``Lip(F^-1)`` of each bijection whose inverse is applied
after it.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Key

from iresnet_jax.maths.fixed_point import FixedPointInfo
from iresnet_jax.maths.keys import typed_key
from iresnet_jax.maths.lipschitz_bounds import BiLipschitz
from iresnet_jax.maths.logdet_estimator import LogdetInfo
from iresnet_jax.maths.upward_rounding import at_least


class Bijection:
    """An invertible map of batches. `ClosedForm` and `Walk` write the four methods by two.

    Attributes:
        forward: ``x -> y``.
        forward_and_logdet: ``(x, key) -> (y, log|det dy/dx|, LogdetInfo)``; one key, or one per
            example.
        inverse: ``y -> (x, FixedPointInfo)``.
        inverse_and_logdet: ``(y, key) -> (x, log|det dx/dy|, LogdetInfo, FixedPointInfo)``.
        inverse_lipschitz: Upper bound of ``Lip(F^-1)``, guaranteed if the bounds of its parts are.
    """

    forward: Callable[[Any], Array]
    forward_and_logdet: Callable[..., tuple[Array, Array, LogdetInfo]]
    inverse: Callable[[Any], tuple[Array, FixedPointInfo]]
    inverse_and_logdet: Callable[..., tuple[Array, Array, LogdetInfo, FixedPointInfo]]
    inverse_lipschitz: Any = jnp.inf


class ClosedForm(Bijection):
    """A bijection by formulas, which need no key.

    Attributes:
        map: ``x -> (y, log|det dy/dx|)``.
        unmap: ``y -> (x, log|det dx/dy|)``.
        bilipschitz: Bounds of the Lipschitz constants of both.
    """

    map: Callable[[Any], tuple[Array, Array]]
    unmap: Callable[[Any], tuple[Array, Array]]
    bilipschitz: Callable[[], BiLipschitz]

    def inverse_error(self, x: Array) -> FixedPointInfo:
        """How far the result ``x`` of the inverse may be off; exact by default."""
        return no_inverse_error(x)

    @property
    def inverse_lipschitz(self) -> Any:
        """Upper bound of ``Lip(F^-1)``."""
        return self.bilipschitz().inverse

    def forward(self, x):
        """``y``."""
        return self.map(x)[0]

    def forward_and_logdet(self, x, key=None):
        """``y``, its log-determinant, no error."""
        y, logdet = self.map(x)
        return y, logdet, no_logdet_error(y)

    def inverse(self, y):
        """``x``, and its `inverse_error`."""
        x, _ = self.unmap(y)
        return x, self.inverse_error(x)

    def inverse_and_logdet(self, y, key=None):
        """``x``, its log-determinant without an error, and `inverse_error`."""
        x, logdet = self.unmap(y)
        return x, logdet, no_logdet_error(x), self.inverse_error(x)


class Onward(NamedTuple):
    """A batch on its way through bijections: ``y``, the log-determinant so far, and its error."""

    y: Array
    logdet: Array
    info: LogdetInfo

    def through(self, bijection: Bijection, key: Array | None) -> "Onward":
        """One bijection further; without a key the log-determinant is left alone."""
        if key is None:
            return self._replace(y=bijection.forward(self.y))
        y, logdet, info = bijection.forward_and_logdet(self.y, key)
        return Onward(y, self.logdet + logdet, add_logdet_info(self.info, info))


class Back(NamedTuple):
    """A batch on its way back: ``x``, the log-determinant so far, its error, and how the inverses
    ended.
    """

    x: Array
    logdet: Array
    logdet_info: LogdetInfo
    info: FixedPointInfo

    def through(self, bijection: Bijection, key: Array | None) -> "Back":
        """One inverse further; without a key the log-determinant is left alone."""
        if key is None:
            x, own = bijection.inverse(self.x)
            logdet, logdet_info = self.logdet, self.logdet_info
        else:
            x, logdet, logdet_info, own = bijection.inverse_and_logdet(self.x, key)
            logdet = self.logdet + logdet
            logdet_info = add_logdet_info(self.logdet_info, logdet_info)
        info = follow_inverse_info(self.info, own, bijection.inverse_lipschitz)
        return Back(x, logdet, logdet_info, info)


class Walk(Bijection):
    """A bijection through others, each way written once: with a key or, where no log-determinant is
    wanted, without.

    Attributes:
        onward: ``(way, key) -> way`` from data to latents.
        back: ``(way, key) -> way`` from latents to data.
    """

    onward: Callable[[Onward, Any], Onward]
    back: Callable[[Back, Any], Back]

    def forward(self, x):
        """``y``."""
        return self._onward(x, None).y

    def forward_and_logdet(self, x, key):
        """``y``, the sum of the steps' log-determinants, and its error."""
        y, logdet, info = self._onward(x, typed_key(key))
        return y, logdet, info

    def inverse(self, y):
        """``x``, and its `inverse_error`."""
        end = self._back(y, None)
        return end.x, end.info

    def inverse_and_logdet(self, y, key):
        """``x``, the sum of the inverses' log-determinants, and both errors."""
        x, logdet, logdet_info, info = self._back(y, typed_key(key))
        return x, logdet, logdet_info, info

    def _onward(self, x, key):
        return self.onward(Onward(x, jnp.zeros(len(x), x.dtype), no_logdet_error(x)), key)

    def _back(self, y, key):
        start = y, jnp.zeros(len(y), y.dtype), no_logdet_error(y), no_inverse_error(y)
        return self.back(Back(*start), key)


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

    An error bound of 0 stays 0 under an infinite ``Lip(F^-1)``; NaN stays NaN.
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
    """``fold_in(key, i)`` for ``i < num``, in one operation, which compiles faster; a list of None
    without a key.
    """
    return [None] * num if key is None else jax.vmap(lambda i: fold_in(key, i))(jnp.arange(num))
