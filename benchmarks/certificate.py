"""What the certificate costs: in a training step beside power iteration, and for a whole model once.

    python benchmarks/certificate.py {steps,model} [--quick]

Steps are the gradient of a likelihood with a series of five terms. The constraint is enforced by five power iterations a
layer (the baseline) or by guaranteed bounds (Gram iteration), with the default twists of the embedding or all of them. Blocks
have 3x3-1x1-3x3 convolutions. The certificate's cost does not depend on the batch, the step's does.

The model is the CIFAR-10 density of Behrmann et al. (2019): 48 blocks in three scales.
"""

import functools
import time

import jax
import jax.numpy as jnp
from _record import describe, interleave, parser, summarize, write

from iresnet_jax.maths.logdet.hutchinson_series import SeriesLogdet
from iresnet_jax.models.architecture import FlowSpec, StageSpec
from iresnet_jax.models.density import Density, DensitySpec
from iresnet_jax.models.flow import constrain, constrain_certified, freeze
from iresnet_jax.models.linen import ResidualFlow
from iresnet_jax.training.initialization import num_parameters

# side, data channels, hidden width, batch: small models first, then the three scales of a network for 32 x 32 images
STEPS = (
    (8, 4, 48, 64),
    (14, 4, 64, 64),
    (16, 12, 64, 32),
    (16, 12, 512, 64),
    (8, 16, 128, 32),
    (8, 48, 512, 64),
    (4, 192, 512, 64),
)
QUICK_STEPS = ((8, 4, 48, 64), (16, 12, 64, 32))
NUM_BLOCKS, NUM_TERMS, NUM_SQUARINGS = 2, 5, 4
BASELINE = "5 power iterations"
TWISTS = {"certified": "auto", "certified, all twists": "all"}


def cifar10(width):
    """The architecture of the CIFAR-10 density."""
    block = {"hidden": (width, width), "kernel_sizes": (3, 1, 3), "activation": "elu", "preactivation": True}
    return FlowSpec((32, 32, 3), tuple(StageSpec(16, **block, squeeze=2, factor_out=i < 2) for i in range(3)))


def initial_variables(flow, x):
    """Fresh variables of a flow, ActNorm fitted to ``x``."""
    return jax.block_until_ready(jax.jit(ResidualFlow(flow).init)(jax.random.key(1), x))


def step_costs(side, channels, width, batch, *, turns):
    """Timings of one step under each constraint."""
    stage = StageSpec(NUM_BLOCKS, hidden=(width, width), kernel_sizes=(3, 1, 3), activation="lipswish")
    flow = FlowSpec((side, side, channels), (stage,))
    x = jax.random.normal(jax.random.key(0), (batch, *flow.event_shape))
    variables = initial_variables(flow, x)
    spectral, key = variables["spectral"], jax.random.key(2)
    model = Density(DensitySpec(flow), {}, {}, estimator=SeriesLogdet(NUM_TERMS), unroll=True)
    constraints = {BASELINE: lambda params: constrain(flow, params, spectral, num_steps=5)}
    for name, twists in TWISTS.items():
        constraints[name] = lambda params, twists=twists: constrain_certified(flow, params, spectral, twists=twists)
    functions = {}
    for name, constrained in constraints.items():

        def loss(params, constrained=constrained):
            return -jnp.mean(model.with_(weights=constrained(params).weights, prior=params["prior"]).log_prob(x, key))

        compiled = jax.jit(jax.grad(loss)).lower(variables["params"]).compile()
        functions[name] = functools.partial(compiled, variables["params"])
    return interleave(functions, turns=turns, max_seconds=20)


def whole_model(width):
    """Seconds to freeze the CIFAR-10 model and to certify it, compilation included, and the largest bound."""
    flow = cifar10(width)
    params = initial_variables(flow, jax.random.normal(jax.random.key(0), (2, *flow.event_shape)))["params"]
    begin = time.perf_counter()
    frozen = jax.block_until_ready(jax.jit(lambda params: freeze(flow, params))(params))
    seconds = time.perf_counter() - begin
    largest = max(float(stage.branch.lipschitz_bound.max()) for stage in frozen.values())
    return {"parameters": num_parameters(params), "freeze_and_certify_s": seconds, "largest_block_bound": largest}


def main():
    options = parser(__doc__)
    options.add_argument("what", choices=("steps", "model"))
    arguments = options.parse_args()
    if arguments.what == "model":
        results = whole_model(64 if arguments.quick else 512)
        print("CIFAR-10 density model:", results)
        write("certificate_model", arguments, {}, results)
        return
    results = []
    for case in QUICK_STEPS if arguments.quick else STEPS:
        timings = step_costs(*case, turns=5 if arguments.quick else 15)
        side, channels, width, batch = case
        print(f"{side}x{side}x{channels}, {width} hidden, batch {batch}: {describe(timings, BASELINE)}", flush=True)
        shape = dict(zip(("side", "channels", "hidden", "batch"), case, strict=True))
        results.append({**shape, "timings": summarize(timings, BASELINE)})
    settings = {"num_blocks": NUM_BLOCKS, "num_terms": NUM_TERMS, "num_squarings": NUM_SQUARINGS}
    write("certificate_steps", arguments, settings, results)


if __name__ == "__main__":
    main()
