"""How sharp the certified local constants of a whole flow are, at a point and in balls around it, and what they cost.

    python benchmarks/local_constants.py --workdir benchmarks/results/digits_density [--images N] [--radii R ...]

At radius 0 they are compared with the singular values of the flow's dense Jacobian at each image, in float64. In a ball the
exact constants are unknown, and those of its centre, which are at most as large, stand for them. Times are wall-clock, after
compilation.
"""

import os
import time

import numpy as np
from _models import add_workdir, flow_input
from _record import parser, table, write
from certified_inverse import jacobians_at

from iresnet_jax import certify
from iresnet_jax.models.density import Density
from iresnet_jax.runs.trained_run import load


def main():
    options = parser(__doc__)
    add_workdir(options)
    options.add_argument("--images", type=int, default=None, metavar="N", help="test examples")
    options.add_argument("--radii", type=float, nargs="+", default=[0.0, 1e-4, 1e-3, 1e-2], metavar="R")
    arguments = options.parse_args()
    run = load(arguments.workdir)
    x = np.asarray(flow_input(run, arguments.images or (2 if arguments.quick else 20)), np.float64)
    values = [np.linalg.svd(jacobian, compute_uv=False) for jacobian in jacobians_at(run.model, x)]
    forward, inverse = np.array([own[0] for own in values]), np.array([1 / own[-1] for own in values])
    certify.local_constants(run.model, x[:1], 0.0)  # compiles
    results, rows = {}, []
    for radius in arguments.radii:
        begin = time.perf_counter()
        found = certify.local_constants(run.model, x, radius)
        seconds = (time.perf_counter() - begin) / len(x)
        stretch, shrink = found.forward / forward, found.inverse / inverse
        results[f"{radius:g}"] = {
            "examples": len(x),
            "below_singular_values": int((stretch < 1 - 1e-9).sum() + (shrink < 1 - 1e-9).sum()),
            "median_forward": float(np.median(forward)),
            "median_inverse": float(np.median(inverse)),
            "median_ratio_forward": float(np.median(stretch)),
            "worst_ratio_forward": float(stretch.max()),
            "median_ratio_inverse": float(np.median(shrink)),
            "worst_ratio_inverse": float(shrink.max()),
            "global_forward": found.global_forward,
            "global_inverse": found.global_inverse,
            "seconds_per_example": seconds,
            "load_average": os.getloadavg()[0],
        }
        pairs = ((forward, stretch), (inverse, shrink))
        cells = [f"{np.median(exact):.3g}, times {np.median(ratio):.6g} ({ratio.max():.6g})" for exact, ratio in pairs]
        rows.append((f"{radius:g}", *cells, f"{seconds:.2f}"))
        print(table(rows, ("radius", "forward at centre, bound (worst)", "inverse at centre, bound (worst)", "s")), flush=True)
    kind = "" if isinstance(run.model, Density) else "_classification"
    settings = {"data": run.config.data.name, "step": run.step, "radii": arguments.radii}
    write(f"local_constants_{run.config.data.name}{kind}", arguments, settings, results)


if __name__ == "__main__":
    main()
