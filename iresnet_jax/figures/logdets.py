"""Bias and spread of estimated log-determinants against products and probes, beside the bound of what is cut off.

The power series cut after ``n`` terms, the same series cut at a random length (Chen et al. 2019) and Krylov subspaces of ``n``
products are compared with the exact log-determinant, at the block of a model with the largest Lipschitz bound.
"""

import functools
import itertools
import math
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jaxtyping import Array, Float

from iresnet_jax.branches.branch import Branch
from iresnet_jax.figures import style
from iresnet_jax.figures.blocks_of_models import PlacedBlock, loosest_block
from iresnet_jax.figures.drawing import Drawing, Row
from iresnet_jax.maths.logdet.estimator import LogdetEstimator
from iresnet_jax.maths.logdet.exact import dense_logdet
from iresnet_jax.maths.logdet.hutchinson_series import SeriesLogdet, truncation_bound
from iresnet_jax.maths.logdet.krylov import KrylovLogdet
from iresnet_jax.maths.logdet.roulette import RouletteLogdet
from iresnet_jax.runs.trained_run import Run

NUM_EXAMPLES, NUM_DRAWS = 8, 100  # examples, and independent estimates of each
PRODUCTS, PROBES = (2, 3, 4, 5, 6, 8, 10, 12, 16, 20), (1, 2, 4, 8, 16)
ROULETTE_MEAN = 2.0  # terms that a random length adds to the exact ones on average
NEGLIGIBLE = 1e-9  # nats that the series leaves out, at most, of what estimates are compared with
AT_PROBES = 5  # products at which the spread is drawn against probes

KINDS = ("series", "roulette", "Krylov")


def figure(run: Run) -> Drawing:
    """The figure of a run: the block with the largest Lipschitz bound, at its first test examples, in float64."""
    with jax.enable_x64():
        rows = measure(loosest_block(run.model, run.test_examples()[:NUM_EXAMPLES]))
    return Drawing(draw(rows), rows)


def measure(block: PlacedBlock, products: Sequence[int] = PRODUCTS, probes: Sequence[int] = PROBES) -> list[dict[str, Any]]:
    """Rows of the figure.

    ``bias_nats`` is the mean difference to the same estimator with so many products that nothing is left out, for the same
    probe: its noise cancels, so that biases far below the spread are seen. ``mean_nats`` and ``exact_nats`` compare without
    this trick. ``spread_nats`` is the standard deviation of one estimate, ``bound_nats`` the mean a posteriori bound of what is
    left out, and ``prior_bound_nats`` the series' bound ``d sum_{k>n} L^k / k`` from the Lipschitz constant alone. What does
    not apply is NaN: biases with several probes, which are those with one, and the prior bound of other estimators.

    Args:
        block: The block and the examples at which it is evaluated.
        products: Products with the Jacobian, of the roulette on average; at least 2.
        probes: Numbers of probes; one of them is 1.
    """
    exact = np.asarray(dense_logdet(block.branch, block.x))
    num_dims, constant = math.prod(block.x.shape[1:]), block.lipschitz_bound
    enough = next(n for n in itertools.count(1) if truncation_bound(num_dims, constant, n) < NEGLIGIBLE)
    at_probes = min(products, key=lambda n: abs(n - AT_PROBES))
    cases = [(n, 1) for n in products] + [(at_probes, p) for p in probes if p > 1]
    keys = jax.random.split(jax.random.key(0), (NUM_DRAWS, len(exact)))
    rows = []
    for kind in KINDS:
        whole, _ = _estimates(block, kind, enough, 1, keys)
        for n, p in cases:
            values, truncated = _estimates(block, kind, n, p, keys)
            missing, spread = values - (whole if p == 1 else math.nan), float(np.sqrt(values.var(axis=0, ddof=1).mean()))
            rows.append(
                {
                    "estimator": kind,
                    "products": n,
                    "probes": p,
                    "bias_nats": float(missing.mean()),
                    "bias_stderr_nats": float(missing.std(ddof=1)) / math.sqrt(missing.size),
                    "bound_nats": float(truncated.mean()),
                    "prior_bound_nats": truncation_bound(num_dims, constant, n) if kind == "series" else math.nan,
                    "mean_nats": float(values.mean()),
                    "mean_stderr_nats": spread / math.sqrt(values.size),
                    "exact_nats": float(exact.mean()),
                    "spread_nats": spread,
                    "lipschitz_bound": constant,
                    "block": block.name,
                }
            )
    return rows


def _estimator(kind: str, products: int, probes: int) -> LogdetEstimator:
    if kind == "series":
        return SeriesLogdet(products, num_probes=probes)
    if kind == "Krylov":
        return KrylovLogdet(products, num_probes=probes)
    return RouletteLogdet("poisson", ROULETTE_MEAN, max(products - round(ROULETTE_MEAN), 0), num_probes=probes)


def _estimates(
    block: PlacedBlock, kind: str, products: int, probes: int, keys: Array
) -> tuple[Float[np.ndarray, "k b"], Float[np.ndarray, "k b"]]:
    """Estimates and bounds of what they leave out, a row for each draw; the same keys give the same probes."""
    products = min(products, math.prod(block.x.shape[1:])) if kind == "Krylov" else products
    found = _draw(block.branch, block.x, _estimator(kind, products, probes), keys)
    return np.asarray(found[0]), np.asarray(found[1])


@functools.partial(jax.jit, static_argnames="estimator")
def _draw(branch: Branch, x: Array, estimator: LogdetEstimator, keys: Array) -> tuple[Array, Array]:
    def once(keys):
        value, info = estimator(branch, x, keys, lipschitz_bound=branch.lipschitz_bound)
        return value, info.truncation_bound

    return jax.lax.map(once, keys)


def draw(rows: Sequence[Row]) -> Any:
    """Bias against products beside its bound on the left, spread against probes on the right."""
    figure = style.figure(width=style.PAGE_WIDTH, height=3.4)
    left, right = figure.subplots(1, 2)
    for which, kind in enumerate(KINDS):
        own = [row for row in rows if row["estimator"] == kind]
        single = [row for row in own if row["probes"] == 1]
        x = [row["products"] for row in single]
        seen = [abs(row["bias_nats"]) for row in single]
        error = [2 * row["bias_stderr_nats"] for row in single]
        style.curve(left, which, x, seen, kind)
        left.errorbar(x, seen, error, color=style.CURVES[which]["color"], linestyle="none", linewidth=0.8, capsize=2)
        style.bound(left, which, x, [row["bound_nats"] for row in single], f"{kind}: bound")
        shared = [row for row in own if row["products"] == _drawn_at(rows)]
        shared.sort(key=lambda row: row["probes"])
        style.curve(right, which, [row["probes"] for row in shared], [row["spread_nats"] for row in shared], kind)
    left.set(yscale="log", ylim=(NEGLIGIBLE, None))
    probes = sorted({row["probes"] for row in rows})
    one = next(row["spread_nats"] for row in rows if row["probes"] == 1 and row["products"] == _drawn_at(rows))
    rate = [one / math.sqrt(p) for p in probes]
    right.plot(probes, rate, color=style.GREY, linewidth=0.8, label="1 / root of the probes")
    right.set(xscale="log", yscale="log")
    right.set_xticks(probes, [f"{p:g}" for p in probes])
    right.set_xticks([], minor=True)
    right.yaxis.set_minor_formatter("{x:g}")
    left.xaxis.get_major_locator().set_params(integer=True)
    style.label(left, "products with the Jacobian", "|bias| [nats]", title=f"{rows[0]['block']}, 1 probe")
    style.label(right, "probes", "standard deviation [nats]", title=f"{_drawn_at(rows):g} products")
    right.tick_params(which="minor", labelsize=8, labelcolor=style.INK)
    style.legend(left)
    style.legend(right)
    return figure


def _drawn_at(rows: Sequence[Row]) -> int:
    return next(row["products"] for row in rows if row["probes"] > 1)
