"""Custom branches: any pytree that can be called on a batch and knows an upper bound of its
Lipschitz constant.

The user gives a function ``make: key -> module``. ``module(x)`` is ``g(x)`` of a batch, or
``module(x, context)`` in a conditional model, and ``module.lipschitz_bound()`` an upper bound of
``Lip(g)`` for every context. Leaves of a module that are arrays of JAX with floats are its weights.
All other leaves, such as NumPy's arrays, numbers and functions, are constants.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.core
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from iresnet_jax.branches.branch import BranchSpec, Weights
from iresnet_jax.maths.upward_rounding import at_least

Make = Callable[[Any], Any]  # key -> module

# The name of ActNorm's parameters, beside which the branch's parameters stand.
_RESERVED = "actnorm"


@dataclass(frozen=True)
class OwnSpec(BranchSpec):
    """The architecture of a branch that the user's function makes.

    A factor on the output brings the branch into the budget. It starts as ``make`` returns it:
    ``last_scale`` and ``sharpness``, which concern layers, are ignored.

    Attributes:
        make: ``key -> module``. Specs with the same function are equal, and share compiled
            programs.
    """

    make: Make = field(kw_only=True)

    def __post_init__(self):
        _try(self)

    def initial_weights(
        self, key: Array, *, last_scale: float = 1.0, sharpness: float = 0.0
    ) -> Weights:
        """Floating-point arrays of a new module, by their path in it, such as
        ``layers.0.weight``.
        """
        del last_scale, sharpness
        _structure(self.make)  # raises if constants differ from call to call
        weights = Structure.of(self.make(key))[1]
        if not weights:
            raise ValueError(
                f"the branch {name_of(self.make)!r} has no weights: its function must return a "
                "pytree with arrays of JAX, such as a registered dataclass"
            )
        return weights

    def module(self, weights: Weights) -> Any:
        """The module with these weights."""
        return _structure(self.make).join(weights)

    def apply(
        self, weights: Weights, x: Float[Array, "b ..."], context: Float[Array, "b k"] | None
    ) -> Float[Array, "b ..."]:
        """``module(x)``, or ``module(x, context)``."""
        dtype = jnp.result_type(x, *jax.tree.leaves(weights))
        given = (x,) if context is None else (x, context)
        value = jnp.asarray(self.module(weights)(*given))
        if value.shape != x.shape or not jnp.issubdtype(value.dtype, jnp.floating):
            raise ValueError(
                f"it must return floats of the shape of its batch {x.shape}, got "
                f"{value.dtype} of {value.shape}"
            )
        return value.astype(dtype)

    def lipschitz_bound(self, weights: Weights) -> Float[Array, ""]:
        """``module.lipschitz_bound()``."""
        bound = self.module(weights).lipschitz_bound()
        bound = bound if isinstance(bound, float | np.generic | np.ndarray) else jnp.asarray(bound)
        # reshape raises for more than one number
        return at_least(bound, jnp.result_type(*jax.tree.leaves(weights))).reshape(())


@dataclass(frozen=True, eq=False)  # compared and hashed by identity: constants may be arrays
class Structure:
    """A pytree without its weights, which are the leaves that are arrays of JAX with floats.

    Attributes:
        treedef: Structure of the pytree.
        names: Name of each leaf among the weights, its path, such as ``layers.0.weight``; None for
            a constant.
        constants: The constants; None for a weight.
    """

    treedef: Any
    names: tuple[str | None, ...]
    constants: tuple[Any, ...]

    @classmethod
    def of(cls, tree: Any) -> "tuple[Structure, dict[str, Array]]":
        """The structure and the weights of a pytree."""
        leaves, treedef = jax.tree.flatten_with_path(tree)
        names: list[str | None] = []
        constants, weights = [], {}
        for path, leaf in leaves:
            name = jax.tree_util.keystr(path, simple=True, separator=".") or "weights"
            is_weight = isinstance(leaf, jax.Array) and jnp.issubdtype(leaf.dtype, jnp.floating)
            if isinstance(leaf, jax.core.Tracer) and not is_weight:
                raise ValueError(
                    f"its leaf {name} is {leaf.dtype}, which cannot be trained: make it an array "
                    "of NumPy, a constant"
                )
            if name in {_RESERVED, *weights}:
                raise ValueError(
                    f"its leaf {name} has the name of another, or the name of ActNorm: rename it, "
                    "without dots in keys of dictionaries"
                )
            names.append(name if is_weight else None)
            constants.append(None if is_weight else leaf)
            if is_weight:
                weights[name] = leaf
        return cls(treedef, tuple(names), tuple(constants)), weights

    def join(self, weights: Weights) -> Any:
        """The pytree with these weights."""
        constants = [
            constant.copy() if isinstance(constant, np.ndarray) else constant
            for constant in self.constants
        ]
        # The constants are copies: JAX would return the single-precision version of an array it has
        # seen.
        named = zip(self.names, constants, strict=True)
        return jax.tree.unflatten(
            self.treedef, [constant if name is None else weights[name] for name, constant in named]
        )


@functools.lru_cache(maxsize=256)
def _structure(make: Make) -> Structure:
    found = []

    def weights_of(key):
        structure, weights = Structure.of(make(key))
        found.append(structure)
        return weights

    for _ in range(2):  # a new lambda each time: JAX caches results by function
        jax.eval_shape(lambda key: weights_of(key), jax.random.key(0))
    for one, other in zip(*(structure.constants for structure in found), strict=True):
        is_number = isinstance(one, np.ndarray | np.generic | float | int)
        if is_number and not np.array_equal(
            one, other, equal_nan=np.asarray(one).dtype.kind in "fc"
        ):
            raise ValueError(
                "its constants differ from call to call: draw them outside of the "
                "function, once for all blocks"
            )
    return found[0]


@functools.lru_cache(maxsize=256)
def _try(spec: OwnSpec) -> None:
    """Raises what the user's code raises, unless a module can be made, called on a batch, and
    asked for its bound.
    """
    x, context = (
        jax.ShapeDtypeStruct((2, *shape), jnp.result_type(float))
        for shape in (spec.in_shape, (spec.context_dim,))
    )
    weights = jax.eval_shape(spec.initial_weights, jax.random.key(0))
    jax.eval_shape(spec.apply, weights, x, context if spec.context_dim else None)
    jax.eval_shape(spec.lipschitz_bound, weights)


def name_of(part: Any) -> str:
    """Name of a function, of a class, or of an instance's class; a partial function has its
    function's name.
    """
    if not hasattr(part, "__name__") and isinstance(part, functools.partial):
        return name_of(part.func)
    return part.__name__ if hasattr(part, "__name__") else type(part).__name__
