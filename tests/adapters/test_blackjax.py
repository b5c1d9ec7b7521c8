"""NUTS of BlackJAX on the log-density of a model."""

import jax
import jax.numpy as jnp
import kept
import moments
import pytest

import iresnet_jax as ir


@pytest.fixture
def blackjax():
    """Imported by the one process that runs this file, and not by all, which collect it."""
    return pytest.importorskip("blackjax", reason="BlackJAX is not installed")


def test_nuts_and_the_model_s_own_samples_have_the_same_moments(blackjax):
    model = kept.model(kept.POINTS)
    log_density = ir.adapters.to_blackjax(model)

    @jax.jit
    def run(key):
        key_start, key_adapt, key_run = jax.random.split(key, 3)
        warmup = blackjax.window_adaptation(blackjax.nuts, log_density)
        (state, parameters), _ = warmup.run(key_adapt, jax.random.normal(key_start, (2,)), num_steps=300)
        nuts = blackjax.nuts(log_density, **parameters)

        def step(state, key):
            state, info = nuts.step(key, state)
            return state, (state.position, info.is_divergent)

        return jax.lax.scan(step, state, jax.random.split(key_run, 2000))[1]

    draws, is_divergent = run(jax.random.key(0))
    assert jnp.mean(is_divergent) < 0.01
    samples, info = model.sample(jax.random.key(1), 4000)
    assert info.converged.all()
    moments.assert_agree(draws, samples)
