"""Which implementation of the convolution is fastest, by channels, image and batch; checks
`choose_implementation`.

    python benchmarks/convolution.py [--quick]

Times the value and both gradients of four 3 x 3 convolutions in a row, written out ("unrolled") and
in ``lax.scan`` ("scanned"), with each implementation, and with JAX's own gradients ("jax"). Then it
says what the rule costs over the fastest implementation of every case, and what each implementation
would cost alone.
"""

import functools
import math
import statistics

import jax
import jax.numpy as jnp
import numpy as np
from _record import interleave, parser, summarize, write
from jax import lax

from iresnet_jax.maths import convolution

IMPLEMENTATIONS = ("xla", "patches", "taps")
FORMS = ("unrolled", "scanned")
NUM_KERNELS = 4
BASELINE = "xla unrolled"
SHAPES = ("channels_in", "channels_out", "side", "batch")
CASES = (
    *(
        (1, 32, 28, 64),
        (4, 32, 4, 64),
        (4, 48, 14, 64),
        (4, 512, 8, 32),
        (12, 128, 16, 32),
        (16, 64, 14, 64),
    ),
    *(
        (24, 256, 8, 32),
        (32, 64, 16, 32),
        (32, 512, 4, 32),
        (48, 48, 14, 32),
        (64, 64, 4, 64),
        (96, 96, 8, 32),
    ),
    *(
        (128, 128, 8, 32),
        (192, 192, 4, 32),
        (192, 512, 4, 32),
        (32, 1, 28, 64),
        (32, 4, 4, 64),
        (48, 4, 14, 64),
    ),
    *((128, 12, 16, 32), (64, 16, 14, 64), (256, 24, 8, 32), (512, 32, 4, 32), (512, 192, 4, 32)),
)
QUICK_CASES = ((4, 32, 8, 32), (64, 64, 4, 32), (32, 4, 8, 32))


@functools.partial(jax.jit, static_argnames=("implementation", "scanned"))
def value_and_gradients(x, kernels, implementation, scanned):
    """A loss of four convolutions in a row, each fed with what the one before made, and its
    gradients.
    """

    def loss(x, kernels):
        def step(x, kernel):
            if implementation == "jax":
                y = lax.conv_general_dilated(
                    x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
                )
            else:
                y = convolution.conv(x, kernel, implementation=implementation)
            return x + jnp.mean(y, axis=-1, keepdims=True), jnp.sum(y**2)

        x, losses = lax.scan(step, x, kernels, unroll=1 if scanned else NUM_KERNELS)
        return jnp.sum(x) + jnp.sum(losses)

    return jax.value_and_grad(loss, argnums=(0, 1))(x, kernels)


def measure(case, **effort):
    """Timings of every implementation, in every form."""
    cin, cout, side, batch = case
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(batch, side, side, cin)), jnp.float32)
    kernels = jnp.asarray(
        rng.normal(size=(NUM_KERNELS, 3, 3, cin, cout)) / math.sqrt(9 * cin), jnp.float32
    )
    variants = {
        f"{implementation} {form}": functools.partial(
            value_and_gradients, x, kernels, implementation, form == "scanned"
        )
        for form in FORMS
        for implementation in (*IMPLEMENTATIONS, "jax")
    }
    return interleave(variants, **effort)


def cost(timings, choose):
    """How many times slower than the fastest implementation a choice is, geometric mean and
    worst over cases and forms.
    """
    logs = []
    for (cin, cout, _, _), own in timings.items():
        for form in FORMS:
            best = min(own[f"{implementation} {form}"].median for implementation in IMPLEMENTATIONS)
            logs.append(math.log(own[f"{choose(cin, cout)} {form}"].median / best))
    return {"geometric_mean": math.exp(statistics.mean(logs)), "worst": math.exp(max(logs))}


def main():
    arguments = parser(__doc__).parse_args()
    effort = (
        {"turns": 3, "most_seconds": 1.0} if arguments.quick else {"turns": 11, "most_seconds": 6.0}
    )
    timings = {
        case: measure(case, **effort) for case in (QUICK_CASES if arguments.quick else CASES)
    }
    costs = {
        "as it is set": cost(
            timings, lambda cin, cout: convolution.choose_implementation((3, 3, cin, cout))
        )
    }
    costs |= {
        f"always {i}": cost(timings, lambda cin, cout, i=i: i) for i in (*IMPLEMENTATIONS, "jax")
    }
    cases = [
        {**dict(zip(SHAPES, case, strict=True)), "timings": summarize(own, BASELINE)}
        for case, own in timings.items()
    ]
    settings = {
        "kernel_size": 3,
        "num_kernels": NUM_KERNELS,
        "dtype": "float32",
        "turns": effort["turns"],
        "baseline": BASELINE,
    }
    write("convolution", arguments, settings, {"cases": cases, "cost_of_rules": costs})


if __name__ == "__main__":
    main()
