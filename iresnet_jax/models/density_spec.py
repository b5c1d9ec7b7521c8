"""All that defines a density but its weights: architecture, preprocessing, prior, and what the
data are.
"""

import math
from dataclasses import field
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Key

from iresnet_jax.bijections.bounded import Bounded
from iresnet_jax.bijections.equalize import Equalize
from iresnet_jax.bijections.logit import Logit
from iresnet_jax.bijections.marginals import Marginals
from iresnet_jax.bijections.standardize import Center, Identity, Standardize, Whiten
from iresnet_jax.maths.lipschitz_bounds import BiLipschitz
from iresnet_jax.models import contexts, noise, preprocessing, priors
from iresnet_jax.models.architecture import FlowSpec
from iresnet_jax.models.columns import Column, Frame, numbers_of
from iresnet_jax.models.contexts import Contexts, ContextScale, ContextScores, Network
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

    def context_numbers(self, context: Any) -> Any:
        """Contexts as an array, if they are a data frame."""
        if self.context_columns is None or not isinstance(context, Frame):
            return context
        return numbers_of(context, self.context_columns)

    def preprocess(self, x: Any, key: Key[Array, "..."] | None = None) -> Float[Array, "b ..."]:
        """The flow's input for data, with uniform noise of levels and cells from the key, or
        none.
        """
        return preprocessing.preprocess(self, x, key)

    def scale_context(
        self, context: Contexts | None, network: Network
    ) -> Float[Array, "b ..."] | None:
        """Contexts as the flow takes them: scaled, then through the network if there is one."""
        if context is None:
            return None
        vectors = jnp.asarray(contexts.as_vectors(context, self.context_dim))
        if not jnp.issubdtype(vectors.dtype, jnp.floating):
            vectors = vectors.astype(jnp.result_type(float))
        if vectors.shape[1:] != (self.context_dim,):
            raise ValueError(
                f"the model takes contexts of length {self.context_dim} (0 for none), got shape "
                f"{vectors.shape}"
            )
        if self.context is None:
            return vectors
        scaled = jax.lax.stop_gradient(self.context).forward(vectors)
        return contexts.apply_network(network, scaled) if self.context_hidden else scaled

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
