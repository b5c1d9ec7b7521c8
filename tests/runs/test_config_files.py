"""The configs that come with the library: what they describe."""

import functools
import importlib.util

import numpy as np
import pytest
from tiny_runs import ROOT

from iresnet_jax.data import load, toys
from iresnet_jax.data.arrays import Arrays, from_arrays
from iresnet_jax.data.dataset import DataSet
from iresnet_jax.models import saved
from iresnet_jax.models.free import abstract, num_parameters
from iresnet_jax.models.model import FILE_NAME
from iresnet_jax.pytrees import first_difference
from iresnet_jax.runs.config import parse, to_plain
from iresnet_jax.runs.job import Job

SHAPES = {
    "digits": (8, 8, 1),
    "mnist": (28, 28, 1),
    "fashion_mnist": (28, 28, 1),
    "cifar10": (32, 32, 3),
    "cifar100": (32, 32, 3),
    "downsampled_imagenet/32x32": (32, 32, 3),
}
CLASSES = {"cifar100": 100}
LEVELS = {"digits": 17}
CONFIGS = [
    ("digits_density", None),
    ("digits_density", "variational"),
    ("digits_hybrid", None),
    ("mnist_density", None),
    *(("mnist_density", name) for name in ("variational", "long", "padded")),
    ("fashion_mnist_density", None),
    ("cifar10_density", None),
    ("bsds300", None),
    ("tabular", None),
    *(("iresnet_density", name) for name in ("mnist", "cifar10")),
    *(
        ("residual_flow_density", name)
        for name in ("mnist", "cifar10", "downsampled_imagenet/32x32")
    ),
    *(("toy_2d", name) for name in toys.TOYS),
    *(("digits_classification", name) for name in (None, "0.7", "vanilla")),
    *(
        (f"{name}_classification", variant)
        for name in ("mnist", "fashion_mnist")
        for variant in (None, "vanilla")
    ),
    *(("mnist_classification", name) for name in ("muon", "muon_0.7", "muon_vanilla")),
    ("cifar10_classification", None),
    *(("mnist_robust", variant) for variant in (None, "0.3", "fashion_mnist", "cifar10")),
    *(
        ("iresnet_classification", name)
        for name in ("mnist", "cifar10", "cifar100", "cifar10_released")
    ),
]
PUBLISHED = {
    ("iresnet_density", "cifar10"): 25.03e6,
    ("iresnet_classification", "cifar10_released"): 4.91e6,
}  # parameters


def get_config(name, argument):
    path = ROOT / "configs" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return parse(module.get_config(*([] if argument is None else [argument])))


def data_of(config):
    """Random images of the data set's shape, random vectors, or the toy."""
    name = config.data.name
    if name in toys.TOYS:
        return load(name)
    if name.startswith("npy:"):
        vectors = np.random.default_rng(0).normal(size=(40, 6))
        return from_arrays(name, Arrays(vectors))
    shape, levels = SHAPES[name], LEVELS.get(name, 256)
    images = np.random.default_rng(0).integers(0, levels, (16, *shape), np.uint8)
    splits = {split: images for split in ("train", "validation", "test")}
    classes = CLASSES.get(name, 10)
    labels = {split: np.arange(16, dtype=np.int32) % classes for split in splits}
    data = DataSet(name, splits, labels, num_levels=levels, num_classes=classes)
    return config.data.changed(data)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "argument"), CONFIGS)
def test_configs_describe_models_that_fit_their_data(name, argument):
    config = get_config(name, argument)
    num = num_parameters(abstract(Job.of(config, data_of(config)).spec).params)
    assert num == pytest.approx(PUBLISHED.get((name, argument), num), rel=0.01)
    assert num > 0


RESULTS = ROOT / "benchmarks/results"
KEPT = {str(file.parent.relative_to(RESULTS)): file for file in RESULTS.rglob(FILE_NAME)}


@functools.cache
def read_kept(name):
    """A kept model, and what its file says about it."""
    return saved.read(KEPT[name])


@pytest.mark.parametrize("name", sorted(KEPT))
def test_kept_models_are_those_of_their_configs(name):
    """A folder has the name of a config, or that and the variant behind ``_`` or ``/``."""
    _, about = read_kept(name)
    of_config = (
        (name, None)
        if (ROOT / f"configs/{name}.py").exists()
        else name.replace("/", "_").rsplit("_", 1)
    )
    config = to_plain(get_config(*of_config))
    if name == "cifar10_density":
        # copies of its images, as docs/results.md says
        config["data"]["name"] = "cifar:cifar10_jpeg"
    assert first_difference(config, to_plain(parse(about["config"])), "config") is None
