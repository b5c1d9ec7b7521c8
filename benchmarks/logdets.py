"""Log-determinants of a trained model with few products: their spread, how far they are off, and what they cost.

    python benchmarks/logdets.py {trace,krylov} --workdir benchmarks/results/digits_density [--quick]

Trace: what its closed form saves. For every block, the standard deviation over probes of a one-probe estimate, a long series on
test data. Then the spread of the gradient of the whole model's objective over probes, and the time of a training step.

Krylov: the power series beside Krylov subspaces. For every number of products, the bias of the whole model's bits/dim, summed
over its blocks; and that of the derivative with respect to the size of a branch, ``d log det(I + s J) / ds`` at ``s = 1``,
which stands for what training sees: the sum over blocks of |bias|, as a share of the sum of |derivative|. Biases are means over
test examples. The reference is a Krylov subspace of 60 dimensions for the same probes, whose bound is recorded. Then the time
of value and gradient of the first block.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from _models import blocks, flow_input, load_kind, model_parser
from _record import interleave, summarize, write

from iresnet_jax.maths.logdet.hutchinson_series import SeriesLogdet
from iresnet_jax.maths.logdet.krylov import KrylovLogdet
from iresnet_jax.models.density import Density
from iresnet_jax.models.flow import unroll_by_default

LONG_SERIES = SeriesLogdet(20)
WITH, WITHOUT = "closed form", "estimated"

PRODUCTS, QUICK_PRODUCTS = (2, 4, 6, 8, 12, 16), (4,)
REFERENCE = KrylovLogdet(60)
METHODS = {"series": SeriesLogdet, "krylov": KrylovLogdet}
KEY = jax.random.key(1)  # source of all probes


@functools.partial(jax.jit, static_argnames=("closed_form", "num_probes"))
def deviation(branch, x, closed_form, num_probes):
    """Standard deviation of a block's one-probe estimate over probes, root mean square over examples, in nats."""
    trace = branch.trace if closed_form else None
    keys = jax.random.split(KEY, num_probes)
    samples = jax.lax.map(lambda key: LONG_SERIES(branch, x, key, trace=trace)[0], keys)
    return jnp.sqrt(jnp.mean(jnp.var(samples, axis=0, ddof=1)))


def spreads(model, x, num_probes):
    """The deviations of every block that has a closed form."""
    results = []
    for block in blocks(model, x):
        if block.branch.trace is not None:
            values = {how: float(deviation(block.branch, block.x, how == WITH, num_probes)) for how in (WITHOUT, WITH)}
            results.append({"block": block.name, **values, "variance_ratio": (values[WITHOUT] / values[WITH]) ** 2})
    return results


def gradient_of(run, examples, closed_form):
    """``key ->`` the gradient of the objective as training has it, the noise of the examples always the same."""
    estimator = dataclasses.replace(run.config.logdet.build(), exact_trace=closed_form).fix_length(jax.random.key(7))
    model = run.model.with_(estimator=estimator, unroll=unroll_by_default())

    @jax.jit
    def gradient(weights, key):
        def loss(weights):
            terms = model.with_(weights=weights).terms(examples, jax.random.key(0), key)
            return jnp.mean(model.spec.in_units(terms.log_prob))

        return jax.grad(loss)(weights)

    return functools.partial(gradient, model.weights)


def noise_of(gradient, num_probes):
    """Root of the total variance over probes of a batch's gradient."""

    def flat(key):
        return np.concatenate([np.asarray(leaf, np.float64).ravel() for leaf in jax.tree.leaves(gradient(key))])

    return float(np.sqrt(np.var([flat(jax.random.key(i)) for i in range(num_probes)], axis=0, ddof=1).sum()))


def trace(run, *, quick):
    """Spreads and times with the closed form and without, and their settings."""
    num, num_probes = (16, 8) if quick else (64, 32)
    examples = run.data.held_out("test", num, run.config.seed)
    gradients = {how: gradient_of(run, examples, how == WITH) for how in (WITHOUT, WITH)}
    timed = {how: functools.partial(gradient, jax.random.key(0)) for how, gradient in gradients.items()}
    timings = interleave(timed, turns=5 if quick else 30)
    return {"num_examples": num, "num_probes": num_probes}, {
        "blocks": spreads(run.model, flow_input(run, num), num_probes),
        "gradient_noise": {how: noise_of(gradient, num_probes) for how, gradient in gradients.items()},
        "gradient_seconds": summarize(timings, WITHOUT),
    }


@functools.partial(jax.jit, static_argnames="estimator")
def log_determinant(branch, x, estimator):
    """A block's log-determinant, its derivative by the size of the branch, and the bound of what is left out, by example."""

    def of_size(s):
        def times_s(function):
            return lambda x: s * function(x)

        trace = branch.trace and times_s(branch.trace)
        value, info = estimator(times_s(branch), x, KEY, lipschitz_bound=branch.lipschitz_bound, trace=trace)
        return value, info.truncation_bound

    return jax.jvp(of_size, (jnp.ones(()),), (jnp.ones(()),), has_aux=True)


def biases(model, x, products):
    """For every method and number of products, the biases of all blocks; and the bound of the reference's."""
    met = list(blocks(model, x))

    def all_blocks(estimator):
        return np.array([np.asarray(log_determinant(b.branch, b.x, estimator), np.float64) for b in met])

    reference, rows = all_blocks(REFERENCE), []
    exact, size = reference.mean(axis=2), np.abs(reference[:, 1]).mean(axis=1).sum()
    for method, make in METHODS.items():
        for num in products:
            value, derivative, _ = (all_blocks(make(num)).mean(axis=2) - exact).T
            bits, share = -float(value.sum()) * model.spec.unit_of_a_nat, float(np.abs(derivative).sum() / size)
            rows.append({"method": method, "products": num, "bits": bits, "derivative": share, "blocks": value.tolist()})
    return rows, float(exact[:, 2].sum()) * model.spec.unit_of_a_nat


@functools.partial(jax.jit, static_argnames="estimator")
def value_and_gradient(branch, x, estimator):
    """The sum of log-determinants and its gradient by a block's weights."""
    return jax.value_and_grad(lambda branch: jnp.sum(estimator(branch, x, KEY, trace=branch.trace)[0]))(branch)


def krylov(run, *, quick):
    """Biases and times of both methods, and their settings."""
    num = 8 if quick else 64
    x = flow_input(run, num)
    rows, uncertain = biases(run.model, x, QUICK_PRODUCTS if quick else PRODUCTS)
    first = next(blocks(run.model, x))
    timed = {
        f"{method} {products}": functools.partial(value_and_gradient, first.branch, first.x, make(products))
        for method, make in METHODS.items()
        for products in (6, 8)
    }
    seconds = summarize(interleave(timed, turns=5 if quick else 30), "series 8")
    results = {"biases": rows, "bound_of_reference": uncertain, "seconds": seconds}
    return {"num_examples": num, "lipschitz": run.model.certificate().max_block}, results


def main():
    options = model_parser(__doc__)
    options.add_argument("what", choices=("trace", "krylov"))
    arguments = options.parse_args()
    run, _ = load_kind(arguments.workdir, Density)
    settings, results = {"trace": trace, "krylov": krylov}[arguments.what](run, quick=arguments.quick)
    name = run.config.data.name
    write(f"{arguments.what}_{name}", arguments, {"data": name, "step": run.step, **settings}, results)


if __name__ == "__main__":
    main()
