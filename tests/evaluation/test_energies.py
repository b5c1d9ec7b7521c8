"""Normalising constants by the weights of a model: known ones, heavy tails, and the bias of random log-determinants."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import iresnet_jax as ir
from iresnet_jax import energy_fitting
from iresnet_jax.models.history import History

KEY = jax.random.key(0)
LOG_Z = 3 * 0.5 * math.log(2 * math.pi * 1.44)


def target(x, std=1.2):
    return -0.5 * jnp.sum(jnp.square(x / std), axis=1)


@functools.cache
def model():
    x = np.random.default_rng(0).normal(size=(512, 3)).astype(np.float32)
    return ir.Density.init(KEY, x, stages=[ir.StageSpec(3, (16,), activation="clipswish")], last_scale=0.3)


def wide():
    """The model with a prior that is twice as wide, whose weights have light tails."""
    return model().with_(prior={"mean": jnp.zeros(3), "log_std": jnp.full(3, math.log(1.6))})


def narrow():
    """The model with a prior that is far too narrow."""
    return model().with_(prior={"mean": jnp.zeros(3), "log_std": jnp.full(3, math.log(0.3))})


def test_the_normalising_constant_of_a_gaussian():
    found = ir.evaluate_energy(wide(), target, KEY, 4000, samples=1.2 * jax.random.normal(jax.random.key(5), (2000, 3)))
    assert found.log_z == pytest.approx(LOG_Z, abs=4 * found.stderr)
    assert found.stderr < 0.05
    assert 0.2 < found.ess < 1
    assert found.upper is not None
    assert found.lower < LOG_Z < found.upper
    assert "light enough" in str(found)


def test_a_heavy_tail_has_no_number():
    found = ir.evaluate_energy(narrow(), target, KEY, 2000)
    assert math.isnan(found.log_z)
    assert found.pareto_k > 0.7
    assert "heavy tail" in str(found)


def test_one_probe_makes_the_constant_too_large():
    exact = ir.evaluate_energy(wide(), target, KEY, 4000)
    noisy = ir.evaluate_energy(
        wide(), target, KEY, 4000, estimator=ir.SeriesLogdet(num_terms=30, num_probes=1, exact_trace=False)
    )
    variance = np.var(noisy.log_weights - exact.log_weights)  # of the same samples
    assert variance > 0.01
    assert noisy.log_z - exact.log_z == pytest.approx(variance / 2, rel=0.5)


def test_an_energy_that_is_infinite_is_counted():
    with pytest.raises(ValueError, match=r"infinite at \d+ of 1000 samples of the model"):
        ir.evaluate_energy(wide(), lambda x: jnp.where(x[:, 0] > 0, target(x), jnp.nan), KEY, 1000)


def test_a_wrong_shape_is_refused():
    with pytest.raises(ValueError, match=r"shape \(1000, 3\)"):
        ir.evaluate_energy(wide(), lambda x: x, KEY, 1000)


def test_a_training_that_is_stopped_is_the_last_of_fit_energy(monkeypatch):
    calls = []

    def stopped(model, *_, **options):
        calls.append(options)
        return model.with_(history=History({}, {}, 0, ended="it was stopped"))  # before anything was logged

    monkeypatch.setattr(energy_fitting, "train", stopped)
    monkeypatch.setattr(energy_fitting, "particles", lambda *_, **__: np.ones((1, 1000, 3), np.float32))
    monkeypatch.setattr(energy_fitting, "_start", lambda *_: wide())
    fitted = ir.fit_energy(target, 3, key=KEY, steps=6, progress=False)
    assert len(calls) == len(fitted.history.attempts) == 1


def test_fit_energy_finds_both_modes(monkeypatch):
    monkeypatch.setattr(energy_fitting, "COMPONENTS", (1, 2))

    def two_modes(x):
        return jnp.logaddexp(target(x - 4.0, 0.5), target(x + 4.0, 0.5))

    options = {"scale": 4.0, "steps": 2, "num_particles": 1000, "stages": [ir.StageSpec(1, (8,))], "progress": False}
    fitted = ir.fit_energy(two_modes, 3, key=KEY, **options)
    found = ir.evaluate_energy(fitted, two_modes, jax.random.key(1), 1000)
    log_z = math.log(2) + 3 * 0.5 * math.log(2 * math.pi * 0.25)
    assert found.log_z == pytest.approx(log_z, abs=4 * found.stderr)
    assert found.ess > 0.5
    assert fitted.certificate().certified
