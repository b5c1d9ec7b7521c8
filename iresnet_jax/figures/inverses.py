"""Error of the inverse of a block against evaluations of its branch, beside what theory guarantees.

Banach iteration ``x_{n+1} = y - g(x_n)`` from ``x_0 = y`` satisfies ``|x_n - x*| <= L^n / (1 - L) |x_1 - x_0|`` (Behrmann et
al. 2019, Lemma 2). Anderson's method remembers past steps, see `iresnet_jax.maths.inverse.fixed_point`.
"""

import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jaxtyping import Array

from iresnet_jax.branches.branch import Branch
from iresnet_jax.figures import style
from iresnet_jax.figures.blocks_of_models import PlacedBlock, loosest_block
from iresnet_jax.figures.drawing import Drawing, Row
from iresnet_jax.maths.inverse.fixed_point import FixedPointInfo, example_norm, invert_residual
from iresnet_jax.runs.trained_run import Run

NUM_EXAMPLES = 32
EVALUATIONS = (1, 2, 3, 4, 6, 8, 11, 15, 20, 30, 45, 70)
MEMORIES = {"Banach": 0, "Anderson, 4 steps": 4}  # steps that a solver remembers
ATOL = 1e-15  # never met before rounding stops an example


def figure(run: Run) -> Drawing:
    """The figure of a run: the block with the largest Lipschitz bound, at its first test examples, in float64."""
    with jax.enable_x64():
        rows = measure(loosest_block(run.model, run.test_examples()[:NUM_EXAMPLES]))
    return Drawing(draw(rows), rows)


def measure(block: PlacedBlock, evaluations: Sequence[int] = EVALUATIONS) -> list[dict[str, Any]]:
    """Rows of the figure: largest and mean Euclidean error after a number of evaluations, in the units of the block's input.

    ``rate_bound`` is the largest of the bounds ``L^n / (1 - L) |x_1 - x_0|`` of the examples, where ``n`` is one less than the
    evaluations: the last of them only measures the residual. ``posterior_bound`` is the largest bound that the solver states.
    """
    first_step = np.asarray(jax.jit(lambda branch, x: example_norm(branch(x + branch(x))))(block.branch, block.x))
    constant, num_dims, rows = block.lipschitz_bound, math.prod(block.x.shape[1:]), []
    for solver, memory in MEMORIES.items():
        for num in evaluations:
            errors, info = _errors(block.branch, block.x, max_evals=num, memory=min(memory, num_dims))
            rows.append(
                {
                    "solver": solver,
                    "evaluations": num,
                    "max_error": float(np.max(errors)),
                    "mean_error": float(np.mean(errors)),
                    "rate_bound": float(constant ** (num - 1) / (1 - constant) * first_step.max()),
                    "posterior_bound": float(np.max(info.error_bound)),
                    "lipschitz_bound": constant,
                    "block": block.name,
                }
            )
    return rows


@functools.partial(jax.jit, static_argnames=("max_evals", "memory"))
def _errors(branch: Branch, x: Array, *, max_evals: int, memory: int) -> tuple[Array, FixedPointInfo]:
    """Euclidean errors of the inverses of ``x + g(x)``, one per example."""
    bound = branch.lipschitz_bound
    found, info = invert_residual(branch, x + branch(x), lipschitz_bound=bound, atol=ATOL, max_evals=max_evals, memory=memory)
    return example_norm(found - x), info


def draw(rows: Sequence[Row]) -> Any:
    """Largest error of any example against evaluations, on a log scale."""
    figure = style.figure(width=style.PAGE_WIDTH, height=3.6)
    axes = figure.add_subplot()
    for which, solver in enumerate(MEMORIES):
        own = [row for row in rows if row["solver"] == solver]
        x = [row["evaluations"] for row in own]
        style.curve(axes, which, x, [row["max_error"] for row in own], solver)
        style.bound(axes, which, x, [row["posterior_bound"] for row in own], f"{solver}: bound of the solver")
    rate = {row["evaluations"]: row["rate_bound"] for row in rows}
    name = f"guaranteed: $L^n |x_1 - x_0| / (1 - L)$, $L$ = {rows[0]['lipschitz_bound']:.3f}"
    axes.plot(list(rate), list(rate.values()), color=style.INK, linewidth=1.4, label=name)
    axes.set_yscale("log")
    style.label(axes, "evaluations of the branch", "largest Euclidean error [units of the block]", title=rows[0]["block"])
    style.legend(axes)
    return figure
