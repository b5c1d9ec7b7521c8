"""Models as files: nothing is believed that can be computed, and damage is named."""

import functools
import io
import zipfile

import jax
import kept
import numpy as np
import pytest

import iresnet_jax as ir
from iresnet_jax.bijections.bounded import Bounded
from iresnet_jax.bijections.equalize import Equalize
from iresnet_jax.models.architecture import FlowSpec, StageSpec
from iresnet_jax.models.contractions import freeze
from iresnet_jax.models.density_spec import DensitySpec
from iresnet_jax.models.flow import as_params
from iresnet_jax.models.saved import model_of, spec_of
from iresnet_jax.pytrees import tagged

FLOW = FlowSpec(
    (4, 4, 1),
    (
        StageSpec(2, hidden=(3,), kernel_sizes=(3, 3), squeeze=2),
        StageSpec(1, hidden=(4,), activation="lipswish"),
    ),
)
DENSITY = DensitySpec(FLOW, "logistic", Equalize((0.25,) * 4, (0.5,) * 16, 1e-3), 4, num_classes=3)


@functools.cache
def params():
    """Twice as large as drawn, so that the budget binds."""
    return as_params(freeze(FLOW, jax.tree.map(lambda a: 2 * a, kept.random_params(FLOW))))


@pytest.fixture(scope="module")
def density():
    return model_of(DENSITY, {"params": params(), "prior": DENSITY.standard_prior()})


def npy(array):
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


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
        DensitySpec(FlowSpec.bilipschitz((2,), [StageSpec(2, (4,))], mu=0.2, nu=5.0))
    )
    block = model.weights["stage0"]
    scale = jax.tree.map(lambda leaf: leaf + 1, block.actnorm)
    altered = model.with_(weights={"stage0": block._replace(actnorm=scale)})
    for same in (altered, ir.load(altered.save(tmp_path / "model.npz"))):
        np.testing.assert_allclose(same.log_prob(x), model.log_prob(x), rtol=1e-6)
        assert same.certificate().forward == model.certificate().forward


OLD_HEADER = np.frombuffer(b'{"format": 1}', np.uint8)


@pytest.mark.parametrize(
    ("damage", "sentence"),
    [
        ({KERNEL: npy(np.zeros((1, 3, 3, 4, 3)))}, r"conv0/kernel in it is \(1, 3, .* \(2, 3"),
        ({"header.npy": npy(OLD_HEADER)}, "has the format 1, not 2"),
        ({"header.npy": None}, r"holds no model that was saved, or is damaged: .*header"),
        ({KERNEL: None}, "conv0/kernel in it is None"),
    ],
)
def test_damage_is_named(density, tmp_path, damage, sentence):
    path = density.save(tmp_path / "model.npz")
    with zipfile.ZipFile(path) as archive:
        content = {name: archive.read(name) for name in archive.namelist()} | damage
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in content.items():
            if data is not None:
                archive.writestr(name, data)
    with pytest.raises(ValueError, match=sentence):
        ir.load(path)


def test_half_a_file_is_no_model(density, tmp_path):
    path = tmp_path / "model.npz"
    whole = density.save(path).read_bytes()
    for content in (b"", whole[: len(whole) // 2]):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"model\.npz holds no model .* or is damaged"):
            ir.load(path)


def test_lines_of_before_keep_to_the_ends_of_their_transform():
    ends = Bounded([-0.5, -np.inf], [1.5, np.inf])
    cells = ir.Marginals.lines([1, 0], least=[0, -np.inf], most=[1, np.inf])
    found = spec_of(tagged(DensitySpec(FlowSpec((2,), ()), "gaussian", ends, cells=cells)))
    log_prob = kept.model(found).log_prob(np.float32([[0, 0.3], [1, -2]]), key=jax.random.key(0))
    assert np.all(np.isfinite(log_prob))
