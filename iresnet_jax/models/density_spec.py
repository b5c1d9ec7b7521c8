"""All that defines a density but its weights: architecture, prior, what the data are, and the way
from data to the flow's input and back.

    data  --numbers, checked-->  levels or vectors  --cells-->  continuous data  --transform-->  the
    flow's input

Cells and transform are bijections, the first ones in distribution: forward adds noise, the inverse
rounds. Their numbers come from the data and are no parameters: their gradients are 0.
"""

import math
from collections.abc import Callable
from dataclasses import field
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Key, Num, Shaped

from iresnet_jax.arguments import check_unmasked, finite_numbers
from iresnet_jax.bijections.bijection import Bijection
from iresnet_jax.bijections.bounded import Bounded
from iresnet_jax.bijections.dequantize import Dequantize, check_levels
from iresnet_jax.bijections.equalize import Equalize
from iresnet_jax.bijections.logit import Logit
from iresnet_jax.bijections.marginals import Marginals
from iresnet_jax.bijections.standardize import Center, Identity, Standardize, Whiten
from iresnet_jax.branches.branch import check_context
from iresnet_jax.maths.lipschitz_bounds import BiLipschitz
from iresnet_jax.models import contexts, noise, priors
from iresnet_jax.models.architecture import FlowSpec
from iresnet_jax.models.columns import Column, Frame, numbers_of
from iresnet_jax.models.contexts import Contexts, ContextScale, ContextScores, Network
from iresnet_jax.models.flow import is_traced
from iresnet_jax.pytrees import pytree

Transform = Identity | Center | Logit | Equalize | Standardize | Whiten | Bounded


@pytree(arrays=("transform", "cells", "context"))
class DensitySpec:
    """All that defines a density but its weights.

    Attributes:
        flow: Architecture of the flow.
        prior_family: Family of the prior, one of `priors.FAMILIES`; "own" if it is a prior of one's
            own.
        transform: Preprocessing: `Center`, `Logit` or `Equalize` of images in [0, 1), `Standardize`
            or `Whiten` of other continuous data, `Bounded` in front of them where entries have hard
            ends or heavy tails, `Identity` of either.
        num_levels: Integer levels of the data, at least 2; None for continuous data.
        num_classes: Classes that have a prior each, at least 2; None for one prior of all.
        cells: Entries of vectors whose values own cells; None if all are continuous.
        columns: Columns of the data frame or table that the entries of vectors are; None for
            arrays.
        context: Scale of the contexts of a conditional density; None takes contexts as they are.
        context_columns: Columns of the data frame that contexts are; None for arrays.
        num_components: Components of a prior of `priors.MIXTURES`, which has no classes; None for
            other priors.
        context_hidden: Widths of a network on the scaled contexts, the last one of its output,
            which the flow then takes, see `iresnet_jax.models.contexts`; none gives the flow the
            contexts themselves.
    """

    constrained: ClassVar[bool] = True

    flow: FlowSpec
    prior_family: str = "gaussian"
    transform: Transform = field(default_factory=Identity)
    num_levels: int | None = None
    num_classes: int | None = None
    cells: Marginals | None = None
    columns: tuple[Column, ...] | None = None
    context: Standardize | ContextScale | ContextScores | None = None
    context_columns: tuple[Column, ...] | None = None
    num_components: int | None = None
    context_hidden: tuple[int, ...] = ()

    def __post_init__(self):
        shape = self.flow.event_shape
        for part in (self.transform, self.cells):
            entries = getattr(part, "num_entries", shape[-1])
            if entries != shape[-1] or (
                isinstance(part, Whiten | Bounded) and len(shape) != 1
            ):  # one entry would broadcast
                raise ValueError(
                    f"{type(part).__name__} has {entries} entries, which do not fit examples of "
                    f"shape {shape}"
                )

    def standard_prior(self) -> Any:
        """The standard member of the prior's family, which has the structure of all its members."""
        return priors.standard(
            self.prior_family, self.flow.num_dims, self.num_components, self.num_classes
        )

    def initial_arrays(self, key: Key[Array, ""]) -> dict[str, Any]:
        """Fresh arrays of a `Density` beside its weights, by its fields: a standard prior,
        random networks.
        """
        return {
            "prior": {} if self.prior_family == priors.OWN else self.standard_prior(),
            "network": contexts.initial_network(key, self.num_features, self.context_hidden),
            "noise_network": noise.initial_network(self.flow, jax.random.fold_in(key, 1)),
        }

    def fitted(self, z: Array, labels: Any = None) -> dict[str, Any]:
        """What of `initial_arrays` is fitted to latents: the prior, if it has components or is
        behind whitening.
        """
        family, num = self.prior_family, self.flow.num_dims
        if self.num_components is not None:
            return {"prior": priors.MIXTURES[family].fit(np.asarray(z), self.num_components)}
        if not self.is_white or family == priors.OWN or (self.num_classes and labels is None):
            return {}
        if self.num_classes is not None:
            fit = priors.ClassPriors.fit
            return {"prior": fit(family, np.asarray(z), np.asarray(labels), self.num_classes)}
        return {"prior": priors.LOCATION_SCALE[family].of_moments(np.zeros(num), np.ones(num))}

    # -------------------------------------------------------------- from data to the flow, and back

    @property
    def example_shape(self) -> tuple[int, ...]:
        """Shape of one example."""
        return self.flow.event_shape

    def numbers(self, x: Any) -> Any:
        """Data as an array of numbers: a data frame by the names, categories and order of the
        columns that were fitted.
        """
        if self.columns is not None and isinstance(x, Frame):
            return numbers_of(x, self.columns)
        x = x if isinstance(x, jax.Array | np.ndarray) else np.asarray(x)
        return x.astype(np.float64) if x.dtype == np.longdouble else x  # which JAX does not know

    def checked(self, x: Any) -> Array:
        """The data as an array, if it is what the model takes: the one check of examples. Values
        are checked where they are known.
        """
        shape, x = tuple(self.flow.event_shape), self.numbers(x)
        is_table = len(shape) == 1 and x.shape[1:] == shape
        if self.num_levels is not None:
            x = x.astype(np.uint8) if x.dtype == bool else x
            check_levels(x, self.num_levels, shape)
        elif is_table and (jnp.issubdtype(x.dtype, jnp.integer) or x.dtype == bool):
            x = x.astype(jnp.result_type(float))
        elif x.shape[1:] != shape or not jnp.issubdtype(x.dtype, jnp.floating):
            wanted = f"floats of shape (batch, {', '.join(map(str, shape))})"
            raise ValueError(f"the model takes {wanted}, got {x.dtype} of shape {x.shape}")
        else:
            # as cells are: 16 bits have other numbers
            x = x.astype(jnp.promote_types(x.dtype, np.float32))
        ends = self.transform if isinstance(self.transform, Bounded) else self.cells
        if is_table and ends is not None and not is_traced((x, self)):
            self._check_ranges(x, ends)
        return x if isinstance(x, jax.Array) else jnp.asarray(x)  # longer than all checks

    def _check_ranges(self, x: Any, ends: Bounded) -> None:
        """Raises ``ValueError`` if an entry of vectors is out of its bounds; the message names the
        first one. Categories that are not known are rare, and not out of bounds.
        """
        low, high, rows = (np.asarray(part, np.float64) for part in (ends.low, ends.high, x))
        half = np.zeros(len(low)) if self.cells is None else np.asarray(self.cells.spacing) / 2
        margin = 2.0**-21 * (np.abs(rows) + 1e-30)
        outside = (rows < low - margin) | (rows > high + margin)
        if self.columns is not None:
            outside &= np.array([column.categories is None for column in self.columns])
        for row, column in np.argwhere(outside)[:1].tolist():
            name = "" if self.columns is None else f" ({self.columns[column].name!r})"
            raise ValueError(
                f"{rows[row, column]:g} in row {row}, column {column}{name}, is not within the "
                f"range {low[column] + half[column]:g} to {high[column] - half[column]:g} of the "
                "model: its density is 0"
            )

    @property
    def dequantizer(self) -> Bijection:
        """From levels to points of [0, 1), or from values to points of their cells; the identity
        of continuous data.
        """
        if self.num_levels is not None:
            return Dequantize(self.num_levels)
        return jax.lax.stop_gradient(self.cells or Identity())

    @property
    def to_flow(self) -> Bijection:
        """From continuous data to the flow's input: `transform`, whose numbers are no
        parameters.
        """
        return jax.lax.stop_gradient(self.transform)

    def rounded(self, u: Float[Array, "b ..."]) -> Num[Array, "b ..."]:
        """Levels, or values that own cells, of continuous data; continuous data of a model without
        either as they are.
        """
        return self.dequantizer.inverse(u)[0]

    def preprocess(self, x: Any, key: Key[Array, "..."] | None = None) -> Float[Array, "b ..."]:
        """The flow's input for data, with uniform noise of levels and cells from the key, or
        none; NaN of data that are out of the range of their transform.
        """
        x, into = self.checked(x), self.dequantizer
        u = into.forward(x) if key is None else into.forward_and_logdet(x, key)[0]
        u = u.astype(jnp.promote_types(u.dtype, jnp.result_type(float)))
        y, log_det, _ = self.to_flow.forward_and_logdet(u)
        return jnp.where(jnp.isfinite(log_det).reshape(-1, *[1] * (y.ndim - 1)), y, jnp.nan)

    def context_numbers(self, context: Any) -> Any:
        """Contexts as an array, if they are a data frame."""
        if self.context_columns is None or not isinstance(context, Frame):
            return context
        return numbers_of(context, self.context_columns)

    def scale_context(
        self, context: Contexts | None, network: Network
    ) -> Float[Array, "b ..."] | None:
        """Contexts as the flow takes them: scaled, then through the network if there is one."""
        if context is None:
            return None
        vectors = jnp.atleast_1d(contexts.as_vectors(context, self.context_dim))
        if not jnp.issubdtype(vectors.dtype, jnp.floating):
            vectors = vectors.astype(jnp.result_type(float))
        check_context(self.context_dim, len(vectors), vectors)
        if self.context is None:
            return vectors
        scaled = jax.lax.stop_gradient(self.context).forward(vectors)
        return contexts.apply_network(network, scaled) if self.context_hidden else scaled

    # ------------------------------------------------------------------------------- what it is

    @property
    def is_white(self) -> bool:
        """Whether the flow's input is whitened."""
        return isinstance(getattr(self.transform, "then", self.transform), Whiten)

    @property
    def context_dim(self) -> int:
        """Length of a context vector; 0 for none."""
        return self.flow.context_dim if self.context is None else self.context.num_entries

    @property
    def num_features(self) -> int:
        """Length of a scaled context."""
        return getattr(self.context, "num_features", self.context_dim)

    @property
    def is_discrete(self) -> bool:
        """Whether data, or some of their entries, are integer levels or own cells, and get
        noise.
        """
        return self.num_levels is not None or self.cells is not None

    def check_continuous(self) -> None:
        """Raises ``ValueError`` if samples have no density."""
        if self.is_discrete:
            raise ValueError(
                "samples of integer levels or with cells have probabilities and no density: take "
                "model.continuous, which has continuous ones"
            )

    @property
    def bound(self) -> str:
        """Name of the bound that the mean over noise is, "uniform mean" or "variational mean";
        "" for continuous data.
        """
        if not self.is_discrete:
            return ""
        return "uniform mean" if self.flow.noise is None else "variational mean"

    @property
    def unit(self) -> str:
        """Unit of reported likelihoods: "bits/dim" for integer levels, "nats" for continuous
        data.
        """
        return "nats" if self.num_levels is None else "bits/dim"

    @property
    def metric(self) -> str:
        """Name of the reported likelihood in logs: "bits_per_dim" or "nll"."""
        return "nll" if self.num_levels is None else "bits_per_dim"

    def bilipschitz(self) -> BiLipschitz:
        """Bounds of the Lipschitz constants of the preprocessing and of its inverse."""
        return self.transform.bilipschitz()

    def in_units(self, log_prob: Float[Array, "..."]) -> Float[Array, "..."]:
        """``-log_prob`` in `unit`: what is minimised and reported."""
        return -log_prob * self.unit_of_a_nat

    @property
    def unit_of_a_nat(self) -> float:
        """One nat of log-likelihood in `unit`."""
        return 1.0 if self.num_levels is None else 1 / (self.flow.num_dims * math.log(2))


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
