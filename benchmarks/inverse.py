"""What Anderson's method saves in the inverse of a trained model: evaluations and wall-clock.

    python benchmarks/inverse.py --workdir runs/digits_density [--quick]

Evaluations are those until what would be returned is within 1e-5 (Euclidean) of the exact preimage, which is known: it is
where the block's output came from, in float64. Counted in float64, one example at a time, on test data, without the one
evaluation at 0 that all examples share, from which Anderson's method starts. With three times the memory it is close to GMRES,
of all methods that take nothing but values of ``g`` the best. The whole inverse is timed in the model's own precision and stops
by its own error bound, as it does in use.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from _models import blocks, decode, encode, flow_input, load, model_parser, name_of
from _record import interleave, summarize, write
from jax import lax

from iresnet_jax.bijections.residual import Solver, inverse
from iresnet_jax.branches.branch import CallableBranch

METHODS = {"banach": 0, "anderson": 4, "anderson12": 12}  # steps remembered
TOLERANCE = 1e-5
SEEN = []  # x and g(x), in the order of their evaluation


def distances(x, y):
    return np.linalg.norm((np.asarray(x) - np.asarray(y)).reshape(len(x), -1), axis=1)


@functools.partial(jax.jit, static_argnums=2)
def watched_inverse(branch, y, solver):
    def watched(x):
        value = branch(x)
        # As bits: a callback runs in a thread of its own, where float64 is not switched on.
        bits = lax.bitcast_convert_type(jnp.stack([x, value]), jnp.uint32)
        jax.debug.callback(lambda bits: SEEN.append(np.array(bits).view(np.float64)[..., 0]), bits, ordered=True)
        return value

    return inverse(CallableBranch(watched, branch.lipschitz_bound, at_zero=branch.at_zero), y, solver)


def evaluations(branch, y, x_true, memory):
    """Evaluations of each example until the Banach step from the least residual, which would be returned, is near enough."""
    SEEN.clear()
    x, _ = watched_inverse(branch, y, Solver(atol=TOLERANCE / 10, max_evals=3000, memory=memory))
    jax.block_until_ready(x)
    jax.effects_barrier()
    if not np.all(distances(x, x_true) <= TOLERANCE):
        raise RuntimeError(f"not within {TOLERANCE} after {len(SEEN)} evaluations: is it a contraction?")
    residuals = np.stack([distances(y, x + g) for x, g in SEEN])
    errors = np.stack([distances(y - g, x_true) for _, g in SEEN])
    is_best = residuals <= np.minimum.accumulate(residuals)
    best = np.maximum.accumulate(np.where(is_best, np.arange(len(SEEN))[:, None], 0))
    return (np.take_along_axis(errors, best, axis=0) <= TOLERANCE).argmax(axis=0) + 1


def count(model, x):
    """Evaluations of every block, by method."""
    results = []
    with jax.enable_x64():
        weights = jax.tree.map(lambda w: jnp.asarray(w, jnp.float64), model.weights)
        for block in blocks(model.with_(weights=weights), np.asarray(x, np.float64)):
            row = {"block": block.name, "lipschitz_bound": float(block.branch.lipschitz_bound)}
            image, needed = block.x + block.branch(block.x), {}
            for method, memory in METHODS.items():
                needed[method] = evaluations(block.branch, image, block.x, memory)
            for method, values in needed.items():
                row |= {f"{method}_mean": float(values.mean()), f"{method}_max": int(values.max())}
            row["ratio"] = row["banach_mean"] / row["anderson_mean"]
            row["examples_worse"] = int((needed["anderson"] > needed["banach"]).sum())
            results.append(row)
    return results


def time_whole(model, z, *, turns):
    """Wall-clock of the whole model's inverse, in turns, and how it ended."""
    atol = model.solver.atol
    models = {name: model.with_(solver=Solver(atol=atol, memory=memory)) for name, memory in METHODS.items()}
    timings = interleave({name: functools.partial(decode, own, z) for name, own in models.items()}, turns=turns)
    results = summarize(timings, "banach")
    for name, own in models.items():
        _, info = decode(own, z)
        evals, converged = float(info.num_evals.mean()), float(info.converged.mean())
        results[name] |= {"mean_evals_a_block": evals / model.spec.flow.num_blocks, "converged": converged}
    return results


def main():
    options = model_parser(__doc__)
    options.add_argument("--num", type=int, default=None, metavar="N", help="test examples")
    arguments = options.parse_args()
    # On one core JAX has one thread for programs and copies: a program would wait there for what its own callback is given.
    jax.config.update("jax_cpu_enable_async_dispatch", False)
    run = load(arguments.workdir)
    model, x = run.model, flow_input(run, arguments.num or (16 if arguments.quick else 128))
    results = {"blocks": count(model, x), "whole": time_whole(model, encode(model, x), turns=5 if arguments.quick else 30)}
    settings = {"data": run.config.data.name, "step": run.step, "num_examples": len(x)}
    settings |= {"tolerance": TOLERANCE, "inverse_atol": model.solver.atol}
    write(f"inverse_{name_of(run)}", arguments, settings, results)


if __name__ == "__main__":
    main()
