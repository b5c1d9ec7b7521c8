"""Test error, its interval and the confusion matrix, against counts and a solver."""

import numpy as np
import pytest
from scipy.optimize import brentq

from iresnet_jax.evaluation.classification import fraction_interval, summarize

Z = 1.959964  # 97.5 % quantile of the normal distribution


@pytest.mark.parametrize(("wrong", "num"), [(0, 360), (5, 360), (360, 360), (1, 1), (40, 10_000)])
def test_the_interval_ends_where_the_errors_are_just_not_surprising(wrong, num):
    """Wilson's interval holds the ``p`` with ``|p_hat - p| <= z sqrt(p (1 - p) / n)``."""
    low, high = fraction_interval(wrong, num)
    p = wrong / num

    def surprise(q):
        return (p - q) ** 2 - Z**2 * q * (1 - q) / num

    assert low == pytest.approx(0.0 if wrong == 0 else brentq(surprise, 1e-12, p - 1e-12), abs=1e-6)
    assert high == pytest.approx(
        1.0 if wrong == num else brentq(surprise, p + 1e-12, 1 - 1e-12), abs=1e-6
    )


def test_confusion_has_classes_along_its_rows_and_classes_that_do_not_occur():
    result = summarize(2.0 * np.eye(4)[[0, 1, 1, 0]], np.array([0, 0, 1, 2]), loss=0.5)
    assert result.confusion == ((1, 1, 0, 0), (0, 1, 0, 0), (1, 0, 0, 0), (0, 0, 0, 0))
    assert (result.error, result.num_errors, result.interval) == (0.5, 2, fraction_interval(2, 4))
