"""How sharp certified inverses of a trained model are, whether they ever lie, and what they cost.

    python benchmarks/certified.py --workdir benchmarks/results/digits_density [--quick]

References are computed by a flow that is written down once more, in plain NumPy on numbers of any
precision. Times are wall-clock, after compilation; ``load_average`` says what else ran.

Every case has latents and a computed preimage of each. The exact preimage is found by Newton's
method on the plain flow with long doubles of 64 bits, and for a few examples with decimal numbers
of 50 digits. Newton's corrections are derivatives of the library's inverse in float64; whether they
led to the preimage shows in the residual of the plain flow, which must be down to the rounding of
its numbers. A bound counts as broken if the error exceeds it, beside long doubles by more than
their own rounding, ``2^-60 |x|``. "ratio to target" is relative to the true error, or to 100 units
of rounding of ``x`` where that is more.
"""

import os
import resource
import time
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from _models import decode, encode, flow_input, load, model_parser, name_of, norms, randomized
from _record import show, write
from plain_flow import DECIMAL, Numbers, distance, forward

from iresnet_jax import certify
from iresnet_jax.bijections.residual import Solver
from iresnet_jax.models.density import Density

ROUNDINGS = 100  # units of rounding of x below which errors are not told apart
TEMPERATURE, FACTOR, COEFF = 5.0, 1e3, 0.999
EXACT = Solver(atol=1e-13, max_evals=5000, refine=True)
# 64 bits on x86
LONG = Numbers(lambda a: np.asarray(a, np.float64).astype(np.longdouble), np.exp, np.log)


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
    x, info = decode(model, y, model.bounds())
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
        for temperature, name in (
            (1.0, "samples"),
            (TEMPERATURE, f"latents at temperature {TEMPERATURE:.0f}"),
        ):
            latents = model.sample_latents(jax.random.key(1), len(few), temperature=temperature)
            yield f"{name}, float32", decoded(model, latents)
    if not quick:
        yield f"inputs times {FACTOR:.0f}, float32", encoded(model, FACTOR * few)
        constant = jnp.broadcast_to(
            jnp.linspace(-3, 3, len(few)).reshape(-1, *[1] * (x.ndim - 1)), few.shape
        )
        yield "constant inputs, float32", encoded(model, jnp.asarray(constant, jnp.float32))
        yield (
            f"random weights, L = {COEFF}, float32",
            encoded(randomized(model, COEFF, jax.random.key(2)), few),
        )
    with jax.enable_x64():
        yield (
            "test, float64",
            encoded(model.with_(solver=EXACT), jnp.asarray(np.asarray(x), jnp.float64)),
        )


def exact_errors(case: Inverted, refined, numbers, num):
    """True errors of the first examples."""
    model = case.model.with_(solver=EXACT)
    spec, weights = model.spec.flow, jax.tree.map(np.asarray, model.weights)

    def solve(y, wrong):
        with jax.enable_x64():
            return np.asarray(
                _solve(model, jnp.asarray(y), jnp.asarray(wrong.reshape(y.shape)))
            ).ravel()

    errors = []
    for i in range(num):
        own = case.y[i : i + 1].astype(np.float64)
        y, x = numbers.of(own.ravel()), numbers.of(refined[i])
        for _ in range(3):
            wrong = y - forward(numbers, spec, weights, x)
            # steps are those of float64, whatever the numbers are
            size = np.max(abs(wrong)) or numbers.of(1.0)[()]
            x = x + (numbers.of(solve(own, (wrong / size).astype(np.float64))) * size).reshape(
                x.shape
            )
        wrong = float(np.max(abs(forward(numbers, spec, weights, x) - y)))
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
    spreads = {
        "error": errors,
        "bound": found.error_bound,
        "ratio": ratios,
        "ratio_to_target": allowed,
    }
    return {
        "examples": len(errors),
        "applied": int(found.applied.sum()),
        "broken": int((errors > found.error_bound + slack).sum()),
        "broken_decimal": int((decimal > found.error_bound[: len(decimal)]).sum()),
        "examples_decimal": len(decimal),
        **{f"median_{name}": float(np.median(values)) for name, values in spreads.items()},
        **{f"worst_{name}": float(values.max()) for name, values in spreads.items()},
        "median_blockwise_bound": float(np.median(case.blockwise)),
        "seconds_per_example": seconds,
        "load_average": os.getloadavg()[0],  # other work on the machine, while it was timed
    }


def main():
    options = model_parser(__doc__)
    options.add_argument("--num", type=int, default=None, metavar="N", help="test examples (360)")
    options.add_argument(
        "--decimal",
        type=int,
        default=3,
        metavar="N",
        help="examples of a case that are checked in 50 digits",
    )
    options.add_argument("--only", default="", metavar="TEXT", help="cases whose name contains it")
    arguments = options.parse_args()
    run, quick = load(arguments.workdir), arguments.quick
    num = arguments.num or (8 if quick else 360)
    settings = {
        "data": run.config.data.name,
        "step": run.step,
        "roundings": ROUNDINGS,
        "only": arguments.only,
    }
    results = {}
    for case_name, case in inverse_cases(run, num, quick=quick):
        if arguments.only in case_name:
            results[case_name] = inverse_of(case, arguments.decimal)
            show(results[case_name], case_name)
    settings["peak_memory_kib"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    write(f"certified_inverse_{name_of(run)}", arguments, settings, results, is_shown=True)


if __name__ == "__main__":
    main()
