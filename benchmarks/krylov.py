"""How far log-determinants with few products are off: the power series beside Krylov subspaces, on a trained model's blocks.

    python benchmarks/krylov.py --workdir runs/mnist_density [--quick]

For every number of products: the bias of the whole model's bits/dim, summed over its blocks; and that of the derivative with
respect to the size of a branch, ``d log det(I + s J) / ds`` at ``s = 1``, which stands for what training sees: the sum over
blocks of |bias|, as a share of the sum of |derivative|. Biases are means over test examples. The reference is a Krylov
subspace of 60 dimensions for the same probes, whose bound is recorded. Then what value and gradient of the first block cost,
in turns. With as many products Krylov
subspaces are expected to be several times closer, for a third more time.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from _models import add_workdir, blocks, branch_of, flow_input
from _record import describe, interleave, parser, summarize, table, write

from iresnet_jax.maths.logdet.hutchinson_series import SeriesLogdet
from iresnet_jax.maths.logdet.krylov import KrylovLogdet
from iresnet_jax.models.density import Density
from iresnet_jax.runs.trained_run import load

PRODUCTS, QUICK_PRODUCTS = (2, 4, 6, 8, 12, 16), (4,)
REFERENCE = KrylovLogdet(60)
METHODS = {"series": SeriesLogdet, "krylov": KrylovLogdet}
KEY = jax.random.key(1)  # source of all probes


@functools.partial(jax.jit, static_argnames=("spec", "estimator"))
def log_determinant(spec, weights, x, estimator):
    """A block's log-determinant, its derivative by the size of the branch, and the bound of what is left out, by example."""
    branch = branch_of(spec, weights)

    def of_size(s):
        def times_s(function):
            return lambda x: s * function(x)

        trace = branch.trace and times_s(branch.trace)
        value, info = estimator(times_s(branch.g), x, KEY, lipschitz_bound=branch.lipschitz_bound, trace=trace)
        return value, info.truncation_bound

    value, derivative, bound = jax.jvp(of_size, (jnp.ones(()),), (jnp.ones(()),), has_aux=True)
    return value, derivative, bound


def biases(model, x, products):
    """For every method and number of products, the biases of all blocks; and the bound of the reference's."""
    met = list(blocks(model.spec.flow, model.weights, x))

    def all_blocks(estimator):
        return [np.asarray(log_determinant(b.spec, b.weights, b.x, estimator), np.float64).mean(axis=1) for b in met]

    exact, rows = all_blocks(REFERENCE), []
    sizes = [np.abs(log_determinant(b.spec, b.weights, b.x, REFERENCE)[1]).mean() for b in met]
    for method, make in METHODS.items():
        for num in products:
            value, derivative, _ = np.transpose(np.subtract(all_blocks(make(num)), exact))
            bits = -float(value.sum()) * model.spec.unit_of_a_nat
            share = float(np.abs(derivative).sum() / np.sum(sizes))
            rows.append({"method": method, "products": num, "bits": bits, "derivative": share, "blocks": value.tolist()})
    return rows, float(np.sum(exact, axis=0)[2]) * model.spec.unit_of_a_nat


@functools.partial(jax.jit, static_argnames=("spec", "estimator"))
def value_and_gradient(spec, weights, x, estimator):
    """The sum of log-determinants and its gradient by a block's weights."""

    def total(weights):
        branch = branch_of(spec, weights)
        return jnp.sum(estimator(branch.g, x, KEY, trace=branch.trace)[0])

    return jax.value_and_grad(total)(weights)


def main():
    options = parser(__doc__)
    add_workdir(options)
    arguments = options.parse_args()
    run = load(arguments.workdir)
    if not isinstance(run.model, Density):
        raise SystemExit(f"error: {arguments.workdir} holds a classifier: log-determinants take a density")
    model, name, num = run.model, run.config.data.name, 8 if arguments.quick else 64
    x = flow_input(run, num)
    rows, uncertain = biases(model, x, QUICK_PRODUCTS if arguments.quick else PRODUCTS)
    shown = [(row["method"], row["products"], f"{row['bits']:+.5f}", f"{100 * row['derivative']:.2f} %") for row in rows]
    unit = model.spec.unit
    print(table(shown, ("method", "products", f"bias [{unit}]", "error of the derivative")))
    print(f"the reference is off by at most {uncertain:.1e} {unit}")

    first = next(blocks(model.spec.flow, model.weights, x))
    timed = {
        f"{method} {products}": functools.partial(value_and_gradient, first.spec, first.weights, first.x, make(products))
        for method, make in METHODS.items()
        for products in (6, 8)
    }
    timings = interleave(timed, turns=5 if arguments.quick else 30)
    print(f"value and gradient of the first block: {describe(timings, 'series 8')}")
    lipschitz = max(float(jnp.max(stage.branch.lipschitz_bound)) for stage in model.weights.values())
    settings = {"data": name, "step": run.step, "num_examples": num, "lipschitz": lipschitz}
    results = {"biases": rows, "bound_of_reference": uncertain, "seconds": summarize(timings, "series 8")}
    write(f"krylov_{name}", arguments, settings, results)


if __name__ == "__main__":
    main()
