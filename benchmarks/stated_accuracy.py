"""What log-likelihoods to a stated accuracy cost, if they keep it, and if probes by colours of pixels would cost less.

    python benchmarks/stated_accuracy.py --workdir runs/mnist_density [--quick]

For every target: seconds an image (compiled before), operations in products with Jacobians, and the true error against exact
log-determinants, root mean square over test images. Exact log-determinants are timed beside. Then, for every convolutional
block, what probes do that are not 0 on one colour of pixels at a time: colours repeat after 2 or 3 rows and columns and each
channel has its own. From dense matrices ``S``, the symmetric part of ``log(I + J)``, less ``J`` where its trace has a closed
form: the variance of a full set of colours times its number of probes, over the variance of plain random signs. A set takes one
probe of at least 4 products for each colour; it can pay only where that is less than the exact log-determinant takes.
"""

import functools
import math
import time

import jax
import numpy as np
from _models import add_workdir, blocks, branch_of, flow_input
from _record import parser, table, write

from iresnet_jax.branches import structured_logdet
from iresnet_jax.evaluation import stated_accuracy
from iresnet_jax.models.density import Density
from iresnet_jax.runs.trained_run import load

TARGETS, QUICK_TARGETS = (0.003, 0.001, 0.0003), (0.003,)
PERIODS = (2, 3)
BATCH_SIZE = 64


def exactly(*arguments, **settings):
    """`stated_accuracy.log_prob` that may only be exact."""
    before, stated_accuracy.CHEAP = stated_accuracy.CHEAP, math.inf
    try:
        return stated_accuracy.log_prob(*arguments, **settings)
    finally:
        stated_accuracy.CHEAP = before


def timed(function):
    """The result and the seconds of the second call, which compiles nothing."""
    function()
    start = time.monotonic()
    return function(), time.monotonic() - start


def costs(model, images, targets):
    """Seconds, products and true error for every target."""
    unit, rows = model.spec.unit_of_a_nat, []
    (truth, accuracy), seconds = timed(lambda: exactly(model, images, 1.0, batch_size=BATCH_SIZE))
    rows.append({"target": 0.0, "ms": 1e3 * seconds / len(images), "products": accuracy.products, "error": 0.0})
    for target in targets:
        evaluate = functools.partial(stated_accuracy.log_prob, model, images, target, batch_size=BATCH_SIZE)
        (found, accuracy), seconds = timed(evaluate)
        rows.append(
            {
                "target": target,
                "ms": 1e3 * seconds / len(images),
                "products": accuracy.products,
                "error": float(np.sqrt(np.mean((found - truth) ** 2))) * unit,
                "bias": accuracy.bias,
                "stderr": accuracy.stderr,
                "bias_bound": accuracy.bias_bound,
                "met": accuracy.met,
                "plan": accuracy.plan,
            }
        )
    return rows


@functools.partial(jax.jit, static_argnames="spec")
def jacobians(spec, weights, x):
    """Dense Jacobians of a block's branch."""
    branch = branch_of(spec, weights)
    return jax.vmap(jax.jacrev(lambda x: branch.g(x[None])[0]))(x).reshape(len(x), math.prod(spec.in_shape), -1)


def colour_ratios(block):
    """Variance of coloured probes by that of plain ones, for equal numbers of products, by period."""
    h, w, c = block.spec.in_shape
    row, column, channel = np.meshgrid(np.arange(h), np.arange(w), np.arange(c), indexing="ij")
    ratios = {period: [] for period in PERIODS}
    for jacobian in np.asarray(jacobians(block.spec, block.weights, block.x), np.float64):
        eigenvalues, vectors = np.linalg.eig(jacobian)
        logarithm = ((vectors * np.log1p(eigenvalues)) @ np.linalg.inv(vectors)).real
        known = jacobian if branch_of(block.spec, block.weights).trace is not None else 0
        squares = ((logarithm - known + (logarithm - known).T) / 2) ** 2
        np.fill_diagonal(squares, 0)
        for period in PERIODS:
            colour = ((row % period * period + column % period) * c + channel).ravel()
            same = squares[colour[:, None] == colour[None]].sum()
            ratios[period].append((colour.max() + 1) * same / squares.sum())
    return {period: float(np.mean(values)) for period, values in ratios.items()}


def colours(model, x):
    """The ratios of every convolutional block, and what a set of colours and the exact log-determinant take."""
    rows = []
    for block in blocks(model.spec.flow, model.weights, x):
        if block.spec.kernel_sizes is not None:
            sets = {period: period**2 * block.spec.in_shape[-1] for period in PERIODS}
            exact = structured_logdet.cost(block.spec)
            rows.append({"block": block.name, "exact": exact, "probes": sets, "ratios": colour_ratios(block)})
    return rows


def main():
    options = parser(__doc__)
    add_workdir(options)
    arguments = options.parse_args()
    run = load(arguments.workdir)
    if not isinstance(run.model, Density):
        raise SystemExit(f"error: {arguments.workdir} holds a classifier: log-determinants take a density")
    model, name, num = run.model, run.config.data.name, 8 if arguments.quick else 128
    images = run.data.held_out("test", num, run.config.seed)
    rows = costs(model, images, QUICK_TARGETS if arguments.quick else TARGETS)
    unit = model.spec.unit
    shown = [(f"{r['target']:g}", f"{r['ms']:.1f}", f"{r['products']:,.0f}", f"{r['error']:.1g}") for r in rows]
    print(table(shown, (f"target [{unit}]", "ms an image", "products", f"true error [{unit}]")), flush=True)
    coloured = colours(model, flow_input(run, 1 if arguments.quick else 2))
    shown = [
        (r["block"], f"{r['exact']:.0f}", *(f"{r['ratios'][p]:.3f} ({4 * r['probes'][p]})" for p in PERIODS)) for r in coloured
    ]
    print(table(shown, ("block", "exact, products", *(f"period {p}: variance (products)" for p in PERIODS))))
    settings = {"data": name, "step": run.step, "num_images": num, "batch_size": BATCH_SIZE}
    write(f"stated_accuracy_{name}", arguments, settings, {"costs": rows, "colours": coloured})


if __name__ == "__main__":
    main()
