"""What Anderson's method and the Jacobian's diagonal save in the inverse of a trained model: evaluations and wall-clock.

    python benchmarks/inverse.py --workdir runs/digits_density [--quick]

Evaluations are those until what would be returned is within 1e-5 (Euclidean) of the exact preimage, which is known: it is
where the block's output came from, in float64. Counted in float64, one example at a time, on test data, without the one
evaluation at 0 that all examples share, from which Anderson's method starts. With three times the memory it is close to GMRES,
of all methods that take nothing but values of ``g`` the best. A diagonal counts as an evaluation. The whole inverse is timed in
the model's own precision and stops by its own error bound, as it does in use.
"""

import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from _record import describe, interleave, parser, summarize, table, write
from iresnet_jax.training.network_input import network_input
from jax import lax

from iresnet_jax.bijections import actnorm
from iresnet_jax.bijections import bijection as bijections
from iresnet_jax.evaluation import trained
from iresnet_jax.maths.inverse.fixed_point import Diagonal, invert_residual
from iresnet_jax.models import branch as branches
from iresnet_jax.models import flow as model

TOLERANCE = 1e-5
# Steps remembered, and whether the diagonal of the Jacobian is used where it has a closed form.
METHODS = {"banach": (0, False), "anderson": (4, False), "anderson12": (12, False), "default": (4, True)}
MAX_EVALS = 3000


def blocks(spec, weights, x):
    """Every residual block on the way of ``x`` through a flow: name, branch, weights and input."""
    for name, stage, branch in zip(model.stage_names(spec), spec.stages, spec.branches, strict=True):
        x = model.into_stage(stage, branch, x)
        for k in range(stage.num_blocks):
            block = jax.tree.map(lambda w, k=k: w[k], weights[name])
            x, _ = actnorm.forward_and_logdet(actnorm.ActNormParams(**block["actnorm"]), x)
            yield f"{name}/block{k:02d}", branch, block, x
            x = x + branches.apply_branch(branch, block["branch"], x)
        if stage.factor_out:
            x = x[..., : x.shape[-1] // 2]


_iterates: list[np.ndarray] = []  # x and g(x), in the order of their evaluation
_diagonals: list[int] = []  # how many iterates there were when the diagonal of the Jacobian was asked for


@functools.partial(jax.jit, static_argnames=("branch", "memory", "with_diagonal"))
def solve_and_tell(branch, block, y, memory, with_diagonal):
    """The inverse of one block, noting every evaluation of its branch."""

    def g(x):
        value = branches.apply_branch(branch, block["branch"], x)
        # As bits: a callback runs in a thread of its own, where float64 is not switched on.
        bits = lax.bitcast_convert_type(jnp.stack([x, value]), jnp.uint32)
        jax.debug.callback(lambda bits: _iterates.append(np.array(bits).view(np.float64)[..., 0]), bits, ordered=True)
        return value

    def diagonal(x):
        jax.debug.callback(lambda: _diagonals.append(len(_iterates)), ordered=True)
        return branches.jacobian_diagonal(branch, block["branch"], x)

    settings = {"atol": TOLERANCE / 10, "max_evals": MAX_EVALS, "memory": memory}
    if with_diagonal and branches.has_diagonal(branch):
        settings["diagonal"] = Diagonal(diagonal, branches.largest_diagonal(branch, block["branch"]))
    start = y - branches.at_zero(branch, block["branch"]) if memory else y  # as `residual.inverse`
    return invert_residual(g, y, lipschitz_bound=block["lipschitz"], start=start, **settings)


def evaluations(branch, block, y, x_true, memory, with_diagonal):
    """Evaluations until the Banach step from the iterate of least residual, which is returned, is within the tolerance.

    A diagonal counts as one, for all examples if any asked for it.
    """
    _iterates.clear()
    _diagonals.clear()
    jax.block_until_ready(solve_and_tell(branch, block, y, memory, with_diagonal))
    jax.effects_barrier()
    x, g = np.stack(_iterates, axis=1).reshape(2, len(_iterates), len(y), -1)
    x_true, y = (np.asarray(a).reshape(len(y), -1) for a in (x_true, y))
    residual = np.linalg.norm(y - x - g, axis=-1)
    error = np.linalg.norm(y - g - x_true, axis=-1)
    best = np.maximum.accumulate(np.where(residual <= np.minimum.accumulate(residual), np.arange(len(x))[:, None], 0))
    reached = np.take_along_axis(error, best, axis=0) <= TOLERANCE
    if not reached[-1].all():
        raise RuntimeError(f"an inverse is not within {TOLERANCE} after {len(x)} evaluations: is the model a contraction?")
    needed = reached.argmax(axis=0) + 1
    return needed + sum(needed > before for before in _diagonals)


def count(loaded, x):
    """Evaluations of every block, by method."""
    results = []
    with jax.enable_x64(True):
        weights = jax.tree.map(lambda w: jnp.asarray(w, jnp.float64), loaded.weights)
        for name, branch, block, x_true in blocks(loaded.spec.flow, weights, jnp.asarray(x, jnp.float64)):
            y = x_true + branches.apply_branch(branch, block["branch"], x_true)
            needed = {method: evaluations(branch, block, y, x_true, *how) for method, how in METHODS.items()}
            row = {"block": name, "lipschitz_bound": float(block["lipschitz"])}
            for method, values in needed.items():
                row |= {f"{method}_mean": float(values.mean()), f"{method}_max": int(values.max())}
            row["ratio"] = row["banach_mean"] / row["default_mean"]
            row["examples_worse"] = int((needed["default"] > needed["banach"]).sum())
            results.append(row)
    return results


def time_whole(loaded, z, *, turns):
    """Wall-clock of the whole model's inverse, in turns, and how it ended."""
    atol = loaded.config.evaluation.inverse_atol
    solvers = {method: bijections.Solver(atol=atol, memory=m, diagonal=used) for method, (m, used) in METHODS.items()}

    @functools.partial(jax.jit, static_argnames="solver")
    def invert(weights, z, solver):
        return model.bijection(loaded.spec.flow, weights, solver=solver).inverse(z)

    timings = interleave({m: functools.partial(invert, loaded.weights, z, s) for m, s in solvers.items()}, turns=turns)
    ended = {}
    for method, solver in solvers.items():
        _, info = invert(loaded.weights, z, solver)
        ended[method] = {
            "mean_evals_a_block": float(info.num_evals.mean() / loaded.num_blocks),
            "converged": float(info.converged.mean()),
        }
    return timings, ended


def main():
    options = parser(__doc__)
    options.add_argument("--workdir", type=Path, required=True, metavar="DIR", help="folder of a training run")
    options.add_argument("--num", type=int, default=None, metavar="N", help="test examples")
    arguments = options.parse_args()
    loaded = trained.load(arguments.workdir)
    num = arguments.num or (16 if arguments.quick else 128)
    examples = loaded.source.held_out("test", num, loaded.config.seed)
    _, x = network_input(loaded.spec, jax.random.key(0), jnp.asarray(examples))
    counted = count(loaded, x)
    print(f"evaluations until the error is at most {TOLERANCE}, mean over {len(x)} test examples (most):")
    rows = []
    for row in counted:
        evals = (f"{row[f'{method}_mean']:.1f} ({row[f'{method}_max']})" for method in METHODS)
        rows.append((row["block"], f"{row['lipschitz_bound']:.3f}", *evals, f"{row['ratio']:.2f}", row["examples_worse"]))
    print(table(rows, ("block", "L", *METHODS, "ratio", "examples worse")))
    z = jax.jit(model.bijection(loaded.spec.flow, loaded.weights).forward)(x)
    timings, ended = time_whole(loaded, z, turns=5 if arguments.quick else 30)
    print(f"whole inverse of {len(x)} examples: {describe(timings, 'banach')}")
    for method, numbers in ended.items():
        print(
            f"  {method}: {numbers['mean_evals_a_block']:.1f} evaluations a block, {100 * numbers['converged']:.1f} % converged"
        )
    settings = {
        "data": loaded.config.data.name,
        "step": loaded.step,
        "num_examples": len(x),
        "tolerance": TOLERANCE,
        "inverse_atol": loaded.config.evaluation.inverse_atol,
    }
    whole = {method: {**numbers, **ended[method]} for method, numbers in summarize(timings, "banach").items()}
    kind = "_classification" if loaded.is_classifier else ""
    write(f"inverse_{loaded.config.data.name}{kind}", arguments, settings, {"blocks": counted, "whole": whole})


if __name__ == "__main__":
    main()
