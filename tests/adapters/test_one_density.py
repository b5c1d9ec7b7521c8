"""What all adapters share: values of any axes, samples of any shape, and what has no density."""

import dataclasses
import sys

import jax
import jax.numpy as jnp
import kept
import numpy as np
import pytest

import iresnet_jax as ir
from iresnet_jax.adapters.one_density import LogDensity, check_continuous

SAME = {"rtol": 1e-5, "atol": 1e-5}  # float32
BOUNDED = dataclasses.replace(kept.POINTS, transform=ir.Bounded((ir.Bounds.of(0.0, 1.0), None)))
KEY = jax.random.key(0)


def test_samples_have_the_shape_of_the_library_and_their_log_densities():
    model = kept.model(kept.GIVEN)
    density = LogDensity.of(model, kept.CONTEXTS)
    x, log_prob = density.sample_and_log_prob(KEY, (4,))
    assert x.shape == (4, 5, 2)
    assert log_prob.shape == (4, 5)
    np.testing.assert_allclose(density.sample(KEY, (4,)), x, **SAME)
    np.testing.assert_allclose(density(x), log_prob, **SAME)
    np.testing.assert_allclose(log_prob[2, 3], model.log_prob(x[2, 3], context=kept.CONTEXTS[3]), **SAME)
    assert LogDensity.of(model, kept.CONTEXTS[0]).sample(KEY).shape == (2,)


def test_outside_of_its_ranges_a_density_is_zero():
    density = ir.adapters.to_blackjax(kept.model(BOUNDED))
    assert density(jnp.array([1.5, 0.0])) == -jnp.inf
    assert np.isfinite(density(jnp.array([0.5, 0.0])))


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda: ir.adapters.to_blackjax(kept.model(kept.IMAGES)), r"integer levels, .* give model\.continuous"),
        (lambda: check_continuous(kept.model(kept.CLASSIFIER)), "made of a Density, got a Classifier"),
        (lambda: ir.adapters.to_blackjax(kept.model(kept.GIVEN)), r"give a context of shape \(\.\.\., 3\)"),
        (
            lambda: LogDensity.of(kept.model(kept.GIVEN), kept.CONTEXTS[:, :2]),
            r"context of shape \(\.\.\., 3\), got one of shape \(5, 2\)",
        ),
        (lambda: LogDensity.of(kept.model(kept.POINTS), kept.CONTEXTS), r"takes no context, got one of shape \(5, 3\)"),
    ],
)
def test_what_is_no_distribution_is_refused(make, sentence):
    with pytest.raises(ValueError, match=sentence):
        make()


def test_a_library_that_is_not_installed_is_named(monkeypatch):
    monkeypatch.delitem(sys.modules, "iresnet_jax.adapters.numpyro", raising=False)
    monkeypatch.setitem(sys.modules, "numpyro", None)  # as if there were none
    monkeypatch.setitem(sys.modules, "numpyro.distributions", None)
    with pytest.raises(ImportError, match=r"pip install 'iresnet_jax\[numpyro\]'"):
        ir.adapters.to_numpyro(kept.model(kept.POINTS))
