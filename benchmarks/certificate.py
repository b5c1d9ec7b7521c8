"""What the certificate costs: in a training step beside power iteration, and for a whole model
once.

    python benchmarks/certificate.py {steps,model} [--quick]

Steps are the gradient of a likelihood with a series of five terms. The constraint is enforced by
five power iterations a layer (the baseline) or by guaranteed bounds (Gram iteration). Blocks have
3x3-1x1-3x3 convolutions. The certificate's cost does not depend on the batch, the step's does.

The model is the CIFAR-10 density of Behrmann et al. (2019): 48 blocks in three scales.
"""

import functools
import time

import jax
import jax.numpy as jnp
from _record import interleave, parser, summarize, write

from iresnet_jax.maths.logdet_series import SeriesLogdet
from iresnet_jax.models.architecture import FlowSpec, StageSpec
from iresnet_jax.models.contractions import constrain, constrain_certified, freeze
from iresnet_jax.models.density_spec import DensitySpec
from iresnet_jax.models.free import Free, num_parameters
from iresnet_jax.models.linen import ResidualFlow
from iresnet_jax.models.model import How

# small models first, then the three scales of a network for 32 x 32 images
SHAPES = ("side", "channels", "hidden", "batch")
STEPS = (
    *((8, 4, 48, 64), (14, 4, 64, 64), (16, 12, 64, 32), (16, 12, 512, 64)),
    *((8, 16, 128, 32), (8, 48, 512, 64), (4, 192, 512, 64)),
)
NUM_BLOCKS, NUM_TERMS = 2, 5
BASELINE = "5 power iterations"


def initial_variables(flow, batch):
    """Fresh variables of a flow, ActNorm fitted to a batch of noise, and the batch."""
    x = jax.random.normal(jax.random.key(0), (batch, *flow.event_shape))
    return jax.block_until_ready(jax.jit(ResidualFlow(flow).init)(jax.random.key(1), x)), x


def step_costs(side, channels, width, batch, *, turns):
    """Timings of one step under each constraint."""
    stage = StageSpec(
        NUM_BLOCKS, hidden=(width, width), kernel_sizes=(3, 1, 3), activation="lipswish"
    )
    flow = FlowSpec((side, side, channels), (stage,))
    variables, x = initial_variables(flow, batch)
    params, spectral = variables["params"], variables["spectral"]
    how = How(SeriesLogdet(NUM_TERMS), unroll=True)
    free = Free(params, spectral, {}, DensitySpec(flow), how)
    constraints = {
        BASELINE: functools.partial(constrain, num_steps=5),
        "certified": constrain_certified,
    }

    def compiled(constrained):
        def loss(params):
            weights = constrained(flow, params, spectral).weights
            return -jnp.mean(free.build(weights, params).log_prob(x, jax.random.key(2)))

        return functools.partial(jax.jit(jax.grad(loss)).lower(params).compile(), params)

    return interleave(
        {name: compiled(own) for name, own in constraints.items()}, turns=turns, most_seconds=20
    )


def whole_model(width):
    """Seconds to freeze the CIFAR-10 model and to certify it, compilation included, and the
    largest bound.
    """
    block = {
        "hidden": (width, width),
        "kernel_sizes": (3, 1, 3),
        "activation": "elu",
        "preactivation": True,
    }
    flow = FlowSpec(
        (32, 32, 3), tuple(StageSpec(16, **block, squeeze=2, factor_out=i < 2) for i in range(3))
    )
    params = initial_variables(flow, 2)[0]["params"]
    begin = time.perf_counter()
    weights = jax.block_until_ready(jax.jit(lambda params: freeze(flow, params))(params))
    seconds = time.perf_counter() - begin
    largest = max(float(block.branch.lipschitz_bound.max()) for block in weights.values())
    return {
        "parameters": num_parameters(params),
        "freeze_and_certify_s": seconds,
        "largest_block_bound": largest,
    }


def main():
    options = parser(__doc__)
    options.add_argument("what", choices=("steps", "model"))
    arguments = options.parse_args()
    if arguments.what == "model":
        settings, results = {}, whole_model(64 if arguments.quick else 512)
    else:
        settings = {"num_blocks": NUM_BLOCKS, "num_terms": NUM_TERMS}
        results = []
        for case in STEPS[:3:2] if arguments.quick else STEPS:
            timings = step_costs(*case, turns=5 if arguments.quick else 15)
            results.append(
                {**dict(zip(SHAPES, case, strict=True)), "timings": summarize(timings, BASELINE)}
            )
    write(f"certificate_{arguments.what}", arguments, settings, results)


if __name__ == "__main__":
    main()
