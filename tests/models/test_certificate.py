"""The certificate of a model against singular values of its layers, and what it says where there is none."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import kept
import numpy as np
import pytest
from certified_flows import changed
from oracles import dense_conv_matrix, operator_norm

from iresnet_jax import certify
from iresnet_jax.branches.branch import checksum
from iresnet_jax.models.contractions import as_params, with_bounds
from iresnet_jax.models.density import Density

NORM_RTOL = 1e-2  # ten times the tolerance of the norms
EXACT_RTOL = 1e-6  # float32


def true_norm(layer, kernel):
    kernel = np.asarray(kernel, np.float64)
    return operator_norm(kernel if kernel.ndim == 2 else dense_conv_matrix(kernel, *layer.in_shape[:2]))


@pytest.mark.parametrize("spec", [kept.POINTS, kept.IMAGES, kept.CLASSIFIER], ids=["points", "images", "classifier"])
def test_norms_agree_with_singular_values_and_bounds_lie_above(spec):
    model = kept.model(spec)
    certificate = model.certificate()
    [stage] = spec.flow.layout
    weights = model.weights["stage0"].branch.weights
    assert [block.name for block in certificate.blocks] == ["stage0/block00", "stage0/block01"]
    for k, block in enumerate(certificate.blocks):
        assert [layer.name for layer in block.layers] == [layer.name for layer in stage.branch.layers]
        norms = [true_norm(layer, weights[layer.name]["kernel"][k]) for layer in stage.branch.layers]
        for norm, layer in zip(norms, block.layers, strict=True):
            assert layer.estimate * (1 - EXACT_RTOL) <= norm <= layer.bound <= layer.target == 0.9
            np.testing.assert_allclose([layer.estimate, layer.bound], norm, rtol=NORM_RTOL)
        product = np.prod(norms)
        assert product <= block.bound <= block.target * (1 + EXACT_RTOL)
        np.testing.assert_allclose([block.estimate, block.bound], product, rtol=2 * NORM_RTOL)
    assert certificate.certified
    assert certificate.max_block == max(block.bound for block in certificate.blocks) <= certificate.target * (1 + EXACT_RTOL)
    lines = str(certificate).splitlines()
    assert len(lines) == 1 + sum(1 + len(block.layers) for block in certificate.blocks) + 1
    assert lines[1].split()[:2] == [f"stage0/block00/{stage.branch.layers[0].name}", "0.9000"]
    assert lines[-1].startswith("certified: every one of 2 blocks is a contraction")


def test_one_block_without_a_bound_is_none_for_the_model():
    model = kept.model(kept.POINTS)
    broken = changed(model, lipschitz_bound=np.array([0.5, np.inf], np.float32)).certificate()
    assert not broken.certified
    assert broken.max_block == broken.inverse == np.inf
    assert broken.verdict == "NOT CERTIFIED: no bound below 1 for 1 of 2 blocks, the first is stage0/block01"


def test_weights_beyond_their_budget_are_not_certified():
    """Kernels twice as large than frozen ones have norms, estimates and bounds of up to 1.8."""
    model = kept.model(kept.IMAGES)
    doubled = jax.tree.map(lambda w: 2 * w, as_params(model.weights))
    found = with_bounds(model.spec.flow, doubled)
    certificate = model.with_(weights=found).certificate()
    own = model.certificate()
    for block, before in zip(certificate.blocks, own.blocks, strict=True):
        np.testing.assert_allclose([block.estimate, block.bound], [4 * before.estimate, 4 * before.bound], rtol=NORM_RTOL)
    assert not certificate.certified
    assert certificate.inverse == np.inf
    assert jax.jit(Density.freeze)(model.with_(weights=found)).certificate().certified


def unflattened(model):
    leaves, tree = jax.tree.flatten(model)
    return jax.tree.unflatten(tree, [leaf + 1e-3 if leaf.ndim == 3 else leaf for leaf in leaves])


def kernels_times_3(model):
    weights = jax.tree.map(lambda w: 3 * w, model.weights["stage0"].branch.weights)
    return model.with_(weights={"stage0": model.weights["stage0"]._replace(branch=replace(branch_of(model), weights=weights))})


def branch_of(model):
    return model.weights["stage0"].branch


CHANGES = {
    "with_": kernels_times_3,
    "tree.map": lambda model: jax.tree.map(lambda leaf: 2 * leaf, model),
    "tree.map of a few entries": lambda model: jax.tree.map(lambda leaf: jnp.clip(leaf, -0.7, 0.7), model),
    "signs": lambda model: jax.tree.map(lambda leaf: -leaf, model),
    "tree.unflatten": unflattened,
}


@pytest.mark.parametrize("change", CHANGES)
def test_whoever_changes_weights_loses_their_bounds(change):
    changed_model = CHANGES[change](kept.model(kept.POINTS))
    x = np.zeros((1, 2), np.float32)
    for call in (changed_model.certificate, lambda: certify.inverse(changed_model, x, x)):
        with pytest.raises(ValueError, match="have changed since their bounds were computed"):
            call()
    assert changed_model.freeze().certificate().certified


def test_the_same_numbers_keep_their_bounds():
    """In NumPy's arrays, in float64, through a flat tree, on the way through ``jit`` and behind a gradient."""
    model = kept.model(kept.POINTS)
    bound = model.certificate().max_block
    leaves, tree = jax.tree.flatten(model)
    gradients = jax.jit(jax.grad(lambda model: model.log_prob(jnp.ones((1, 2)))[0]))(model)
    assert not np.any(branch_of(gradients).seal)
    with jax.enable_x64(True):
        wide = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float64), model)
        assert wide.certificate().max_block == bound
    for same in (jax.device_get(model), jax.tree.unflatten(tree, leaves), jax.jit(lambda model: model)(model)):
        assert same.certificate().max_block == bound


NUMBERS = {
    "float64": np.random.default_rng(0).normal(size=(3, 50)),
    "too small for float32": np.array([[1.2345678912e-32], [1e-310], [1e-40]]),
    "no numbers": np.array([[np.nan], [np.inf], [-0.0]], np.float32),
    "float16": np.linspace(-1, 1, 9, dtype=np.float16).reshape(3, 3),
    "large integers": np.array([[2**24 + 1], [2**31 - 1], [-(2**31)]], np.int32),
    "random bits": np.array([[2**32 - 1], [1], [2**31]], np.uint32),
    "a mask": np.array([[True, False], [False, True], [True, True]]),
}


@pytest.mark.parametrize("is_wide", [False, True], ids=["float32", "float64"])
@pytest.mark.parametrize("name", NUMBERS)
def test_checksums_are_the_same_in_programs_and_by_numpy(name, is_wide):
    with jax.enable_x64(is_wide):
        in_program = jax.jit(checksum)([NUMBERS[name]])
        np.testing.assert_array_equal(checksum([NUMBERS[name]]), in_program)
        np.testing.assert_array_equal(checksum([jnp.asarray(NUMBERS[name])]), in_program)


def test_weights_without_bounds_are_refused():
    model = kept.model(kept.POINTS)
    with pytest.raises(ValueError, match=r"these weights are not certified: call freeze\(\) first"):
        model.with_(weights=kept.uncertified(model.weights)).certificate()
