"""Ranks of the truth among samples: uniform for the true posterior, refused for wrong ones."""

import functools
import math

import jax
import jax.numpy as jnp
import kept
import numpy as np
import pytest

import iresnet_jax as ir
from iresnet_jax.evaluation import calibration
from iresnet_jax.models.contractions import freeze
from iresnet_jax.models.priors import Gaussian
from iresnet_jax.runs.config import EvaluationConfig

SETTINGS = EvaluationConfig(batch_size=2000)
NUM, SAMPLES = 400, 49


DIMS, DEVIATION = 10, math.sqrt(0.1)  # task T.1 of the SBI benchmark (Lueckmann et al. 2021)
LINEAR_FLOW = ir.FlowSpec((DIMS,), (ir.StageSpec(1, hidden=(2,)),), context_dim=DIMS)


def linear_gaussian_pairs(num):
    """Parameters ``theta ~ N(0, .1 I)`` and observations ``x ~ N(theta, .1 I)``."""
    prior, noise = DEVIATION * np.random.default_rng(0).normal(size=(2, num, DIMS)).astype(
        np.float32
    )
    return prior, prior + noise


@functools.cache
def zero_weights():
    """Frozen weights of that flow, all zero."""
    shapes = jax.eval_shape(
        lambda params: freeze(LINEAR_FLOW, params), kept.random_params(LINEAR_FLOW)
    )
    return jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), shapes)


def linear_gaussian_model(shift=0.0, scale=1.0):
    """The posterior ``N(x / 2, .05 I)`` as one block ``z = theta - x / 2`` and a prior."""
    weights = jax.tree.map(jnp.asarray, zero_weights())
    weights["stage0"].branch.weights["dense1"]["context"] = -0.5 * jnp.eye(DIMS)[None]
    prior = Gaussian(jnp.full((DIMS,), shift), jnp.full((DIMS,), math.log(scale * math.sqrt(0.05))))
    return ir.Density(ir.DensitySpec(LINEAR_FLOW), weights, prior)


@functools.cache
def calibrated(**wrong):
    theta, x = linear_gaussian_pairs(NUM)
    return calibration.calibrate(linear_gaussian_model(**wrong), theta, x, SAMPLES, SETTINGS)


def test_the_true_posterior_is_not_refused():
    found = calibrated()
    assert found.p_value > 0.01
    assert [test.name for test in found.tests] == [*(f"entry {i}" for i in range(10)), "log p"]
    low, high = found.band()
    for test in found.tests:
        assert sum(test.counts) == NUM
        assert abs(test.mean_rank - 0.5) < 5 / np.sqrt(12 * NUM)
    bars = np.concatenate([test.counts for test in found.tests])
    assert np.mean((bars >= low) & (bars <= high)) > 0.95
    assert found.warnings() == []


@pytest.mark.parametrize("wrong", [{"shift": 0.1}, {"scale": 1.5}, {"scale": 0.7}], ids=str)
def test_a_wrong_posterior_is_refused(wrong):
    found = calibrated(**wrong)
    assert not found.is_calibrated
    if "shift" in wrong:  # samples are too high
        assert found.tests[0].mean_rank < 0.45
    else:  # too wide are hills, too narrow are valleys
        ends = np.mean([test.counts[0] + test.counts[-1] for test in found.tests[:-1]]) / 2
        assert (ends < NUM / 20) == (wrong["scale"] > 1)
    assert "not calibrated" in str(found)


def test_p_values_of_uniform_ranks_are_small_as_rarely_as_they_say():
    """Twice the smaller of two: between half of the level and the level."""
    generator = np.random.default_rng(0)
    tests = [
        calibration.rank_test("", generator.integers(0, SAMPLES + 1, 300), SAMPLES, generator)
        for _ in range(400)
    ]
    for level in (0.05, 0.2, 0.5):
        found = np.mean([test.p_value < level for test in tests])
        low, high = (
            bound + side * 4 * np.sqrt(bound * (1 - bound) / 400)
            for bound, side in ((level / 2, -1), (level, 1))
        )
        assert low < found < high
