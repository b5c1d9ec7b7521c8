"""Enclosures of priors against mpmath's numbers of 50 digits."""

import mpmath
import numpy as np
import plain_flow as plain
import pytest

from iresnet_jax.certification import enclosed_priors
from iresnet_jax.maths.enclosures.ball_arithmetic import Ball
from iresnet_jax.models import priors

NUMBERS = plain.mpmath_numbers(50)
DIMS = 5


@pytest.mark.parametrize("kind", priors.PRIORS)
@pytest.mark.parametrize("num_classes", [None, 3])
@pytest.mark.parametrize("scale", [1.0, 40.0])
def test_log_densities_are_enclosed(kind, num_classes, scale):
    rng = np.random.default_rng(0)
    params = {
        name: (0.5 * rng.normal(size=values.shape)).astype(np.float32)
        for name, values in priors.standard(kind, DIMS, num_classes).items()
    }
    z = scale * rng.normal(size=(3, DIMS))
    errors = np.array([0.0, 1e-15, 1e-6])
    found = enclosed_priors.log_prob(kind, params, Ball.of(z).widened(errors[:, None]))
    lower, upper = found.bounds()
    for i, one in enumerate(z):
        for side in (-1, 1):
            moved = one + side * errors[i] * (1 - 1e-6) * np.sign(one)
            exact = plain.log_prior(NUMBERS, kind, params, NUMBERS.of(moved))
            assert mpmath.mpf(float(lower[i])) <= exact <= mpmath.mpf(float(upper[i]))
            if errors[i]:  # the ends of the balls are not in what the middles give
                of_middle = enclosed_priors.log_prob(kind, params, Ball.of(z)).bounds()
                assert not of_middle[0][i] <= float(exact) <= of_middle[1][i] or errors[i] < 1e-12
    assert np.all(upper - lower <= 1e-13 * np.abs(lower) + 40 * DIMS * scale * errors)


def test_other_priors_are_refused():
    with pytest.raises(ValueError, match="has no guaranteed enclosure"):
        enclosed_priors.log_prob("cauchy", {"mean": np.zeros(2), "log_scale": np.zeros(2)}, Ball.of(np.zeros((1, 2))))
