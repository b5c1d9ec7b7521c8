"""How sharp certificates of a trained model are, whether they ever lie, and what they cost.

    python benchmarks/certified.py {inverse,likelihood} --workdir benchmarks/results/digits_density [--quick]

References are computed by a flow that is written down once more, in plain NumPy on numbers of any precision. Times are
wall-clock, after compilation; ``load_average`` says what else ran.

Inverse: every case has latents and a computed preimage of each. The exact preimage is found by Newton's method on the plain
flow with long doubles of 64 bits, and for a few examples with decimal numbers of 50 digits. Newton's corrections are
derivatives of the library's inverse in float64; whether they led to the preimage shows in the residual of the plain flow, which
must be down to the rounding of its numbers. A bound counts as broken if the error exceeds it, beside long doubles by more than
their own rounding, ``2^-60 |x|``. "ratio to target" is relative to the true error, or to 100 units of rounding of ``x`` where
that is more.

Likelihood: the plain flow has the determinant of its whole Jacobian, in float64, in long doubles, for a few images in decimal
numbers of 50 digits. A value counts as broken if it is not in the interval.
"""

import functools
import os
import resource
import time
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from _models import decode, encode, flow_input, load, load_kind, model_parser, name_of, norms, randomized
from _record import show, write
from plain_flow import DECIMAL, FLOAT, LONG, distance, forward, invert, log_prob

from iresnet_jax import certify
from iresnet_jax.bijections.residual import Solver
from iresnet_jax.models.density import Density

ROUNDINGS = 100  # units of rounding of x below which errors are not told apart
TEMPERATURE, FACTOR, COEFF = 5.0, 1e3, 0.999
EXACT = Solver(atol=1e-13, max_evals=5000, refine=True)


def timed(certify, *arguments):
    """A certificate that was compiled before, and its seconds an example."""
    certify(*arguments)
    begin = time.perf_counter()
    found = certify(*arguments)
    return found, (time.perf_counter() - begin) / len(arguments[1])


class Inverted(NamedTuple):
    """Latents, what the inverse made of them, and the bound that multiplies those of the blocks."""

    model: Any
    y: np.ndarray
    x: np.ndarray
    blockwise: np.ndarray


@jax.jit
def _solve(model, y, wrong):
    """``DF^-1 wrong`` at the preimage of latents."""
    return jax.jvp(lambda y: decode(model, y)[0], (y,), (wrong,))[1]


def decoded(model, y) -> Inverted:
    """Preimages of latents in their own precision."""
    x, info = decode(model, y)
    return Inverted(model, np.asarray(y), np.asarray(x), np.asarray(info.error_bound))


def encoded(model, x) -> Inverted:
    """Preimages of the latents of inputs, in the inputs' precision."""
    return decoded(model, encode(model, x))


def inverse_cases(run, num, *, quick):
    """All cases of a model, by name."""
    model, x = run.model, flow_input(run, num)
    few = x[: min(len(x), 16)]
    yield "test, float32", encoded(model, x)
    if isinstance(model, Density):
        for temperature, name in ((1.0, "samples"), (TEMPERATURE, f"latents at temperature {TEMPERATURE:.0f}")):
            latents = model.sample_latents(jax.random.key(1), len(few), temperature=temperature)
            yield f"{name}, float32", decoded(model, latents)
    if not quick:
        yield f"inputs times {FACTOR:.0f}, float32", encoded(model, FACTOR * few)
        constant = jnp.broadcast_to(jnp.linspace(-3, 3, len(few)).reshape(-1, *[1] * (x.ndim - 1)), few.shape)
        yield "constant inputs, float32", encoded(model, jnp.asarray(constant, jnp.float32))
        yield f"random weights, L = {COEFF}, float32", encoded(randomized(model, COEFF, jax.random.key(2)), few)
    with jax.enable_x64():
        yield "test, float64", encoded(model.with_(solver=EXACT), jnp.asarray(np.asarray(x), jnp.float64))


def exact_errors(case: Inverted, refined, numbers, num):
    """True errors of the first examples."""
    model = case.model.with_(solver=EXACT)
    spec, weights = model.spec.flow, jax.tree.map(np.asarray, model.weights)

    def solve(y, wrong):
        with jax.enable_x64():
            return np.asarray(_solve(model, jnp.asarray(y), jnp.asarray(wrong.reshape(y.shape)))).ravel()

    errors = []
    for i in range(num):
        own = case.y[i : i + 1].astype(np.float64)
        y = own.ravel()
        x = invert(numbers, spec, weights, y, refined[i], functools.partial(solve, own), num_steps=3)
        wrong = float(np.max(abs(forward(numbers, spec, weights, x) - numbers.of(y))))
        if not wrong <= (1e-14 if numbers is LONG else 1e-25) * max(1.0, float(np.max(abs(y)))):
            raise RuntimeError(f"Newton's method left a residual of {wrong}: there is no reference")
        errors.append(distance(numbers, case.x[i].astype(np.float64), x))
    return np.array(errors)


def inverse_of(case, num_decimal):
    """The numbers of a case."""
    found, seconds = timed(certify.inverse, case.model, case.y, case.x)
    errors = exact_errors(case, found.refined, LONG, len(case.y))
    decimal = exact_errors(case, found.refined, DECIMAL, min(num_decimal, len(case.y)))
    slack = 2.0**-60 * norms(found.refined)
    rounding = ROUNDINGS * 2.0**-52 * norms(case.x)
    ratios, allowed = found.error_bound / errors, found.error_bound / np.maximum(errors, rounding)
    spreads = {"error": errors, "bound": found.error_bound, "ratio": ratios, "ratio_to_target": allowed}
    return {
        "examples": len(errors),
        "applied": int(found.applied.sum()),
        "h_above_half": int((found.h > 0.5).sum()),
        "broken": int((errors > found.error_bound + slack).sum()),
        "broken_decimal": int((decimal > found.error_bound[: len(decimal)]).sum()),
        "examples_decimal": len(decimal),
        **{f"median_{name}": float(np.median(values)) for name, values in spreads.items()},
        **{f"worst_{name}": float(values.max()) for name, values in spreads.items()},
        "median_blockwise_bound": float(np.median(case.blockwise)),
        "median_beta": float(np.median(found.beta)),
        "worst_h": float(found.h.max()),
        "K": float(found.K.max()),
        "seconds_per_example": seconds,
        "load_average": os.getloadavg()[0],  # other work on the machine, while it was timed
    }


class Images(NamedTuple):
    """Images and a model, and the kinds of numbers that check how many of them."""

    model: Any
    x: np.ndarray
    checks: dict[str, tuple[Any, int]]


def likelihood_cases(run, num, num_long, num_decimal, *, quick):
    """All cases of a model, by name."""
    model = run.model
    x = np.asarray(run.data.held_out("test", num, run.config.seed))
    both = {"float64": (FLOAT, len(x)), "long": (LONG, len(x) if num_long is None else num_long)}
    yield "test", Images(model, x, {**both, "decimal": (DECIMAL, 0 if quick else num_decimal)})
    if not quick:
        few = x[:16]
        constant = np.broadcast_to(np.arange(len(few), dtype=x.dtype).reshape(-1, *[1] * (x.ndim - 1)), few.shape)
        yield "constant images", Images(model, constant, both)
        yield f"random weights, L = {COEFF}", Images(randomized(model, COEFF, jax.random.key(2)), few, both)


def likelihood_of(case):
    """The numbers of a case."""
    model = case.model
    found, seconds = timed(certify.log_prob, model, case.x)
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
    options.add_argument("what", choices=("inverse", "likelihood"))
    options.add_argument("--num", type=int, default=None, metavar="N", help="test examples (360)")
    options.add_argument("--long", type=int, default=None, metavar="N", help="images of a case checked in long doubles (all)")
    options.add_argument("--decimal", type=int, default=3, metavar="N", help="examples of a case that are checked in 50 digits")
    options.add_argument("--only", default="", metavar="TEXT", help="cases whose name contains it")
    arguments = options.parse_args()
    what, quick = arguments.what, arguments.quick
    run = load_kind(arguments.workdir, Density)[0] if what == "likelihood" else load(arguments.workdir)
    num = arguments.num or (8 if quick else 360)
    name, settings, results = f"certified_{what}_{name_of(run)}", {"data": run.config.data.name, "step": run.step}, {}
    if what == "inverse":
        settings |= {"roundings": ROUNDINGS, "only": arguments.only}
        chosen, measure = inverse_cases(run, num, quick=quick), functools.partial(inverse_of, num_decimal=arguments.decimal)
    else:
        settings |= {"only": arguments.only}
        chosen, measure = likelihood_cases(run, num, arguments.long, arguments.decimal, quick=quick), likelihood_of
    for case_name, case in chosen:
        if arguments.only in case_name:
            results[case_name] = measure(case)
            show(results[case_name], case_name)
    settings["peak_memory_kib"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    write(name, arguments, settings, results, is_shown=True)


if __name__ == "__main__":
    main()
