"""The certificate of a model against singular values of its layers, and what it says where there
is none.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import kept
import numpy as np
import pytest
from certified_flows import times

from iresnet_jax.bijections.residual import Solver
from iresnet_jax.models.density import Density

NORM_RTOL = 1e-2  # ten times the tolerance of the norms


def test_one_block_without_a_bound_is_none_for_the_model():
    broken = times(
        kept.model(kept.POINTS), np.array([1, np.inf], np.float32).reshape(2, 1, 1)
    ).certificate()
    assert not broken.certified
    assert broken.max_block == broken.inverse == np.inf
    assert (
        broken.verdict
        == "NOT CERTIFIED: no bound below 1 for 1 of 2 blocks, the first is stage0/block01"
    )


def test_weights_beyond_their_budget_are_not_certified():
    """Kernels twice as large than frozen ones have norms, estimates and bounds of up to 1.8."""
    model = kept.model(kept.IMAGES)
    doubled = times(model, 2)
    certificate = doubled.certificate()
    own = model.certificate()
    for block, before in zip(certificate.blocks, own.blocks, strict=True):
        np.testing.assert_allclose(
            [block.estimate, block.bound], [4 * before.estimate, 4 * before.bound], rtol=NORM_RTOL
        )
    assert not certificate.certified
    assert certificate.inverse == np.inf
    assert jax.jit(Density.freeze)(doubled).certificate().certified


def test_bounds_are_said_rounded_up():
    certificate = kept.model(kept.POINTS).certificate()
    said = [float(line.split()[3]) for line in certificate.table.splitlines()[1:5]]
    assert np.all(
        said
        >= np.array([row.bound for row in (*certificate.blocks[0].layers, certificate.blocks[0])])
    )
    changed = dataclasses.replace(certificate.blocks[0], bound=0.969994)
    assert "Lip(g) <= 0.97;" in dataclasses.replace(certificate, blocks=(changed,)).verdict


def of_programs(model):
    """Changed while bounds are among the arrays, by whoever asked for them."""
    return jax.tree.map(lambda leaf: 1.05 * leaf, model.with_bounds())


def of_numpy(model):
    """Changed in place, after the same arrays were bounded."""
    own = jax.tree.map(np.array, model)
    own.certificate()
    for layer in own.weights["stage0"].branch.weights.values():
        layer["kernel"] *= np.float32(1.05)
    return own


CHANGES = {
    "with_": lambda model: times(model, 1.05),
    "tree.map": lambda model: jax.tree.map(lambda leaf: 1.05 * leaf, model),
    "a few entries": lambda model: jax.tree.map(
        lambda leaf: jnp.clip(1.05 * leaf, -0.9, 0.9), model
    ),
    "bounds too": of_programs,
    "NumPy's arrays": of_numpy,
}
EXACT = Solver(atol=1e-12, refine=True)


@pytest.mark.parametrize("change", CHANGES)
def test_whoever_changes_weights_gets_their_bounds(change):
    """True errors of inverses, from a solver in float64, are within the bounds that `decode`
    reports; in programs none is.
    """
    model = kept.model(kept.POINTS)
    z = 3 * np.asarray(jax.random.normal(jax.random.key(0), (200, 2)))
    changed = CHANGES[change](model).with_(solver=Solver(atol=1e-2, memory=0))
    x, info = changed.decode(z)
    with jax.enable_x64(True):
        exact, _ = jax.tree.map(jnp.asarray, changed).with_(solver=EXACT).decode(z)
    errors = np.linalg.norm(x - np.asarray(exact), axis=1)
    assert np.all(errors <= info.error_bound)
    assert np.median(errors / np.asarray(info.error_bound)) > 1e-3
    assert changed.certificate().max_block > model.certificate().max_block
    traced = jax.jit(lambda model: model.decode(z)[1])(changed.with_(weights=changed.weights))
    assert np.all(np.isinf(traced.error_bound))


def test_bounds_of_the_same_arrays_are_remembered_and_those_of_programs_are_their_own():
    model: Any = kept.model(kept.POINTS)
    z = jnp.ones((3, 2))
    bounds = [model.with_bounds().weights["stage0"].branch.lipschitz_bound for _ in range(2)]
    assert bounds[0] is bounds[1]
    same = (
        jax.tree.map(lambda leaf: leaf + 0, model)
        .with_bounds()
        .weights["stage0"]
        .branch.lipschitz_bound
    )
    assert same is not bounds[0]
    np.testing.assert_array_equal(same, bounds[0])
    handed = jax.jit(lambda model: model.decode(z))(model.with_bounds())
    inside = jax.jit(lambda model: model.with_bounds().decode(z))(model)
    for found in (handed, inside):
        jax.tree.map(
            np.testing.assert_allclose, found[1].error_bound, model.decode(z)[1].error_bound
        )


def test_inverses_in_programs_without_bounds_converge_and_have_derivatives():
    model: Any = kept.model(kept.POINTS)
    z = jnp.ones((3, 2))
    own, handed = (
        jax.jit(lambda model, z: model.decode(z))(given, z)
        for given in (model, model.with_bounds())
    )
    np.testing.assert_allclose(own[0], handed[0], atol=1e-5)
    assert np.all(own[1].converged)
    slopes = [
        jax.jit(jax.grad(lambda z, m: m.decode(z)[0].sum()))(z, given)
        for given in (model, model.with_bounds())
    ]
    np.testing.assert_allclose(*slopes, rtol=1e-4)
