"""How sharp the certified local constants of a whole flow are, at a point and in balls around it, and what they cost.

    python benchmarks/local_constants.py --workdir benchmarks/results/digits_density [--images N] [--radii R ...]

At radius 0 they are compared with the singular values of the flow's dense Jacobian at each image, in float64. In a ball the
exact constants are unknown, and those of its centre, which are at most as large, stand for them. Times are wall-clock, after
compilation.
"""

import os
import time

import jax
import jax.numpy as jnp
import numpy as np
from _models import flow_input, load, model_parser, name_of
from _record import show, write

from iresnet_jax import certify


def singular_values(model, x):
    """Singular values of the whole flow's Jacobian, in float64, for each example."""
    with jax.enable_x64():
        weights = jax.tree.map(lambda a: jnp.asarray(a, jnp.float64), model.weights)

        @jax.jit
        def jacobian(x):
            return jax.jacfwd(lambda x: model.with_(weights=weights).flow().forward(x[None])[0])(x)

        return np.array([np.linalg.svd(np.reshape(jacobian(one), (one.size, -1)), compute_uv=False) for one in x])


def main():
    options = model_parser(__doc__)
    options.add_argument("--images", type=int, default=None, metavar="N", help="test examples")
    options.add_argument("--radii", type=float, nargs="+", default=[0.0, 1e-4, 1e-3, 1e-2], metavar="R")
    arguments = options.parse_args()
    run, results = load(arguments.workdir), {}
    x = np.asarray(flow_input(run, arguments.images or (2 if arguments.quick else 20)), np.float64)
    values = singular_values(run.model, x)
    exact = {"forward": values[:, 0], "inverse": 1 / values[:, -1]}
    certify.local_constants(run.model, x[:1], 0.0)  # compiles
    for radius in arguments.radii:
        begin = time.perf_counter()
        found = certify.local_constants(run.model, x, radius)
        seconds = (time.perf_counter() - begin) / len(x)
        ratios = {way: getattr(found, way) / own for way, own in exact.items()}
        results[f"{radius:g}"] = {
            "examples": len(x),
            "below_singular_values": int(sum((ratio < 1 - 1e-9).sum() for ratio in ratios.values())),
            **{f"median_{way}": float(np.median(own)) for way, own in exact.items()},
            **{f"median_ratio_{way}": float(np.median(ratio)) for way, ratio in ratios.items()},
            **{f"worst_ratio_{way}": float(ratio.max()) for way, ratio in ratios.items()},
            "global_forward": found.global_forward,
            "global_inverse": found.global_inverse,
            "seconds_per_example": seconds,
            "load_average": os.getloadavg()[0],
        }
        show(results[f"{radius:g}"], f"radius {radius:g}")
    settings = {"data": run.config.data.name, "step": run.step, "radii": arguments.radii}
    write(f"local_constants_{name_of(run)}", arguments, settings, results)


if __name__ == "__main__":
    main()
