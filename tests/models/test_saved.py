"""Models as files: nothing is believed that can be computed, and damage is named."""

import functools

import jax
import kept
import numpy as np
import pytest

import iresnet_jax as ir
from iresnet_jax.models.contractions import freeze
from iresnet_jax.models.flow import as_params
from iresnet_jax.models.saved import model_of, spec_of
from iresnet_jax.pytrees import tagged

FLOW = ir.FlowSpec(
    (4, 4, 1),
    (
        ir.StageSpec(2, hidden=(3,), kernel_sizes=(3, 3), squeeze=2),
        ir.StageSpec(1, hidden=(4,), activation="lipswish"),
    ),
)
DENSITY = ir.DensitySpec(
    FLOW, "logistic", ir.Equalize((0.25,) * 4, (0.5,) * 16, 1e-3), 4, num_classes=3
)


@functools.cache
def params():
    """Twice as large as drawn, so that the budget binds."""
    return as_params(freeze(FLOW, jax.tree.map(lambda a: 2 * a, kept.random_params(FLOW))))


@pytest.fixture(scope="module")
def density():
    return model_of(DENSITY, {"params": params(), "prior": DENSITY.standard_prior()})


KERNEL = "params/stage0/blocks/conv0/kernel.npy"


def test_bounds_are_those_of_the_weights_in_the_file(density, tmp_path):
    """Kernels that somebody made larger do not keep their certificate."""
    path = density.save(tmp_path / "model.npz")
    assert ir.load(path).certificate().certified
    with np.load(path) as archive:
        content = {name: archive[name] for name in archive.files}
    content[KERNEL.removesuffix(".npy")] *= 2
    np.savez(path, **content)
    loaded = ir.load(path)
    bound, doubled = (own.certificate().blocks[0].layers[0].bound for own in (density, loaded))
    np.testing.assert_allclose(doubled, 2 * bound, rtol=1e-3)
    assert not loaded.certificate().certified


def test_scales_of_a_flow_with_prescribed_constants_cannot_be_altered(tmp_path):
    x = np.random.default_rng(0).normal(size=(20, 2)).astype(np.float32)
    model = kept.model(
        ir.DensitySpec(ir.FlowSpec.bilipschitz((2,), [ir.StageSpec(2, (4,))], mu=0.2, nu=5.0))
    )
    block = model.weights["stage0"]
    scale = jax.tree.map(lambda leaf: leaf + 1, block.actnorm)
    altered = model.with_(weights={"stage0": block._replace(actnorm=scale)})
    for same in (altered, ir.load(altered.save(tmp_path / "model.npz"))):
        np.testing.assert_allclose(same.log_prob(x), model.log_prob(x), rtol=1e-6)
        assert same.certificate().forward == model.certificate().forward


def test_lines_of_before_keep_to_the_ends_of_their_transform():
    ends = ir.Bounded([-0.5, -np.inf], [1.5, np.inf])
    cells = ir.Marginals.lines([1, 0], least=[0, -np.inf], most=[1, np.inf])
    found = spec_of(tagged(ir.DensitySpec(ir.FlowSpec((2,), ()), "gaussian", ends, cells=cells)))
    log_prob = kept.model(found).log_prob(np.float32([[0, 0.3], [1, -2]]), key=jax.random.key(0))
    assert np.all(np.isfinite(log_prob))
