"""Which implementation of the convolution is fastest, by channels, image and batch; checks `choose_implementation`.

    python benchmarks/convolution.py [--quick]

Times the value and both gradients of four 3 x 3 convolutions in a row, written out ("unrolled") and in ``lax.scan``
("scanned"), with each implementation, and with JAX's own gradients ("jax"). Then it says what a rule would cost over the
fastest implementation of every case: XLA above a threshold of channels on the thinner side, plain matrix products up to it.
"""

import functools
import math
import statistics

import jax
import jax.numpy as jnp
import numpy as np
from _record import interleave, parser, show, summarize, write
from jax import lax

from iresnet_jax.maths import convolution

IMPLEMENTATIONS = ("xla", "patches", "taps")
FORMS = ("unrolled", "scanned")
NUM_KERNELS = 4
BASELINE = "xla unrolled"
SHAPES = ("channels_in", "channels_out", "side", "batch")
CASES = (
    *((1, 32, 28, 64), (4, 32, 4, 64), (4, 48, 14, 64), (4, 512, 8, 32), (12, 128, 16, 32), (16, 64, 14, 64)),
    *((24, 256, 8, 32), (32, 64, 16, 32), (32, 512, 4, 32), (48, 48, 14, 32), (64, 64, 4, 64), (96, 96, 8, 32)),
    *((128, 128, 8, 32), (192, 192, 4, 32), (192, 512, 4, 32), (32, 1, 28, 64), (32, 4, 4, 64), (48, 4, 14, 64)),
    *((128, 12, 16, 32), (64, 16, 14, 64), (256, 24, 8, 32), (512, 32, 4, 32), (512, 192, 4, 32)),
)
QUICK_CASES = ((4, 32, 8, 32), (64, 64, 4, 32), (32, 4, 8, 32))
THRESHOLDS = (0, 4, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192)


def convolve(x, kernel, implementation):
    if implementation == "jax":
        return lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))
    return convolution.conv(x, kernel, implementation=implementation)


@functools.partial(jax.jit, static_argnames=("implementation", "scanned"))
def value_and_gradients(x, kernels, implementation, scanned):
    """A loss of four convolutions in a row, each fed with what the one before made, and its gradients."""

    def loss(x, kernels):
        def step(x, kernel):
            y = convolve(x, kernel, implementation)
            return x + jnp.mean(y, axis=-1, keepdims=True), jnp.sum(y**2)

        x, losses = lax.scan(step, x, kernels, unroll=1 if scanned else NUM_KERNELS)
        return jnp.sum(x) + jnp.sum(losses)

    return jax.value_and_grad(loss, argnums=(0, 1))(x, kernels)


def measure(case, *, turns, most_seconds):
    """Timings of every implementation, in every form."""
    cin, cout, side, batch = case
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(batch, side, side, cin)), jnp.float32)
    kernels = jnp.asarray(rng.normal(size=(NUM_KERNELS, 3, 3, cin, cout)) / math.sqrt(9 * cin), jnp.float32)
    variants = {
        f"{implementation} {form}": functools.partial(value_and_gradients, x, kernels, implementation, form == "scanned")
        for form in FORMS
        for implementation in (*IMPLEMENTATIONS, "jax")
    }
    return interleave(variants, turns=turns, most_seconds=most_seconds)


def rule(cin, cout, threshold):
    """XLA above the threshold, the better of the matrix products up to it."""
    if min(cin, cout) > threshold:
        return "xla"
    return "patches" if cin <= cout else "taps"


def cost(medians, choose):
    """How many times slower than the fastest implementation a choice is, geometric mean and worst over cases and forms."""
    logs = []
    for (cin, cout, _, _), times in medians.items():
        for form in FORMS:
            best = min(times[f"{implementation} {form}"] for implementation in IMPLEMENTATIONS)
            logs.append(math.log(times[f"{choose(cin, cout)} {form}"] / best))
    return {"geometric_mean": math.exp(statistics.mean(logs)), "worst": math.exp(max(logs))}


def main():
    arguments = parser(__doc__).parse_args()
    turns, most_seconds = (3, 1.0) if arguments.quick else (11, 6.0)
    results, medians = [], {}
    for case in QUICK_CASES if arguments.quick else CASES:
        timings = measure(case, turns=turns, most_seconds=most_seconds)
        medians[case] = {name: timing.median for name, timing in timings.items()}
        results.append({**dict(zip(SHAPES, case, strict=True)), "timings": summarize(timings, BASELINE)})
        show(results[-1], str(case))
    costs = {f"threshold {t}": cost(medians, functools.partial(rule, threshold=t)) for t in THRESHOLDS}
    best = min(costs, key=lambda name: costs[name]["geometric_mean"])
    costs["as it is set"] = cost(medians, lambda cin, cout: convolution.choose_implementation((3, 3, cin, cout)))
    costs |= {f"always {i}": cost(medians, lambda cin, cout, i=i: i) for i in (*IMPLEMENTATIONS, "jax")}
    show(costs, "time over that of the fastest implementation of every case,")
    print(f"least on this machine ({jax.default_backend()}): {best}")
    settings = {"kernel_size": 3, "num_kernels": NUM_KERNELS, "dtype": "float32", "turns": turns, "baseline": BASELINE}
    write("convolution", arguments, settings, {"cases": results, "cost_of_rules": costs, "recommended": best})


if __name__ == "__main__":
    main()
