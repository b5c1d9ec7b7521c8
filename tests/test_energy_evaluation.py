"""Normalising constants by the weights of a model: known ones, tails of known shape, lost modes."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import iresnet_jax as ir
from iresnet_jax.energies import weigh
from iresnet_jax.models.priors import Gaussian

KEY = jax.random.key(0)
LOG_Z = 3 * 0.5 * math.log(2 * math.pi * 1.44)


def target(x, std=1.2):
    return -0.5 * jnp.sum(jnp.square(x / std), axis=1)


@functools.cache
def model():
    x = np.random.default_rng(0).normal(size=(512, 3)).astype(np.float32)
    return ir.Density.init(
        KEY, x, stages=[ir.StageSpec(3, (16,), activation="clipswish")], last_scale=0.3
    )


def with_scale(scale):
    """The model with a normal prior of this standard deviation."""
    return model().with_(prior=Gaussian(jnp.zeros(3), jnp.full(3, math.log(scale))))


def test_the_normalising_constant_of_a_gaussian():
    samples = 1.2 * jax.random.normal(jax.random.key(5), (2000, 3))
    found = ir.evaluate_energy(with_scale(1.6), target, KEY, 4000, samples=samples)
    assert found.log_z == pytest.approx(LOG_Z, abs=4 * found.stderr)
    assert found.stderr < 0.05
    assert 0.2 < found.ess < 1
    assert found.lower < LOG_Z < found.upper
    assert found.lost < 0.01
    assert "light enough" in str(found)
    assert "at least" not in str(found)  # a bound far from the number that stands above it


def test_modes_that_samples_of_the_target_show_are_missing():
    """No sample of the model finds the second mode: its weights alone look perfect."""

    def two_modes(x):
        return jnp.logaddexp(target(x), target(x - 30.0))

    samples = np.random.default_rng(0).normal(0, 1.2, (1000, 3)).astype(np.float32)
    samples[::2] += 30
    blind = ir.evaluate_energy(with_scale(1.6), two_modes, KEY, 4000)
    assert blind.log_z == pytest.approx(LOG_Z, abs=0.05)
    found = ir.evaluate_energy(with_scale(1.6), two_modes, KEY, 4000, samples=samples)
    assert found.lost == pytest.approx(0.5, abs=0.01)
    assert math.isnan(found.log_z)
    assert found.lower < LOG_Z + math.log(2) < found.upper
    assert str(found).startswith("The model has lost modes: 50.0% of the target's samples")
    assert "log Z is at least" in str(found)


@pytest.mark.parametrize("shape", [0.4, 0.6, 1.0])
def test_the_tail_of_pareto_weights_has_their_shape_and_no_mean_is_given_of_a_heavy_one(shape):
    # P(w > t) = t^(-1 / k): the tail is generalised Pareto with shape k above any threshold, and E
    # w = 1 / (1 - k)
    found = [
        weigh(-shape * np.log(np.random.default_rng(seed).uniform(size=10_000)))
        for seed in range(50)
    ]
    assert np.mean([one.pareto_k for one in found]) == pytest.approx(shape, abs=0.03)
    if shape < 0.7:
        errors = [(one.log_z + math.log(1 - shape)) / one.stderr for one in found]
        assert np.mean(np.abs(errors) < 3) > 0.85
    else:
        assert all(one.pareto_k > one.threshold for one in found)


def test_the_constant_and_its_error_of_weights_with_known_moments():
    """``q = N(0, 1)`` and ``p = exp(-x^2 / 2.4)``: ``w = c exp(a x^2)``."""
    x = np.random.default_rng(0).normal(size=50_000)
    found = weigh(-(x**2) / 2.4 + 0.5 * x**2 + 0.5 * math.log(2 * math.pi))
    a = 0.5 - 1 / 2.4
    mean, square = (1 - 2 * a) ** -0.5, (1 - 4 * a) ** -0.5  # of exp(a x^2) and of its square
    assert found.pareto_k < found.threshold
    assert abs(found.log_z - 0.5 * math.log(2.4 * math.pi)) < 4 * found.stderr
    assert found.ess == pytest.approx(mean**2 / square, abs=0.005)
    assert found.stderr == pytest.approx(math.sqrt((square / mean**2 - 1) / len(x)), rel=0.3)


def test_equal_weights_are_exact():
    found = weigh(np.full(1000, 700.0))
    assert found.ess == pytest.approx(1)
    assert found.log_z == pytest.approx(700, abs=1e-12)
    assert found.stderr < 1e-6
    assert found.pareto_k < 0.5
