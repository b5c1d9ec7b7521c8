"""Exact log-determinants of branches with few numbers in their Jacobian, against dense determinants in float64."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from iresnet_jax.branches import structured_logdet
from iresnet_jax.branches.feedforward import FeedforwardSpec, apply_branch, initial_weights
from iresnet_jax.maths.logdet import banded
from iresnet_jax.maths.logdet.exact import ExactLogdet
from iresnet_jax.models.flow import known_branch

EXACT = 1e-10  # same maths by another route, float64
BATCH, NORM = 3, 0.98

CASES = {
    "two convolutions": {"in_shape": (7, 8, 2), "hidden": (3,), "kernel_sizes": (3, 3)},
    "preactivation, two channels of one": {
        "in_shape": (7, 6, 2),
        "hidden": (3,),
        "kernel_sizes": (3, 3),
        "activation": "clipswish",
        "preactivation": True,
    },
    "three convolutions": {"in_shape": (6, 9, 1), "hidden": (3, 2), "kernel_sizes": (3, 1, 3), "activation": "clipswish"},
    "channels that an activation mixes": {
        "in_shape": (7, 6, 1),
        "hidden": (4,),
        "kernel_sizes": (3, 3),
        "activation": "maxmin",
    },
    "kernels of two sizes": {"in_shape": (9, 8, 1), "hidden": (3,), "kernel_sizes": (5, 3), "activation": "tanh"},
    "even kernels": {"in_shape": (7, 8, 1), "hidden": (3,), "kernel_sizes": (2, 2)},
    "lower than the reach": {"in_shape": (2, 9, 1), "hidden": (3,), "kernel_sizes": (3, 3)},
    "single taps": {"in_shape": (3, 2, 2), "hidden": (3,), "kernel_sizes": (1, 1)},
    "dense, narrow": {"in_shape": (7,), "hidden": (3,), "activation": "clipswish"},
    "dense, narrow, preactivation": {"in_shape": (7,), "hidden": (3,), "activation": "clipswish", "preactivation": True},
    "context": {"in_shape": (6, 7, 1), "hidden": (3,), "kernel_sizes": (3, 3), "context_dim": 2},
}
NONE = {
    "a torus": {"in_shape": (8, 8, 1), "hidden": (3,), "kernel_sizes": (3, 3), "padding": "CIRCULAR"},
    "an image within reach": {"in_shape": (4, 5, 2), "hidden": (3,), "kernel_sizes": (3, 3)},
    "dense, wide": {"in_shape": (3,), "hidden": (3,)},
    "dense, two hidden layers": {"in_shape": (7,), "hidden": (3, 3)},
}


@functools.partial(jax.jit, static_argnums=0)
def dense_jacobian(spec, weights, x, context):
    def at(x, context):
        return spec.apply(weights, x[None], None if context is None else context[None])[0]

    jacobian = jax.vmap(jax.jacfwd(at), in_axes=(0, None if context is None else 0))(x, context)
    return jacobian.reshape(len(x), math.prod(spec.in_shape), -1)


def dense_logdet(spec, weights, x, context):
    jacobian = np.asarray(dense_jacobian(spec, weights, x, context))
    return np.linalg.slogdet(np.eye(math.prod(spec.in_shape)) + jacobian)[1]


@functools.partial(jax.jit, static_argnums=0)
def random_case(spec):
    """Weights, inputs and contexts."""
    x = jax.random.normal(jax.random.key(1), (BATCH, *spec.in_shape))
    context = jax.random.normal(jax.random.key(2), (BATCH, spec.context_dim)) if spec.context_dim else None
    return spec.initial_weights(jax.random.key(0)), x, context


def of_norm(spec):
    """`random_case` with the last layer scaled such that the largest norm of the Jacobian is `NORM`."""
    weights, x, context = random_case(spec)
    last = spec.layers[-1].name
    norms = np.linalg.norm(dense_jacobian(spec, weights, x, context), 2, axis=(1, 2))
    weights[last] = {**weights[last], "kernel": jnp.asarray(np.asarray(weights[last]["kernel"]) * (NORM / norms.max()))}
    return weights, x, context


@pytest.mark.parametrize("name", CASES)
def test_it_is_the_determinant_of_the_dense_jacobian(name):
    with jax.enable_x64(True):
        spec = FeedforwardSpec(**CASES[name])
        weights, x, context = of_norm(spec)
        expected = dense_logdet(spec, weights, x, context)
        branch = Branch(spec, weights, 1.0).given(context)
        found = jax.jit(lambda x: structured_logdet.logdet(spec, weights, x, context))(x)
        np.testing.assert_allclose(found, expected, rtol=EXACT, atol=EXACT)
        if branch.jacobian is None:
            estimate, info = jax.jit(lambda x: ExactLogdet()(branch.g, x, logdet=branch.logdet))(x)
            np.testing.assert_allclose(estimate, expected, rtol=EXACT, atol=EXACT)
            assert not np.any(info.stderr)
        assert 0 < structured_logdet.cost(spec)


@pytest.mark.parametrize("name", NONE)
def test_other_branches_have_none(name):
    spec = FeedforwardSpec(**NONE[name])
    assert known_branch(spec, spec.initial_weights(jax.random.key(0)), 1.0).logdet is None
    assert structured_logdet.cost(spec) > math.prod(spec.in_shape)
    with pytest.raises(ValueError, match="no shorter way"):
        structured_logdet.logdet(spec, {}, jnp.zeros((1, *spec.in_shape)))


def test_a_stencil_that_is_too_small_is_rejected():
    with jax.enable_x64(True):
        spec = FeedforwardSpec(**CASES["two convolutions"])
        weights, x, _ = of_norm(spec)
        expected = dense_logdet(spec, weights, x, None)

        def by_products(x, reach):
            return banded.stencil_logdet(banded.stencil_by_products(lambda x: spec.apply(weights, x), x, reach))

        found = {reach: jax.jit(by_products, static_argnums=1)(x, reach) for reach in (1, 2)}
        np.testing.assert_allclose(found[2], expected, rtol=EXACT)
        assert np.abs(found[1] - expected).max() > 1e-3


def test_groups_of_examples_and_gradients_are_those_of_the_whole(monkeypatch):
    with jax.enable_x64(True):
        spec = FeedforwardSpec(**CASES["two convolutions"])
        weights, x, _ = of_norm(spec)

        def total(x):
            return jnp.sum(structured_logdet.logdet(spec, weights, x))

        def dense(x):
            jacobian = jax.vmap(jax.jacfwd(lambda x: spec.apply(weights, x[None])[0]))(x)
            return jnp.sum(jnp.linalg.slogdet(jnp.eye(112)[None] + jacobian.reshape(BATCH, 112, 112))[1])

        expected, of_dense = jax.jit(jax.value_and_grad(dense))(x)
        np.testing.assert_allclose(jax.jit(jax.grad(total))(x), of_dense, rtol=1e-8, atol=1e-8)
        monkeypatch.setattr(banded, "MOST_ENTRIES", 1)
        np.testing.assert_allclose(jax.jit(total)(x), expected, rtol=EXACT)


@pytest.mark.parametrize("sign", [1, -1])
def test_elimination_by_halves_is_stable_for_contractions(sign):
    num_dims = 100
    rotation = np.linalg.qr(np.random.default_rng(0).normal(size=(2, num_dims, num_dims)))[0]
    matrices = np.eye(num_dims) + sign * NORM * rotation
    logdet, inverse = banded.logdet_and_inverse(jnp.asarray(matrices, jnp.float32))
    np.testing.assert_allclose(logdet, np.linalg.slogdet(matrices)[1], atol=1e-3)
    np.testing.assert_allclose(inverse @ matrices, np.broadcast_to(np.eye(num_dims), matrices.shape), atol=1e-3)
