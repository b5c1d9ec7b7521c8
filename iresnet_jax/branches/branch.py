"""A residual branch as a value: ``g(x; context)`` with its weights, and what is known about it.

A kind of branch is a `BranchSpec`: an architecture without weights, in one file of this folder.
From weights it makes a `Branch`, which estimators, solvers and certificates take without asking
what kind it is. Your own kind needs `BranchSpec.initial_weights`, `BranchSpec.apply` and
`BranchSpec.lipschitz_bound`. `own` makes such a kind from your own modules.
"""

import dataclasses
import functools
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float

from iresnet_jax.maths.activations import PROVEN
from iresnet_jax.maths.lipschitz_bounds import BiLipschitz, block_bounds
from iresnet_jax.maths.logdet_estimator import Jacobian, Logdet, Trace
from iresnet_jax.maths.upward_rounding import lipschitz_at_least, rounded_up

if TYPE_CHECKING:
    from iresnet_jax.branches.layers import LayerSpec, Part

Weights = Mapping[str, Any]
# Lipschitz constants by part of a branch, such as a layer's norm; arrays of JAX or NumPy
Norms = Mapping[str, Any]


class CallableBranch(NamedTuple):
    """A branch that is any function, and what is known about it.

    Attributes:
        g: ``x -> g(x)``, acting on each example of a batch alone.
        lipschitz_bound: Upper bound of ``Lip(g)``. The inverse and the truncation bound rely on it;
            None promises nothing.
        trace: ``x -> tr J_g(x)`` in closed form, if there is one.
        jacobian: ``x -> J_g(x) (b, d, d)`` in closed form, if there is one.
        logdet: ``x -> log det(I + J_g(x)) (b,)`` exactly, if that is cheaper than ``d`` products
            with ``J_g``.
        at_zero: ``() -> g(0)`` as a batch of one, if it is the same for all examples. The inverse
            starts from ``y - g(0)``.
    """

    g: Callable[[Array], Array]
    lipschitz_bound: float | Float[Array, ""] | None
    trace: Trace | None = None
    jacobian: Jacobian | None = None
    logdet: Logdet | None = None
    at_zero: Callable[[], Array] | None = None

    def __call__(self, x: Float[Array, "b ..."]) -> Float[Array, "b ..."]:
        """``g(x)``."""
        return self.g(x)


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["weights", "lipschitz_bound", "norms", "gain", "context"],
    meta_fields=["spec"],
)
@dataclass(frozen=True, eq=False)  # compared and hashed by identity, as functions are
class Branch:
    """A residual branch with its weights: a pytree, which scans and ``vmap`` run over when arrays
    are stacked over blocks.

    Attributes:
        spec: The architecture.
        weights: Weights of the branch, in the form that `spec` takes.
        lipschitz_bound: Upper bound of ``Lip(g)``: guaranteed after `with_bounds`, an estimate from
            below during training by power iteration, None if nothing is known.
        norms: Guaranteed constants of the parts, see `BranchSpec.parts`; set by `with_bounds`.
        gain: Factor on ``g`` that brings a kind without parts into the budget; None means 1.
        context: Contexts that the branch depends on, one per example, see `given`.
    """

    spec: "BranchSpec"
    weights: Weights = field(repr=False)
    lipschitz_bound: Any = None
    norms: Norms | None = field(default=None, repr=False)
    gain: Any = None
    context: Any = None

    def __call__(self, x: Float[Array, "b ..."]) -> Float[Array, "b ..."]:
        """``g(x)``, or ``g(x; context)`` if contexts are bound."""
        if x.shape[1:] != tuple(self.spec.in_shape):
            raise ValueError(
                f"the branch and its bounds are for examples of shape {self.spec.in_shape}, got "
                f"{x.shape[1:]}"
            )
        of_pixels = x.shape[1:-1] if np.ndim(self.context) == x.ndim > 2 else ()
        check_context(self.spec.context_dim, len(x), self.context, of_pixels)
        return self._scaled(self.spec.apply(self.weights, x, self.context))

    def given(self, context: Float[Array, "b ... k"] | None) -> "Branch":
        """The branch with these contexts bound, one for each example of the batches it will see."""
        return dataclasses.replace(self, context=context)

    def with_bounds(self, norms: Norms) -> "Branch":
        """The branch of one block with the bounds that follow from ``norms``, the
        `BranchSpec.norm_bounds` of its weights.
        """
        bound = self.spec.bound_of_norms(norms)
        if self.gain is not None:
            bound = rounded_up(jnp.abs(jnp.asarray(self.gain, bound.dtype)) * bound, 1)
        return dataclasses.replace(
            self, lipschitz_bound=bound, norms=norms if self.spec.parts else None
        )

    @property
    def trace(self) -> Trace | None:
        """``x -> tr J_g(x)`` in closed form, if there is one."""
        return self._known("trace")

    @property
    def jacobian(self) -> Jacobian | None:
        """``x -> J_g(x) (b, d, d)`` in closed form, if there is one."""
        return self._known("jacobian")

    @property
    def logdet(self) -> Logdet | None:
        """``x -> log det(I + J_g(x))`` exactly, if that is cheaper than ``d`` products with
        ``J_g``.
        """
        return self._known("logdet")

    @property
    def at_zero(self) -> Callable[[], Array] | None:
        """``() -> g(0)`` as a batch of one; None if it depends on contexts."""
        if self.context is not None:
            return None
        dtype = jnp.result_type(*jax.tree.leaves(self.weights))
        return lambda: self._scaled(
            self.spec.apply(self.weights, jnp.zeros((1, *self.spec.in_shape), dtype), None)
        )

    def _known(self, name: str) -> Callable[[Array], Array] | None:
        if name not in self.spec.knows or (name == "logdet" and self.gain is not None):
            return None
        closed_form = getattr(self.spec, name)
        return lambda x: self._scaled(closed_form(self.weights, x, self.context))

    def _scaled(self, value: Array) -> Array:
        return value if self.gain is None else jnp.asarray(self.gain, value.dtype) * value


AnyBranch = Branch | CallableBranch


class ConstrainedBranch(NamedTuple):
    """A branch within its budget.

    Attributes:
        branch: The branch, whose Lipschitz constant is within the budget if its norms are right.
        iterates: Power iterates for the next call, with the structure of
            `BranchSpec.initial_iterates`.
        norms: Constant of every part before it was scaled: estimated, or bounded from above.
    """

    branch: Branch
    iterates: Weights
    norms: Norms


@dataclass(frozen=True)
class BranchSpec(ABC):
    """The architecture of a residual branch, which makes a `Branch` from weights. Kinds of branches
    inherit from this class.

    A kind must define `initial_weights`, `apply` and `lipschitz_bound`, and `of_stage` if it has
    settings. The methods here bring any such branch into a budget by a factor on its output. A kind
    that knows its layers, such as `feedforward`, scales the layers instead.

    Attributes:
        in_shape: Shape of one example, ``(h, w, c)`` or ``(d,)``.
        context_dim: Length of the context vector of an example; 0 for none.
    """

    in_shape: tuple[int, ...]
    context_dim: int = field(default=0, kw_only=True)

    @classmethod
    def of_stage(cls, stage: Any, in_shape: tuple[int, ...], context_dim: int) -> "BranchSpec":
        """The branch that a `StageSpec` describes, for examples of this shape."""
        del stage
        return cls(in_shape, context_dim=context_dim)

    @abstractmethod
    def initial_weights(
        self, key: Array, *, last_scale: float = 1.0, sharpness: float = 0.0
    ) -> Weights:
        """Random weights, a dictionary; ``last_scale`` is a factor on ``g``, ``sharpness`` asks
        for sharper activations.
        """

    @abstractmethod
    def apply(
        self, weights: Weights, x: Float[Array, "b ..."], context: Float[Array, "b ... k"] | None
    ) -> Float[Array, "b ..."]:
        """``g(x; context)`` for these weights, without a constraint."""

    @abstractmethod
    def lipschitz_bound(self, weights: Weights) -> Float[Array, ""]:
        """Upper bound of ``Lip(g)`` for these weights and every context."""

    def less_context(self, weights: Weights) -> Weights:
        """Weights with which the branch subtracts the first entries of its context; unchanged if
        the kind cannot do so.
        """
        return weights

    # ----------------------------------------------------------------------------------- the budget

    def initial_iterates(self, key: Array) -> Weights:
        """Random starts of power iterations; empty for a kind that iterates nothing."""
        del key
        return {}

    def singular_vectors(
        self, weights: Weights, iterates: Weights, *, num_steps: int | None
    ) -> Weights:
        """The directions along which `constrained` measures norms, by power iteration without a
        gradient.

        Args:
            weights: Weights of the branch.
            iterates: From `initial_iterates`, or from the previous call.
            num_steps: Power iterations; None iterates until the norms are within 0.1 %.
        """
        del weights, num_steps
        return iterates

    def constrained(
        self, weights: Weights, vectors: Weights, *, coeff: float, budget: str
    ) -> ConstrainedBranch:
        """The branch brought into the budget by norms along `singular_vectors`.

        Args:
            weights: Unconstrained weights, as an optimizer holds them.
            vectors: From `singular_vectors`.
            coeff: Largest norm of a layer (budget "layer") or of the whole branch ("block"), in (0,
                1).
            budget: "layer" or "block".
        """
        return self.certified(
            weights, self.norm_bounds(weights), coeff=coeff, budget=budget
        )._replace(iterates=vectors)

    def norm_bounds(self, weights: Weights, **settings: Any) -> Norms:
        """Guaranteed upper bound of every part's constant; a branch without parts has one bound,
        "branch", of ``Lip(g)``.
        """
        del settings
        return {"branch": lipschitz_at_least(self.lipschitz_bound(weights))}

    def certified(
        self, weights: Weights, bounds: Norms, *, coeff: float, budget: str
    ) -> ConstrainedBranch:
        """The branch brought into the budget by ``bounds`` from `norm_bounds`; the rest is as for
        `constrained`.
        """
        del budget
        bound = bounds["branch"]
        rounding = 4 * jnp.finfo(bound.dtype).eps
        gain = jnp.where(
            bound > coeff, coeff * (1 - rounding) / jnp.where(bound > coeff, bound, 1), 1
        )
        lipschitz = lax.stop_gradient(jnp.minimum(bound, coeff))
        return ConstrainedBranch(Branch(self, weights, lipschitz, gain=gain), {}, bounds)

    def bound_of_norms(self, bounds: Norms) -> Float[Array, ""]:
        """Upper bound of ``Lip(g)`` that follows from `norm_bounds`."""
        return bounds["branch"]

    def block_bounds(self, lipschitz_bound: float | Float[Array, ""]) -> BiLipschitz:
        """Bounds of the block ``x + g(x)`` with ``Lip(g) <= lipschitz_bound``; a kind may have
        tighter ones.
        """
        return block_bounds(lipschitz_bound)

    def of_stored(self, weights: Weights, *, coeff: float) -> Branch:
        """The branch that a model makes from stored weights.

        A kind that scales its output is brought into the budget again, unless ``coeff`` is
        infinite. A kind that scales its layers has stored the scaled layers, which do not change.
        """
        if coeff == math.inf:
            return Branch(self, weights)
        return self.certified(
            weights, self.norm_bounds(weights), coeff=coeff, budget="block"
        ).branch

    # --------------------------------------------------------------------------------- closed forms

    @property
    def knows(self) -> frozenset[str]:
        """Names of the closed forms that save time: "trace", "jacobian", "logdet", each a method of
        ``(weights, x, context)``.
        """
        return frozenset()

    def folded(self, weights: Weights, context: Float[Array, " k"]) -> Weights:
        """Weights of ``x -> g(x; context)`` as a branch without contexts, with the same bounds; not
        defined by every kind.
        """
        raise ValueError(
            f"a branch of {type(self).__name__} depends on contexts in its own way: go on giving "
            "context=..., or define folded"
        )

    @property
    def parts(self) -> "tuple[Part, ...]":
        """Parts with separate `norm_bounds`, whose product bounds ``Lip(g)``; none if the kind
        scales its output.
        """
        return ()

    @property
    def claim(self) -> str:
        """What the bounds rely on without a proof, as a clause; empty if they are guaranteed."""
        if not self.parts:
            return "the bounds hold that you give for your own branches"
        own = {layer.activation for layer in self.chain if layer.activation} - PROVEN
        return f"your activation {', '.join(sorted(own))} is 1-Lipschitz" if own else ""

    @property
    def chain(self) -> "tuple[LayerSpec, ...]":
        """Layers, each behind its activation, whose composition is ``g``, for certificates; empty
        if there are none.
        """
        return ()

    def chain_weights(self, weights: Weights, norms: Norms) -> tuple[Weights, Norms]:
        """Weights and guaranteed operator norms of the layers of `chain`, by name.

        Args:
            weights: Weights of the branch, which become the chain's without rounding.
            norms: From `norm_bounds`.
        """
        return weights, norms


def check_context(
    context_dim: int,
    batch_size: int,
    context: Float[Array | np.ndarray, "..."] | None,
    of_pixels: tuple[int, ...] = (),
) -> None:
    """Raises ``ValueError`` unless there is one context of length ``context_dim`` per example, or
    none if the length is 0.

    With ``of_pixels``, the height and width of an image, there must be one context per pixel.
    """
    found = None if context is None else context.shape
    if found != ((batch_size, *of_pixels, context_dim) if context_dim else None):
        wanted = f"a context of shape (batch, {context_dim})" if context_dim else "no context"
        got = f"one of shape {found} for a batch of {batch_size}" if found else "none"
        raise ValueError(f"the model takes {wanted}, got {got}")
