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

from iresnet_jax.evaluation.trained import Trained, require_bijection
from iresnet_jax.models import branch as branches
from iresnet_jax.models import classifier, constraint, density
from iresnet_jax.models import flow as model


def measure(trained: Trained) -> dict[str, Any]:
    """Every layer's and block's constants.

    Returns:
        ``coeff`` and ``budget``, the constraint (None without one); ``certified``, whether every block's bound is below 1;
        ``max_block``, the largest of the blocks' bounds; ``model_bounds``, ``forward`` and ``inverse``; ``blocks``, each with
        ``name`` ("stage0/block03"), ``target``, ``estimate``, ``bound`` and ``layers``, each by name ``target`` (None where
        only the block has one), ``estimate`` and ``bound``.
    """
    require_bijection(trained)
    spec = trained.spec.flow
    blocks = []
    for stage, branch in zip(model.stage_names(spec), spec.branches, strict=True):
        bounds = {name: np.asarray(values, np.float64) for name, values in trained.bounds[stage].items()}
        block_bounds = np.asarray(trained.weights[stage]["lipschitz"], np.float64)
        rtol = trained.config.constraint.rtol
        estimates = {
            name: np.asarray(values, np.float64)
            for name, values in estimate_norms(branch, trained.weights[stage]["branch"], rtol=rtol).items()
        }
        per_layer = spec.coeff if trained.is_constrained and spec.budget == "layer" else None
        per_block = spec.coeff if trained.is_constrained else None
        for index, bound in enumerate(block_bounds):
            layers = {
                layer.name: {
                    "target": per_layer,
                    "estimate": float(estimates[layer.name][index]),
                    "bound": float(bounds[layer.name][index]),
                }
                for layer in branch.layers
            }
            blocks.append(
                {
                    "name": f"{stage}/block{index:02d}",
                    "target": per_layer ** len(branch.layers) if per_layer else per_block,
                    "estimate": math.prod(layer["estimate"] for layer in layers.values()),
                    "bound": float(bound),
                    "layers": layers,
                }
            )
    flow_bounds = model.bilipschitz(spec, trained.weights)
    input_bounds = classifier.input_bounds if trained.is_classifier else density.transform_bounds
    whole = input_bounds(trained.spec).compose(flow_bounds)
    return {
        "coeff": spec.coeff if trained.is_constrained else None,
        "budget": spec.budget if trained.is_constrained else None,
        "certified": all(block["bound"] < 1 for block in blocks),
        "max_block": max((block["bound"] for block in blocks), key=lambda bound: (math.isnan(bound), bound)),
        "model_bounds": {"forward": float(whole.forward), "inverse": float(whole.inverse)},
        "blocks": blocks,
    }


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


def target(constants: dict[str, Any]) -> float | None:
    """The Lipschitz constant that the constraint leaves a block at most; None without one."""
    return max((block["target"] for block in constants["blocks"] if block["target"] is not None), default=None)


def table(constants: dict[str, Any]) -> str:
    """The certificate, layer by layer, as text: target, power-iteration estimate, certified bound."""
    rows = []
    for block in constants["blocks"]:
        rows += [(f"{block['name']}/{name}", layer) for name, layer in block["layers"].items()]
        rows.append((block["name"], block))
    width = max(len(name) for name, _ in rows)
    lines = [f"{'':{width}}   target  estimate  certified bound"]
    for name, row in rows:
        limit = "" if row["target"] is None else f"{row['target']:.4f}"
        lines.append(f"{name:{width}}  {limit:>7}  {row['estimate']:8.5f}  {row['bound']:15.5f}")
    return "\n".join(lines)


def verdict(constants: dict[str, Any]) -> str:
    """One line: whether every block is certified a contraction."""
    failed = [block["name"] for block in constants["blocks"] if not block["bound"] < 1]
    total, bounds = len(constants["blocks"]), constants["model_bounds"]
    if failed:
        return f"NOT CERTIFIED: no bound below 1 for {len(failed)} of {total} blocks, the first is {failed[0]}"
    return (
        f"certified: every one of {total} blocks is a contraction, Lip(g) <= {constants['max_block']:.5f}; whole model: "
        f"Lip(F) <= {bounds['forward']:.3g}, Lip(F^-1) <= {bounds['inverse']:.3g}"
    )
