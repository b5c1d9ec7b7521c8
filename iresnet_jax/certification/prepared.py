"""What all certificates share: checks, a prepared flow in float64 on the host, and examples in
chunks.
"""

import contextlib
import dataclasses
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Num

from iresnet_jax.branches.branch import check_context
from iresnet_jax.certification.norms import StepConstants, constants_of
from iresnet_jax.certification.residuals import PreciseStage, precise_stages
from iresnet_jax.certification.steps import Places, places_of
from iresnet_jax.maths.double_double import LARGEST_EXPONENT
from iresnet_jax.models.architecture import FlowSpec
from iresnet_jax.models.contexts import Contexts
from iresnet_jax.models.flow import FlowWeights, blocks_of, bounded
from iresnet_jax.models.model import M, Model, as_batch

# Entries of the widest layer, over all blocks of a stage and all examples refined together.
_CHUNK_ENTRIES = 2**17


@dataclass(frozen=True)
class PreparedFlow:
    """A flow prepared for certificates, in float64.

    Attributes:
        spec: Architecture of the flow.
        weights: Its weights.
        stages: Its steps in double-double.
        constants: Guaranteed constants of the steps, as arrays.
    """

    spec: FlowSpec
    weights: FlowWeights
    stages: tuple[PreciseStage, ...]
    constants: StepConstants

    @classmethod
    def of(cls, model: Model) -> "PreparedFlow":
        """The flow of a model with certified bounds; under ``enable_x64``."""
        spec = model.spec.flow
        # NumPy converts the weights, which compiles nothing.
        weights = jax.tree.map(lambda a: jnp.asarray(np.asarray(a, np.float64)), model.weights)
        stages = precise_stages(spec, weights)
        return cls(spec, weights, stages, constants_of(stages))

    @property
    def places(self) -> Places:
        """Places of the stages and latents in the vector of a trajectory."""
        return places_of(self.spec)

    @property
    def chunk(self) -> int:
        """Examples that are certified together, at most."""
        sizes = [
            stage.num_blocks * math.prod(layer.spec.in_shape)
            for stage in self.stages
            for layer in stage.layers
        ]
        return max(1, min(32, _CHUNK_ENTRIES // max(sizes, default=1)))

    def chained(self, norms: Float[np.ndarray, "... t"]) -> Float[np.ndarray, "... t"]:
        """Norms of the steps as maps of the whole vector: a step that leaves entries alone has a
        norm of at least 1.
        """
        beside = [
            np.full(stage.num_blocks, len(stage.place.entries) < self.spec.num_dims)
            for stage in self.stages
        ]
        return np.where(np.concatenate(beside), np.maximum(norms, 1), norms)


def check(
    model: M, *given: Any, context: Contexts | None = None, contraction: bool = True
) -> tuple[M, Num[Array, "b k"] | Num[np.ndarray, "b k"] | None]:
    """The model with guaranteed bounds, and a context for each example.

    Args:
        model: The model.
        given: Batches of examples.
        context: Contexts of a conditional density, one for all examples of the batches or one for
            each.
        contraction: Whether every block must be certified to be a contraction.
    """
    weights = bounded(blocks_of(model.spec.flow, model.weights), model.bounds())
    model = dataclasses.replace(model, weights=weights)  # pyright: ignore[reportArgumentType]
    found: Any = context
    if given:
        dim, numbers = model.spec.context_dim, model.spec.context_numbers(context)
        found = as_batch(given[0], np.shape(given[0])[1:], numbers, dim).context
        check_context(dim, len(given[0]), found)
    for stage in model.spec.flow.layout:
        scale, branch = model.weights[stage.name]
        if not np.all(np.abs(scale.log_scale) <= LARGEST_EXPONENT):
            raise ValueError(
                f"{stage.name} has an ActNorm whose log_scale is not within {LARGEST_EXPONENT:g}: "
                "its scale is beyond what certificates compute with"
            )
        is_followed = branch.spec.chain and branch.norms is not None and branch.gain is None
        if branch.spec.claim or not is_followed:
            raise ValueError(
                f"{stage.name} has branches of kind {stage.spec.branch_name!r}, which certificates "
                "cannot follow: they take chains of layers with the library's activations, not "
                "with your own; certificate() has the bounds"
            )
    if contraction and not all(
        np.all(np.asarray(block.branch.lipschitz_bound) < 1) for block in model.weights.values()
    ):
        raise ValueError(
            "a block is not certified to be a contraction, so the inverse may not be "
            "unique: see certificate()"
        )
    return model, found


@contextlib.contextmanager
def on_host() -> Iterator[None]:
    """JAX computes on the host's CPU, which has IEEE arithmetic, also in float64."""
    with jax.default_device(jax.local_devices(backend="cpu")[0]):
        yield


@contextlib.contextmanager
def prepared(
    model: Model, *given: Any, context: Contexts | None = None, contraction: bool = True
) -> Iterator[tuple[PreparedFlow, Float[np.ndarray, "b k"] | None]]:
    """The prepared flow of a model, and its contexts, scaled in float64.

    Inside, JAX computes in float64 on the host's CPU, and NumPy does not warn.

    Args:
        model: The model.
        given: Batches of examples.
        context: Contexts of a conditional density, one for all or one for each.
        contraction: Whether every block must be certified to be a contraction.
    """
    model, context = check(model, *given, context=context, contraction=contraction)
    with jax.enable_x64():
        given_context = None if context is None else np.asarray(context, np.float64)
        scaled = model.scale_context(given_context)
    scaled = None if scaled is None else np.asarray(scaled)
    with jax.enable_x64(), on_host(), np.errstate(all="ignore"):
        yield PreparedFlow.of(model), scaled


def vectors_of(
    model: Model, y: Float[Array, "b ..."] | Float[np.ndarray, "b ..."]
) -> Float[Array, "b d"] | Float[np.ndarray, "b d"]:
    """Latents or features as vectors in the order of the flow's outputs; given vectors are assumed
    to be in this order.
    """
    return y.reshape(len(y), model.spec.flow.num_dims)


def inputs_of(
    model: Model, x: Float[Array, "b ..."] | Float[np.ndarray, "b ..."]
) -> Float[np.ndarray, "b d"]:
    """Inputs of the flow as vectors in float64."""
    return np.asarray(x, np.float64).reshape(len(x), model.spec.flow.num_dims)


def in_parts(certify: Callable[..., Any], size: int, *arrays: Any) -> Any:
    """``certify(*arrays)`` in chunks of examples, all of one shape so that programs are compiled
    once.

    Args:
        certify: A function of arrays of examples, whose results have one entry per example.
        size: Most examples in a chunk.
        arrays: Trees of NumPy arrays with a leading axis of examples. The last chunk is filled up
            with its last example.
    """
    num = len(jax.tree.leaves(arrays)[0])
    size, parts = min(size, 2 ** math.ceil(math.log2(max(num, 1)))), []
    if not num:
        arrays = jax.tree.map(lambda a: np.zeros((1, *a.shape[1:])), arrays)
    for first in range(0, max(num, 1), size):
        chosen = np.minimum(np.arange(first, first + size), max(num - 1, 0))
        part = certify(*jax.tree.map(lambda a, chosen=chosen: a[chosen], arrays))
        parts.append(jax.tree.map(lambda a, first=first: np.asarray(a)[: num - first], part))
    return jax.tree.map(lambda *values: np.concatenate(values), *parts)
