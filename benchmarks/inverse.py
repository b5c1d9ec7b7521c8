"""What Anderson's method saves in the inverse of a trained model: evaluations and wall-clock.

    python benchmarks/inverse.py --workdir runs/digits_density [--quick]

Evaluations are those until what would be returned is within 1e-5 (Euclidean) of the exact preimage,
which is known: it is where the block's output came from, in float64. Counted in float64, one
example at a time, on test data, without the one evaluation at 0 that all examples share, from which
Anderson's method starts. With three times the memory it is close to GMRES, of all methods that take
nothing but values of ``g`` the best. The whole inverse is timed in the model's own precision and
stops by its own error bound, as it does in use.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from _models import blocks, decode, encode, flow_input, load, model_parser, name_of
from _record import interleave, summarize, write

from iresnet_jax.bijections.residual import Solver
from iresnet_jax.maths import fixed_point

TOLERANCE = 1e-5
MOST_EVALS = 3000
METHODS = {"banach": 0, "anderson": 4, "anderson12": 12}  # steps remembered


def needed_evals(branch, x, memory):
    """Evaluations of the branch until the Banach step from the best iterate is within the
    tolerance, for each example.
    """
    y = x + branch(x)
    equation = fixed_point.Equation.of(
        branch, y, lipschitz_bound=branch.lipschitz_bound, atol=TOLERANCE / 10
    )
    start = (y - branch.at_zero()).reshape(equation.y.shape) if memory else None
    state, exact = fixed_point.init(equation, start, memory=memory), x.reshape(equation.y.shape)

    @jax.jit
    def step(state):
        state = fixed_point.step(equation, state)
        return state, fixed_point.example_norm(state.best.image - exact) <= TOLERANCE

    needed = np.zeros(len(x), int)
    for num_evals in range(1, MOST_EVALS):
        state, is_within = step(state)
        needed = np.where((needed == 0) & np.asarray(is_within), num_evals, needed)
        if np.all(needed):
            return needed
    raise RuntimeError(
        f"no preimage within {TOLERANCE} after {MOST_EVALS} evaluations: is the "
        "branch a contraction?"
    )


def count(model, x):
    """Evaluations of every block, by method."""
    results = []
    with jax.enable_x64():
        weights = jax.tree.map(lambda w: jnp.asarray(w, jnp.float64), model.weights)
        for block in blocks(model.with_(weights=weights), np.asarray(x, np.float64)):
            row = {"block": block.name, "lipschitz_bound": float(block.branch.lipschitz_bound)}
            needed = {
                method: needed_evals(block.branch, block.x, memory)
                for method, memory in METHODS.items()
            }
            for method, values in needed.items():
                row |= {f"{method}_mean": float(values.mean()), f"{method}_max": int(values.max())}
            row["ratio"] = row["banach_mean"] / row["anderson_mean"]
            row["examples_worse"] = int((needed["anderson"] > needed["banach"]).sum())
            results.append(row)
    return results


def time_whole(model, z, *, turns):
    """Wall-clock of the whole model's inverse, in turns, and how it ended."""
    atol = model.how.solver.atol
    models = {
        name: model.with_(solver=Solver(atol=atol, memory=memory))
        for name, memory in METHODS.items()
    }
    bounds = model.bounds()
    runs = {name: functools.partial(decode, own, z, bounds) for name, own in models.items()}
    timings = interleave(runs, turns=turns)
    results = summarize(timings, "banach")
    for name, own in models.items():
        _, info = decode(own, z, bounds)
        evals, converged = float(info.num_evals.mean()), float(info.converged.mean())
        results[name] |= {
            "mean_evals_a_block": evals / model.spec.flow.num_blocks,
            "converged": converged,
        }
    return results


def main():
    options = model_parser(__doc__)
    options.add_argument("--num", type=int, default=None, metavar="N", help="test examples")
    arguments = options.parse_args()
    run = load(arguments.workdir)
    model, x = run.model, flow_input(run, arguments.num or (16 if arguments.quick else 128))
    results = {
        "blocks": count(model, x),
        "whole": time_whole(model, encode(model, x), turns=5 if arguments.quick else 30),
    }
    settings = {"data": run.config.data.name, "step": run.step, "num_examples": len(x)}
    settings |= {"tolerance": TOLERANCE, "inverse_atol": model.how.solver.atol}
    write(f"inverse_{name_of(run)}", arguments, settings, results)


if __name__ == "__main__":
    main()
