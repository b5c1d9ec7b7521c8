"""How wide the guaranteed intervals of log-likelihoods are, whether they ever lie, and what they cost.

    python benchmarks/certified_likelihood.py --workdir benchmarks/results/digits_density [--num N] [--quick]

Every case has images. The likelihood is computed once more by a flow that is written down in plain NumPy, with the determinant
of its whole Jacobian: in float64, in long doubles of 64 bits, for a few images in decimal numbers of 50 digits, and for a small
model in mpmath's of 50 digits. A value counts as broken if it is not in the interval. Times are wall-clock, after compilation.
"""

import dataclasses
import resource
import time
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from _models import load_kind, model_parser, randomized
from _record import show, write
from plain_flow import DECIMAL, FLOAT, LONG, log_prob, mpmath_numbers

from iresnet_jax import certify
from iresnet_jax.models import priors
from iresnet_jax.models.architecture import FlowSpec, StageSpec
from iresnet_jax.models.density import Density, DensitySpec
from iresnet_jax.models.flow import freeze
from iresnet_jax.models.linen import ResidualFlow

COEFF, DIGITS = 0.999, 50


class Case(NamedTuple):
    """Images and a model, and the kinds of numbers that check how many of them."""

    model: Any
    x: np.ndarray
    checks: dict[str, tuple[Any, int]]


def small_model(model):
    """A random density of images of 4 x 4, with the prior, the levels and the grey levels' distribution of another one."""
    stages = (
        StageSpec(2, hidden=(6,), kernel_sizes=(3, 3), activation="clipswish", squeeze=2),
        StageSpec(2, hidden=(8,), activation="tanh"),
    )
    flow, key = FlowSpec((4, 4, 1), stages, coeff=0.95), jax.random.key(0)
    params = jax.jit(ResidualFlow(flow).init)(key, jax.random.normal(key, (64, 4, 4, 1)))["params"]
    transform = model.spec.transform
    if hasattr(transform, "shares"):
        transform = dataclasses.replace(transform, shares=None)
    spec = DensitySpec(flow, model.spec.prior_family, transform, model.spec.num_levels)
    return Density(spec, jax.jit(freeze, static_argnums=0)(flow, params), priors.standard(spec.prior_family, flow.num_dims))


def cases(run, num, num_long, num_decimal, *, quick):
    """All cases of a model, by name."""
    model = run.model
    x = np.asarray(run.data.held_out("test", num, run.config.seed))
    both = {"float64": (FLOAT, len(x)), "long": (LONG, len(x) if num_long is None else num_long)}
    if model.spec.num_classes is None:
        crops = x[:, 2:6, 2:6, :1] if x.shape[1] < 16 else x[:, 12:16, 12:16, :1]
        yield "small model", Case(small_model(model), crops[:3], {**both, "mpmath": (mpmath_numbers(DIGITS), 3)})
    yield "test", Case(model, x, {**both, "decimal": (DECIMAL, 0 if quick else num_decimal)})
    if not quick:
        few = x[:16]
        constant = np.broadcast_to(np.arange(len(few), dtype=x.dtype).reshape(-1, *[1] * (x.ndim - 1)), few.shape)
        yield "constant images", Case(model, constant, both)
        yield f"random weights, L = {COEFF}", Case(randomized(model, COEFF, jax.random.key(2)), few, both)


def measure(case: Case):
    """The numbers of a case."""
    model = case.model
    certify.log_prob(model, case.x)  # compiles
    begin = time.perf_counter()
    found = certify.log_prob(model, case.x)
    seconds = (time.perf_counter() - begin) / len(case.x)
    own_key = jax.random.split(jax.random.key(0))[0]  # of the noise that `log_prob` draws without a key
    u = np.asarray(model.dequantize(jnp.asarray(case.x), own_key)).astype(np.float64)
    weights, in_bits = jax.tree.map(np.asarray, model), found.in_units(model.spec)
    row = {
        "examples": len(case.x),
        "median_width": float(np.median(in_bits.width)),
        "worst_width": float(in_bits.width.max()),
        "median_bits_per_dim": float(np.median(in_bits.lower)),
        "seconds_per_example": seconds,
    }
    middle = (found.lower + found.upper) / 2
    for name, (numbers, most) in case.checks.items():
        values = [log_prob(numbers, weights, u[i], case.x[i]) for i in range(min(most, len(case.x)))]
        outside = [not found.lower[i] <= value <= found.upper[i] for i, value in enumerate(values)]
        apart = [abs(float(value - type(value)(middle[i]))) / max(found.width[i], 1e-300) for i, value in enumerate(values)]
        row |= {
            f"examples_{name}": len(values),
            f"broken_{name}": sum(outside),
            f"worst_distance_from_middle_{name}": max(apart, default=0.0),
        }
    return row


def main():
    options = model_parser(__doc__)
    options.add_argument("--num", type=int, default=None, metavar="N", help="test images")
    options.add_argument("--long", type=int, default=None, metavar="N", help="images of a case checked in long doubles (all)")
    options.add_argument("--decimal", type=int, default=3, metavar="N", help="test images that are checked in 50 digits")
    options.add_argument("--only", default="", metavar="TEXT", help="cases whose name contains it")
    arguments = options.parse_args()
    (run, _), results = load_kind(arguments.workdir, Density), {}
    num = arguments.num or (8 if arguments.quick else 360)
    for name, case in cases(run, num, arguments.long, arguments.decimal, quick=arguments.quick):
        if arguments.only in name:
            results[name] = measure(case)
            show(results[name], name)
    settings = {"data": run.config.data.name, "step": run.step, "digits": DIGITS, "only": arguments.only}
    settings["peak_memory_kib"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    write(f"certified_likelihood_{run.config.data.name}", arguments, settings, results)


if __name__ == "__main__":
    main()
