"""How wide the guaranteed intervals of log-likelihoods are, whether they ever lie, and what they cost.

    python benchmarks/certified_likelihood.py --workdir benchmarks/results/digits_density [--num N] [--quick]

Every case has images. The likelihood is computed once more by a flow that is written down in plain NumPy, with the determinant
of its whole Jacobian: in float64, in long doubles of 64 bits, for a few images in decimal numbers of 50 digits, and for a small
model in mpmath's of 50 digits. A value counts as broken if it is not in the interval. Times are wall-clock, after compilation.
"""

import dataclasses
import resource
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from _models import add_workdir
from _record import parser, table, write

from iresnet_jax import certify
from iresnet_jax.models import priors
from iresnet_jax.models.architecture import FlowSpec, StageSpec
from iresnet_jax.models.density import Density, DensitySpec
from iresnet_jax.models.flow import as_params, freeze
from iresnet_jax.runs.trained_run import load

sys.path.append(str(Path(__file__).parents[1] / "tests"))
from plain_flow import DECIMAL, FLOAT, LONG, mpmath_numbers
from plain_likelihood import log_prob

COEFF, DIGITS, TARGET = 0.999, 50, 1e-6  # bits/dim


class Case(NamedTuple):
    """Images and a model, and the kinds of numbers that check how many of them."""

    model: Any
    x: np.ndarray
    checks: dict[str, tuple[Any, int]]


def random_weights(model, key):
    """The same architecture with random weights of the constraint's largest norms, ``L`` up to .999 a block."""
    flow = dataclasses.replace(model.spec.flow, coeff=COEFF, budget="block")
    leaves, tree = jax.tree.flatten(as_params(model.weights))
    keys = jax.random.split(key, len(leaves))
    params = jax.tree.unflatten(tree, [jax.random.normal(k, leaf.shape) for k, leaf in zip(keys, leaves, strict=True)])
    for stage in params.values():
        stage["blocks"]["actnorm"] = jax.tree.map(lambda a: 0.1 * a, stage["blocks"]["actnorm"])
    frozen = jax.jit(freeze, static_argnums=0)(flow, params)
    return model.with_(spec=dataclasses.replace(model.spec, flow=flow), weights=frozen)


def small_model(model):
    """A random density of images of 4 x 4, with the prior, the levels and the grey levels' distribution of another one."""
    stages = (
        StageSpec(2, hidden=(6,), kernel_sizes=(3, 3), activation="clipswish", squeeze=2),
        StageSpec(2, hidden=(8,), activation="tanh"),
    )
    flow = FlowSpec((4, 4, 1), stages, coeff=0.95)
    params = {}
    for i, stage in enumerate(flow.layout):
        keys = jax.random.split(jax.random.key(i), stage.spec.num_blocks + 1)
        noise = 0.1 * jax.random.normal(keys[0], (2, stage.spec.num_blocks, stage.branch.in_shape[-1]))
        blocks = jax.vmap(lambda key, stage=stage: stage.branch.initial_weights(key))(keys[1:])
        params[stage.name] = {"blocks": {**blocks, "actnorm": {"bias": noise[0], "log_scale": noise[1]}}}
    frozen = jax.jit(freeze, static_argnums=0)(flow, params)
    transform = dataclasses.replace(
        model.spec.transform, **({"shares": None} if hasattr(model.spec.transform, "shares") else {})
    )
    spec = DensitySpec(flow, model.spec.prior, transform, model.spec.num_levels)
    return Density(spec, frozen, priors.standard(spec.prior, flow.num_dims))


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
        yield f"random weights, L = {COEFF}", Case(random_weights(model, jax.random.key(2)), few, both)


def measure(case: Case):
    """One row of the table, as numbers."""
    model = case.model
    certify.log_prob(model, case.x)  # compiles
    begin = time.perf_counter()
    found = certify.log_prob(model, case.x)
    seconds = (time.perf_counter() - begin) / len(case.x)
    own_key = jax.random.split(jax.random.key(0))[0]  # of the noise that `log_prob` draws without a key
    u = np.asarray(model.dequantize(jnp.asarray(case.x), own_key)).astype(np.float64)
    weights = jax.tree.map(np.asarray, model)
    width = found.in_units(model.spec).width
    row = {
        "examples": len(case.x),
        "median_width": float(np.median(width)),
        "worst_width": float(width.max()),
        "median_bits_per_dim": float(np.median(found.in_units(model.spec).lower)),
        "seconds_per_example": seconds,
    }
    for name, (numbers, most) in case.checks.items():
        checked = min(most, len(case.x))
        values = [log_prob(numbers, weights, u[i], case.x[i]) for i in range(checked)]
        outside = [not found.lower[i] <= value <= found.upper[i] for i, value in enumerate(values)]
        middle = (found.lower + found.upper) / 2
        apart = [abs(float(value - type(value)(middle[i]))) / max(found.width[i], 1e-300) for i, value in enumerate(values)]
        row |= {
            f"examples_{name}": checked,
            f"broken_{name}": int(sum(outside)),
            f"worst_distance_from_middle_{name}": float(max(apart, default=0.0)),
        }
    return row


def main():
    options = parser(__doc__)
    add_workdir(options)
    options.add_argument("--num", type=int, default=None, metavar="N", help="test images")
    options.add_argument("--long", type=int, default=None, metavar="N", help="images of a case checked in long doubles (all)")
    options.add_argument("--decimal", type=int, default=3, metavar="N", help="test images that are checked in 50 digits")
    options.add_argument("--only", default="", metavar="TEXT", help="cases whose name contains it")
    arguments = options.parse_args()
    run = load(arguments.workdir)
    results, rows = {}, []
    header = ("case", "images", "width", "worst", f"below {TARGET}", "broken", "of values", "ms")
    num = arguments.num or (8 if arguments.quick else 360)
    for name, case in cases(run, num, arguments.long, arguments.decimal, quick=arguments.quick):
        if arguments.only not in name:
            continue
        row = results[name] = measure(case)
        broken, values = (sum(n for key, n in row.items() if key.startswith(start)) for start in ("broken_", "examples_"))
        widths = f"{row['median_width']:.2g}", f"{row['worst_width']:.2g}"
        rows.append(
            (
                name,
                row["examples"],
                *widths,
                "yes" if row["worst_width"] <= TARGET else "no",
                broken,
                values,
                f"{1e3 * row['seconds_per_example']:.0f}",
            )
        )
        print(table(rows, header), flush=True)
    settings = {"data": run.config.data.name, "step": run.step, "digits": DIGITS, "only": arguments.only}
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    write(f"certified_likelihood_{run.config.data.name}", arguments, {**settings, "peak_memory_kib": peak}, results)


if __name__ == "__main__":
    main()
