"""What a likelihood gradient costs as blocks are added: written out, written out without stored outputs, and scanned.

    python benchmarks/depth.py [--quick]

XLA:CPU fuses the sum ``x + g_1 + g_2 + ...`` of blocks that are written out into all that reads it, unless every block's output
is stored (`chain.repeat`). Gradient of the mean log-likelihood of a stage like the MNIST density's first: 14 x 14 x 4,
two convolutions of 48 channels, 4 products of Arnoldi's method. Compile times are of this process, one compilation each.
"""

import functools
import time
from unittest import mock

import jax
import jax.numpy as jnp
from _record import interleave, parser, summarize, write
from certificate import initial_variables

from iresnet_jax.bijections import chain
from iresnet_jax.maths.logdet.krylov import KrylovLogdet
from iresnet_jax.models import priors
from iresnet_jax.models.architecture import FlowSpec, StageSpec
from iresnet_jax.models.contractions import freeze
from iresnet_jax.models.density import Density
from iresnet_jax.models.density_spec import DensitySpec

BATCH_SIZE, NUM_PRODUCTS = 32, 4
LAYOUTS = ("stored", "fused", "scanned")


def gradient(num_blocks, layout):
    """A function without arguments that computes the gradient, and the time it took to compile."""
    branch = {"hidden": (48,), "kernel_sizes": (3, 3), "activation": "clipswish", "positional_bias": True}
    flow = FlowSpec((28, 28, 1), (StageSpec(num_blocks, squeeze=2, **branch),), coeff=0.95)
    variables, x = initial_variables(flow, BATCH_SIZE)
    weights = freeze(flow, variables["params"])
    spec, prior = DensitySpec(flow, prior_family="logistic"), priors.standard("logistic", flow.num_dims)
    model = Density(spec, weights, prior, estimator=KrylovLogdet(NUM_PRODUCTS), unroll=layout != "scanned")

    def loss(weights):
        return -jnp.mean(model.with_(weights=weights).log_prob(x, jax.random.key(0)))

    with mock.patch.object(chain, "_store", (lambda x: x) if layout == "fused" else chain._store):
        start = time.perf_counter()
        compiled = jax.jit(jax.grad(loss)).lower(weights).compile()
    return functools.partial(compiled, weights), time.perf_counter() - start


def main():
    arguments = parser(__doc__).parse_args()
    results = {}
    for num_blocks in (2, 4) if arguments.quick else (4, 8, 16, 32):
        made = {layout: gradient(num_blocks, layout) for layout in LAYOUTS}
        functions = {layout: function for layout, (function, _) in made.items()}
        numbers = summarize(interleave(functions, turns=3 if arguments.quick else 20, most_seconds=60), "fused")
        results[num_blocks] = {layout: {**numbers[layout], "compile_s": seconds} for layout, (_, seconds) in made.items()}
    write("depth", arguments, {"batch_size": BATCH_SIZE, "num_products": NUM_PRODUCTS}, results)


if __name__ == "__main__":
    main()
