"""Leading axes: models run one example, a batch, or any axes of examples as one batch, and give the
axes back.

Axes of examples and of their contexts broadcast against each other: ``(b, d)`` and ``(k,)`` are a
batch under one context, ``(d,)`` and ``(n, k)`` are one example under ``n`` contexts. A batch with
a context for each example takes no operation.
"""

import math
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from iresnet_jax.maths.keys import typed_key
from iresnet_jax.models import contexts

T = TypeVar("T")


class Examples(NamedTuple):
    """Examples as one batch, with the axes that they came in.

    Attributes:
        x: The batch ``(b, ...)``.
        context: Context of each example ``(b, k)``; None without.
        axes: Leading axes of the examples, whose product is ``b``.
    """

    x: Any
    context: Any
    axes: tuple[int, ...]

    def keys(self, key: Any) -> Any:
        """One key or None as it is, or one key per example as a vector of them.

        Raises:
            ValueError: If it is no key, or keys have other axes than the examples.
        """
        if key is None:
            return None
        key = typed_key(key)
        if key.shape not in ((), self.axes):
            raise ValueError(
                f"there must be one key, or one per example in shape {self.axes}, got "
                f"keys of shape {key.shape}"
            )
        return key.reshape(-1) if key.ndim > 1 else key

    def restore(self, results: T) -> T:
        """Arrays of the batch ``(b, ...)``, a tree of them, with the examples' own axes."""
        if len(self.axes) == 1:
            return results
        return jax.tree.map(lambda a: a.reshape(*self.axes, *a.shape[1:]), results)


def as_batch(
    x: Any, event_shape: tuple[int, ...], context: Any = None, context_dim: int = 0
) -> Examples:
    """Examples ``(..., *event_shape)`` and contexts ``(..., context_dim)`` as one batch.

    Arrays that do not end in these shapes are left as they are, for the model to refuse.

    Raises:
        ValueError: If the leading axes of examples and contexts do not fit together.
    """
    event_shape, x = (
        tuple(event_shape),
        x if isinstance(x, jax.Array | np.ndarray) else np.asarray(x),
    )
    axes = x.shape[: -len(event_shape)]
    if x.shape != (*axes, *event_shape):
        return Examples(x, context, x.shape[:1])
    if context is not None and context_dim:
        context = contexts.as_vectors(context, context_dim)
        if context.shape[-1:] == (context_dim,):
            try:
                axes = np.broadcast_shapes(axes, context.shape[:-1])
            except ValueError:
                raise ValueError(
                    f"contexts of shape {context.shape} do not fit examples of shape {x.shape}: "
                    "give one context for all, one "
                    "for each example, or leading axes that broadcast"
                ) from None
            context = _flat(context, axes, (context_dim,))
    return Examples(_flat(x, axes, event_shape), context, axes)


def _flat(array: Any, axes: tuple[int, ...], own: tuple[int, ...]) -> Any:
    """An array of ``own`` shape behind axes that broadcast to ``axes``, as a batch."""
    if len(axes) == 1 and array.shape == (*axes, *own):
        return array
    # known numbers stay known under jit, and are checked
    xp = jnp if isinstance(array, jax.Array) else np
    return xp.broadcast_to(array, (*axes, *own)).reshape(math.prod(axes), *own)
