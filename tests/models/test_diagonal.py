"""The diagonal of the Jacobian in an inverse: fewer evaluations where it is large, and never a wrong result."""

import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from evaluations import TOLERANCE, itself, solve_and_watch

import iresnet_jax as ir
from iresnet_jax import data
from iresnet_jax.bijections import actnorm
from iresnet_jax.bijections.chain import chain
from iresnet_jax.bijections.residual import Solver
from iresnet_jax.maths.fixed_point import Diagonal, invert_residual

RESULTS = Path(__file__).parents[2] / "benchmarks/results"
LIPSCHITZ = 0.9
BATCH, DIM = 6, 40


@functools.cache
def stiff():
    """A map whose slopes differ from entry to entry and from place to place, with a little of everything else."""
    rng = np.random.default_rng(0)
    rates = rng.uniform(-0.85, 0.3, DIM)[None]
    mixing = 0.04 * np.linalg.qr(rng.normal(size=(DIM, DIM)))[0]

    def g(x):
        return rates * jnp.tanh(2 * x) / 2 + jnp.sin(x) @ mixing.T

    def slopes(x):
        return rates / jnp.cosh(2 * x) ** 2 + jnp.cos(x) * np.diag(mixing)[None]

    @jax.jit
    def evaluated(x):
        return g(x), slopes(x), jax.vmap(jax.jacfwd(lambda x: g(x[None])[0]))(x)

    x = jnp.asarray(rng.normal(size=(BATCH, DIM)))
    value, diagonal, dense = evaluated(x)
    np.testing.assert_allclose(diagonal, np.diagonal(dense, axis1=1, axis2=2), rtol=1e-12, atol=1e-15)
    assert np.linalg.norm(dense, 2, axis=(1, 2)).max() < LIPSCHITZ
    return g, slopes, x, x + value


@functools.partial(jax.jit, static_argnames=("g", "slopes", "size", "memory"))
def solve(g, y, *, slopes=None, size=1.0, memory=4):
    diagonal = None if slopes is None else Diagonal(slopes, size)
    return invert_residual(g, y, lipschitz_bound=LIPSCHITZ, atol=1e-8, memory=memory, diagonal=diagonal)


def test_fewer_evaluations_and_the_same_preimage_within_its_bound(x64):
    g, slopes, x_true, y = stiff()
    _, plain = solve(g, y)
    x, info = solve(g, y, slopes=slopes)
    assert info.converged.all()
    assert np.all(np.linalg.norm(x - x_true, axis=1) <= info.error_bound)
    assert np.all(info.error_bound <= 1.1e-8)
    assert np.all(info.num_evals < plain.num_evals)
    assert 1.5 * info.num_evals.mean() <= plain.num_evals.mean()


def test_without_history_it_is_a_newton_step_as_far_as_the_diagonal_goes(x64):
    """Of a linear map that is nothing but its diagonal, the step after it is known is the last."""
    rates = np.linspace(-0.88, 0.88, DIM)[None]
    y = jnp.asarray(np.random.default_rng(1).normal(size=(BATCH, DIM)))
    x, info = solve(lambda x: rates * x, y, memory=0, slopes=lambda x: jnp.broadcast_to(rates, x.shape))
    np.testing.assert_allclose(x, y / (1 + rates), rtol=1e-12)
    assert np.all(info.num_evals == 6)  # four to see that it is slow, the diagonal, and the one that finds the solution


WRONG = {  # factor of the true diagonal, and size of the noise beside it
    "not a number": (np.nan, 0.0),
    "infinite": (-np.inf, 0.0),
    "of the wrong sign": (-1.0, 0.0),
    "too large": (100.0, 0.0),
    "noise": (0.0, 5.0),
}


@jax.jit
def solve_by_a_wrong_diagonal(y, factor, noise):
    g, slopes, *_ = stiff()

    def wrong(x):
        return factor * slopes(x) + noise * jnp.sin(1e5 * slopes(x))

    return solve(g, y, slopes=wrong)


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_diagonal_costs_evaluations_and_nothing_else(x64, name):
    g, _, x_true, y = stiff()
    _, banach = solve(g, y, memory=0)
    x, info = solve_by_a_wrong_diagonal(y, *WRONG[name])
    assert info.converged.all()
    assert np.all(np.linalg.norm(x - x_true, axis=1) <= info.error_bound)
    assert np.all(info.num_evals <= 1.5 * banach.num_evals)


def test_under_a_false_bound_nothing_blows_up(x64):
    """Where ``1 + dg/dx`` is 0 or less there may be no solution, and nothing is promised."""
    y = jnp.asarray(np.random.default_rng(1).normal(size=(BATCH, DIM)))
    slopes = np.resize([-1.0, -1.5, 0.5], DIM)[None]

    @jax.jit
    def run(y):
        known = Diagonal(lambda x: slopes / (1 + x**2))
        return invert_residual(lambda x: slopes * jnp.arctan(x), y, lipschitz_bound=jnp.inf, max_evals=50, diagonal=known)

    x, info = run(y)
    assert np.isfinite(x).all()
    assert not info.converged.any()
    assert np.all(info.residual < np.linalg.norm(y, axis=1))


def test_nobody_asks_where_it_is_small_or_the_way_is_short(x64):
    g, _, x_true, y = stiff()
    asked = []

    def unwanted(x):
        jax.debug.callback(lambda: asked.append(1))
        return x

    def short(x):
        return 0.05 * g(x)

    for map_, there, size in ((g, y, 0.4), (short, x_true + 0.05 * (y - x_true), 1.0)):
        plain, without = solve(map_, there)
        x, info = solve(map_, there, slopes=unwanted, size=size)
        jax.effects_barrier()
        assert not asked
        np.testing.assert_allclose(x, plain, atol=1e-12)
        np.testing.assert_array_equal(info.num_evals, without.num_evals)


def test_a_result_does_not_depend_on_batch_mates(x64):
    """Fast examples beside slow ones, of a map without matrix products, whose rounding depends on the batch."""

    def g(x):
        return -0.4 * jnp.tanh(2 * x) + 0.05 * jnp.roll(x, 1, axis=1)

    def slopes(x):
        return -0.8 / jnp.cosh(2 * x) ** 2

    y = np.random.default_rng(2).normal(size=(5, 7)) * np.array([0.01, 0.1, 1, 3, 10])[:, None]
    together = solve(g, jnp.asarray(y), slopes=slopes)
    assert len(set(np.asarray(together[1].num_evals).tolist())) > 2
    for i in range(len(y)):
        own = solve(g, jnp.asarray(y[i : i + 1]), slopes=slopes)
        for alone, other in zip(*map(jax.tree.leaves, jax.device_get((own, together))), strict=True):
            np.testing.assert_allclose(alone[0], other[i], rtol=1e-9, atol=1e-14)


def test_gradients_and_vmap_are_those_of_the_solution(x64):
    g, slopes, x_true, y = stiff()

    def loss(scale, y, known):
        x, _ = invert_residual(lambda x: scale * g(x), y, lipschitz_bound=LIPSCHITZ, atol=1e-12, diagonal=known(scale))
        return jnp.sum(jnp.sin(x))

    @jax.jit
    def run(y):
        diagonals = (lambda scale: Diagonal(lambda x: scale * slopes(x))), (lambda scale: None)
        gradients = [jax.grad(loss, (0, 1))(1.0, y, known) for known in diagonals]
        mapped = jax.vmap(lambda y: invert_residual(g, y, lipschitz_bound=LIPSCHITZ, diagonal=Diagonal(slopes))[0])
        return gradients, mapped(jnp.stack([y, 0.5 * y]))[0]

    gradients, mapped = jax.device_get(run(y))
    for with_, without in zip(*gradients, strict=True):
        np.testing.assert_allclose(with_, without, rtol=1e-8, atol=1e-10)
    np.testing.assert_allclose(mapped, x_true, atol=1e-6)


def blocks_of(kept, images):
    """Branch, inputs and outputs of the blocks of a kept model's first stage, in float64."""
    stage = kept.spec.flow.layout[0]
    weights = jax.tree.map(lambda w: jnp.asarray(w, jnp.float64), kept.weights[stage.name])

    @jax.jit
    def entered(kept, images):
        return chain(stage.reshapes).forward(kept.preprocess(images, jax.random.key(0)).astype(jnp.float64))

    @jax.jit
    def through(block, x):
        x, _ = actnorm.forward_and_logdet(block.actnorm, x)
        return x, x + block.branch(x)

    y = entered(kept, images)
    for k in range(stage.spec.num_blocks):
        block = jax.tree.map(lambda w, k=k: w[k], weights)
        x, y = through(block, y)
        yield block.branch, x, y


@functools.cache
def kept_model():
    with jax.enable_x64(False):
        return ir.load(RESULTS / "digits_hybrid")


def test_slow_blocks_of_a_kept_model_take_a_fraction_of_the_evaluations(x64):
    """To a true error of 1e-5, against plain Banach iteration, the diagonal's evaluations included."""
    found = 0
    for branch, x_true, y in blocks_of(kept_model(), data.load("digits").examples["test"][:8]):
        _, banach = solve_and_watch(itself, branch, y, x_true, Solver(atol=TOLERANCE, memory=0))
        if banach.mean() < 35:
            continue
        _, needed = solve_and_watch(itself, branch, y, x_true, Solver(atol=TOLERANCE, memory=4))
        assert 3 * needed.mean() <= banach.mean(), (needed, banach)
        found += 1
    assert found, "no block is slow"


def test_the_solver_of_a_model_can_do_without(x64):
    kept = kept_model().continuous
    images = (data.load("digits").examples["test"][:4] + 0.5) / 17
    z, decode, evals = jax.jit(ir.Density.encode)(kept, images), jax.jit(ir.Density.decode), []
    for used in (True, False):
        back, info = decode(kept.with_(solver=Solver(atol=1e-9, diagonal=used)), z)
        np.testing.assert_allclose(back, images, atol=1e-8)
        evals.append(info.num_evals.sum())
    assert evals[0] < evals[1]
