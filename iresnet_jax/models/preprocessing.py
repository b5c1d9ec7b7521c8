"""Data as the flow takes them, and back.

    data  --numbers, checked-->  levels or vectors  --cells-->  continuous data  --transform-->  the
    flow's input

`cells` and `transform` are bijections, the first one in distribution: forward adds noise, the
inverse rounds. Their numbers come from the data and are no parameters: their gradients are 0. All
functions of a ``spec`` take a `DensitySpec`, which imports this file.

**Leading axes.** Models run one example, a batch, or any axes of examples as one batch, and give
the axes back. Axes of examples and of their contexts broadcast against each other: ``(b, d)`` and
``(k,)`` are a batch under one context, ``(d,)`` and ``(n, k)`` are one example under ``n``
contexts. A batch with a context for each example takes no operation.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import jax
import jax.core
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Num, Shaped

from iresnet_jax.arguments import check_unmasked, finite_numbers
from iresnet_jax.bijections.bijection import Bijection
from iresnet_jax.bijections.bounded import Bounded
from iresnet_jax.bijections.dequantize import Dequantize, check_levels
from iresnet_jax.bijections.standardize import Identity
from iresnet_jax.maths.keys import typed_key
from iresnet_jax.models import contexts
from iresnet_jax.models.columns import Frame, numbers_of

T = TypeVar("T")


def numbers(spec: Any, x: Any) -> Any:
    """Data as an array of numbers: a data frame by the names, categories and order of the columns
    that were fitted.
    """
    if spec.columns is not None and isinstance(x, Frame):
        return numbers_of(x, spec.columns)
    x = x if isinstance(x, jax.Array | np.ndarray) else np.asarray(x)
    return x.astype(np.float64) if x.dtype == np.longdouble else x  # which JAX does not know


def examples(x: Any, num_levels: int | None) -> tuple[np.ndarray, int | None]:
    """Examples that a new model is made for, as it will take them, and the number of their integer
    levels: of images of integers 256 by default, and 2 of booleans.
    """
    check_unmasked(x, "x")
    x = np.asarray(x)
    if x.ndim < 2 or not len(x):
        raise ValueError(
            f"x must be a batch of examples, got shape {x.shape}; numbers, one an "
            "example, are x[:, None]"
        )
    if x.ndim > 2 and x.dtype == bool:
        x, num_levels = x.astype(np.uint8), num_levels or 2
    if np.issubdtype(x.dtype, np.integer) and (x.ndim > 2 or num_levels is not None):
        return x, num_levels or 256
    x = finite_numbers(x, "x", x.dtype if np.issubdtype(x.dtype, np.floating) else float)
    check_told_apart(x.reshape(-1, x.shape[-1]), jnp.result_type(float), "entry {} of x".format)
    return x, num_levels


def check_told_apart(
    rows: Shaped[np.ndarray, "n d"], dtype: Any, name_of: Callable[[int], str]
) -> None:
    """Raises ``ValueError`` if a column varies by less than 128 roundings of its mean in this
    type; the message names it.
    """
    rows, info = np.asarray(rows, np.float64), jnp.finfo(dtype)
    std, mean = rows.std(axis=0), rows.mean(axis=0)
    is_faint = std < np.maximum(
        128 * float(info.eps) * np.abs(mean), float(info.tiny) / float(info.eps)
    )
    for column in np.flatnonzero(is_faint & (np.ptp(rows, axis=0) > 0)).tolist():
        raise ValueError(
            f"{info.dtype} cannot tell the values of {name_of(column)} apart: subtract its mean, "
            "and divide by its standard "
            "deviation"
        )


def checked(spec: Any, x: Any) -> Array:
    """The data as an array, if it is what the model takes: the one check of examples. Values are
    checked where they are known.
    """
    shape, x = tuple(spec.flow.event_shape), numbers(spec, x)
    is_table = len(shape) == 1 and x.shape[1:] == shape
    if spec.num_levels is not None:
        x = x.astype(np.uint8) if x.dtype == bool else x
        check_levels(x, spec.num_levels, shape)
    elif is_table and (jnp.issubdtype(x.dtype, jnp.integer) or x.dtype == bool):
        x = x.astype(jnp.result_type(float))
    elif x.shape[1:] != shape or not jnp.issubdtype(x.dtype, jnp.floating):
        wanted = f"floats of shape (batch, {', '.join(map(str, shape))})"
        raise ValueError(f"the model takes {wanted}, got {x.dtype} of shape {x.shape}")
    else:
        # as cells are: 16 bits have other numbers
        x = x.astype(jnp.promote_types(x.dtype, np.float32))
    if is_table and (spec.cells is not None or isinstance(spec.transform, Bounded)):
        if not any(isinstance(leaf, jax.core.Tracer) for leaf in (x, *jax.tree.leaves(spec))):
            check_ranges(spec, x)
    return x if isinstance(x, jax.Array) else jnp.asarray(x)  # which takes longer than all checks


def check_ranges(spec: Any, x: Any) -> None:
    """Raises ``ValueError`` if an entry of vectors is out of its bounds; the message names the
    first one. Categories that are not known are rare, and not out of bounds.
    """
    ends = spec.transform if isinstance(spec.transform, Bounded) else spec.cells
    if ends is None:
        return
    low, high, rows = (np.asarray(part, np.float64) for part in (ends.low, ends.high, x))
    half = np.zeros(len(low)) if spec.cells is None else np.asarray(spec.cells.spacing) / 2
    margin = 2.0**-21 * (np.abs(rows) + 1e-30)
    outside = (rows < low - margin) | (rows > high + margin)
    if spec.columns is not None:
        outside &= np.array([column.categories is None for column in spec.columns])
    for row, column in np.argwhere(outside)[:1].tolist():
        name = "" if spec.columns is None else f" ({spec.columns[column].name!r})"
        raise ValueError(
            f"{rows[row, column]:g} in row {row}, column {column}{name}, is not within the range "
            f"{low[column] + half[column]:g} to {high[column] - half[column]:g} of the model: its "
            "density is 0"
        )


def cells(spec: Any) -> Bijection:
    """From levels to points of [0, 1), or from values to points of their cells; the identity of
    continuous data.
    """
    if spec.num_levels is not None:
        return Dequantize(spec.num_levels)
    return jax.lax.stop_gradient(spec.cells or Identity())


def preprocess(spec: Any, x: Any, key: Any = None) -> Float[Array, "b ..."]:
    """The flow's input for data, with uniform noise from the key, or none; NaN of data that are
    out of the range of their transform.
    """
    x, into = checked(spec, x), cells(spec)
    u = into.forward(x) if key is None else into.forward_and_logdet(x, key)[0]
    u = u.astype(jnp.promote_types(u.dtype, jnp.result_type(float)))
    key = jax.random.key(0) if key is None else key
    y, log_det, _ = transform(spec).forward_and_logdet(u, key)
    return jnp.where(jnp.isfinite(log_det).reshape(-1, *[1] * (y.ndim - 1)), y, jnp.nan)


def transform(spec: Any) -> Bijection:
    """From continuous data to the flow's input."""
    return jax.lax.stop_gradient(spec.transform)


def rounded(spec: Any, u: Float[Array, "b ..."]) -> Num[Array, "b ..."]:
    """Levels, or values that own cells, of continuous data; continuous data of a model without
    either as they are.
    """
    return cells(spec).inverse(u)[0]


# ----------------------------------------------------------------------------------- leading axes


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
        """One key or None as it is, or one key per example as a vector of them."""
        key = None if key is None else typed_key(key)
        return key if key is None or key.ndim < 2 else key.reshape(-1)

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
    """
    event_shape = tuple(event_shape)
    x = x if isinstance(x, jax.Array | np.ndarray) else np.asarray(x)
    axes = x.shape[: -len(event_shape)]
    if x.shape != (*axes, *event_shape):
        return Examples(x, context, x.shape[:1])
    if context is not None and context_dim:
        context = contexts.as_vectors(context, context_dim)
        if context.shape[-1:] == (context_dim,):
            axes = np.broadcast_shapes(axes, context.shape[:-1])
            context = _flat(context, axes, (context_dim,))
    return Examples(_flat(x, axes, event_shape), context, axes)


def _flat(array: Any, axes: tuple[int, ...], own: tuple[int, ...]) -> Any:
    """An array of ``own`` shape behind axes that broadcast to ``axes``, as a batch."""
    if len(axes) == 1 and array.shape == (*axes, *own):
        return array
    # known numbers stay known under jit, and are checked
    xp = jnp if isinstance(array, jax.Array) else np
    return xp.broadcast_to(array, (*axes, *own)).reshape(math.prod(axes), *own)
