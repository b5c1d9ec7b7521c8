"""Gradient steps of convex potentials against spectra of dense Jacobians, in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import iresnet_jax as ir
from iresnet_jax.branches.potential import PotentialSpec

COEFF = 0.95
SPECS = {
    "wide": PotentialSpec((3,), (7,), activation="relu"),
    "contexts": PotentialSpec((5,), (2,), activation="softplus4", context_dim=2),
    "convolutional": PotentialSpec(
        (4, 3, 2), (3,), (3, 3), activation="tanh", positional_bias=True
    ),
    "periodic": PotentialSpec((4, 4, 1), (3,), (3, 3), activation="softplus4", padding="CIRCULAR"),
}


@pytest.mark.parametrize("name", SPECS)
def test_eigenvalues_are_between_1_minus_the_bound_and_1(name, x64):
    spec, rng = SPECS[name], np.random.default_rng(0)
    first = jax.device_get(jax.jit(spec.initial_weights)(jax.random.key(0)))

    @jax.jit
    def certified(weights):
        branch = spec.certified(
            weights, spec.norm_bounds(weights), coeff=COEFF, budget="layer"
        ).branch
        return branch.with_bounds(spec.norm_bounds(branch.weights))

    branch = certified(jax.tree.map(lambda a: a + rng.normal(size=a.shape), first))
    context = jnp.asarray(rng.normal(size=(1, spec.context_dim))) if spec.context_dim else None

    @jax.jit
    @jax.vmap
    def jacobians(x):
        return jax.jacfwd(lambda x: x + branch.given(context)(x[None])[0])(x)

    found = np.asarray(jacobians(3 * rng.normal(size=(50, *spec.in_shape)))).reshape(
        50, *2 * (np.prod(spec.in_shape),)
    )
    np.testing.assert_allclose(found, found.swapaxes(1, 2), atol=1e-14)
    values = np.linalg.eigvalsh(found)
    bound = float(branch.lipschitz_bound)
    assert 1 - COEFF <= 1 - bound <= values.min() < 0.5
    assert values.max() <= 1 + 1e-14
    bounds = spec.block_bounds(bound)
    assert bounds.forward == 1
    assert bounds.inverse >= 1 / (1 - bound)
    assert 1.5 <= spec.block_bounds(2.5).forward <= 1.500001  # an eigenvalue of -1.5


def test_a_network_of_any_depth_is_1_lipschitz():
    x = np.random.default_rng(0).normal(size=(50, 3)).astype(np.float32)
    stage = ir.StageSpec(20, (8,), activation="softplus4", kind="potential", actnorm=False)
    network = ir.Density.init(
        jax.random.key(0), x, stages=[stage], coeff=COEFF, transform=ir.Identity()
    )
    certificate = network.certificate()
    assert certificate.certified
    assert 1 <= certificate.forward < 1 + 1e-4
    z = np.asarray(network.encode(x))
    assert np.all(np.linalg.norm(z[1:] - z[:-1], axis=1) < np.linalg.norm(x[1:] - x[:-1], axis=1))
