"""How large the Lipschitz constants of a trained model are: estimated from below, and certified from above.

The model is the one that everything after training runs, with frozen weights. For every layer its norm as power iteration sees
it, and the guaranteed bound of `certify`; for every block their products; for the whole model bounds of ``Lip(F)`` and
``Lip(F^-1)``, from data to latents. The bounds concern the stored weights in exact arithmetic.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from iresnet_jax.evaluation.certificate import Block, Certificate, Layer
from iresnet_jax.evaluation.trained import Trained, require_bijection
from iresnet_jax.models import branch as branches
from iresnet_jax.models import classifier, constraint, density
from iresnet_jax.models import flow as model


def measure(trained: Trained) -> Certificate:
    """Every layer's and block's constants."""
    require_bijection(trained)
    spec = trained.spec.flow
    blocks = []
    for stage, branch in zip(model.stage_names(spec), spec.branches, strict=True):
        bounds = {name: np.asarray(values, np.float64) for name, values in trained.bounds[stage].items()}
        block_bounds = np.asarray(trained.weights[stage]["lipschitz"], np.float64)
        estimates = {
            name: np.asarray(values, np.float64)
            for name, values in estimate_norms(
                branch, trained.weights[stage]["branch"], rtol=trained.config.constraint.rtol
            ).items()
        }
        per_layer = spec.coeff if trained.is_constrained and spec.budget == "layer" else None
        per_block = spec.coeff if trained.is_constrained else None
        for index, bound in enumerate(block_bounds):
            layers = {
                layer.name: Layer(per_layer, float(estimates[layer.name][index]), float(bounds[layer.name][index]))
                for layer in branch.layers
            }
            blocks.append(
                Block(
                    target=per_layer ** len(branch.layers) if per_layer else per_block,
                    estimate=math.prod(layer.estimate for layer in layers.values()),
                    bound=float(bound),
                    name=f"{stage}/block{index:02d}",
                    layers=layers,
                )
            )
    flow_bounds = model.bilipschitz(spec, trained.weights)
    input_bounds = classifier.input_bounds if trained.is_classifier else density.transform_bounds
    whole = input_bounds(trained.spec).compose(flow_bounds)
    return Certificate(
        coeff=spec.coeff if trained.is_constrained else None,
        budget=spec.budget if trained.is_constrained else None,
        blocks=tuple(blocks),
        forward=float(whole.forward),
        inverse=float(whole.inverse),
    )


def estimate_norms(branch: branches.BranchSpec, weights: Any, *, rtol: float) -> dict[str, Any]:
    """The operator norms of the layers of a stage's blocks by power iteration to a tolerance, one a block.

    Args:
        branch: The architecture.
        weights: Branch weights, stacked over blocks.
        rtol: Relative tolerance.
    """
    starts = constraint.initial_vectors(branch, jax.random.key(0))

    @jax.jit
    def estimate(weights):
        return jax.lax.map(lambda w: constraint.normalize(branch, w, starts, coeff=0.5, rtol=rtol).norms, weights)

    return estimate(jax.tree.map(jnp.asarray, weights))
