"""Bijections: a dictionary of cases drives the generic tests; information composes by hand."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import kept
import numpy as np
import oracles
import pytest

import iresnet_jax as ir
from iresnet_jax.bijections.actnorm import ActNorm
from iresnet_jax.bijections.bijection import (
    fold_in,
)
from iresnet_jax.bijections.chain import Chain, Multiscale, Repeat
from iresnet_jax.bijections.reshape import Isometry, flatten_bijection, squeeze_bijection
from iresnet_jax.bijections.residual import Residual
from iresnet_jax.models.contractions import freeze
from iresnet_jax.models.flow import flow_bijection

EXACT = 1e-9  # the same mathematics by another route in float64; slogdet of up to 32 dimensions
LAYOUT = 1e-12  # the same operations in the same order, fused differently
INVERSE_ATOL = 1e-8  # asked of the solver
PREIMAGE = 1e-6  # what that leaves after a handful of blocks, in a latent or a log-determinant
BATCH = 3
SOLVER, DENSE = ir.Solver(atol=INVERSE_ATOL), ir.ExactLogdet()


def residual(g, lipschitz_bound, estimator=DENSE, solver=SOLVER):
    return Residual(ir.CallableBranch(g, lipschitz_bound), estimator, solver)


def random_actnorm(rng, channels):
    return ActNorm(*(jnp.asarray(0.4 * rng.normal(size=channels)) for _ in range(2)))


def chain_case():
    return Chain(
        [
            squeeze_bijection(2),
            random_actnorm(np.random.default_rng(1), 4),
            flatten_bijection((1, 2, 4)),
            residual(lambda x: 0.5 * jnp.sin(x), 0.5),
        ]
    )


def network_weights(num_blocks, width=4, dim=3):
    """Blocks ``x + W2 tanh(W1 x)`` behind an ActNorm each, with ``|W2| |W1| = 0.8``."""
    rng = np.random.default_rng(2)
    first, second = (
        rng.normal(size=(num_blocks, dim, width)),
        rng.normal(size=(num_blocks, width, dim)),
    )
    first, second = (w / np.linalg.norm(w, 2, axis=(1, 2))[:, None, None] for w in (first, second))
    actnorm = 0.3 * rng.normal(size=(2, num_blocks, dim))
    return jax.tree.map(
        jnp.asarray,
        {"first": 0.8 * first, "second": second, "bias": actnorm[0], "log_scale": actnorm[1]},
    )


def network(weights, estimator=DENSE, **layout):
    def make(w):
        block = residual(lambda x: jnp.tanh(x @ w["first"]) @ w["second"], 0.8, estimator)
        return Chain([ActNorm(w["bias"], w["log_scale"]), block])

    return Repeat(make, weights, **layout)


def multiscale_case():
    first = Chain([squeeze_bijection(2), random_actnorm(np.random.default_rng(4), 8)])
    return Multiscale(
        [ir.Stage(first, factor_out=True), ir.Stage(residual(lambda x: 0.6 * jnp.tanh(x), 0.6))],
        (2, 4, 2),
    )


def model_case():
    """A flow of convolutions, then of a dense branch, with weights away from its start."""
    layout = {"squeeze": 2, "channel_order": (5, 1, 7, 0, 2, 4, 6, 3), "factor_out": True}
    first = ir.StageSpec(1, hidden=(3,), kernel_sizes=(3, 1), padding="CIRCULAR", **layout)
    spec = ir.FlowSpec((4, 2, 2), (first, ir.StageSpec(1, hidden=(6,), preactivation=True)))
    params = jax.tree.map(lambda leaf: jnp.asarray(leaf, float), kept.random_params(spec))
    return flow_bijection(spec, freeze(spec, params), ir.ExactLogdet(), SOLVER)


FREQUENCIES = (0.15, 0.5, 0.1, 0.25)
DATA = (
    np.random.default_rng(6).normal(size=(50, 4))
    @ np.random.default_rng(7).normal(size=(4, 4))
    * [1, 4, 0.5, 2]
)
INTERVALS = (-1.0, -np.inf, 0.0, -0.5), (3.0, np.inf, 1.0, 4.5)
# Shape of an example, and the bijection, or a transform, whose data are uniform on [0, 1). A new
# bijection is one line here.
CASES: dict[str, tuple[tuple[int, ...], Callable[[], Any]]] = {
    "actnorm": ((2, 3, 4), lambda: random_actnorm(np.random.default_rng(0), 4)),
    "chain": ((2, 4, 1), chain_case),
    "scanned blocks": ((3,), lambda: network(network_weights(4))),
    "multi-scale": ((2, 4, 2), multiscale_case),
    "image model": ((4, 2, 2), model_case),
    "logit .05": ((2, 2, 1), lambda: ir.Logit(0.05)),
    "equalize, entrywise": (
        (2, 2, 1),
        lambda: ir.Equalize(FREQUENCIES, (0.999, 0.3, 0.5, 0.01), alpha=1e-6),
    ),
    "standardize": ((4,), lambda: ir.Standardize.fit(DATA)),
    "standardize images": ((2, 2, 4), lambda: ir.Standardize.fit(DATA)),
    "whiten": ((4,), lambda: ir.Whiten.fit(DATA)),
    "bounded": ((4,), lambda: ir.Bounded(*INTERVALS)),
    "one end": (
        (4,),
        lambda: ir.Bounded(
            (-9.0, 0.0, -np.inf, -np.inf), (np.inf, np.inf, 9.0, np.inf), 0.0, (0.1, 0.0, 3.0, 2.0)
        ),
    ),
    "heavy tails": (
        (4,),
        lambda: ir.Bounded(
            (-np.inf, -np.inf, 0.0, -np.inf),
            (np.inf, np.inf, 1.0, np.inf),
            (0.3, 0, 0, -2),
            (0.01, 0, 0, 5),
        ),
    ),
    "bounded, whitened": ((4,), lambda: ir.Bounded(*INTERVALS, then=ir.Whiten.fit(DATA))),
}


class Measured(NamedTuple):
    x: Any
    y: Any
    logdet: Any
    logdet_info: Any
    jacobian: Any
    back: Any
    inverse_logdet: Any
    inverse_info: Any
    lipschitz: Any
    inverse_lipschitz: Any


@functools.cache
def measure(name) -> Measured:
    """Everything a case is asked about, in float64, from one compilation."""
    shape, make = CASES[name]
    with jax.enable_x64(True):
        bijection = make()
        known = hasattr(bijection, "bilipschitz")
        lipschitz = jnp.asarray(bijection.bilipschitz().forward if known else jnp.inf)
        x = jnp.asarray(np.random.default_rng(5).uniform(size=(BATCH, *shape)))

        @jax.jit
        def run(x, key):
            y, logdet, logdet_info = bijection.forward_and_logdet(x, key)
            back, inverse_logdet, _, inverse_info = bijection.inverse_and_logdet(y, key)
            jacobian = jax.vmap(jax.jacfwd(lambda row: bijection.forward(row[None])[0].ravel()))(x)
            jacobian = jacobian.reshape(BATCH, x[0].size, -1)
            constants = lipschitz, jnp.asarray(bijection.inverse_lipschitz)
            return Measured(
                x, y, logdet, logdet_info, jacobian, back, inverse_logdet, inverse_info, *constants
            )

        return jax.tree.map(np.asarray, run(x, jax.random.key(0)))


@pytest.mark.parametrize("name", CASES)
def test_round_trip(name):
    m = measure(name)
    assert m.y.shape[0] == BATCH
    assert m.y.size == m.x.size
    assert np.all(m.inverse_info.converged)
    np.testing.assert_allclose(m.back, m.x, atol=PREIMAGE)
    error = np.linalg.norm((m.back - m.x).reshape(BATCH, -1), axis=1)
    assert np.all(error <= m.inverse_info.error_bound + 1e-12)


@pytest.mark.parametrize("name", CASES)
def test_logdet_and_lipschitz_constants_against_the_jacobian(name):
    m = measure(name)
    assert m.logdet.shape == (BATCH,)
    np.testing.assert_allclose(m.logdet, np.linalg.slogdet(m.jacobian)[1], rtol=EXACT, atol=EXACT)
    np.testing.assert_array_equal(m.logdet_info.truncation_bound, 0)
    np.testing.assert_allclose(m.inverse_logdet, -m.logdet, atol=PREIMAGE)
    assert np.all(np.linalg.norm(m.jacobian, 2, axis=(1, 2)) <= m.lipschitz * (1 + EXACT))
    assert np.all(
        1 / np.linalg.norm(m.jacobian, -2, axis=(1, 2)) <= m.inverse_lipschitz * (1 + EXACT)
    )


@pytest.mark.slow
def test_layouts_change_neither_values_nor_gradients(x64):
    weights, x = network_weights(2), jnp.asarray(np.random.default_rng(0).normal(size=(BATCH, 3)))

    def results(**layout):
        @jax.jit
        @functools.partial(jax.value_and_grad, argnums=(0, 1), has_aux=True)
        def run(weights, x):
            # with random probes: every layout must draw the same
            bijection = network(weights, ir.SeriesLogdet(2), **layout)
            z, logdet, info = bijection.forward_and_logdet(x, jax.random.key(0))
            return jnp.sum(jnp.sin(z)) + jnp.sum(logdet * jnp.arange(1.0, 4.0)), (
                z,
                logdet,
                info.truncation_bound,
            )

        return run(weights, x)

    scanned = results()
    for unroll, kind in ((True, "elementwise"), (False, "blocks")):
        found = results(unroll=unroll, rematerialize=kind)
        jax.tree.map(
            functools.partial(np.testing.assert_allclose, rtol=LAYOUT, atol=LAYOUT), found, scanned
        )


def test_error_bounds_of_a_chain_compose_by_the_lipschitz_constants_of_the_inverses(x64):
    coarse = ir.Solver(atol=1e-3)  # so that errors stand out from rounding
    parts = [
        residual(lambda x: -0.8 * jnp.sin(x), 0.8, solver=coarse),
        ActNorm(jnp.zeros(2), jnp.array([-1.0, 0.5])),
        residual(lambda x: -0.5 * jnp.tanh(x), 0.5, solver=coarse),
    ]
    x = jnp.asarray(np.random.default_rng(0).normal(size=(20, 2)))
    chained = Chain(parts)

    @jax.jit
    def run(x):
        y = chained.forward(x)
        middle, last = parts[2].inverse(y)
        by_hand, first = parts[0].inverse(parts[1].inverse(middle)[0])
        return chained.inverse(y), (by_hand, first, last)

    (back, info), (by_hand, first, last) = run(x)
    np.testing.assert_allclose(back, by_hand, rtol=LAYOUT)
    np.testing.assert_allclose(
        info.error_bound, first.error_bound + np.e / (1 - 0.8) * last.error_bound, rtol=EXACT
    )
    np.testing.assert_array_equal(info.num_evals, first.num_evals + last.num_evals)
    np.testing.assert_allclose(info.residual, np.maximum(first.residual, last.residual), rtol=EXACT)
    np.testing.assert_allclose(chained.inverse_lipschitz, 5 * np.e * 2, rtol=EXACT)
    error = np.linalg.norm(back - x, axis=1)
    assert np.all(error <= info.error_bound)
    assert np.max(error) > 1e-4
    assert np.any(error > first.error_bound)  # the first solver's own bound is not enough


def test_one_failed_block_fails_the_Chain():
    good, bad = (
        residual(lambda x: 0.5 * x, bound, solver=ir.Solver(max_evals=50)) for bound in (0.5, 1.0)
    )
    _, info = jax.jit(Chain([good, bad, good]).inverse)(jnp.ones((1, 2)))
    assert not info.converged[0]
    assert jnp.isinf(info.error_bound[0])


def test_errors_of_logdets_add_up(x64):
    part = residual(lambda x: 0.5 * jnp.sin(x[:, ::-1]), 0.5, ir.SeriesLogdet(2, num_probes=16))
    x, key = jnp.asarray(np.random.default_rng(0).normal(size=(2, 3))), jax.random.key(0)

    @jax.jit
    def run(x):
        middle, *first = part.forward_and_logdet(x, fold_in(key, 0))
        return (
            Chain([part, part]).forward_and_logdet(x, key),
            first,
            part.forward_and_logdet(middle, fold_in(key, 1)),
        )

    (y, total, info), (first, first_info), (last_y, second, second_info) = run(x)
    np.testing.assert_allclose(y, last_y, rtol=LAYOUT)
    np.testing.assert_allclose(total, first + second, rtol=EXACT)
    np.testing.assert_allclose(
        info.stderr, np.hypot(first_info.stderr, second_info.stderr), rtol=EXACT
    )
    np.testing.assert_allclose(
        info.truncation_bound,
        first_info.truncation_bound + second_info.truncation_bound,
        rtol=EXACT,
    )


def test_a_latent_that_leaves_early_skips_the_later_inverses(x64):
    shrinking_inverse = ActNorm(jnp.zeros(1), jnp.full(1, 2.0))
    identity = Isometry(lambda x: x, lambda y: y)
    split = Multiscale([ir.Stage(identity, factor_out=True), ir.Stage(shrinking_inverse)], (2,))
    jacobian = jax.jit(jax.jacfwd(lambda z: split.inverse(z[None])[0][0]))(jnp.ones(2))
    np.testing.assert_allclose(oracles.operator_norm(jacobian), 1, rtol=EXACT)
    np.testing.assert_allclose(split.inverse_lipschitz, 1, rtol=EXACT)


def test_latents_are_the_parts_in_the_order_in_which_they_leave():
    x = jnp.arange(2 * 16.0).reshape(2, 2, 4, 2)
    bijection = Multiscale(
        [
            ir.Stage(squeeze_bijection(2), factor_out=True),
            ir.Stage(squeeze_bijection(1), factor_out=True),
        ],
        (2, 4, 2),
    )
    squeezed = squeeze_bijection(2).forward(x)  # (2, 1, 2, 8)
    first, rest = squeezed[..., 4:], squeezed[..., :4]
    second, last = rest[..., 2:], rest[..., :2]
    expected = jnp.concatenate([part.reshape(2, -1) for part in (first, second, last)], axis=1)
    np.testing.assert_array_equal(bijection.forward(x), expected)
    np.testing.assert_array_equal(bijection.inverse(expected)[0], x)
