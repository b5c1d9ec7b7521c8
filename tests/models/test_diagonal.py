"""The diagonal of the Jacobian in an inverse: fewer evaluations where it is large, and never a wrong result."""

import functools
import os
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from evaluations import solve_and_watch

from iresnet_jax import data
from iresnet_jax.bijections import actnorm
from iresnet_jax.bijections import bijection as bijections
from iresnet_jax.evaluation import frozen
from iresnet_jax.maths.inverse.fixed_point import Diagonal, invert_residual
from iresnet_jax.models import branch as branches
from iresnet_jax.models import density
from iresnet_jax.models import flow as model

RESULTS = Path(__file__).parents[2] / "benchmarks/results"
REAL_DATA_DIR = os.environ.get("TFDS_DATA_DIR", "")
LIPSCHITZ = 0.9
BATCH, DIM = 6, 40


def stiff():
    """A map whose slopes differ from entry to entry and from place to place, with a little of everything else."""
    rng = np.random.default_rng(0)
    rates = jnp.asarray(rng.uniform(-0.85, 0.3, DIM))[None]
    mixing = jnp.asarray(0.04 * np.linalg.qr(rng.normal(size=(DIM, DIM)))[0])

    def g(x):
        return rates * jnp.tanh(2 * x) / 2 + jnp.sin(x) @ mixing.T

    def slopes(x):
        return rates / jnp.cosh(2 * x) ** 2 + jnp.cos(x) * jnp.diag(mixing)[None]

    x = jnp.asarray(rng.normal(size=(BATCH, DIM)))
    dense = jax.vmap(jax.jacfwd(lambda x: g(x[None])[0]))(x)
    np.testing.assert_allclose(slopes(x), np.diagonal(dense, axis1=1, axis2=2), rtol=1e-12)
    assert np.linalg.norm(dense, 2, axis=(1, 2)).max() < LIPSCHITZ
    return g, slopes, x


def solve(g, y, **more):
    return jax.jit(lambda y: invert_residual(g, y, lipschitz_bound=LIPSCHITZ, atol=1e-8, **more))(y)


def test_fewer_evaluations_and_the_same_preimage_within_its_bound(x64):
    g, slopes, x_true = stiff()
    _, plain = solve(g, x_true + g(x_true))
    x, info = solve(g, x_true + g(x_true), diagonal=Diagonal(slopes))
    assert info.converged.all()
    assert np.all(np.linalg.norm(x - x_true, axis=1) <= info.error_bound)
    assert np.all(info.error_bound <= 1.1e-8)
    assert np.all(info.num_evals < plain.num_evals)
    assert 1.5 * info.num_evals.mean() <= plain.num_evals.mean()


def test_without_history_it_is_a_newton_step_as_far_as_the_diagonal_goes(x64):
    """Of a linear map that is nothing but its diagonal, the step after it is known is the last."""
    rates = jnp.linspace(-0.88, 0.88, DIM)[None]
    y = jnp.asarray(np.random.default_rng(1).normal(size=(BATCH, DIM)))
    x, info = solve(lambda x: rates * x, y, memory=0, diagonal=Diagonal(lambda x: jnp.broadcast_to(rates, x.shape)))
    np.testing.assert_allclose(x, y / (1 + rates), rtol=1e-12)
    assert np.all(info.num_evals == 6)  # four to see that it is slow, the diagonal, and the one that finds the solution


WRONG = {
    "not a number": lambda true: jnp.nan * true,
    "infinite": lambda true: -jnp.inf * true,
    "of the wrong sign": lambda true: -true,
    "too large": lambda true: 100 * true,
    "noise": lambda true: 5 * jnp.sin(1e5 * true),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_diagonal_costs_evaluations_and_nothing_else(x64, name):
    g, slopes, x_true = stiff()
    y = x_true + g(x_true)
    _, banach = solve(g, y, memory=0)
    x, info = solve(g, y, diagonal=Diagonal(lambda x: WRONG[name](slopes(x))))
    assert info.converged.all()
    assert np.all(np.linalg.norm(x - x_true, axis=1) <= info.error_bound)
    assert np.all(info.num_evals <= 1.5 * banach.num_evals)


def test_under_a_false_bound_nothing_blows_up(x64):
    """Where ``1 + dg/dx`` is 0 or less there may be no solution, and nothing is promised."""
    y = jnp.asarray(np.random.default_rng(1).normal(size=(BATCH, DIM)))
    slopes = jnp.asarray(np.resize([-1.0, -1.5, 0.5], DIM))[None]
    known = Diagonal(lambda x: slopes / (1 + x**2))
    x, info = invert_residual(lambda x: slopes * jnp.arctan(x), y, lipschitz_bound=jnp.inf, max_evals=50, diagonal=known)
    assert np.isfinite(x).all()
    assert not info.converged.any()
    assert np.all(info.residual < np.linalg.norm(y, axis=1))


def test_nobody_asks_where_it_is_small_or_the_way_is_short(x64):
    g, _, x_true = stiff()

    def unwanted(x):
        jax.debug.callback(lambda: asked.append(1))
        return x

    for map_, size in ((g, 0.4), (lambda x: 0.05 * g(x), 1.0)):
        asked = []
        y = x_true + map_(x_true)
        plain, without = solve(map_, y)
        x, info = solve(map_, y, diagonal=Diagonal(unwanted, size))
        jax.effects_barrier()
        assert not asked
        np.testing.assert_allclose(x, plain, atol=1e-12)
        np.testing.assert_array_equal(info.num_evals, without.num_evals)


def test_a_result_does_not_depend_on_batch_mates(x64):
    """Fast examples beside slow ones, of a map without matrix products, whose rounding depends on the batch."""

    def g(x):
        return -0.4 * jnp.tanh(2 * x) + 0.05 * jnp.roll(x, 1, axis=1)

    diagonal = Diagonal(lambda x: -0.8 / jnp.cosh(2 * x) ** 2)
    y = jnp.asarray(np.random.default_rng(2).normal(size=(5, 7)) * np.array([0.01, 0.1, 1, 3, 10])[:, None])
    together = solve(g, y, diagonal=diagonal)
    assert len(set(np.asarray(together[1].num_evals).tolist())) > 2
    for i in range(len(y)):
        own = solve(g, y[i : i + 1], diagonal=diagonal)
        for alone, other in zip(jax.tree.leaves(own), jax.tree.leaves(together), strict=True):
            np.testing.assert_allclose(alone[0], other[i], rtol=1e-9, atol=1e-14)


def test_gradients_and_vmap_are_those_of_the_solution(x64):
    g, slopes, x_true = stiff()
    y = x_true + g(x_true)

    def loss(scale, y, diagonal):
        known = Diagonal(lambda x: scale * slopes(x)) if diagonal else None
        x, _ = invert_residual(lambda x: scale * g(x), y, lipschitz_bound=LIPSCHITZ, atol=1e-12, diagonal=known)
        return jnp.sum(jnp.sin(x))

    for with_, without in zip(*(jax.grad(loss, (0, 1))(1.0, y, diagonal) for diagonal in (True, False)), strict=True):
        np.testing.assert_allclose(with_, without, rtol=1e-8, atol=1e-10)
    mapped = jax.vmap(lambda y: invert_residual(g, y, lipschitz_bound=LIPSCHITZ, diagonal=Diagonal(slopes))[0])
    np.testing.assert_allclose(mapped(jnp.stack([y, 0.5 * y]))[0], x_true, atol=1e-6)


def blocks_of(kept, images):
    """Branch, weights, bound and inputs of the convolutional blocks of a kept model's first stage, in float64."""
    spec = kept.spec.flow
    stage, branch = spec.stages[0], spec.layout[0].branch
    weights = jax.tree.map(lambda w: jnp.asarray(w, jnp.float64), kept.weights["stage0"])
    continuous = density.to_continuous(kept.spec, jax.random.key(0), jnp.asarray(images))
    x = model.into_stage(stage, branch, density.transform(kept.spec, continuous)[0])
    for k in range(stage.num_blocks):
        block = jax.tree.map(lambda w, k=k: w[k], weights)
        x, _ = actnorm.forward_and_logdet(actnorm.ActNormParams(**block["actnorm"]), x)
        yield branch, block["branch"], block["lipschitz"], x
        x = x + branches.apply_branch(branch, block["branch"], x)


@pytest.mark.parametrize(("name", "slow"), [("digits", 35), ("fashion_mnist", 50)])
def test_slow_blocks_of_kept_models_take_a_third_of_the_evaluations(x64, name, slow):
    """To a true error of 1e-5, against plain Banach iteration, the diagonal's evaluations included."""
    if name != "digits" and not list(Path(REAL_DATA_DIR, name).glob("*/*.array_record-*")):
        pytest.skip(f"no {name} in array_record under TFDS_DATA_DIR={REAL_DATA_DIR!r}")
    images = data.load(name).images["test"][:8]
    found = 0
    for branch, weights, lipschitz, x_true in blocks_of(frozen.load(RESULTS / f"{name}_density"), images):
        g = functools.partial(branches.apply_branch, branch)
        y = x_true + g(weights, x_true)
        _, banach = solve_and_watch(g, y, x_true, lipschitz, memory=0, weights=weights)
        if banach.mean() < slow:
            continue
        _, needed = solve_and_watch(g, y, x_true, lipschitz, memory=4, weights=weights, diagonal_of=branch)
        assert np.all(3 * needed.mean() <= banach.mean()), (needed, banach)
        found += 1
    assert found, "no block is slow"


def test_the_solver_of_a_model_can_do_without(x64):
    kept = frozen.load(RESULTS / "digits_density")
    images = (jnp.asarray(data.load("digits").images["test"][:4]) + 0.5) / kept.spec.num_levels
    z = kept.encode(images)
    evals = []
    for used in (True, False):
        back, info = kept.decode(z, bijections.Solver(atol=1e-9, diagonal=used))
        np.testing.assert_allclose(back, images, atol=1e-8)
        evals.append(info.num_evals.sum())
    assert evals[0] < evals[1]
