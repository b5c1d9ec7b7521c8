"""A flow prepared for certification: its steps in double-double and as matrices, and guaranteed constants of each."""

import math
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Array, Float

from iresnet_jax.certification.step_blocks import layers_of
from iresnet_jax.certification.step_jacobians import StepConstants, step_constants
from iresnet_jax.certification.trajectory import Entries, PreciseStage, entries_of, in_float64, precise_stages
from iresnet_jax.maths.chains.row_blocks import RowBlocks
from iresnet_jax.models.architecture import FlowSpec
from iresnet_jax.models.certificate import require_bounds
from iresnet_jax.models.classifier import Classifier
from iresnet_jax.models.density import Density
from iresnet_jax.models.flow import Block
from iresnet_jax.models.reconstructor import Reconstructor

MOST_DIMS = 4096  # of what takes dense Jacobians
_CHUNK_ENTRIES = 2**17  # of the widest layer in all blocks of a stage, in the examples that are refined together
ALL_PRODUCTS = 1e10  # floating-point operations up to which the products of all pairs of steps are computed


class Problem(NamedTuple):
    """A flow prepared for certification.

    Attributes:
        spec: Architecture of the flow.
        weights: Its weights in float64.
        stages: Its steps in double-double.
        entries: Where the vector of a trajectory keeps what.
        constants: Guaranteed constants of the steps.
        scales: Scales of the ActNorms of each stage, one an entry that its steps act on.
        layers: Layers of the steps as matrices, see `step_blocks.layers_of`.
        dense: Whether the products of all pairs of steps are affordable, and with them the sharpest norms.
        chunk: Examples that are certified together, at most.
    """

    spec: FlowSpec
    weights: Any
    stages: tuple[PreciseStage, ...]
    entries: Entries
    constants: StepConstants
    scales: tuple[Float[np.ndarray, "k a"], ...]
    layers: tuple[tuple[RowBlocks, ...], ...]
    dense: bool
    chunk: int

    @property
    def smooth(self) -> bool:
        """Whether every Jacobian is Lipschitz: without, as for ReLU, the theorem does not apply."""
        return bool(np.all(np.isfinite(self.constants.second)))

    def kernels(self) -> list[dict[str, Array]]:
        """Kernels of the layers, by stage and layer, those of all blocks stacked."""
        return [kernels_of(self.weights[stage.name]) for stage in self.spec.layout]

    @classmethod
    def of(cls, model: Density | Classifier | Reconstructor) -> "Problem":
        """Prepares a model's flow; in float64."""
        spec, weights = model.spec.flow, in_float64(model.weights)
        stages = precise_stages(spec, weights)
        kernels = [kernels_of(weights[stage.name]) for stage in spec.layout]
        lipschitz = [weights[stage.name].branch.lipschitz_bound for stage in spec.layout]
        constants = step_constants(stages, kernels, lipschitz)
        scales = tuple(
            np.broadcast_to(own.scale.high[:, 0], (stage.spec.num_blocks, *stage.branch.in_shape)).reshape(
                stage.spec.num_blocks, -1
            )
            for stage, own in zip(spec.layout, stages, strict=True)
        )
        dense = 2.0 * len(constants.second) ** 2 * spec.num_dims**3 <= ALL_PRODUCTS
        layers = layers_of(stages, kernels)
        widest = max(
            stage.spec.num_blocks * math.prod(layer.in_shape) for stage in spec.layout for layer in stage.branch.layers
        )
        chunk = max(1, min(32, _CHUNK_ENTRIES // widest))
        return cls(spec, weights, stages, entries_of(spec), constants, scales, layers, dense, chunk)


def kernels_of(block: Block) -> dict[str, Array]:
    """Kernels of the layers of a stage's blocks by name."""
    return {name: layer["kernel"] for name, layer in block.branch.weights.items()}


def check_layers(model: Density | Classifier | Reconstructor) -> None:
    """Raises ``ValueError`` unless every branch is a chain of layers with guaranteed norms."""
    require_bounds(model.weights)
    for stage in model.spec.flow.layout:
        if not stage.branch.layers:
            raise ValueError(
                f"{stage.name} has branches of kind {stage.spec.kind!r}, which certificates cannot follow: they take chains of "
                "layers and activations; certificate() has the bounds on that kind's word"
            )


def check_certified(model: Density | Classifier | Reconstructor, *, most_dims: int | None = MOST_DIMS) -> None:
    """Raises ``ValueError`` unless every block is certified to be a contraction, and for more dimensions than that."""
    if isinstance(model, Classifier):
        model.require_bijection()
    check_layers(model)
    if not all(np.all(np.asarray(stage.branch.lipschitz_bound) < 1) for stage in model.weights.values()):
        raise ValueError("a block is not certified to be a contraction, so the inverse may not be unique: see certificate()")
    num_dims = model.spec.flow.num_dims
    if most_dims is not None and num_dims > most_dims:
        raise ValueError(f"dense Jacobians are computed up to {most_dims} dimensions, got {num_dims}")
