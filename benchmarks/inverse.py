"""What Anderson's method and the Jacobian's diagonal save in the inverse of a trained model: evaluations and wall-clock.

    python benchmarks/inverse.py --workdir runs/digits_density [--quick]

Evaluations are those until what would be returned is within 1e-5 (Euclidean) of the exact preimage, which is known: it is
where the block's output came from, in float64. Counted in float64, one example at a time, on test data, without the one
evaluation at 0 that all examples share, from which Anderson's method starts. With three times the memory it is close to GMRES,
of all methods that take nothing but values of ``g`` the best. A diagonal counts as an evaluation. The whole inverse is timed in
the model's own precision and stops by its own error bound, as it does in use.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from _models import blocks, flow_input, load, model_parser, name_of
from _record import interleave, summarize, write
from jax import lax

from iresnet_jax.bijections.residual import Solver, inverse
from iresnet_jax.branches.branch import CallableBranch

TOLERANCE = 1e-5
# Steps remembered, and whether the diagonal of the Jacobian is used where it has a closed form.
METHODS = {"banach": (0, False), "anderson": (4, False), "anderson12": (12, False), "default": (4, True)}
MAX_EVALS = 3000

_iterates: list[np.ndarray] = []  # x and g(x), in the order of their evaluation
_diagonals: list[int] = []  # how many iterates there were when the diagonal of the Jacobian was asked for


@functools.partial(jax.jit, static_argnames="solver")
def solve_and_tell(branch, y, solver):
    """The inverse of one block, noting every evaluation of its branch."""

    def noted(x):
        value = branch(x)
        # As bits: a callback runs in a thread of its own, where float64 is not switched on.
        bits = lax.bitcast_convert_type(jnp.stack([x, value]), jnp.uint32)
        jax.debug.callback(lambda bits: _iterates.append(np.array(bits).view(np.float64)[..., 0]), bits, ordered=True)
        return value

    def diagonal(x):
        jax.debug.callback(lambda: _diagonals.append(len(_iterates)), ordered=True)
        return branch.diagonal.at(x)

    known = branch.diagonal and branch.diagonal._replace(at=diagonal)
    return inverse(CallableBranch(noted, branch.lipschitz_bound, at_zero=branch.at_zero, diagonal=known), y, solver)


def evaluations(block, memory, with_diagonal):
    """Evaluations until the Banach step from the iterate of least residual, which is returned, is within the tolerance.

    A diagonal counts as one, for all examples if any asked for it.
    """
    _iterates.clear()
    _diagonals.clear()
    solver = Solver(atol=TOLERANCE / 10, max_evals=MAX_EVALS, memory=memory, diagonal=with_diagonal)
    image = block.x + block.branch(block.x)
    jax.block_until_ready(solve_and_tell(block.branch, image, solver))
    jax.effects_barrier()
    x_true, y = (np.asarray(a).reshape(len(a), -1) for a in (block.x, image))
    x, g = np.stack(_iterates, axis=1).reshape(2, len(_iterates), *y.shape)
    residual = np.linalg.norm(y - x - g, axis=-1)
    error = np.linalg.norm(y - g - x_true, axis=-1)
    best = np.maximum.accumulate(np.where(residual <= np.minimum.accumulate(residual), np.arange(len(x))[:, None], 0))
    reached = np.take_along_axis(error, best, axis=0) <= TOLERANCE
    if not reached[-1].all():
        raise RuntimeError(f"an inverse is not within {TOLERANCE} after {len(x)} evaluations: is the model a contraction?")
    needed = reached.argmax(axis=0) + 1
    return needed + sum(needed > before for before in _diagonals)


def count(model, x):
    """Evaluations of every block, by method."""
    results = []
    with jax.enable_x64():
        weights = jax.tree.map(lambda w: jnp.asarray(w, jnp.float64), model.weights)
        for block in blocks(model.with_(weights=weights), np.asarray(x, np.float64)):
            row = {"block": block.name, "lipschitz_bound": float(block.branch.lipschitz_bound)}
            needed = {method: evaluations(block, *how) for method, how in METHODS.items()}
            for method, values in needed.items():
                row |= {f"{method}_mean": float(values.mean()), f"{method}_max": int(values.max())}
            row["ratio"] = row["banach_mean"] / row["default_mean"]
            row["examples_worse"] = int((needed["default"] > needed["banach"]).sum())
            results.append(row)
    return results


@jax.jit
def invert(model, z):
    """The inverse of the whole flow."""
    return model.flow().inverse(z)


def time_whole(model, z, *, turns):
    """Wall-clock of the whole model's inverse, in turns, and how it ended."""
    atol = model.solver.atol
    models = {name: model.with_(solver=Solver(atol=atol, memory=m, diagonal=used)) for name, (m, used) in METHODS.items()}
    timings = interleave({name: functools.partial(invert, own, z) for name, own in models.items()}, turns=turns)
    results = summarize(timings, "banach")
    for name, own in models.items():
        _, info = invert(own, z)
        evals, converged = float(info.num_evals.mean()), float(info.converged.mean())
        results[name] |= {"mean_evals_a_block": evals / model.spec.flow.num_blocks, "converged": converged}
    return results


def main():
    options = model_parser(__doc__)
    options.add_argument("--num", type=int, default=None, metavar="N", help="test examples")
    arguments = options.parse_args()
    run = load(arguments.workdir)
    model, x = run.model, flow_input(run, arguments.num or (16 if arguments.quick else 128))
    z = jax.jit(lambda model, x: model.flow().forward(x))(model, x)
    results = {"blocks": count(model, x), "whole": time_whole(model, z, turns=5 if arguments.quick else 30)}
    settings = {"data": run.config.data.name, "step": run.step, "num_examples": len(x)}
    settings |= {"tolerance": TOLERANCE, "inverse_atol": model.solver.atol}
    write(f"inverse_{name_of(run)}", arguments, settings, results)


if __name__ == "__main__":
    main()
