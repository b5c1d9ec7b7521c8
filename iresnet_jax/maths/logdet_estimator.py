"""What log-determinant estimators share: their interface, the error that they report, probes,
and products with a Jacobian.
"""

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Key, Shaped, UInt32

from iresnet_jax.maths.keys import check_keys
from iresnet_jax.maths.upward_rounding import as_floats
from iresnet_jax.pytrees import in_words, largest

Branch = Callable[[Array], Array]
Trace = Callable[[Array], Array]
Jacobian = Callable[[Array], Array]
Logdet = Callable[[Array], Array]
# one key, or one per example; typed, or from jax.random.PRNGKey
Keys = Key[Array, "..."] | UInt32[Array, "..."]
Scalar = float | Float[Array, ""]
Batch = Shaped[Array | np.ndarray, "..."] | Sequence  # made an array of floats by `as_floats`


class Linearized(NamedTuple):
    """A branch ``g`` at a batch ``x``: value and products evaluate activations, and differentiate
    them, once.

    Attributes:
        value: ``g(x)``.
        push: ``v -> J v`` for ``v`` of the shape of ``x``.
    """

    value: Float[Array, "b ..."]
    push: Callable[[Array], Array]


def linearize(branch: Branch | Linearized, x: Float[Array, "b ..."]) -> Linearized:
    """The branch linearised at ``x``; a linearised branch is returned as it is."""
    return branch if isinstance(branch, Linearized) else Linearized(*jax.linearize(branch, x))


def jacobian_product(at: Linearized, probes: Float[Array, "p b ..."]) -> Float[Array, "p b ..."]:
    """``J v`` for every probe."""
    return _over_probes(at.push, len(probes))(probes)


def transposed_jacobian(at: Linearized, num_probes: int) -> Callable[[Array], Array]:
    """``u -> J^T u`` for ``u`` of shape ``(p, b, ...)``; its gradient is zero."""
    example = jnp.zeros_like(at.value)
    push, residuals = jax.closure_convert(at.push, example)
    frozen = lax.stop_gradient(residuals)
    transposed = jax.linear_transpose(lambda v: push(v, *frozen), example)
    return _over_probes(lambda u: transposed(u)[0], num_probes)


def with_gradient(
    value: Float[Array, "p b"], pushed: Float[Array, "p b ..."], w: Float[Array, "p b ..."]
) -> Float[Array, "p b"]:
    """``value`` with the gradient of ``<w, J v>``, where ``pushed`` is ``J v`` and ``w`` is held
    fixed.

    Second derivatives are wrong for the log-determinant, as ``w`` depends on the point too.
    """
    surrogate = jnp.sum(lax.stop_gradient(w) * pushed, axis=tuple(range(2, pushed.ndim)))
    return lax.stop_gradient(value) + (surrogate - lax.stop_gradient(surrogate))


def _over_probes(function, num_probes):
    """``vmap`` without a batch axis for a single probe, which would cost."""
    return jax.vmap(function) if num_probes > 1 else lambda v: function(v[0])[None]


class LogdetInfo(NamedTuple):
    """Error of a log-determinant, in nats, one per example.

    Attributes:
        stderr: Standard error over the probes; 0 if exact, infinite for a single probe. For
            `RouletteLogdet` it holds given the random length, which all probes of an example share.
        truncation_bound: Upper bound of the terms left out, rigorous if the Lipschitz bound is; 0
            if exact, infinite without a Lipschitz bound below 1.
    """

    stderr: Float[Array, " b"]
    truncation_bound: Float[Array, " b"]

    def __repr__(self) -> str:
        return in_words(
            self,
            lambda: (
                f"{np.size(self.stderr)} examples, stderr at most {largest(self.stderr)} nats, "
                f"truncation_bound at most {largest(self.truncation_bound)} nats"
            ),
        )


class LogdetEstimator:
    """Estimates ``log det(I + J)`` of a branch at every example of a batch.

    Attributes:
        unbiased: True if the mean over all random choices is the log-determinant (for
            `RouletteLogdet`, the series up to its last weight); False for a truncated estimate.
        _estimate: The arguments of a call, in this order, without defaults -> its results.
    """

    unbiased: ClassVar[bool]
    _estimate: ClassVar[Callable[..., tuple[Array, LogdetInfo]]]

    def fix_length(self, key: Keys) -> "LogdetEstimator":
        """The estimator with its random length drawn once for all blocks, examples and devices;
        itself if it has none.
        """
        del key
        return self

    def __call__(
        self,
        branch: Branch | Linearized,
        x: Batch,
        key: Keys | None = None,
        *,
        lipschitz_bound: Scalar | None = None,
        trace: Trace | None = None,
        jacobian: Jacobian | None = None,
        logdet: Logdet | None = None,
    ) -> tuple[Float[Array, " b"], LogdetInfo]:
        """The log-determinant and its error.

        Args:
            branch: ``g``, acting on each example alone, or linearised at ``x``.
            x: Where to evaluate.
            key: Key of the random choices, one or one per example; only `ExactLogdet` needs none.
            lipschitz_bound: Upper bound of ``Lip(g)``, for the truncation bound.
            trace: ``x -> tr J (b,)`` in closed form, if there is one.
            jacobian: ``x -> J (b, d, d)`` in closed form, if there is one.
            logdet: ``x -> log det(I + J) (b,)`` exactly, if there is a faster way than ``d``
                products with ``J``.
        """
        bound = jnp.inf if lipschitz_bound is None else lipschitz_bound
        return self._estimate(branch, as_floats(x), key, bound, trace, jacobian, logdet)


@dataclass(frozen=True, kw_only=True)
class ProbingEstimator(LogdetEstimator):
    """Averages estimates ``v^T log(I + J) v`` over random probes ``v``.

    Attributes:
        num_probes: Probes for each example.
        exact_trace: Whether a trace in closed form replaces the estimate of ``tr J`` where there is
            one.
        _samples: ``(branch, x, key, lipschitz_bound, trace) ->`` one estimate per probe, ``(p,
            b)``, and the bound of the terms left out, ``(b,)``.
    """

    num_probes: int = 1
    exact_trace: bool = True
    _samples: ClassVar[Callable[..., tuple[Array, Array]]]

    def _estimate(self, branch, x, key, lipschitz_bound, trace, jacobian, logdet):
        del jacobian, logdet
        trace = trace if self.exact_trace else None
        samples, bound = self._samples(branch, x, check_keys(key, len(x)), lipschitz_bound, trace)
        value, stderr = mean_and_stderr(samples)
        return value, LogdetInfo(stderr, bound)


def draw_probes(
    key: Key[Array, "..."], x: Float[Array, "b ..."], num_probes: int
) -> Float[Array, "p b ..."]:
    """Probes of independent signs, which have the least variance among probes of independent
    entries.

    Args:
        key: One key, or one for each example; with one key per example, an example has the same
            probes in every batch.
        x: The batch, for shape and type.
        num_probes: Probes for each example.
    """
    if key.ndim == 0:
        return _signs(key, (num_probes, *x.shape), x.dtype)
    return jax.vmap(lambda k: _signs(k, (num_probes, *x.shape[1:]), x.dtype), out_axes=1)(key)


@functools.partial(jax.jit, static_argnums=(1, 2), inline=True)
def _signs(key: Key[Array, ""], shape: tuple[int, ...], dtype: Any) -> Array:
    """Independent signs, one random bit each: `jax.random.rademacher` spends a whole word of random
    bits on each sign.
    """
    with jax.named_scope("random_signs"):
        size, place = math.prod(shape), jnp.arange(32, dtype=jnp.uint32)[None]
        bits = jax.random.bits(key, (-(-size // 32), 1), jnp.uint32) >> place & 1
        return (1 - 2 * bits.reshape(-1)[:size].reshape(shape).astype(jnp.int32)).astype(dtype)


def mean_and_stderr(samples: Float[Array, "p b"]) -> tuple[Float[Array, " b"], Float[Array, " b"]]:
    """Mean over probes, and its standard error: infinite for a single probe."""
    mean = jnp.mean(samples, axis=0)
    if len(samples) == 1:
        return mean, jnp.full_like(mean, jnp.inf)
    return mean, lax.stop_gradient(jnp.std(samples, axis=0, ddof=1)) / np.sqrt(len(samples)).astype(
        samples.dtype
    )
