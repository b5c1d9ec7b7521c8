"""Annealed particles against integrals that are known, and densities that are made of them."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import iresnet_jax as ir
from iresnet_jax import energies
from iresnet_jax.energies import anneal

pytestmark = pytest.mark.slow

SHARES = (0.2, 0.8)
QUICK = {"key": jax.random.key(0), "steps": 2, "num_particles": 1000, "progress": False}
QUICK |= {"stages": [ir.StageSpec(1, (8,))]}


def two_modes(x):
    """Normal distributions at -8 and 8 in the first entry, of integral 3 together."""
    centers = jnp.asarray([[-8.0, 0.0], [8.0, 0.0]], x.dtype)
    squares = jnp.sum(jnp.square(x[:, None] - centers[None]), axis=2)
    return (
        jax.nn.logsumexp(jnp.log(jnp.asarray(SHARES))[None] - 0.5 * squares, axis=1)
        - math.log(2 * math.pi)
        + math.log(3.0)
    )


def test_modes_that_are_far_apart_keep_their_shares_when_annealed_and_moved():
    found, step = anneal(two_modes, jax.random.key(0), 2000, 2, scale=8.0)
    x = np.asarray(found.x)
    is_left = x[:, 0] < 0
    assert np.mean(is_left) == pytest.approx(SHARES[0], abs=0.05)
    assert x[is_left].mean(axis=0) == pytest.approx([-8, 0], abs=0.2)
    assert x[~is_left].std(axis=0) == pytest.approx([1, 1], abs=0.1)
    later = step(jax.random.key(1), found)
    # each in its place but for a few that jump
    assert np.mean((later.x[:, 0] < 0) == is_left) > 0.99
    assert np.mean(np.any(later.x != found.x, axis=1)) > 0.99


def test_fit_energy_finds_both_modes(monkeypatch):
    monkeypatch.setattr(energies, "COMPONENTS", (1, 2))

    def target(x):
        return jnp.logaddexp(
            *(-0.5 * jnp.sum(jnp.square((x - center) / 0.5), axis=1) for center in (-4.0, 4.0))
        )

    fitted = ir.fit_energy(target, 3, scale=4.0, **QUICK)
    found = ir.evaluate_energy(fitted, target, jax.random.key(1), 1000)
    log_z = math.log(2) + 3 * 0.5 * math.log(2 * math.pi * 0.25)
    assert found.log_z == pytest.approx(log_z, abs=4 * found.stderr)
    assert found.ess > 0.5
    assert fitted.certificate().certified
