"""Closed forms of ``J`` and ``tr J`` against dense Jacobians, and their use: log-determinants steadier, or exact for less."""

import functools
import math

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from iresnet_jax.branches import branch as branches
from iresnet_jax.branches import closed_form_jacobian
from iresnet_jax.maths.logdet.exact import ExactLogdet
from iresnet_jax.maths.logdet.hutchinson_series import SeriesLogdet, weighted_series
from iresnet_jax.maths.logdet.roulette import RouletteLogdet
from iresnet_jax.models.flow import known_branch

EXACT = 1e-10
BATCH = 3

CASES = {
    "dense": {"in_shape": (5,), "hidden": (7,)},
    "dense, narrow": {"in_shape": (5,), "hidden": (2,), "activation": "clipswish"},
    "dense, preactivation": {"in_shape": (5,), "hidden": (7,), "activation": "clipswish", "preactivation": True},
    "dense, context": {"in_shape": (3,), "hidden": (4,), "activation": "lipswish", "context_dim": 2},
    "conv": {"in_shape": (4, 3, 2), "hidden": (5,), "kernel_sizes": (3, 3), "activation": "tanh"},
    "conv, two channels of one": {
        "in_shape": (4, 3, 2),
        "hidden": (5,),
        "kernel_sizes": (3, 3),
        "activation": "clipswish",
        "positional_bias": True,
    },
    "conv, preactivation": {
        "in_shape": (3, 4, 2),
        "hidden": (4,),
        "kernel_sizes": (3, 3),
        "activation": "clipswish",
        "preactivation": True,
    },
    "conv, circular": {"in_shape": (4, 5, 1), "hidden": (4,), "kernel_sizes": (3, 3), "padding": "CIRCULAR"},
    "conv, larger than the image": {"in_shape": (3, 2, 2), "hidden": (4,), "kernel_sizes": (5, 5)},
    "conv, single taps": {"in_shape": (2, 2, 3), "hidden": (4,), "kernel_sizes": (1, 1)},
}


def make(name):
    spec = FeedforwardSpec(**CASES[name])

    @jax.jit
    def draw(keys):
        weights = spec.initial_weights(keys[0], last_scale=0.3)
        for layer in weights.values():
            layer["bias"] = 0.5 * jax.random.normal(keys[1], layer["bias"].shape)
        context = jax.random.normal(keys[3], (BATCH, spec.context_dim)) if spec.context_dim else None
        return weights, jax.random.normal(keys[2], (BATCH, *spec.in_shape)), context

    return spec, *draw(jax.random.split(jax.random.key(0), 4))


@pytest.mark.parametrize("name", CASES)
def test_all_closed_forms_are_those_of_the_dense_jacobian(x64, name):
    spec, weights, x, context = make(name)
    is_dense = spec.kernel_sizes is None
    assert closed_form_jacobian.has_trace(spec)
    assert closed_form_jacobian.has_jacobian(spec) == is_dense

    def one(weights, x, context):
        context = None if context is None else context[None]
        return spec.apply(weights, x[None], context)[0]

    @jax.jit
    def both(weights, x, context):
        jacobians = jax.vmap(jax.jacfwd(one, 1), (None, 0, 0))(weights, x, context)
        diagonal = (
            closed_form_jacobian.jacobian_diagonal(spec, weights, x, context),
            closed_form_jacobian.largest_diagonal(spec, weights),
        )
        trace = closed_form_jacobian.trace(spec, weights, x, context)
        full = closed_form_jacobian.jacobian(spec, weights, x, context) if is_dense else jacobians
        return jacobians, *diagonal, trace, full

    jacobians, diagonal, largest, trace, full = map(np.asarray, both(weights, x, context))
    jacobians = jacobians.reshape(BATCH, x[0].size, x[0].size)
    np.testing.assert_allclose(full.reshape(jacobians.shape), jacobians, atol=EXACT)
    expected = np.diagonal(jacobians, axis1=1, axis2=2)
    np.testing.assert_allclose(diagonal, expected.reshape(x.shape), atol=EXACT)
    assert np.abs(diagonal).max() <= 1.1 * largest  # slopes may leave [0, 1] a little
    assert np.abs(expected.sum(axis=1)).min() > 1e-3
    np.testing.assert_allclose(trace, expected.sum(axis=1), rtol=EXACT)


@pytest.mark.parametrize("name", ["dense", "conv, two channels of one"])
def test_values_and_gradients_agree_on_average_over_probes(x64, name):
    """With the columns of ``sqrt(d) I`` as probes the mean is the series of traces without noise, first term included."""
    spec, weights, x, _ = make(name)
    basis = math.sqrt(x[0].size) * jnp.eye(x[0].size).reshape(-1, 1, *spec.in_shape)
    probes = jnp.broadcast_to(basis, (len(basis), *x.shape))
    cotangent = jnp.array([1.0, -0.7, 0.4])

    def total(weights, x, *, closed_form):
        branch = functools.partial(spec.apply, weights)
        trace = functools.partial(closed_form_jacobian.trace, spec, weights) if closed_form else None
        samples, _ = weighted_series(branch, x, probes, jnp.ones(5), 5, trace=trace)
        return jnp.sum(cotangent * jnp.mean(samples, axis=0))

    run = jax.jit(jax.value_and_grad(total, (0, 1)), static_argnames="closed_form")
    chex.assert_trees_all_close(run(weights, x, closed_form=True), run(weights, x, closed_form=False), rtol=1e-8, atol=EXACT)


@pytest.mark.parametrize("estimator", [SeriesLogdet(12, num_probes=16), RouletteLogdet(num_exact_terms=12, num_probes=16)])
def test_estimates_are_steadier_and_right(x64, estimator):
    spec, weights, x, _ = make("conv, two channels of one")
    branch, trace = (functools.partial(f, spec, weights) for f in (branches.apply_branch, closed_form_jacobian.trace))

    @jax.jit
    def run(x, key):
        return ExactLogdet()(branch, x)[0], estimator(branch, x, key), estimator(branch, x, key, trace=trace)

    exact, (plain, plain_info), (logdet, info) = run(x, jax.random.key(1))
    assert np.all(info.stderr < 0.5 * plain_info.stderr)
    assert np.all(np.abs(logdet - exact) < 5 * info.stderr + 1e-6)  # what a dozen terms leave out
    assert np.all(np.abs(plain - exact) < 5 * plain_info.stderr)


@pytest.mark.parametrize("name", ["dense, preactivation", "dense, context"])
def test_the_exact_logdet_and_its_gradients_are_the_same_with_it(x64, name):
    spec, weights, x, context = make(name)

    def total(weights, x, *, closed_form):
        branch = Branch(spec, weights, 0.9).given(context)
        logdet, _ = ExactLogdet()(branch.g, x, jacobian=branch.jacobian if closed_form else None)
        return jnp.sum(jnp.array([1.0, -0.7, 0.4]) * logdet)

    run = jax.jit(jax.value_and_grad(total, (0, 1)), static_argnames="closed_form")
    chex.assert_trees_all_close(run(weights, x, closed_form=True), run(weights, x, closed_form=False), rtol=1e-8, atol=EXACT)


def test_other_branches_have_no_closed_form():
    for changes in (
        {"hidden": (4, 4), "kernel_sizes": (3, 1, 3)},
        {"kernel_sizes": (3, 1)},
        {"kernel_sizes": (2, 2)},
        {"activation": "maxmin"},
    ):
        spec = FeedforwardSpec(**{**CASES["conv"], "hidden": (4,), **changes})
        assert not closed_form_jacobian.has_trace(spec)
        weights = jax.jit(lambda key, spec=spec: spec.initial_weights(key))(jax.random.key(0))
        with pytest.raises(ValueError, match="two layers with an elementwise activation"):
            closed_form_jacobian.trace(spec, weights, jnp.ones((1, *spec.in_shape)))
    wide = FeedforwardSpec(in_shape=(closed_form_jacobian.FULL_DIMS + 1,), hidden=(4,))
    assert closed_form_jacobian.has_trace(wide)
    for spec in (wide, FeedforwardSpec(**CASES["conv"])):
        assert not closed_form_jacobian.has_jacobian(spec)
        weights = spec.initial_weights(jax.random.key(0))
        assert Branch(spec, weights, 0.9).jacobian is None
        with pytest.raises(ValueError, match="dense branches of two layers"):
            closed_form_jacobian.jacobian(spec, weights, jnp.ones((1, *spec.in_shape)))


@pytest.mark.parametrize(("side", "taps"), [(2, 3), (1, 3), (4, 5)])
def test_on_a_torus_smaller_than_the_kernel_there_is_no_closed_form_and_none_is_used(side, taps):
    shape = {"in_shape": (side, side, 1), "hidden": (4,), "kernel_sizes": (taps, taps), "padding": "CIRCULAR"}
    spec = FeedforwardSpec(**shape)
    weights = jax.jit(lambda key: spec.initial_weights(key))(jax.random.key(0))
    assert not closed_form_jacobian.has_trace(spec)
    with pytest.raises(ValueError, match="the trace has a closed form for two layers"):
        closed_form_jacobian.trace(spec, weights, jnp.ones((1, side, side, 1)))
    assert Branch(spec, weights, 0.9).trace is None
    assert closed_form_jacobian.has_trace(FeedforwardSpec(**shape | {"in_shape": (taps, taps, 1)}))
