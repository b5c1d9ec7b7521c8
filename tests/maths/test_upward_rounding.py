"""Rounding upwards: never below, never more than a step above."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from iresnet_jax.maths.upward_rounding import at_least, said_up

NUMBERS = [0.0, 0.5, 0.9, 0.9999, 0.99999, 1 / 3, np.float64(0.1), 1e-300, 1e300, np.inf, 2]


@pytest.mark.parametrize("number", NUMBERS)
def test_a_number_of_python_is_never_rounded_down(number):
    found = np.asarray(at_least(number))
    assert found.dtype == np.float32
    assert float(found) >= number
    if np.isfinite(found):
        assert float(np.nextafter(found, np.float32(-np.inf))) < number


def test_types_are_kept_where_they_can_be(x64):
    assert at_least(0.1) == 0.1
    assert at_least(np.float32(0.1)).dtype == np.float32
    assert at_least(jnp.float32(0.1)).dtype == np.float32
    assert jnp.isnan(at_least(float("nan")))


def test_an_array_on_its_way_to_float32_is_rounded_up_and_differentiated(x64):
    values = jnp.asarray([0.9999, 0.5, 1 / 3])
    found = jax.jit(lambda v: at_least(v, jnp.float32))(values)
    assert found.dtype == np.float32
    assert np.all(np.asarray(found, np.float64) >= values)
    np.testing.assert_allclose(found, values, rtol=1.2e-7)
    np.testing.assert_array_equal(jax.grad(lambda v: at_least(v, jnp.float32).sum())(values), 1)


def test_a_bound_in_words_is_no_smaller():
    assert [said_up(value, 2) for value in (1.24e-6, 1.2, 0.0, np.inf)] == [
        "1.3e-06",
        "1.2",
        "0",
        "inf",
    ]
    assert said_up(1.234, 3) == "1.24"
