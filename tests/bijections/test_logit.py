"""Maps of the unit interval: Lipschitz constants, and both ends in float32."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import iresnet_jax as ir

SINGLE = 1e-5  # float32, same maths by another route


def test_logit_is_accurate_and_finite_at_both_ends_in_float32():
    alpha = 1e-6
    x = np.array([0, 2**-24, 1e-4, 0.5, 1 - 2**-12, 1 - 2**-24, 1], np.float32)
    s = alpha + (1 - 2 * alpha) * x.astype(np.float64)
    y, logdet = ir.Logit(alpha).map(jnp.asarray(x)[:, None])
    assert y.dtype == logdet.dtype == jnp.float32
    np.testing.assert_allclose(y[:, 0], np.log(s) - np.log1p(-s), rtol=SINGLE, atol=SINGLE)
    np.testing.assert_allclose(logdet, np.log1p(-2 * alpha) - np.log(s) - np.log1p(-s), rtol=SINGLE)
    far = jnp.array([[-100.0, 100.0]])
    back, logdet = ir.Logit(alpha).unmap(far)
    np.testing.assert_allclose(back, [[0.0, 1.0]], atol=2 * alpha)
    np.testing.assert_allclose(logdet, -200, rtol=SINGLE)


@pytest.mark.parametrize("transform", [ir.Logit(0.05), ir.Equalize((0.5, 0.5), alpha=0.05)])
def test_beyond_the_interval_there_is_no_density(transform):
    x = jnp.array([-0.2, 0.0, 1.0, 1.03, 1.06, jnp.nan])
    y, logdet = jax.jit(transform.map)(x[:, None])
    assert np.isfinite(y[:-1]).all()
    np.testing.assert_array_equal(np.isneginf(logdet), [True, False, False, False, True, False])
    assert np.isnan(y[-1, 0])
    slope = jax.grad(lambda x: transform.map(x[:, None])[1].sum())
    slopes = jax.jit(slope)(x[:-1])
    assert np.isfinite(slopes).all()


@pytest.mark.parametrize(
    ("transform", "forward", "inverse"),
    [
        (ir.Identity(), 1, 1),
        (ir.Center(), 1, 1),
        (ir.Logit(0.05), 0.9 / (0.05 * 0.95), 1 / (4 * 0.9)),
        (ir.Equalize((0.8, 0.2), alpha=0.05), 1.6 * 0.9 / (0.05 * 0.95), 1 / (0.4 * 4 * 0.9)),
        (
            ir.Equalize((0.8, 0.2), (0.9, 0.9, 0.4), 0.05),
            2 * 0.9 * 0.9 / (0.05 * 0.95),
            1 / (2 * 0.1 * 4 * 0.9),
        ),
    ],
)
def test_lipschitz_constants_in_closed_form(transform, forward, inverse):
    np.testing.assert_allclose(transform.bilipschitz(), (forward, inverse), rtol=1e-5)
    np.testing.assert_allclose(transform.inverse_lipschitz, inverse, rtol=1e-5)
