"""What the certificate costs: in a training step beside power iteration, and for a whole model once.

    python benchmarks/certificate.py {steps,model} [--quick]

Steps are the gradient of a likelihood with a series of five terms. The constraint is enforced by five power iterations a
layer (the baseline) or by guaranteed bounds (Gram iteration), with the default twists of the embedding or all of them. Blocks
have 3x3-1x1-3x3 convolutions. The certificate's cost does not depend on the batch, the step's does.

The model is the CIFAR-10 density of Behrmann et al. (2019): 48 blocks in three scales.
"""

import time

import _record
import jax
import jax.numpy as jnp

from iresnet_jax.maths.logdet.hutchinson_series import SeriesLogdet
from iresnet_jax.models import density
from iresnet_jax.models import flow as model
from iresnet_jax.models import linen as modules
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
TWISTS = {"certified": "auto", "certified, all twists": "all"}


def cifar10(width: int) -> model.FlowSpec:
    stages = [
        model.StageSpec(
            16, hidden=(width, width), kernel_sizes=(3, 1, 3), activation="elu", preactivation=True, squeeze=2, factor_out=i < 2
        )
        for i in range(3)
    ]
    return model.FlowSpec((32, 32, 3), tuple(stages))


def step_costs(side: int, channels: int, width: int, batch: int, *, turns: int, num_blocks: int = 2):
    """Timings of one step under each constraint."""
    stage = model.StageSpec(num_blocks, hidden=(width, width), kernel_sizes=(3, 1, 3), activation="lipswish")
    flow = model.FlowSpec((side, side, channels), (stage,))
    spec = density.DensitySpec(flow, transform="none", num_levels=None)
    x = jax.random.normal(jax.random.key(0), (batch, *flow.event_shape))
    variables = jax.jit(modules.ResidualFlow(flow).init)(jax.random.key(1), x)
    constraints = {"5 power iterations": lambda p: model.constrain(flow, p, variables["spectral"], num_steps=5)}
    for name, twists in TWISTS.items():
        constraints[name] = lambda p, twists=twists: model.constrain_certified(flow, p, variables["spectral"], twists=twists)
    functions = {}
    for name, constrain in constraints.items():

        def loss(params, constrain=constrain):
            weights = constrain(params).weights
            key, estimator = jax.random.key(2), SeriesLogdet(num_terms=5)
            return -jnp.mean(density.log_prob(spec, weights, params["prior"], x, key, estimator, unroll=True).log_prob)

        compiled = jax.jit(jax.grad(loss)).lower(variables["params"]).compile()
        functions[name] = lambda compiled=compiled: compiled(variables["params"])
    return _record.interleave(functions, turns=turns, max_seconds=20)


def whole_model(width: int):
    """Seconds to freeze the CIFAR-10 model and to certify it, compilation included, and the largest bound."""
    spec = cifar10(width)
    x = jax.random.normal(jax.random.key(0), (2, *spec.event_shape))
    params = jax.jit(modules.ResidualFlow(spec).init)(jax.random.key(1), x)["params"]
    jax.block_until_ready(params)
    begin = time.perf_counter()
    frozen = jax.block_until_ready(jax.jit(lambda p: model.freeze(spec, p))(params))
    seconds = time.perf_counter() - begin
    largest = max(float(stage["lipschitz"].max()) for stage in frozen.weights.values())
    return {"parameters": num_parameters(params), "freeze_and_certify_s": seconds, "largest_block_bound": largest}


def main():
    parser = _record.parser(__doc__)
    parser.add_argument("what", choices=("steps", "model"))
    arguments = parser.parse_args()
    settings = {"num_blocks": 2, "num_terms": 5, "num_squarings": 4}
    if arguments.what == "model":
        results = whole_model(64 if arguments.quick else 512)
        print("CIFAR-10 density model:", results)
        _record.write("certificate_model", arguments, {}, results)
        return
    results = []
    for side, channels, width, batch in QUICK_STEPS if arguments.quick else STEPS:
        timings = step_costs(side, channels, width, batch, turns=5 if arguments.quick else 15)
        print(
            f"{side}x{side}x{channels}, {width} hidden, batch {batch}:",
            _record.describe(timings, "5 power iterations"),
            flush=True,
        )
        case = {"side": side, "channels": channels, "hidden": width, "batch": batch}
        results.append({**case, "timings": _record.summarize(timings, "5 power iterations")})
    _record.write("certificate_steps", arguments, settings, results)


if __name__ == "__main__":
    main()
