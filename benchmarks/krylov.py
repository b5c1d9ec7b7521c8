"""How far log-determinants with few products are off: the power series beside Krylov subspaces, on a trained model's blocks.

    python benchmarks/krylov.py --workdir runs/mnist_density [--quick]

For every number of products: the bias of the whole model's bits/dim, summed over its blocks; and that of the derivative with
respect to the size of a branch, ``d log det(I + s J) / ds`` at ``s = 1``, which is of the kind that training sees: the sum over
blocks of its size, as a share of that of the derivatives. Biases are means over test examples. The reference is a Krylov
subspace of 60 dimensions for the same probes, whose bound is recorded. Then what value and gradient of the first block cost,
in turns. Expected: with as many products Krylov subspaces are several times closer, for a third more time.
"""

import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from _record import describe, interleave, parser, summarize, table, write
from inverse import blocks

from iresnet_jax.evaluation import trained
from iresnet_jax.maths.logdet.hutchinson_series import SeriesLogdet
from iresnet_jax.maths.logdet.krylov import KrylovLogdet
from iresnet_jax.models import branch as branches
from iresnet_jax.models import density

PRODUCTS = (2, 4, 6, 8, 12, 16)
REFERENCE = 60
METHODS = {"series": SeriesLogdet, "krylov": KrylovLogdet}


@functools.partial(jax.jit, static_argnames=("branch", "estimator"))
def log_determinant(branch, block, x, key, estimator):
    """A block's log-determinant and its derivative with respect to the size of the branch, for every example."""
    trace = functools.partial(branches.trace, branch, block["branch"]) if branches.has_trace(branch) else None

    def of_size(s):
        def scaled(x):
            return s * branches.apply_branch(branch, block["branch"], x)

        scaled_trace = None if trace is None else lambda x: s * trace(x)
        return estimator(scaled, x, key, trace=scaled_trace)[0]

    ones = jnp.ones(())
    return jax.jvp(of_size, (ones,), (ones,))


def biases(loaded, x):
    """For every method and number of products, the biases of all blocks; and the bound of the reference's."""
    rows = []
    key = jax.random.key(1)
    exact, uncertain = {}, 0.0
    for name, branch, block, x_in in blocks(loaded.spec.flow, loaded.weights, x):
        exact[name] = log_determinant(branch, block, x_in, key, KrylovLogdet(REFERENCE))
        uncertain += float(jnp.mean(remainder(branch, block, x_in, key, KrylovLogdet(REFERENCE))))
    for method, make in METHODS.items():
        for num in PRODUCTS:
            value, derivative, scale = [], [], []
            for name, branch, block, x_in in blocks(loaded.spec.flow, loaded.weights, x):
                found = log_determinant(branch, block, x_in, key, make(num))
                value.append(float(jnp.mean(found[0] - exact[name][0])))
                derivative.append(float(jnp.mean(found[1] - exact[name][1])))
                scale.append(float(jnp.mean(jnp.abs(exact[name][1]))))
            bits = -sum(value) * density.objective_scale(loaded.spec)
            share = float(np.abs(derivative).sum() / np.sum(scale))
            rows.append({"method": method, "products": num, "bits": bits, "derivative": share, "blocks": value})
    return rows, uncertain * density.objective_scale(loaded.spec)


@functools.partial(jax.jit, static_argnames=("branch", "estimator"))
def remainder(branch, block, x, key, estimator):
    """The bound of what a block's log-determinant leaves out, for every example."""
    g = functools.partial(branches.apply_branch, branch, block["branch"])
    return estimator(g, x, key, lipschitz_bound=block["lipschitz"])[1].truncation_bound


@functools.partial(jax.jit, static_argnames=("branch", "estimator"))
def gradient(branch, block, x, estimator):
    """The gradient of the sum of log-determinants with respect to a block's weights."""

    def total(weights):
        trace = functools.partial(branches.trace, branch, weights) if branches.has_trace(branch) else None
        return jnp.sum(estimator(lambda x: branches.apply_branch(branch, weights, x), x, jax.random.key(1), trace=trace)[0])

    return jax.value_and_grad(total)(block["branch"])


def main():
    options = parser(__doc__)
    options.add_argument("--workdir", type=Path, required=True, metavar="DIR", help="folder of a training run")
    arguments = options.parse_args()
    loaded = trained.load(arguments.workdir)
    num = 8 if arguments.quick else 64
    examples = jnp.asarray(loaded.source.held_out("test", num, loaded.config.seed))
    continuous = density.to_continuous(loaded.spec, jax.random.key(0), examples)
    x, _ = density.transform(loaded.spec, continuous)
    rows, uncertain = biases(loaded, x)
    shown = [(row["method"], row["products"], f"{row['bits']:+.5f}", f"{100 * row['derivative']:.2f} %") for row in rows]
    unit = "bits/dim" if loaded.spec.num_levels is not None else "nats"
    print(table(shown, ("method", "products", f"bias [{unit}]", "error of the derivative")))
    print(f"the reference is off by at most {uncertain:.1e} {unit}")

    _, branch, block, x_in = next(iter(blocks(loaded.spec.flow, loaded.weights, x)))
    run = {
        f"{method} {products}": functools.partial(gradient, branch, block, x_in, make(products))
        for method, make in METHODS.items()
        for products in (6, 8)
    }
    timings = interleave(run, turns=5 if arguments.quick else 30)
    print(f"value and gradient of the first block: {describe(timings, 'series 8')}")
    lipschitz = max(float(jnp.max(stage["lipschitz"])) for stage in loaded.weights.values())
    settings = {"data": loaded.config.data.name, "step": loaded.step, "num_examples": num, "lipschitz": lipschitz}
    results = {"biases": rows, "bound_of_reference": uncertain, "seconds": summarize(timings, "series 8")}
    write(f"krylov_{loaded.config.data.name}", arguments, settings, results)


if __name__ == "__main__":
    main()
