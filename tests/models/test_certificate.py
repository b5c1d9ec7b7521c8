"""The certificate of a model against singular values, and where there is none."""

import dataclasses

import jax
import jax.numpy as jnp
import kept
import numpy as np
import pytest
from certified_flows import times

import iresnet_jax as ir
from iresnet_jax.models.contractions import freeze
from iresnet_jax.models.flow import as_params

NORM_RTOL = 1e-2  # ten times the tolerance of the norms


def test_one_block_without_a_bound_is_none_for_the_model():
    broken = times(
        kept.model(kept.POINTS), np.array([1, np.inf], np.float32).reshape(2, 1, 1)
    ).certificate()
    assert not broken.certified
    assert broken.max_block == broken.inverse == np.inf
    assert (
        broken.verdict
        == "NOT CERTIFIED: no bound of Lip(g) below 1 for 1 of 2 blocks, the first is "
        "stage0/block01"
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
    assert jax.jit(ir.Density.freeze)(doubled).certificate().certified


def test_bounds_are_said_rounded_up():
    certificate = kept.model(kept.POINTS).certificate()
    said = [float(line.split()[3]) for line in certificate.table.splitlines()[1:5]]
    assert np.all(
        said
        >= np.array([row.bound for row in (*certificate.blocks[0].layers, certificate.blocks[0])])
    )
    changed = dataclasses.replace(certificate.blocks[0], bound=0.969994)
    assert "Lip(g) <= 0.97" in dataclasses.replace(certificate, blocks=(changed,)).verdict


@pytest.mark.parametrize("spec", [kept.POINTS, kept.CLASSES_OF_POINTS])
def test_the_prompt_shows_what_a_model_is_how_large_and_whether_it_is_certified(spec):
    model = kept.model(spec)
    num = sum(array.size for array in jax.tree.leaves(ir.Free.of(model).params))
    for value in (model, ir.Free.of(model)):
        assert f"{num:,}" in repr(value)
        assert len(repr(value)) < 300
    assert "certified: every block is invertible" in repr(model.freeze())
    stretched = times(model, 9)
    assert "print(model.certificate())" in repr(stretched)  # nothing is computed to be shown
    assert not stretched.certificate().certified
    assert "NOT CERTIFIED" in repr(stretched)
    _, info = model.decode(jnp.zeros((3, 2)))
    assert "3 of 3 converged" in repr(info)
    jax.eval_shape(repr_of_traced, model)


def repr_of_traced(model):
    assert "Density" in repr(model)
    assert "float32[3]" in repr(model.decode(jnp.zeros((3, 2)))[1])


CONDITIONAL = dataclasses.replace(
    kept.POINTS,
    flow=dataclasses.replace(kept.POINTS.flow, context_dim=3),
    transform=ir.Standardize((0.0, 0.0), (1.0, 1.0)),
)


def grown(model, factor=1.05):
    return jax.tree.map(lambda leaf: factor * leaf, model)


def bounded(model):
    """The same model, which has been asked for its bounds."""
    model.certificate()
    return model


def of_numpy(model):
    own = bounded(jax.tree.map(np.array, model))
    for layer in own.weights["stage0"].branch.weights.values():
        layer["kernel"] *= np.float32(1.05)
    return own


def of_carried(model):
    """Weights with bounds among their arrays, and what a program made of them."""
    weights = freeze(model.spec.flow, as_params(model.weights))
    return dataclasses.replace(model, weights=grown(weights))


CHANGES = {
    "with_": lambda model: times(model, 1.05),
    "NumPy's arrays": of_numpy,
    "carried bounds": of_carried,
    "given": lambda _: bounded(kept.model(CONDITIONAL)).given(np.ones(3, np.float32)),
    "unconstrained": lambda model: grown(ir.Free.of(model)).constrain()[0],
}
EXACT = ir.Solver(atol=1e-12, refine=True)
Z = 3 * np.random.default_rng(0).normal(size=(200, 2)).astype(np.float32)
decode = jax.jit(lambda model, bounds: model.decode(Z, bounds=bounds))


@pytest.mark.parametrize("change", CHANGES)
def test_whoever_changes_weights_gets_their_bounds(change):
    """Errors against float64 are within the bounds that `decode` reports; none without them."""
    model = bounded(kept.model(kept.POINTS))
    changed = CHANGES[change](model).with_(solver=ir.Solver(atol=1e-2, memory=0))
    with jax.enable_x64(True):
        precise = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float64), changed)
        exact, _ = precise.with_(solver=EXACT).decode(np.float64(Z))
        is_exact = np.abs(precise.encode(exact) - Z).max(axis=1) < 1e-9
        found = {"eager": changed.decode(Z), "handed": decode(changed, changed.bounds())}
    for x, info in found.values():
        errors = np.linalg.norm(np.asarray(x) - np.asarray(exact), axis=1)
        bounds = np.asarray(info.error_bound)
        assert np.all(is_exact)
        assert np.all(errors <= bounds)
        assert np.all(np.isfinite(bounds))
        assert np.median(errors / bounds) > 1e-3 or change not in ("with_", "NumPy's arrays")
    _, info = decode(changed, None)
    assert np.all(np.isinf(info.error_bound))
