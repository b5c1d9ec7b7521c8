"""What is compared in `peers.py`: flows by name, and what both sides need of them."""

import math
from pathlib import Path

import jax
import numpy as np
from _models import read_config

from iresnet_jax.models.density import Density
from iresnet_jax.training import plan
from iresnet_jax.training.config import default_config, estimator_settings, parse
from iresnet_jax.training.from_config import density_spec

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
    return {"stages": stages, "coeff": spec.flow.coeff, "prior": spec.prior}


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
