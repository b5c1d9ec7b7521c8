"""How many evaluations of a branch an inverse takes until it is within a tolerance of the exact preimage, which is known."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from iresnet_jax.bijections.residual import inverse
from iresnet_jax.branches.branch import CallableBranch

TOLERANCE = 1e-5


def error(x, x_true):
    return np.linalg.norm((np.asarray(x) - np.asarray(x_true)).reshape(len(x), -1), axis=1)


SEEN = []  # x and g(x), in the order of their evaluation


def itself(branch):
    return branch


@functools.partial(jax.jit, static_argnames=("branch_of", "solver"))
def watched_inverse(branch_of, weights, y, solver):
    branch = branch_of(weights)

    def watched(x):
        value = branch(x)
        # As bits: a callback runs in a thread of its own, where the test's float64 is not switched on.
        bits = lax.bitcast_convert_type(jnp.stack([x, value]), jnp.uint32)
        jax.debug.callback(lambda bits: SEEN.append(np.array(bits).view(np.float64)[..., 0]), bits, ordered=True)
        return value

    return inverse(CallableBranch(watched, branch.lipschitz_bound, at_zero=branch.at_zero), y, solver)


def solve_and_watch(branch_of, weights, y, x_true, solver):
    """How an inverse ended, and the evaluations of each example until what would be returned is within the tolerance.

    What would be returned is the Banach step from the iterate of least residual. The evaluation at 0, which all share, does not
    count.

    Args:
        branch_of: ``weights ->`` the branch; `itself` of a branch as a value.
        weights: Arrays of the branch, in float64.
        y: Images under ``x + g(x)``.
        x_true: Their exact preimages.
        solver: Settings of the inverse, whose tolerance is at most `TOLERANCE`.
    """
    SEEN.clear()
    x, info = watched_inverse(branch_of, weights, y, solver)
    jax.block_until_ready(x)
    jax.effects_barrier()
    assert np.all(error(x, x_true) <= TOLERANCE), f"not within {TOLERANCE} after {len(SEEN)} evaluations: is it a contraction?"
    residuals = np.stack([error(y, x + g) for x, g in SEEN])
    errors = np.stack([error(y - g, x_true) for _, g in SEEN])
    is_best = residuals <= np.minimum.accumulate(residuals)
    best = np.maximum.accumulate(np.where(is_best, np.arange(len(SEEN))[:, None], 0))
    within = np.take_along_axis(errors, best, axis=0) <= TOLERANCE
    assert within[-1].all()
    return info, within.argmax(axis=0) + 1
