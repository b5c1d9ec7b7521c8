"""Flows with prescribed constants: certificates and Jacobians lie within them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import iresnet_jax as ir
from iresnet_jax.maths.lipschitz_bounds import block_bounds

MU, NU = 0.2, 5.0
X = np.random.default_rng(0).normal(size=(20, 2)).astype(np.float32)
SINGLE = [ir.StageSpec(1, (4,), activation="maxmin")]
SEVERAL = [ir.StageSpec(2, (4,), activation="maxmin"), ir.StageSpec(1, (4,), activation="maxmin")]


def test_one_residual_block_has_the_constants_of_a_bilipnet_layer():
    spec = ir.FlowSpec.bilipschitz((2,), SINGLE, mu=MU, nu=NU)
    assert spec.coeff == pytest.approx((NU - MU) / (NU + MU), abs=1e-4)
    assert spec.scale == pytest.approx((NU + MU) / 2, rel=1e-4)
    assert not spec.stages[0].actnorm


def test_certificates_reach_the_constants_and_keep_within_them():
    """Weights are so large that every block takes all of its budget."""
    settings = {
        "stages": SEVERAL,
        "constants": (MU, NU),
        "transform": ir.Identity(),
        "last_scale": 100.0,
    }
    model = ir.Density.init(jax.random.key(0), X, **settings)
    certificate = model.certificate()
    assert 0.999 * NU < certificate.forward <= NU
    assert MU <= 1 / certificate.inverse < 1.002 * MU
    jacobians = jax.jit(jax.vmap(jax.jacfwd(lambda x: model.encode(x[None])[0])))(jnp.asarray(X))
    singular = np.linalg.svd(jacobians, compute_uv=False)
    assert MU < singular.min()
    assert singular.max() < NU


@pytest.mark.parametrize(("mu", "nu"), [(0.5, 0.6), (1e-3, 2.0)])
def test_bounds_of_spent_budgets_are_within_constants_near_and_far(mu, nu):
    spec = ir.FlowSpec.bilipschitz(
        (2,), [ir.StageSpec(3, (4,)), ir.StageSpec(2, (4,))], mu=mu, nu=nu
    )
    bounds = block_bounds(jnp.full((), spec.coeff))
    stretch = (float(bounds.forward) * spec.scale) ** spec.num_blocks
    # less than the scales' factors and products are rounded up
    assert 0.999 * nu < stretch < nu * (1 - 5 * 3e-6)
    shrink = (spec.scale / float(bounds.inverse)) ** spec.num_blocks
    assert mu * (1 + 5 * 3e-6) < shrink < 1.01 * mu
