"""Losses against an energy: their values in closed form, and their gradients."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import iresnet_jax as ir

KEY = jax.random.key(0)


def target(x):
    """Normal, with mean 1 and standard deviation 2 in both entries."""
    return -0.5 * jnp.sum(jnp.square((x - 1) / 2), axis=1)


@functools.cache
def model(prior="gaussian"):
    x = np.random.default_rng(0).normal(size=(256, 2)).astype(np.float32)
    components = 2 if prior == "mixture" else None
    stages = [ir.StageSpec(1, (8,), activation="clipswish")]
    made = ir.Density.init(
        KEY, x, stages=stages, prior=prior, num_components=components, last_scale=0.1
    )
    return made.with_(unroll=True)  # compiles sooner


@functools.cache
def gradient_of(loss):
    """The gradient by the parameters, of the target or of the model as target."""
    own = model("mixture")

    @jax.jit
    def at(free, is_own, key):
        value = loss(lambda x: jnp.where(is_own, own.log_prob(x), target(x)))
        return jax.grad(lambda params: value(free.constrain(params)[0], None, key))(free.params)

    return functools.partial(at, ir.Free.of(own))


def gradient(loss, keys, *, is_own=False):
    """Mean gradient by the parameters, and its standard error."""
    leaves = [jax.tree.leaves(gradient_of(loss)(is_own, key)) for key in keys]
    rows = [np.concatenate([np.ravel(leaf) for leaf in own]) for own in leaves]
    return np.mean(rows, axis=0), np.std(rows, axis=0, ddof=1) / math.sqrt(len(rows))


def without_score(log_density):
    """The loss of the library, whose gradients leave out the score of the model."""
    return ir.losses.reverse_kl(log_density, 200)


def with_score(log_density):
    """The same divergence with its whole gradient, the weights of components by the score alone."""

    def loss(model, batch, key):
        x = jax.lax.stop_gradient(model.sample_and_log_prob(key, 200).x)
        log_prob = model.log_prob(x)
        differences = jax.lax.stop_gradient(log_prob - log_density(x))
        return jnp.mean((differences - jnp.mean(differences)) * log_prob) * 200 / 199

    return loss


def test_reverse_kl_is_the_divergence():
    drawn = jax.jit(ir.Density.sample_and_log_prob, static_argnums=2)(
        model(), jax.random.key(7), 4000
    )
    value = jax.jit(ir.losses.reverse_kl(target, 4000))(model(), None, KEY)
    differences = np.asarray(drawn.log_prob - target(drawn.x), np.float64)
    assert float(value) == pytest.approx(
        differences.mean(), abs=6 * float(differences.std()) / math.sqrt(4000)
    )


def test_the_gradient_has_the_mean_of_the_score_function_s():
    keys = jax.random.split(KEY, 40)
    (path, path_error), (full, full_error) = (
        gradient(loss, keys) for loss in (without_score, with_score)
    )
    assert np.linalg.norm(path) > 5 * np.linalg.norm(path_error)
    assert np.all(np.abs(path - full) < 5 * np.hypot(path_error, full_error) + 1e-5)


def test_the_gradient_vanishes_at_the_target():
    (path, _), (full, _) = (
        gradient(loss, jax.random.split(KEY, 2), is_own=True)
        for loss in (without_score, with_score)
    )
    assert np.abs(path).max() < 1e-3 * max(np.abs(full).max(), 1e-2)


def test_symmetric_kl_adds_the_likelihood():
    x = jnp.asarray(np.random.default_rng(1).normal(size=(64, 2)), jnp.float32)
    value, metrics = jax.jit(ir.losses.symmetric_kl(target, 16))(model(), x, KEY)
    assert float(metrics["forward"]) == pytest.approx(-float(model().log_prob(x).mean()), abs=1e-5)
    assert float(value) == pytest.approx(float(metrics["forward"] + metrics["reverse"]), abs=1e-5)
