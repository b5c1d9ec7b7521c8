"""Closed forms of feed-forward branches against dense Jacobians in float64."""

import functools
import math

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from iresnet_jax.branches.branch import Branch
from iresnet_jax.branches.feedforward import FULL_DIMS, FeedforwardSpec
from iresnet_jax.branches.sandwich import SandwichSpec
from iresnet_jax.maths import logdet_exact as banded
from iresnet_jax.maths.logdet_exact import ExactLogdet

EXACT = 1e-10  # same maths by another route, float64
BATCH, NORM = 3, 0.98


def dense(*shape, **settings):
    return FeedforwardSpec(shape[:1], shape[1:], **settings)


def conv(in_shape, hidden, kernel_sizes=(3, 3), **settings):
    return FeedforwardSpec(in_shape, hidden, kernel_sizes, **settings)


CLIPPED = {"activation": "clipswish", "preactivation": True}
TRACE = {
    "dense, narrow": dense(7, 3, activation="clipswish"),
    "dense, preactivation": dense(5, 7, **CLIPPED),
    "dense, narrow, preactivation": dense(7, 3, **CLIPPED),
    "dense, context": dense(3, 4, activation="lipswish", context_dim=2),
    "conv": conv((7, 8, 2), (3,), activation="tanh"),
    "conv, preactivation, two channels of one": conv(
        (7, 6, 2), (3,), positional_bias=True, **CLIPPED
    ),
    "conv, context": conv((6, 7, 1), (3,), context_dim=2),
    "conv, circular": conv((4, 5, 1), (4,), padding="CIRCULAR"),
    "conv, larger than the image": conv((3, 2, 2), (4,), (5, 5)),
    "conv, lower than the reach": conv((2, 9, 1), (3,)),
    "conv, within reach of every pixel": conv((4, 3, 3), (4,), activation="tanh"),
}
LOGDET_ALONE = {
    "three convolutions": conv((6, 9, 1), (3, 2), (3, 1, 3), activation="clipswish"),
    "channels that an activation mixes": conv((7, 6, 1), (4,), activation="maxmin"),
    "kernels of two sizes": conv((9, 8, 1), (3,), (5, 3), activation="tanh"),
    "two sandwich layers": SandwichSpec((8, 11, 1), (3, 2), (3, 1, 3), activation="tanh"),
    "even kernels": conv((7, 8, 1), (3,), (2, 2)),
}
NOTHING = {
    "two hidden layers": dense(7, 3, 3),
    "a torus smaller than the kernel": conv((2, 2, 1), (4,), padding="CIRCULAR"),
    "three convolutions within reach": conv((4, 5, 2), (3, 3), (3, 1, 3)),
}


@functools.partial(jax.jit, static_argnums=0)
def dense_jacobian(spec, weights, x, context):
    def at(x, context):
        return spec.apply(weights, x[None], None if context is None else context[None])[0]

    jacobian = jax.vmap(jax.jacfwd(at), in_axes=(0, None if context is None else 0))(x, context)
    return jacobian.reshape(len(x), math.prod(spec.in_shape), -1)


def draw(spec):
    """Drawn by NumPy: JAX would compile a program for each shape."""
    rng = np.random.default_rng(0)
    shapes = jax.eval_shape(spec.initial_weights, jax.random.key(0))
    weights = jax.tree.map(lambda leaf: jnp.asarray(0.5 * rng.normal(size=leaf.shape)), shapes)
    context = jnp.asarray(rng.normal(size=(BATCH, spec.context_dim))) if spec.context_dim else None
    return weights, jnp.asarray(rng.normal(size=(BATCH, *spec.in_shape))), context


def make(spec):
    """Weights with Jacobians of a norm of at most `NORM`, inputs, contexts, and these Jacobians."""
    weights, x, context = draw(spec)
    factor = NORM / np.linalg.norm(dense_jacobian(spec, weights, x, context), 2, axis=(1, 2)).max()
    last = spec.layers[-1].name
    weights = {**weights, last: {**weights[last], "kernel": factor * weights[last]["kernel"]}}
    return weights, x, context, np.asarray(dense_jacobian(spec, weights, x, context))


@pytest.mark.parametrize("name", ["dense, narrow", "conv, context"])
def test_log_determinants_of_the_smallest_batches(x64, name):
    weights, x, context, jacobians = make(spec := TRACE[name])
    expected = np.linalg.slogdet(np.eye(x[0].size) + jacobians)[1]
    for num in (0, 1):
        found = jax.jit(spec.logdet)(weights, x[:num], None if context is None else context[:num])
        np.testing.assert_allclose(found, expected[:num], rtol=EXACT, atol=EXACT)


@pytest.mark.parametrize(
    "spec", [*TRACE.values(), *LOGDET_ALONE.values()], ids=[*TRACE, *LOGDET_ALONE]
)
def test_what_a_branch_knows_is_that_of_its_dense_jacobian(x64, spec):
    weights, x, context, jacobians = make(spec)
    assert ("trace" in spec.knows) == (spec in TRACE.values())
    if spec is TRACE["conv, within reach of every pixel"]:
        # its stencil takes fewer operations than products with unit vectors
        assert "logdet" in spec.knows
    expected = {
        "trace": np.trace(jacobians, axis1=1, axis2=2),
        "jacobian": jacobians,
        "logdet": np.linalg.slogdet(np.eye(x[0].size) + jacobians)[1],
    }
    # small Jacobians are faster than a narrow branch's own log-determinant, which large ones take
    is_narrow = spec.kernel_sizes is None and spec.hidden[0] < spec.in_shape[0]
    names = sorted(spec.knows | ({"logdet"} if is_narrow else set()))

    @jax.jit
    def known_and_exact(weights, x):
        own = Branch(spec, weights, 1.0).given(context)
        exact = ExactLogdet()(own, x, jacobian=own.jacobian, logdet=own.logdet)
        return {name: getattr(spec, name)(weights, x, context) for name in names}, exact

    found, (exact, info) = known_and_exact(weights, x)
    assert found
    for name, value in found.items():
        np.testing.assert_allclose(value, expected[name], rtol=EXACT, atol=EXACT)
    np.testing.assert_allclose(exact, expected["logdet"], rtol=EXACT, atol=EXACT)
    assert not np.any(info.stderr)


@pytest.mark.parametrize("name", ["dense, preactivation", "conv"])
def test_gradients_are_those_of_dense_jacobians(x64, name):
    weights, x, _, _ = make(spec := TRACE[name])
    known = next(name for name in ("jacobian", "logdet") if name in spec.knows)

    def total(weights, x, *, closed_form):
        if not closed_form:
            matrices = jnp.eye(x[0].size)[None] + dense_jacobian(spec, weights, x, None)
            return jnp.sum(jnp.array([1.0, -0.7, 0.4]) * jnp.linalg.slogdet(matrices)[1])
        own = Branch(spec, weights, 1.0)
        logdet, _ = ExactLogdet()(own, x, **{known: getattr(own, known)})
        return jnp.sum(jnp.array([1.0, -0.7, 0.4]) * logdet)

    run = jax.jit(jax.value_and_grad(total, (0, 1)), static_argnames="closed_form")
    chex.assert_trees_all_close(
        run(weights, x, closed_form=True), run(weights, x, closed_form=False), rtol=1e-8, atol=EXACT
    )


def test_other_branches_know_nothing():
    assert not any(spec.knows for spec in NOTHING.values())
    assert dense(FULL_DIMS + 1, FULL_DIMS + 2).knows == {"trace"}


def test_a_stencil_that_is_too_small_is_rejected(x64, monkeypatch):
    weights, x, _, jacobians = make(spec := TRACE["conv"])
    expected = np.linalg.slogdet(np.eye(x[0].size) + jacobians)[1]

    def by_products(x, reach):
        return banded.stencil_logdet(
            banded.stencil_by_products(functools.partial(spec.apply, weights), x, reach)
        )

    found = {reach: jax.jit(by_products, static_argnums=1)(x, reach) for reach in (1, 2)}
    np.testing.assert_allclose(found[2], expected, rtol=EXACT)
    assert np.abs(found[1] - expected).max() > 1e-3
    monkeypatch.setattr(banded, "MOST_ENTRIES", 1)  # examples one after the other
    np.testing.assert_allclose(
        jax.jit(functools.partial(spec.logdet, weights))(x), expected, rtol=EXACT
    )
