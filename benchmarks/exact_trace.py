"""What the closed form of the trace saves: the spread of a log-determinant with it and without, and what a step costs.

    python benchmarks/exact_trace.py --workdir runs/digits_density [--quick]

For every block of a trained model: the standard deviation over probes of a one-probe estimate, a long series on test data. Then
the spread of the gradient of the whole model's objective over probes, and the wall-clock of a training step, in turns.
"""

import dataclasses
import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from _record import describe, interleave, parser, summarize, table, write
from inverse import blocks

from iresnet_jax.evaluation import trained
from iresnet_jax.maths.logdet.hutchinson_series import SeriesLogdet
from iresnet_jax.models import branch as branches
from iresnet_jax.models import density
from iresnet_jax.models import flow as model

NUM_TERMS = 20
WITH, WITHOUT = "closed form", "estimated"


def spreads(loaded, x, num_probes):
    """Standard deviation of every block's one-probe estimate over probes, root mean square over examples, in nats."""
    results = []
    estimator = SeriesLogdet(NUM_TERMS)

    @functools.partial(jax.jit, static_argnames=("branch", "closed_form"))
    def deviation(branch, block, x, closed_form):
        g, trace = (functools.partial(f, branch, block["branch"]) for f in (branches.apply_branch, branches.trace))
        trace = trace if closed_form else None
        keys = jax.random.split(jax.random.key(1), num_probes)
        samples = jax.lax.map(lambda key: estimator(g, x, key, trace=trace)[0], keys)
        return jnp.sqrt(jnp.mean(jnp.var(samples, axis=0, ddof=1)))

    for name, branch, block, x_in in blocks(loaded.spec.flow, loaded.weights, x):
        if branches.has_trace(branch):
            values = {how: float(deviation(branch, block, x_in, how == WITH)) for how in (WITHOUT, WITH)}
            results.append({"block": name, **values, "variance_ratio": (values[WITHOUT] / values[WITH]) ** 2})
    return results


def gradient_of(loaded, closed_form):
    """``(weights, x, key) ->`` the gradient of the objective as training has it, compiled with the closed form or without."""
    estimator = dataclasses.replace(loaded.config.logdet.build(), exact_trace=closed_form)
    spec = loaded.spec

    def loss(weights, x, key):
        shared = estimator.fix_length(jax.random.key(7))
        terms = density.log_prob(spec, weights, loaded.prior, x, key, shared, unroll=model.unroll_by_default())
        return jnp.mean(density.objective(spec, terms.log_prob))

    return jax.jit(jax.grad(loss))


def gradient_noise(gradient, weights, x, num_probes):
    """Root of the total variance over probes of a batch's gradient, and the norm of its mean."""
    total, squares = None, 0.0
    for i in range(num_probes):
        leaves = [np.asarray(leaf, np.float64) for leaf in jax.tree.leaves(gradient(weights, x, jax.random.key(i)))]
        flat = np.concatenate([leaf.ravel() for leaf in leaves])
        total, squares = flat if total is None else total + flat, squares + flat @ flat
    mean = total / num_probes
    return float(np.sqrt((squares - num_probes * mean @ mean) / (num_probes - 1))), float(np.linalg.norm(mean))


def main():
    options = parser(__doc__)
    options.add_argument("--workdir", type=Path, required=True, metavar="DIR", help="folder of a training run")
    arguments = options.parse_args()
    loaded = trained.load(arguments.workdir)
    num, num_probes = (16, 8) if arguments.quick else (64, 32)
    examples = jnp.asarray(loaded.source.held_out("test", num, loaded.config.seed))
    continuous = density.to_continuous(loaded.spec, jax.random.key(0), examples)
    x, _ = density.transform(loaded.spec, continuous)
    rows = spreads(loaded, x, num_probes)
    if not rows:
        raise SystemExit(f"{arguments.workdir}: no block of this model has a trace in closed form")
    print("standard deviation of a one-probe log-determinant, nats:")
    shown = [(r["block"], f"{r[WITHOUT]:.3f}", f"{r[WITH]:.3f}", f"{r['variance_ratio']:.1f}") for r in rows]
    print(table(shown, ("block", WITHOUT, WITH, "variance ratio")))

    gradients = {how: gradient_of(loaded, how == WITH) for how in (WITHOUT, WITH)}
    noise = {}
    for how, gradient in gradients.items():
        noise[how], size = gradient_noise(gradient, loaded.weights, continuous, num_probes)
        print(
            f"gradient of {num} examples, {how}: standard deviation over probes {noise[how]:.4g}, norm of the mean {size:.4g}"
        )
    key = jax.random.key(0)
    run = {how: functools.partial(gradient, loaded.weights, continuous, key) for how, gradient in gradients.items()}
    timings = interleave(run, turns=5 if arguments.quick else 30)
    print(f"value and gradient: {describe(timings, WITHOUT)}")
    settings = {"data": loaded.config.data.name, "step": loaded.step, "num_examples": num, "num_probes": num_probes}
    results = {"blocks": rows, "gradient_noise": noise, "gradient_seconds": summarize(timings, WITHOUT)}
    write(f"trace_{loaded.config.data.name}", arguments, settings, results)


if __name__ == "__main__":
    main()
