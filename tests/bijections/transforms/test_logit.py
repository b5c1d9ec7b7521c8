"""Maps of the unit interval: round trips, log-determinants of the dense Jacobian, Lipschitz constants, both ends in float32."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from iresnet_jax.bijections.transforms.equalize import Equalize
from iresnet_jax.bijections.transforms.logit import Center, Identity, Logit

EXACT = 1e-10  # float64, same maths by another route
SLOGDET = 1e-9  # float64, dense determinant
SINGLE = 1e-5  # float32, same maths by another route

FREQUENCIES = (0.15, 0.5, 0.1, 0.25)
TRANSFORMS = {
    "identity": Identity(),
    "logit .05": Logit(0.05),
    "logit 1e-6": Logit(1e-6),
    "center": Center(),
    "equalize": Equalize(FREQUENCIES, alpha=0.05),
    "equalize, entrywise": Equalize(FREQUENCIES, (0.999, 0.3, 0.5, 0.01), alpha=1e-6),
}


def slogdets_of(transform, x):
    """Of the dense Jacobian at each example."""
    jacobians = jax.jit(jax.vmap(jax.jacfwd(lambda x: transform(x[None])[0][0])))(x)
    return np.linalg.slogdet(np.asarray(jacobians).reshape(len(x), x[0].size, x[0].size))[1]


@pytest.mark.parametrize("name", TRANSFORMS)
def test_transforms_round_trip_with_logdets_of_the_dense_jacobian(x64, name):
    bijection, key = TRANSFORMS[name].bijection(), jax.random.key(0)
    forward, inverse = (
        (lambda x: bijection.forward_and_logdet(x, key)[:2]),
        (lambda y: bijection.inverse_and_logdet(y, key)[:2]),
    )
    x = jnp.asarray(np.random.default_rng(0).uniform(size=(3, 2, 2, 1)))
    y, logdet = jax.jit(forward)(x)
    back, logdet_inverse = jax.jit(inverse)(y)
    assert logdet.shape == logdet_inverse.shape == (3,)
    np.testing.assert_allclose(back, x, rtol=0, atol=EXACT)
    np.testing.assert_allclose(logdet_inverse, -logdet, rtol=0, atol=SLOGDET)
    np.testing.assert_allclose(logdet, slogdets_of(forward, x), rtol=0, atol=SLOGDET)
    np.testing.assert_allclose(logdet_inverse, slogdets_of(inverse, y), rtol=0, atol=SLOGDET)


def test_the_logdet_oracle_rejects_a_forgotten_constant(x64):
    """RealNVP's log(1 - 2 alpha) is the term that implementations drop."""
    x = jnp.full((1, 4), 0.3)
    forward = Logit(0.05).forward_and_logdet
    without = forward(x)[1] - 4 * np.log1p(-0.1)
    assert abs(without - slogdets_of(forward, x)) > 0.4


def test_logit_is_accurate_and_finite_at_both_ends_in_float32():
    alpha = 1e-6
    x = np.array([0, 2**-24, 1e-4, 0.5, 1 - 2**-12, 1 - 2**-24, 1], np.float32)
    s = alpha + (1 - 2 * alpha) * x.astype(np.float64)
    y, logdet = Logit(alpha).forward_and_logdet(jnp.asarray(x)[:, None])
    assert y.dtype == logdet.dtype == jnp.float32
    np.testing.assert_allclose(y[:, 0], np.log(s) - np.log1p(-s), rtol=SINGLE, atol=SINGLE)
    np.testing.assert_allclose(logdet, np.log1p(-2 * alpha) - np.log(s) - np.log1p(-s), rtol=SINGLE)
    far = jnp.array([[-100.0, 100.0]])
    back, logdet = Logit(alpha).inverse_and_logdet(far)
    np.testing.assert_allclose(back, [[0.0, 1.0]], atol=2 * alpha)
    np.testing.assert_allclose(logdet, -200, rtol=SINGLE)


@pytest.mark.parametrize("name", TRANSFORMS)
def test_lipschitz_constants_are_those_of_the_slopes(x64, name):
    transform = TRANSFORMS[name]
    edges = np.concatenate([np.linspace(0, 1, 200, endpoint=False), np.nextafter(np.array([0.25, 0.5, 0.75, 1.0]), 0)])
    x = jnp.asarray(np.repeat(edges, 4).reshape(-1, 2, 2, 1))
    slopes = jax.jit(lambda x: jax.jvp(transform.bijection().forward, (x,), (jnp.ones_like(x),))[1])(x)
    bounds = transform.bilipschitz()
    assert np.max(slopes) <= bounds.forward * (1 + EXACT)
    assert 1 / np.min(slopes) <= bounds.inverse * (1 + EXACT)
    assert np.max(slopes) >= 0.2 * bounds.forward  # of a logit and of a histogram, each of which has its own steepest point
    assert float(transform.bijection().inverse_lipschitz) == pytest.approx(float(bounds.inverse))


@pytest.mark.parametrize(
    ("transform", "forward", "inverse"),
    [
        (Identity(), 1, 1),
        (Center(), 1, 1),
        (Logit(0.05), 0.9 / (0.05 * 0.95), 1 / (4 * 0.9)),
        (Equalize((0.8, 0.2), alpha=0.05), 1.6 * 0.9 / (0.05 * 0.95), 1 / (0.4 * 4 * 0.9)),
        (Equalize((0.8, 0.2), (0.9, 0.9, 0.4), 0.05), 2 * 0.9 * 0.9 / (0.05 * 0.95), 1 / (2 * 0.1 * 4 * 0.9)),
    ],
)
def test_lipschitz_constants_in_closed_form(transform, forward, inverse):
    np.testing.assert_allclose(transform.bilipschitz(), (forward, inverse), rtol=1e-5)


@pytest.mark.parametrize("alpha", [0.0, 0.5, 0.7])
def test_caller_mistakes(alpha):
    with pytest.raises(ValueError, match=rf"\(0, 0.5\), got {alpha}"):
        Logit(alpha)
