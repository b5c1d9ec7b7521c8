"""How far log-determinants of a trained model with few products are off, and what they cost: Krylov
subspaces beside series.

    python benchmarks/krylov.py --workdir benchmarks/results/mnist_density [--quick]

For every number of products, the bias of the whole model's bits/dim, summed
over its blocks; and that of the derivative with respect to the size of a branch, ``d log det(I + s
J) / ds`` at ``s = 1``, which stands for what training sees: the sum over blocks of |bias|, as a
share of the sum of |derivative|. Biases are means over test examples. The reference is a Krylov
subspace of 60 dimensions for the same probes, whose bound is recorded. Then the time of value and
gradient of the first block.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from _models import blocks, flow_input, load_kind, model_parser
from _record import interleave, summarize, write

from iresnet_jax.maths.logdet_krylov import KrylovLogdet
from iresnet_jax.maths.logdet_series import SeriesLogdet
from iresnet_jax.models.density import Density

PRODUCTS, QUICK_PRODUCTS = (2, 4, 6, 8, 12, 16), (4,)
REFERENCE = KrylovLogdet(60)
METHODS = {"series": SeriesLogdet, "krylov": KrylovLogdet}
KEY = jax.random.key(1)  # source of all probes


@functools.partial(jax.jit, static_argnames="estimator")
def log_determinant(branch, x, estimator):
    """A block's log-determinant, its derivative by the size of the branch, and the bound of what
    is left out, by example.
    """

    def of_size(s):
        def times_s(function):
            return lambda x: s * function(x)

        trace = branch.trace and times_s(branch.trace)
        value, info = estimator(
            times_s(branch), x, KEY, lipschitz_bound=branch.lipschitz_bound, trace=trace
        )
        return value, info.truncation_bound

    return jax.jvp(of_size, (jnp.ones(()),), (jnp.ones(()),), has_aux=True)


def biases(model, x, products):
    """For every method and number of products, the biases of all blocks; and the bound of the
    reference's.
    """
    met = list(blocks(model, x))

    def all_blocks(estimator):
        return np.array(
            [np.asarray(log_determinant(b.branch, b.x, estimator), np.float64) for b in met]
        )

    reference, rows = all_blocks(REFERENCE), []
    exact, size = reference.mean(axis=2), np.abs(reference[:, 1]).mean(axis=1).sum()
    for method, make in METHODS.items():
        for num in products:
            value, derivative, _ = (all_blocks(make(num)).mean(axis=2) - exact).T
            bits, share = (
                -float(value.sum()) * model.spec.unit_of_a_nat,
                float(np.abs(derivative).sum() / size),
            )
            rows.append(
                {
                    "method": method,
                    "products": num,
                    "bits": bits,
                    "derivative": share,
                    "blocks": value.tolist(),
                }
            )
    return rows, float(exact[:, 2].sum()) * model.spec.unit_of_a_nat


@functools.partial(jax.jit, static_argnames="estimator")
def value_and_gradient(branch, x, estimator):
    """The sum of log-determinants and its gradient by a block's weights."""
    return jax.value_and_grad(
        lambda branch: jnp.sum(estimator(branch, x, KEY, trace=branch.trace)[0])
    )(branch)


def krylov(run, *, quick):
    """Biases and times of both methods, and their settings."""
    num = 8 if quick else 64
    x = flow_input(run, num)
    rows, uncertain = biases(run.model, x, QUICK_PRODUCTS if quick else PRODUCTS)
    first = next(blocks(run.model, x))
    timed = {
        f"{method} {products}": functools.partial(
            value_and_gradient, first.branch, first.x, make(products)
        )
        for method, make in METHODS.items()
        for products in (6, 8)
    }
    seconds = summarize(interleave(timed, turns=5 if quick else 30), "series 8")
    results = {"biases": rows, "bound_of_reference": uncertain, "seconds": seconds}
    return {"num_examples": num, "lipschitz": run.model.certificate().max_block}, results


def main():
    arguments = model_parser(__doc__).parse_args()
    run, _ = load_kind(arguments.workdir, Density)
    settings, results = krylov(run, quick=arguments.quick)
    name = run.config.data.name
    write(f"krylov_{name}", arguments, {"data": name, "step": run.step, **settings}, results)


if __name__ == "__main__":
    main()
