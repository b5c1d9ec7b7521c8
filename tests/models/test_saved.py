"""Models as files: nothing is lost, nothing is believed that can be computed, and damage ends in
one sentence.
"""

import dataclasses
import functools
import io
import json
import zipfile
from typing import Any

import jax
import kept
import numpy as np
import pytest
from fsspec.implementations.memory import MemoryFileSystem

import iresnet_jax as ir
from iresnet_jax.bijections.equalize import Equalize
from iresnet_jax.models.architecture import FlowSpec, StageSpec
from iresnet_jax.models.contractions import freeze
from iresnet_jax.models.density_spec import DensitySpec
from iresnet_jax.models.flow import as_params
from iresnet_jax.models.saved import model_of, spec_of
from iresnet_jax.pytrees import tagged
from iresnet_jax.storage import path_of

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


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda plain: plain | {"type": "Sofa"}, "Sofa"),
        (lambda plain: plain | {"colour": 1}, "unexpected keyword argument 'colour'"),
        (
            lambda plain: plain | {"flow": plain["flow"] | {"coeff": 1.5}},
            r"coeff must lie in \(0, 1\), got 1.5",
        ),
    ],
)
def test_plain_data_that_are_no_spec(change, sentence):
    with pytest.raises((KeyError, TypeError, ValueError), match=sentence):
        spec_of(change(tagged(DENSITY)))


def rewritten(path, change):
    """The file with other members."""
    with zipfile.ZipFile(path) as archive:
        content = {name: archive.read(name) for name in archive.namelist()}
    change(content)
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in content.items():
            archive.writestr(name, data)


def npy(array):
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


KERNEL = "params/stage0/blocks/conv0/kernel.npy"


def test_bounds_are_those_of_the_weights_in_the_file(density, tmp_path):
    """Kernels that somebody made larger do not keep their certificate."""
    path = density.save(tmp_path / "model.npz")
    assert ir.load(path).certificate().certified
    rewritten(
        path,
        lambda content: content.update({KERNEL: npy(2 * np.load(io.BytesIO(content[KERNEL])))}),
    )
    loaded = ir.load(path)
    np.testing.assert_allclose(
        *(
            factor * own.certificate().blocks[0].layers[0].bound
            for own, factor in ((loaded, 1), (density, 2))
        ),
        rtol=1e-3,
    )
    assert not loaded.certificate().certified


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_model_in_half_precision_is_saved_in_single(density, tmp_path, dtype):
    half = jax.tree.map(lambda leaf: leaf.astype(dtype), density)
    loaded = ir.load(half.save(tmp_path / "model.npz"))
    np.testing.assert_array_equal(
        loaded.prior.by_class.mean, half.prior.by_class.mean.astype(np.float32)
    )


@pytest.mark.slow
def test_the_spec_says_what_branches_compute_before_and_after_saving(density, tmp_path):
    spec = density.spec
    stages = (
        dataclasses.replace(spec.flow.stages[0], activation="tanh", padding="CIRCULAR"),
        spec.flow.stages[1],
    )
    other = density.with_(
        spec=dataclasses.replace(spec, flow=dataclasses.replace(spec.flow, stages=stages))
    )
    x = np.random.default_rng(0).integers(0, 4, (3, 4, 4, 1), np.uint8)
    loaded = ir.load(other.save(tmp_path / "model.npz"))
    np.testing.assert_allclose(other.log_prob(x), loaded.log_prob(x), rtol=1e-6)
    assert np.abs(other.log_prob(x) - density.log_prob(x)).max() > 0.01
    np.testing.assert_allclose(other.certificate().forward, loaded.certificate().forward, rtol=1e-6)
    wider = (dataclasses.replace(stages[0], hidden=(5,)), stages[1])
    with pytest.raises(
        ValueError, match=r"do not fit the new spec: .*conv0.* has shape .* and needs"
    ):
        density.with_(
            spec=dataclasses.replace(spec, flow=dataclasses.replace(spec.flow, stages=wider))
        )


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


def huge_header(content):
    """An array that claims 4 TB."""
    buffer = io.BytesIO()
    np.lib.format.write_array_header_1_0(
        buffer, {"descr": "<f4", "fortran_order": False, "shape": (2**40,)}
    )
    content[KERNEL] = buffer.getvalue()


def with_blocks(content, num):
    header = json.loads(np.load(io.BytesIO(content["header.npy"])).tobytes())
    header["spec"]["flow"]["stages"][0]["num_blocks"] = num
    return np.frombuffer(json.dumps(header).encode(), np.uint8)


@pytest.mark.parametrize(
    ("damage", "sentence"),
    [
        (huge_header, ""),
        (
            lambda content: content.update({KERNEL: npy(np.zeros((2, 3, 3, 4, 3), np.float16))}),
            "is float16 of shape",
        ),
        (
            lambda content: content.update(
                {KERNEL: npy(np.full((2, 3, 3, 4, 3), np.nan, np.float32))}
            ),
            "numbers that are not finite",
        ),
        (lambda content: content.update({KERNEL: content[KERNEL][:-4]}), "buffer|reshape|size|EOF"),
        (lambda content: content.pop(KERNEL), "conv0/kernel is not a file"),
        (
            lambda content: content.update({"more.npy": npy(np.zeros(1))}),
            "it holds more, which such a model does not have",
        ),
        (
            lambda content: content.update({"header.npy": npy(OLD_HEADER)}),
            "its format is 1, not 2",
        ),
        (
            lambda content: content.update(
                {"header.npy": npy(np.frombuffer(b"[" * 100_000, np.uint8))}
            ),
            "recursion",
        ),
        (lambda content: content.update({"header.npy": npy(with_blocks(content, 2**70))}), ""),
    ],
)
def test_damage_ends_in_one_sentence(density, tmp_path, damage, sentence):
    path = density.save(tmp_path / "model.npz")
    rewritten(path, damage)
    with pytest.raises(
        ValueError, match=rf"model\.npz is damaged or was written by another version .*{sentence}"
    ):
        ir.load(path)


def test_files_that_are_no_models(density, tmp_path):
    with pytest.raises(ValueError, match=r"there is no model .*nowhere\.npz"):
        ir.load(tmp_path / "nowhere.npz")
    with pytest.raises(ValueError, match="is a folder: give a file"):
        density.save(tmp_path)
    np.savez(tmp_path / "checkpoint.npz", step=3)
    with pytest.raises(ValueError, match="give the folder that holds config"):
        ir.load(tmp_path / "checkpoint.npz")
    path = tmp_path / "model.npz"
    whole = density.save(path).read_bytes()
    for content in (
        b"",
        b"text",
        whole[: len(whole) // 2],
        whole[: len(whole) // 2] + bytes(100) + whole[len(whole) // 2 + 100 :],
    ):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"model\.npz is damaged"):
            ir.load(path)


def test_a_bucket_that_cannot_be_reached_is_no_damage(density, monkeypatch):
    path = path_of("memory://bucket/model.npz")
    density.save(path)

    def fail(*args, **kwargs):
        raise RuntimeError("503 at the moment")

    monkeypatch.setattr(MemoryFileSystem, "cat_file", fail)
    with pytest.raises(
        ConnectionError, match=r"model\.npz cannot be reached \(503 at the moment\)"
    ):
        ir.load(path)


def test_numbers_of_numpy_in_a_spec_are_those_of_python():
    @dataclasses.dataclass
    class Numbers:
        one: Any
        several: Any

    found = json.loads(json.dumps(tagged(Numbers(np.int64(2), (np.float32(0.5), 3)))))
    assert found == {"type": "Numbers", "one": 2, "several": [0.5, 3]}
