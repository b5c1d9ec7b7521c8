"""The layers of a flow's steps, and their Jacobians, as banded matrices of few blocks."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from iresnet_jax.branches.feedforward import FeedforwardSpec
from iresnet_jax.certification.trajectory import PreciseStage
from iresnet_jax.maths.chains.row_blocks import RowBlocks, behind_activation, layer_blocks

MOST_ENTRIES = 2**26  # of a step's Jacobian, beyond which there are no layers as matrices


def layers_of(stages: Sequence[PreciseStage], kernels: Sequence[Mapping[str, Any]]) -> tuple[tuple[RowBlocks, ...], ...]:
    """The layers of all steps as matrices, none for a step whose Jacobian has more than `MOST_ENTRIES` entries.

    Args:
        stages: The steps in double-double.
        kernels: Kernels of the layers, by stage and layer, ``(k, ..., cout)``.
    """
    steps = []
    for stage, of_stage in zip(stages, kernels, strict=True):
        own = {name: np.asarray(kernel, np.float64) for name, kernel in of_stage.items()}
        for k in range(len(stage.layers[0].norm)):
            small = num_entries(stage.branch) <= MOST_ENTRIES
            shapes = ((layer.spec.name, layer.spec.in_shape) for layer in stage.layers if small)
            steps.append(tuple(layer_blocks(own[name][k], shape, stage.branch.padding) for name, shape in shapes))
    return tuple(steps)


def num_entries(branch: FeedforwardSpec) -> int:
    """Numbers in the banded Jacobian of a branch."""
    if branch.kernel_sizes is None:
        return math.prod(branch.in_shape) ** 2
    height, width, channels = branch.in_shape
    seen = min(height, 1 + sum(size - 1 for size in branch.kernel_sizes))
    return height * seen * (width * channels) ** 2


def jacobian_blocks(branch: FeedforwardSpec, layers: Sequence[RowBlocks], slopes: Sequence[np.ndarray | None]) -> RowBlocks:
    """``J_g = W_n D_n ... W_1 D_1`` of one branch at slopes of one example, in front of each layer.

    Every entry of a product is a sum of at most as many terms as a layer has taps and channels, which `StepConstants` bounds.
    """
    widths = (branch.in_shape[-1], *branch.hidden)
    product = None
    for layer, slope, width in zip(layers, slopes, widths, strict=True):
        matrix = layer if slope is None else behind_activation(layer, slope, width)
        product = matrix if product is None else matrix @ product
    assert product is not None
    return product
