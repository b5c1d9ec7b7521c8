"""Log-likelihoods to a stated accuracy against those of dense Jacobians in float64."""

import dataclasses
import functools
import math

import kept
import numpy as np
import pytest

from iresnet_jax.branches.feedforward import FeedforwardSpec
from iresnet_jax.evaluation import likelihood, probes, stated_accuracy
from iresnet_jax.evaluation.likelihood import SUSPICIOUS_Z
from iresnet_jax.runs.config import parse

TARGET, NUM, SEED = 0.004, 48, 3  # bits/dim of 16 dimensions
BITS = 16 * math.log(2)


@functools.cache
def model_at(lipschitz):
    flow = dataclasses.replace(kept.IMAGES.flow, coeff=lipschitz, budget="block")
    return kept.model(dataclasses.replace(kept.IMAGES, flow=flow))


@functools.cache
def by_hand(lipschitz):
    return kept.dense_bits(model_at(lipschitz), kept.images(NUM)[0], SEED, 0)


@pytest.fixture
def exact_is_dear(monkeypatch):
    monkeypatch.setattr(FeedforwardSpec, "logdet_cost", 1e9)


def bits_of(lipschitz, **settings):
    settings = {"batch_size": 16, **settings}
    found, accuracy = stated_accuracy.log_prob(model_at(lipschitz), kept.images(NUM)[0], TARGET, SEED, **settings)
    return -found / BITS, accuracy


@pytest.mark.parametrize("lipschitz", [0.9, 0.98])
@pytest.mark.usefixtures("exact_is_dear")
def test_estimates_are_as_accurate_as_stated(lipschitz):
    bits, accuracy = bits_of(lipschitz)
    error = np.sqrt(np.mean((bits[:, 0] - by_hand(lipschitz)) ** 2))
    assert accuracy.met
    assert accuracy.bias <= accuracy.bias_bound
    assert error <= TARGET
    assert accuracy.stderr / 2 < error  # no more probes than it takes
    assert "probes of" in accuracy.plan[0]


def test_what_is_cheaper_exactly_is_exact():
    bits, accuracy = bits_of(0.9)
    np.testing.assert_allclose(bits[:, 0], by_hand(0.9), rtol=1e-5)
    assert accuracy.bias == accuracy.stderr == accuracy.bias_bound == 0
    assert accuracy.met
    assert accuracy.plan == ("stage0: blocks 2 exact",)
    (stage,) = model_at(0.9).spec.flow.layout
    assert accuracy.products == pytest.approx(2 * stage.branch.logdet_cost)


@pytest.mark.usefixtures("exact_is_dear")
def test_rounds_of_probes_meet_what_the_plan_misses_and_run_the_program_they_have(monkeypatch):
    traced, rounds = [], []
    forms, add = stated_accuracy.nested_quadratic_forms, stated_accuracy._Evaluation.add

    def counted(branch, x, probes, sizes, **known):
        traced.append((x.shape, sizes))
        return forms(branch, x, probes, sizes, **known)

    def counted_add(self, *arguments, **settings):
        rounds.append(arguments)
        return add(self, *arguments, **settings)

    monkeypatch.setattr(stated_accuracy, "nested_quadratic_forms", counted)
    monkeypatch.setattr(stated_accuracy._Evaluation, "add", counted_add)
    monkeypatch.setattr(probes, "SAFETY", 3.0)
    bits, accuracy = bits_of(0.9, batch_size=24)  # of a shape that no other test has compiled for
    assert len(rounds) > 1
    assert len(set(traced)) == len(traced) > 0
    assert accuracy.met
    assert np.sqrt(np.mean((bits[:, 0] - by_hand(0.9)) ** 2)) <= TARGET


@pytest.mark.usefixtures("exact_is_dear")
def test_the_mean_over_noise_draws_needs_fewer_probes():
    (_, single), (_, double) = bits_of(0.9), bits_of(0.9, num_dequantisations=2)
    assert double.met
    assert double.products < 0.75 * single.products


@pytest.mark.usefixtures("exact_is_dear")
def test_the_likelihood_of_a_report_says_how_it_was_reached_and_whether():
    settings = dataclasses.replace(kept.SETTINGS, target_stderr=TARGET, num_dequantisations=1, batch_size=16)
    result = likelihood.measure(model_at(0.9), kept.images(NUM)[0], settings, SEED).summary
    assert abs(result.mean - by_hand(0.9).mean()) <= TARGET
    assert result.accuracy.met
    assert not result.unbiased
    assert result.stderr_probes == pytest.approx(result.accuracy.stderr / math.sqrt(NUM))
    assert result.stderr == pytest.approx(by_hand(0.9).std(ddof=1) / math.sqrt(NUM), rel=0.05)
    assert abs(result.estimate.z) < SUSPICIOUS_Z
    assert "within 0.004" in str(result)
    assert result.warnings() == []
    missed = dataclasses.replace(result.accuracy, target=0.1 * result.accuracy.stderr)
    assert "NOT within" in str(missed)
    [warning] = dataclasses.replace(result, accuracy=missed).warnings()
    assert "missed their target_stderr" in warning


def test_targets_out_of_range_are_refused():
    with pytest.raises(ValueError, match=r"target_stderr must .* got -1"):
        parse({"evaluation": {"target_stderr": -1}})
    with pytest.raises(ValueError, match="positive number of bits/dim, got 0"):
        stated_accuracy.log_prob(model_at(0.9), kept.images(NUM)[0], 0.0)
