"""What the closed form of the trace saves: the spread of a log-determinant with it and without, and what a step costs.

    python benchmarks/exact_trace.py --workdir runs/digits_density [--quick]

For every block of a trained model: the standard deviation over probes of a one-probe estimate, a long series on test data. Then
the spread of the gradient of the whole model's objective over probes, and the wall-clock of a training step, in turns.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from _models import add_workdir, blocks, branch_of, flow_input
from _record import describe, interleave, parser, summarize, table, write
from iresnet_jax.branches.closed_form_jacobian import has_trace

from iresnet_jax.maths.logdet.hutchinson_series import SeriesLogdet
from iresnet_jax.models.density import Density
from iresnet_jax.models.flow import unroll_by_default
from iresnet_jax.runs.trained_run import load

SERIES = SeriesLogdet(20)
WITH, WITHOUT = "closed form", "estimated"


@functools.partial(jax.jit, static_argnames=("spec", "closed_form", "num_probes"))
def deviation(spec, weights, x, closed_form, num_probes):
    """Standard deviation of a block's one-probe estimate over probes, root mean square over examples, in nats."""
    branch = branch_of(spec, weights)
    trace = branch.trace if closed_form else None
    keys = jax.random.split(jax.random.key(1), num_probes)
    samples = jax.lax.map(lambda key: SERIES(branch.g, x, key, trace=trace)[0], keys)
    return jnp.sqrt(jnp.mean(jnp.var(samples, axis=0, ddof=1)))


def spreads(model, x, num_probes):
    """The deviations of every block that has a closed form."""
    results = []
    for block in blocks(model.spec.flow, model.weights, x):
        if has_trace(block.spec):
            of_block = functools.partial(deviation, block.spec, block.weights, block.x, num_probes=num_probes)
            values = {how: float(of_block(closed_form=how == WITH)) for how in (WITHOUT, WITH)}
            results.append({"block": block.name, **values, "variance_ratio": (values[WITHOUT] / values[WITH]) ** 2})
    return results


def gradient_of(run, examples, closed_form):
    """``key ->`` the gradient of the objective as training has it, the noise of the examples always the same."""
    estimator = dataclasses.replace(run.config.logdet.build(), exact_trace=closed_form).fix_length(jax.random.key(7))
    model = run.model.with_(estimator=estimator, unroll=unroll_by_default())

    @jax.jit
    def gradient(model, examples, key):
        def loss(weights):
            terms = model.with_(weights=weights).terms(examples, jax.random.key(0), key)
            return jnp.mean(model.spec.in_units(terms.log_prob))

        return jax.grad(loss)(model.weights)

    return functools.partial(gradient, model, examples)


def gradient_noise(gradient, num_probes):
    """Root of the total variance over probes of a batch's gradient, and the norm of its mean."""
    total, squares = None, 0.0
    for i in range(num_probes):
        leaves = [np.asarray(leaf, np.float64) for leaf in jax.tree.leaves(gradient(jax.random.key(i)))]
        flat = np.concatenate([leaf.ravel() for leaf in leaves])
        total, squares = flat if total is None else total + flat, squares + flat @ flat
    mean = total / num_probes
    return float(np.sqrt((squares - num_probes * mean @ mean) / (num_probes - 1))), float(np.linalg.norm(mean))


def main():
    options = parser(__doc__)
    add_workdir(options)
    arguments = options.parse_args()
    run = load(arguments.workdir)
    if not isinstance(run.model, Density):
        raise SystemExit(f"error: {arguments.workdir} holds a classifier: log-determinants take a density")
    name = run.config.data.name
    num, num_probes = (16, 8) if arguments.quick else (64, 32)
    rows = spreads(run.model, flow_input(run, num), num_probes)
    if not rows:
        raise SystemExit(f"{arguments.workdir}: no block of this model has a trace in closed form")
    print("standard deviation of a one-probe log-determinant, nats:")
    shown = [(r["block"], f"{r[WITHOUT]:.3f}", f"{r[WITH]:.3f}", f"{r['variance_ratio']:.1f}") for r in rows]
    print(table(shown, ("block", WITHOUT, WITH, "variance ratio")))

    examples = run.data.held_out("test", num, run.config.seed)
    gradients = {how: gradient_of(run, examples, how == WITH) for how in (WITHOUT, WITH)}
    noise = {}
    for how, gradient in gradients.items():
        noise[how], size = gradient_noise(gradient, num_probes)
        spread = f"standard deviation over probes {noise[how]:.4g}, norm of the mean {size:.4g}"
        print(f"gradient of {num} examples, {how}: {spread}")
    timed = {how: functools.partial(gradient, jax.random.key(0)) for how, gradient in gradients.items()}
    timings = interleave(timed, turns=5 if arguments.quick else 30)
    print(f"gradient: {describe(timings, WITHOUT)}")
    settings = {"data": name, "step": run.step, "num_examples": num, "num_probes": num_probes}
    results = {"blocks": rows, "gradient_noise": noise, "gradient_seconds": summarize(timings, WITHOUT)}
    write(f"trace_{name}", arguments, settings, results)


if __name__ == "__main__":
    main()
