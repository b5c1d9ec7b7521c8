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
from _models import blocks, flow_input, load_kind, model_parser
from _record import interleave, summarize, write

from iresnet_jax.maths.logdet.hutchinson_series import SeriesLogdet
from iresnet_jax.models.density import Density
from iresnet_jax.models.flow import unroll_by_default

SERIES = SeriesLogdet(20)
WITH, WITHOUT = "closed form", "estimated"


@functools.partial(jax.jit, static_argnames=("closed_form", "num_probes"))
def deviation(branch, x, closed_form, num_probes):
    """Standard deviation of a block's one-probe estimate over probes, root mean square over examples, in nats."""
    trace = branch.trace if closed_form else None
    keys = jax.random.split(jax.random.key(1), num_probes)
    samples = jax.lax.map(lambda key: SERIES(branch, x, key, trace=trace)[0], keys)
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


def main():
    arguments = model_parser(__doc__).parse_args()
    run, model = load_kind(arguments.workdir, Density)
    num, num_probes = (16, 8) if arguments.quick else (64, 32)
    rows = spreads(model, flow_input(run, num), num_probes)
    if not rows:
        raise SystemExit(f"{arguments.workdir}: no block of this model has a trace in closed form")
    examples = run.data.held_out("test", num, run.config.seed)
    gradients = {how: gradient_of(run, examples, how == WITH) for how in (WITHOUT, WITH)}
    noise = {how: noise_of(gradient, num_probes) for how, gradient in gradients.items()}
    timed = {how: functools.partial(gradient, jax.random.key(0)) for how, gradient in gradients.items()}
    timings = interleave(timed, turns=5 if arguments.quick else 30)
    results = {"blocks": rows, "gradient_noise": noise, "gradient_seconds": summarize(timings, WITHOUT)}
    name = run.config.data.name
    settings = {"data": name, "step": run.step, "num_examples": num, "num_probes": num_probes}
    write(f"trace_{name}", arguments, settings, results)


if __name__ == "__main__":
    main()
