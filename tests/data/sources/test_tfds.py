"""TFDS data sets in array_record, as the writer of TFDS makes them."""

import functools
import importlib.util
import io
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from image_sets import assert_holds, examples
from PIL import Image

from iresnet_jax import data

ROOT = Path(__file__).parents[3]
NUM_TRAIN, NUM_TEST = 40, 6
REAL_DATA_DIR = os.environ.get("TFDS_DATA_DIR")


@functools.cache
def tfds():
    """TFDS, imported by the one process that runs this file, and not by all, which collect it."""
    import tensorflow_datasets

    return tensorflow_datasets


@pytest.fixture(autouse=True)
def root(tmp_path, monkeypatch):
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path / "tfds"))
    return tmp_path / "tfds"


def png(pixels):
    """An encoded image, as TFDS takes one where TensorFlow is not installed."""
    buffer = io.BytesIO()
    Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels).save(buffer, "PNG")
    buffer.seek(0)
    return buffer


def write(folder, splits, *, shards=1, supervised=("image", "label"), **features):
    """A prepared data set, by the writer of TFDS."""
    folder.mkdir(parents=True)
    name, *_, version = folder.relative_to(folder.parents[1]).parts
    identity = tfds().core.dataset_info.DatasetIdentity(name=name, version=version, data_dir=str(folder), module_name="")
    described = tfds().features.FeaturesDict(features)
    info = tfds().core.DatasetInfo(builder=identity, features=described, supervised_keys=supervised)
    size = -(-len(splits["train"]) // shards)
    writer = tfds().core.SequentialWriter(info, max_examples_per_shard=size, overwrite=True, file_format="array_record")
    writer.initialize_splits(list(splits))
    writer.add_examples(splits)
    writer.close_all()
    return folder


def records_of(images, labels, **others):
    return [{**others, "image": png(image), "label": label} for image, label in zip(images, labels, strict=True)]


def label():
    return tfds().features.ClassLabel(num_classes=10)


TRAIN, TEST = examples(NUM_TRAIN, (28, 28, 1)), examples(NUM_TEST, (28, 28, 1), seed=1)


def write_mnist(folder, train=TRAIN, test=TEST, **options):
    splits = {"train": records_of(*train), "test": records_of(*test)}
    return write(folder, splits, **{"image": tfds().features.Image(shape=(28, 28, 1)), "label": label(), **options})


# Reading ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shards", [1, 3])
def test_images_and_labels_come_through_and_the_second_time_needs_no_tfds(root, monkeypatch, shards):
    write_mnist(root / "mnist" / "3.0.1", shards=shards)
    loaded = data.load("mnist")
    assert_holds(loaded, TRAIN, TEST)
    assert (loaded.name, loaded.num_classes, loaded.event_shape) == ("mnist", 10, (28, 28, 1))
    monkeypatch.setitem(sys.modules, "tensorflow_datasets", None)  # an import would fail
    assert_holds(data.load("mnist"), TRAIN, TEST)


def test_data_dir_goes_before_the_environment(root, tmp_path):
    write_mnist(root / "mnist" / "3.0.1", train=examples(20, (28, 28, 1), seed=5))
    write_mnist(tmp_path / "other" / "mnist" / "3.0.1")
    assert_holds(data.load("mnist", data_dir=str(tmp_path / "other")), TRAIN, TEST)


def test_colour_images_with_other_features(root):
    train, test = examples(NUM_TRAIN, (32, 32, 3)), examples(NUM_TEST, (32, 32, 3), seed=1)
    records = {"train": records_of(*train, id="x"), "test": records_of(*test, id="x")}
    features = {"id": tfds().features.Text(), "image": tfds().features.Image(shape=(32, 32, 3)), "label": label()}
    write(root / "cifar10" / "3.0.2", records, **features)
    assert_holds(data.load("cifar10"), train, test)


def test_downsampled_imagenet_has_no_labels_and_no_test_split(root):
    (train, _), (valid, _) = examples(NUM_TRAIN, (32, 32, 3)), examples(NUM_TEST, (32, 32, 3), seed=1)
    records = {split: [{"image": png(i)} for i in images] for split, images in (("train", train), ("validation", valid))}
    image = tfds().features.Image(shape=(None, None, 3))  # as TFDS has it
    write(root / "downsampled_imagenet" / "32x32" / "2.0.0", records, image=image, supervised=None)
    loaded = data.load("downsampled_imagenet/32x32")
    assert_holds(loaded, (train, None), (valid, None))
    assert loaded.num_classes is None


def test_newest_version_unless_one_is_named(root):
    for version, train in (("3.0.9", examples(20, (28, 28, 1), seed=5)), ("3.0.10", TRAIN)):
        write_mnist(root / "mnist" / version, train=train)
    (root / "mnist" / "incomplete.3.0.11").mkdir()
    assert_holds(data.load("mnist"), TRAIN, TEST)
    assert len(data.load("mnist:3.0.9").examples["train"]) == 18


def test_default_configuration_is_found(root):
    write_mnist(Path(tfds().builder("emnist", data_dir=root).data_path))
    assert root / "emnist" / "byclass" in next(root.rglob("dataset_info.json")).parents
    assert_holds(data.load("emnist"), TRAIN, TEST)


def test_reading_leaves_tensorflow_alone_where_it_is_installed(root, tmp_path):
    write_mnist(root / "mnist" / "3.0.1")
    fake = tmp_path / "site" / "tensorflow"
    fake.mkdir(parents=True)
    (fake / "__init__.py").write_text("raise SystemExit('tensorflow was imported')")
    body = "import importlib.util as u; from iresnet_jax import data; data.load('mnist'); print(u.find_spec('tensorflow').name)"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(fake.parent), str(ROOT)])}
    run = subprocess.run([sys.executable, "-c", body], capture_output=True, text=True, env=environment)
    assert (run.returncode, run.stdout) == (0, "tensorflow\n"), run.stderr


@pytest.mark.skipif(not REAL_DATA_DIR, reason="TFDS_DATA_DIR names no folder of prepared data sets")
def test_real_mnist(tmp_path, monkeypatch):
    """What the published images are known by: their mean and deviation, and the counts of the classes."""
    if not list(Path(REAL_DATA_DIR, "mnist").glob("*/*.array_record-*")):
        pytest.skip(f"no mnist in array_record under TFDS_DATA_DIR={REAL_DATA_DIR}")
    monkeypatch.setenv("IRESNET_JAX_CACHE_DIR", str(tmp_path / "cache"))
    loaded = data.load("mnist", data_dir=REAL_DATA_DIR)
    sizes = {split: len(images) for split, images in loaded.examples.items()}
    assert sizes == {"train": 55_000, "validation": 5000, "test": 10_000}
    published = np.concatenate([loaded.examples["train"], loaded.examples["validation"]])
    assert published.mean() / 255 == pytest.approx(0.1307, abs=5e-5)
    assert published.std() / 255 == pytest.approx(0.3081, abs=5e-5)
    assert np.bincount(loaded.labels["test"]).tolist() == [980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009]


# Mistakes -----------------------------------------------------------------------------------------------------------------


RECORDS, INFO = "*-train.array_record-*", "dataset_info.json"


@pytest.mark.parametrize(
    ("file", "damage", "problem"),
    [
        (RECORDS, lambda content: bytes(len(content)), ""),
        (RECORDS, lambda content: content[:-70_000], "should be at least 64KB"),
        (INFO, lambda content: b"\xff\xfe{}", "can't decode"),
        (INFO, lambda content: b"{", "Failed to load JSON"),
        (INFO, lambda content: b"[]", "version"),
        (INFO, lambda content: content.replace(b"array_record", b"tfrecord"), "in the FileFormat.TFRECORD format"),
    ],
)
def test_what_cannot_be_read_is_to_be_prepared_again(root, file, damage, problem):
    folder = write_mnist(root / "mnist" / "3.0.1")
    path = next(folder.glob(file))
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(ValueError, match=rf"cannot read mnist in {folder}, delete that folder .*: .*{problem}"):
        data.load("mnist")
    assert not list(folder.glob("*decoded*/*"))


def test_images_without_classes_to_learn(root):
    write_mnist(root / "ages" / "1.0.0", label=tfds().features.Scalar(np.int64))
    with pytest.raises(ValueError, match="ages is not a classification data set: its feature 'label' is not a class"):
        data.load("ages")


# Preparing ----------------------------------------------------------------------------------------------------------------


@pytest.fixture
def tensorflow(monkeypatch):
    """Makes TensorFlow look installed, with a function in place of TFDS's preparation, or not installed."""
    real = importlib.util.find_spec

    def pretend(prepare=None):
        spec = importlib.util.spec_from_loader("tensorflow", None) if prepare else None
        monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: spec if name == "tensorflow" else real(name, *a))
        monkeypatch.setattr(tfds().core.DatasetBuilder, "download_and_prepare", prepare)

    return pretend


def test_unprepared_without_tensorflow_says_what_to_install(root, tensorflow):
    tensorflow()
    with pytest.raises(ValueError, match=rf"kmnist is not prepared in {root}, .* 'iresnet_jax\[prepare\]'"):
        data.load("kmnist")
    assert not root.exists()


def test_unprepared_with_tensorflow_is_prepared_once(root, tensorflow):
    prepared = []

    def prepare(builder, *, file_format):
        prepared.append(file_format)
        write_mnist(Path(builder.data_path))

    tensorflow(prepare)
    for _ in range(2):
        assert_holds(data.load("kmnist"), TRAIN, TEST)
    assert prepared == ["array_record"]


def test_failure_to_prepare_is_one_sentence(root, tensorflow):
    def prepare(builder, *, file_format):
        raise ConnectionError("Max retries exceeded\n with url: /kmnist")

    tensorflow(prepare)
    with pytest.raises(RuntimeError, match=rf"download and prepare kmnist in {root}: Max retries exceeded with url: /kmnist"):
        data.load("kmnist")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("downsampled_imagenet/31x31", "downsampled_imagenet has .* the configurations 32x32, 64x64"),
        ("mnist/big", "mnist has version 3.0.1 and the configurations none"),
        ("mnist:9.9.9", "TFDS has no mnist:9.9.9: mnist has version 3.0.1"),
        ("ag_news_subset", "ag_news_subset is not a data set of images with classes: its features are description,"),
    ],
)
def test_unknown_versions_and_other_kinds_of_data_are_refused_before_any_download(root, tensorflow, name, message):
    tensorflow(lambda builder, *, file_format: pytest.fail("it was downloaded"))
    with pytest.raises(ValueError, match=message):
        data.load(name)
