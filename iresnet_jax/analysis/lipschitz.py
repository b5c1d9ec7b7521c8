"""The Lipschitz constants of a trained model's blocks, as power iteration estimates them: from below, so they prove nothing."""

import math
from typing import Any

import numpy as np

from iresnet_jax import model
from iresnet_jax.analysis.trained import Trained


def measure(trained: Trained) -> dict[str, Any]:
    """Every block's layer norms and their product.

    Returns:
        ``coeff``, ``max_block`` (the largest product), and ``blocks``, each with ``name`` ("stage0/block03"), ``layers`` (norm
        of each layer after normalisation, ``min(norm, coeff)``), ``norms_before``, ``estimate`` (product of the layers) and
        ``bound``, None where nothing was certified.
    """
    coeff = trained.spec.flow.coeff
    blocks = []
    for stage, branch in zip(model.stage_names(trained.spec.flow), trained.spec.flow.branches, strict=True):
        norms = {layer.name: np.asarray(trained.norms[stage][layer.name], np.float64) for layer in branch.layers}
        for index in range(len(next(iter(norms.values())))):
            before = {name: float(values[index]) for name, values in norms.items()}
            after = {name: min(norm, coeff) for name, norm in before.items()}
            blocks.append(
                {
                    "name": f"{stage}/block{index:02d}",
                    "layers": after,
                    "norms_before": before,
                    "estimate": math.prod(after.values()),
                    "bound": None,
                }
            )
    return {"coeff": coeff, "max_block": max(block["estimate"] for block in blocks), "blocks": blocks}


def target(trained: Trained) -> float:
    """The Lipschitz constant that the constraint leaves a block at most: ``coeff`` to the power of its number of layers."""
    return max(trained.spec.flow.coeff ** len(branch.layers) for branch in trained.spec.flow.branches)
