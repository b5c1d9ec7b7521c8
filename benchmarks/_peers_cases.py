"""What is compared in `peers.py`: flows by name, and what both sides need of them."""

import math
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from _models import read_config

from iresnet_jax.bijections.residual import Solver
from iresnet_jax.models.architecture import FlowSpec, StageSpec
from iresnet_jax.models.density import Density, DensitySpec
from iresnet_jax.models.flow import freeze
from iresnet_jax.models.priors import standard
from iresnet_jax.runs.config import default_config, estimator_settings, parse
from iresnet_jax.runs.from_config import density_spec
from iresnet_jax.runs.planning import plan

CONFIGS = Path(__file__).parents[1] / "configs"
ACTNORM_EXAMPLES, NUM_BATCHES = 256, 4


def colour_config(width, num_blocks=4):
    """Three scales of blocks 3x3-1x1-3x3 with ELU on 32 x 32 x 3: 5 terms of the series, 5 power iterations, 32 images."""
    config = default_config()
    config.data.name = "cifar10"  # random images stand in for it
    block = {"num_blocks": num_blocks, "hidden": (width, width), "kernel_sizes": (3, 1, 3), "activation": "elu", "squeeze": 2}
    config.model.stages = (block, block, block)
    config.constraint.num_steps = 5
    config.logdet = estimator_settings(kind="series", num_terms=5, num_probes=1)
    config.training.update({"batch_size": 32, "actnorm_examples": ACTNORM_EXAMPLES})
    return parse(config)


def step_config(name):
    """The config of a size: "digits", or the number of channels of `colour_config`."""
    return read_config(CONFIGS / "digits_density.py") if name == "digits" else colour_config(int(name))


def architecture(spec):
    """Plain data of a `DensitySpec`'s flow, for PyTorch.

    Raises:
        ValueError: If it is none of those that `_peers_torch` builds.
    """
    stages = []
    for stage in spec.flow.layout:
        given, inside = stage.spec, stage.branch
        if given.factor_out or given.squeeze not in (1, 2) or given.padding != "SAME" or spec.flow.budget != "layer":
            raise ValueError(f"PyTorch has flows of squeezes by 2 with a budget for each layer, no factor-out: {given}")
        side, _, channels = stage.in_shape if len(stage.in_shape) == 3 else (1, 1, 1)
        factor = given.squeeze
        is_flattened = len(stage.in_shape) == 3 and len(inside.in_shape) == 1
        stages.append(
            {
                "num_blocks": given.num_blocks,
                "squeeze": int(factor == 2),
                "flattened": (side // factor, channels * factor**2) if is_flattened else None,
                "activation": given.activation,
                "positional_bias": given.positional_bias,
                "layers": [layer._asdict() for layer in inside.layers],
            }
        )
    last = spec.flow.layout[-1].branch.in_shape
    ends = (last[0], last[-1]) if len(last) == 3 else None
    return {"stages": stages, "ends": ends, "coeff": spec.flow.coeff, "prior": spec.prior}


def write_batches(config, path):
    """Writes training batches as the flow of a config takes them, (b, c, h, w).

    Returns:
        Plain data of the flow, see `architecture`, and its dimensions.
    """
    data = plan.data_for(config)
    spec = density_spec(config, data)
    size = config.training.batch_size
    examples = np.asarray(data.examples["train"][: NUM_BATCHES * size])
    x = np.moveaxis(np.asarray(jax.jit(Density(spec, {}, {}).preprocess)(examples, jax.random.key(0))), -1, 1)
    np.savez(path, batches=x.reshape(NUM_BATCHES, size, *x.shape[1:]))
    return architecture(spec), math.prod(data.event_shape)


def write_arrays(model, x, z, path):
    """Writes a case of `_peers_fixed`: inputs (b, h, w, c) or (b, d), latents, and the weights of the flow by path."""
    x = np.asarray(x, np.float64)
    arrays = {"x": np.moveaxis(x, -1, 1) if x.ndim == 4 else x, "z": np.asarray(z, np.float32)}
    for stage, weights in model.weights.items():
        arrays |= {f"{stage}/actnorm/{name}": value for name, value in weights.actnorm._asdict().items()}
        for layer, own in weights.branch.items():
            arrays |= {f"{stage}/branch/{layer}/{name}": value for name, value in own.items()}
    given: dict[str, Any] = {name: np.asarray(value) for name, value in arrays.items()}
    np.savez(path, **given)


def exact_inverse(model, z):
    """The preimages of latents in float64, to 1e-10 in every block."""
    with jax.enable_x64(True):
        solver = Solver(atol=1e-10, refine=True)
        x, info = jax.jit(lambda model, z: model.flow().inverse(z))(model.with_(solver=solver), jnp.asarray(z))
        if not bool(info.converged.all()):
            raise RuntimeError(f"the exact inverse did not converge: residuals up to {float(info.residual.max()):.1e}")
        return np.asarray(x)


def random_block(kind, lipschitz):
    """A flow of one residual block on 16 x 16 x 12 with random kernels of certified norms, whose product is ``lipschitz``.

    Args:
        kind: "random", 3x3-1x1-3x3 with independent kernels; or "contracting", ``-W^T phi(W x + 1)``, whose Jacobian has
            eigenvalues close to ``-lipschitz``, as blocks have them that training makes contract.
        lipschitz: Bound of ``Lip(g)``, below 1.
    """
    kernel_sizes, hidden = ((3, 1, 3), (64, 64)) if kind == "random" else ((3, 3), (64,))
    stage = StageSpec(1, hidden, kernel_sizes)
    spec = FlowSpec((16, 16, 12), (stage,), coeff=lipschitz ** (1 / len(kernel_sizes)))
    branch = spec.layout[0].branch
    weights: Any = jax.tree.map(lambda leaf: 10 * leaf, branch.initial_weights(jax.random.key(0)))  # to be scaled down
    if kind == "contracting":
        there = weights["conv0"]["kernel"]
        weights["conv1"]["kernel"] = -jnp.swapaxes(jnp.flip(there, (0, 1)), 2, 3)
        weights["conv0"]["bias"] = jnp.ones_like(weights["conv0"]["bias"])
    scale = {name: jnp.zeros(12) for name in ("bias", "log_scale")}
    blocks = jax.tree.map(lambda leaf: leaf[None], {**weights, "actnorm": scale})
    frozen = jax.jit(freeze, static_argnums=0)(spec, {"stage0": {"blocks": blocks}})
    prior = standard("gaussian", spec.num_dims)
    return Density(DensitySpec(spec), frozen, prior)
