"""How sharp the certified inverse of a whole flow is, whether it ever lies, and what it costs.

    python benchmarks/certified_inverse.py --workdir benchmarks/results/digits_density [--images N] [--quick]

Every case has latents and a computed preimage of each. The exact preimage is found by Newton's method on a flow that is written
down once more, in plain NumPy with long doubles of 64 bits, and for a few examples with decimal numbers of 50 digits. Newton's
corrections come from the dense inverse of the Jacobian up to 256 dimensions, and beyond from the library's iterative solves;
whether they led to the preimage shows in the residual of the plain flow, which must be down to the rounding of its numbers. A
bound counts as broken if the error exceeds it, beside long doubles by more than their own rounding, ``2^-60 |x|``. "bound /
target" is relative to the true error, or to 100 units of rounding of ``x`` where that is more. Times are wall-clock, after
compilation; ``load_average`` says what else ran.
"""

import dataclasses
import os
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from _models import add_workdir, flow_input
from _record import parser, table, write

from iresnet_jax import certify
from iresnet_jax.bijections.residual import Solver
from iresnet_jax.certification import trajectory
from iresnet_jax.certification.passes import newton_step
from iresnet_jax.certification.prepared import PreparedFlow
from iresnet_jax.maths.enclosures.double_double import DoubleDouble
from iresnet_jax.models.density import Density
from iresnet_jax.models.flow import as_params, freeze
from iresnet_jax.runs.trained_run import load

sys.path.append(str(Path(__file__).parents[1] / "tests"))
from plain_flow import DECIMAL, LONG, distance, forward, invert

ROUNDINGS = 100  # units of rounding of x below which errors are not told apart
TEMPERATURE, FACTOR, COEFF = 5.0, 1e3, 0.999
DENSE = 256  # dimensions up to which references take the dense inverse of the Jacobian


class Case(NamedTuple):
    """Latents and computed preimages.

    Attributes:
        model: The model.
        y: Latents.
        x: What the inverse made of them.
        blockwise: The bound that multiplies those of the blocks.
    """

    model: Any
    y: np.ndarray
    x: np.ndarray
    blockwise: np.ndarray


@jax.jit
def _encode(model, x):
    return model.flow().forward(x)


@jax.jit
def _decode(model, y):
    return model.flow().inverse(y)


def decoded(model, y) -> Case:
    """Preimages of latents in their own precision."""
    x, info = _decode(model, y)
    return Case(model, np.asarray(y), np.asarray(x), np.asarray(info.error_bound))


def encoded(model, x) -> Case:
    """Preimages of the latents of inputs, in the inputs' precision."""
    return decoded(model, _encode(model, x))


def random_weights(model, key):
    """The same architecture with random weights of the constraint's largest norms, ``L`` up to .999 a block."""
    spec = dataclasses.replace(model.spec.flow, coeff=COEFF, budget="block")
    leaves, tree = jax.tree.flatten(as_params(model.weights))
    keys = jax.random.split(key, len(leaves))
    params = jax.tree.unflatten(tree, [jax.random.normal(k, leaf.shape) for k, leaf in zip(keys, leaves, strict=True)])
    for stage in params.values():
        stage["blocks"]["actnorm"] = jax.tree.map(lambda a: 0.1 * a, stage["blocks"]["actnorm"])
    frozen = jax.jit(freeze, static_argnums=0)(spec, params)
    return model.with_(spec=dataclasses.replace(model.spec, flow=spec), weights=frozen)


def cases(run, num, *, quick):
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
        yield f"random weights, L = {COEFF}, float32", encoded(random_weights(model, jax.random.key(2)), few)
    with jax.enable_x64():
        precise = model.with_(solver=Solver(atol=1e-13, refine=True))
        yield "test, float64", encoded(precise, jnp.asarray(np.asarray(x), jnp.float64))


def exact(case: Case, refined, numbers, indices, solves):
    """True errors of some examples."""
    spec, weights = case.model.spec.flow, jax.tree.map(np.asarray, case.model.weights)
    errors = []
    for i, solve in zip(indices, solves, strict=True):
        y = case.y[i].astype(np.float64).ravel()
        x = invert(numbers, spec, weights, y, refined[i], solve, num_steps=3)
        wrong = forward(numbers, spec, weights, x) - numbers.of(y)
        allowed = 1e-14 if numbers is LONG else 1e-25
        if not float(np.max(abs(wrong))) <= allowed * max(1.0, float(np.max(abs(y)))):
            raise RuntimeError(f"Newton's method left a residual of {float(np.max(abs(wrong)))}: there is no reference")
        errors.append(distance(numbers, case.x[i].astype(np.float64), x))
    return np.array(errors)


def solves_at(model, x):
    """What multiplies vectors with the inverse of the whole flow's Jacobian, for each example: a matrix, or a function."""
    if model.spec.flow.num_dims <= DENSE:
        return [np.linalg.inv(jacobian) for jacobian in jacobians_at(model, x)]
    with jax.enable_x64():
        flow = PreparedFlow.of(model)
    leaves, next_active = [], [*flow.entries.active[1:], np.array([], int)]
    for active, following in zip(flow.entries.active, next_active, strict=True):
        leaves.append(np.setdiff1d(active, following))  # entries that no later stage acts on
    ends = np.cumsum([stage.spec.num_blocks for stage in flow.spec.layout]) - 1

    def at(one):
        with jax.enable_x64():
            points = trajectory.follow(flow.spec, flow.weights, jnp.asarray(one[None], jnp.float64), None)
            found = trajectory.residuals(flow.stages, DoubleDouble.of(np.asarray(points)))

        def solve(wrong):
            vector, values = np.zeros(len(wrong)), np.zeros_like(found.values)
            vector[flow.entries.latents] = wrong
            for end, entries in zip(ends, leaves, strict=True):
                values[0, end, entries] = -vector[entries]
            with jax.enable_x64():
                return np.asarray(newton_step(flow.spec, flow.steps, found.slopes, jnp.asarray(values)))[0, 0]

        return solve

    return [at(one) for one in x]


def jacobians_at(model, x):
    """Dense Jacobians of the whole flow, in float64, one example at a time."""
    flow = model.spec.flow
    order = trajectory.entries_of(flow).latents
    with jax.enable_x64():
        weights = jax.tree.map(lambda a: jnp.asarray(a, jnp.float64), model.weights)

        @jax.jit
        def jacobian(x):
            return jax.jacfwd(lambda x: trajectory.follow(flow, weights, x[None], None)[0, -1][order])(x)

        return [np.asarray(jacobian(jnp.asarray(one))).reshape(flow.num_dims, -1) for one in x]


def measure(case: Case, num_decimal):
    """One row of the table, as numbers."""
    certify.inverse(case.model, case.y[:32], case.x[:32])  # compiles
    begin = time.perf_counter()
    found = certify.inverse(case.model, case.y, case.x)
    seconds = (time.perf_counter() - begin) / len(case.y)
    solves = solves_at(case.model, found.refined)
    everyone = range(len(case.y))
    errors = exact(case, found.refined, LONG, everyone, solves)
    slack = 2.0**-60 * np.linalg.norm(found.refined.reshape(len(errors), -1), axis=1)
    few = list(everyone)[:num_decimal]
    decimal = exact(case, found.refined, DECIMAL, few, solves[: len(few)])
    rounding = ROUNDINGS * 2.0**-52 * np.linalg.norm(case.x.reshape(len(errors), -1).astype(np.float64), axis=1)
    ratios, allowed = found.error_bound / errors, found.error_bound / np.maximum(errors, rounding)
    return {
        "examples": len(errors),
        "applied": int(found.applied.sum()),
        "h_above_half": int((found.h > 0.5).sum()),
        "broken": int((errors > found.error_bound + slack).sum()),
        "broken_decimal": int((decimal > found.error_bound[: len(few)]).sum()),
        "examples_decimal": len(few),
        "median_error": float(np.median(errors)),
        "worst_error": float(errors.max()),
        "median_bound": float(np.median(found.error_bound)),
        "worst_bound": float(found.error_bound.max()),
        "median_ratio": float(np.median(ratios)),
        "worst_ratio": float(ratios.max()),
        "median_ratio_to_target": float(np.median(allowed)),
        "worst_ratio_to_target": float(allowed.max()),
        "median_blockwise_bound": float(np.median(case.blockwise)),
        "median_beta": float(np.median(found.beta)),
        "worst_h": float(found.h.max()),
        "K": float(found.K.max()),
        "seconds_per_example": seconds,
        "load_average": os.getloadavg()[0],  # other work on the machine, while it was timed
    }


def main():
    options = parser(__doc__)
    add_workdir(options)
    options.add_argument("--images", "--num", dest="num", type=int, default=None, metavar="N", help="test examples")
    options.add_argument("--decimal", type=int, default=3, metavar="N", help="examples of a case that are checked in 50 digits")
    options.add_argument("--only", default="", metavar="TEXT", help="cases whose name contains it")
    arguments = options.parse_args()
    run = load(arguments.workdir)
    name, kind = run.config.data.name, "" if isinstance(run.model, Density) else "_classification"
    results, rows = {}, []
    for case_name, case in cases(run, arguments.num or (8 if arguments.quick else 360), quick=arguments.quick):
        if arguments.only not in case_name:
            continue
        row = measure(case, arguments.decimal)
        results[case_name] = row
        ratio = f"{row['median_ratio']:.3f} ({row['worst_ratio']:.3f})"
        target = f"{row['median_ratio_to_target']:.3g} ({row['worst_ratio_to_target']:.3g})"
        rows.append(
            (
                case_name,
                f"{row['applied']}/{row['examples']}",
                row["broken"] + row["broken_decimal"],
                f"{row['median_error']:.2g}",
                f"{row['median_bound']:.2g}",
                f"{row['median_blockwise_bound']:.1g}",
                ratio,
                target,
                f"{row['median_beta']:.0f}",
                f"{row['worst_h']:.1g}",
                f"{1e3 * row['seconds_per_example']:.0f}",
            )
        )
        header = (
            "case",
            "applied",
            "broken",
            "error",
            "bound",
            "by blocks",
            "bound / error",
            "bound / target",
            "beta",
            "h",
            "ms",
        )
        print(table(rows, header), flush=True)
    settings = {"data": name, "step": run.step, "roundings": ROUNDINGS, "only": arguments.only}
    write(f"certified_inverse_{name}{kind}", arguments, settings, results)


if __name__ == "__main__":
    main()
