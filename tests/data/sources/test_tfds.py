"""TFDS data sets in array_record, of the true byte format: records, JSON files and protocol buffers written by hand."""

import importlib.util
import io
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from array_record.python.array_record_module import ArrayRecordWriter
from PIL import Image

from iresnet_jax import data
from iresnet_jax.data import splits

ROOT = Path(__file__).parents[3]
NUM_TRAIN, NUM_TEST = 40, 6
REAL_DATA_DIR = os.environ.get("TFDS_DATA_DIR")


@pytest.fixture(autouse=True)
def root(tmp_path, monkeypatch):
    monkeypatch.delenv("IRESNET_JAX_CACHE_DIR", raising=False)
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path / "tfds"))
    return tmp_path / "tfds"


# A writer that knows nothing of TFDS --------------------------------------------------------------------------------------


def varint(number):
    low = number & 127
    return bytes([low]) if number < 128 else bytes([low | 128]) + varint(number >> 7)


def field(number, content):
    """A length-delimited field of a protocol buffer."""
    return varint(number << 3 | 2) + varint(len(content)) + content


def example(features):
    """A ``tf.train.Example``: features {1: {1: map entry {1: key, 2: bytes list {1: ...} or int64 list {3: packed}}}}."""
    entries = b""
    for key, value in features.items():
        stored = field(1, field(1, value)) if isinstance(value, bytes) else field(3, field(1, varint(int(value))))
        entries += field(1, field(1, key.encode()) + field(2, stored))
    return field(1, entries)


def png(pixels):
    buffer = io.BytesIO()
    Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels).save(buffer, "PNG")
    return buffer.getvalue()


def feature(kind, **fields):
    modules = {"Image": "image_feature", "ClassLabel": "class_label_feature", "Text": "text_feature", "Scalar": "scalar"}
    return {"pythonClassName": f"tensorflow_datasets.core.features.{modules[kind]}.{kind}", **fields}


def image_feature(*dimensions):
    return feature("Image", image={"dtype": "uint8", "shape": {"dimensions": [str(size) for size in dimensions]}})


LABEL = feature("ClassLabel", classLabel={"numClasses": "10"})


def write(folder, split_records, features, *, supervised=("image", "label"), file_format="array_record", shards=1):
    """A prepared data set."""
    folder.mkdir(parents=True)
    name = folder.relative_to(folder.parents[1]).parts[0]
    infos = []
    for split, records in split_records.items():
        parts = np.array_split(np.arange(len(records)), shards)
        for i, rows in enumerate(parts):
            path = folder / f"{name}-{split}.{file_format}-{i:05d}-of-{shards:05d}"
            writer = ArrayRecordWriter(str(path), "group_size:1")
            for row in rows:
                writer.write(records[row])
            writer.close()
        infos.append(
            {
                "filepathTemplate": "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}",
                "name": split,
                "numBytes": str(sum(map(len, records))),
                "shardLengths": [str(len(rows)) for rows in parts],
            }
        )
    info = {"fileFormat": file_format, "name": name, "splits": infos, "version": folder.name}
    if supervised:
        info["supervisedKeys"] = {"tuple": {"items": [{"featureKey": key} for key in supervised]}}
    (folder / "dataset_info.json").write_text(json.dumps(info))
    top = {
        "pythonClassName": "tensorflow_datasets.core.features.features_dict.FeaturesDict",
        "featuresDict": {"features": features},
    }
    (folder / "features.json").write_text(json.dumps(top))
    return folder


def draw(num, shape, seed=0):
    rng = np.random.default_rng(seed)
    return rng.integers(0, 256, (num, *shape), np.uint8), rng.integers(0, 10, num)


def records_of(images, labels):
    return [example({"image": png(image), "label": label}) for image, label in zip(images, labels, strict=True)]


TRAIN, TEST = draw(NUM_TRAIN, (28, 28, 1)), draw(NUM_TEST, (28, 28, 1), seed=1)


def write_mnist(folder, train=TRAIN, test=TEST, **options):
    features = {"image": image_feature(28, 28, 1), "label": LABEL}
    return write(folder, {"train": records_of(*train), "test": records_of(*test)}, features, **options)


def assert_is(loaded, train=TRAIN, test=TEST):
    held_out = splits.validation_mask(len(train[0]))
    for split, (images, labels), rows in (("train", train, ~held_out), ("validation", train, held_out), ("test", test, ...)):
        np.testing.assert_array_equal(loaded.examples[split], images[rows])
        np.testing.assert_array_equal(loaded.labels[split], labels[rows])


# Reading ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shards", [1, 3])
def test_images_and_labels_come_through(root, shards):
    folder = write_mnist(root / "mnist" / "3.0.1", shards=shards)
    loaded = data.load("mnist")
    assert_is(loaded)
    assert (loaded.name, loaded.num_levels, loaded.num_classes, loaded.event_shape) == ("mnist", 256, 10, (28, 28, 1))
    assert (folder / "iresnet_jax.decoded" / "record.json").is_file()


def test_data_dir_goes_before_the_environment(root, tmp_path):
    write_mnist(root / "mnist" / "3.0.1", train=draw(20, (28, 28, 1), seed=5))
    write_mnist(tmp_path / "other" / "mnist" / "3.0.1")
    assert_is(data.load("mnist", data_dir=str(tmp_path / "other")))


def test_colour_images_with_other_features(root):
    (train, train_labels), (test, test_labels) = draw(NUM_TRAIN, (32, 32, 3)), draw(NUM_TEST, (32, 32, 3), seed=1)

    def records(images, labels):
        pairs = zip(images, labels, strict=True)
        return [example({"id": b"x", "image": png(image), "label": label}) for image, label in pairs]

    features = {"id": feature("Text", text={}), "image": image_feature(32, 32, 3), "label": LABEL}
    write(root / "cifar10" / "3.0.2", {"train": records(train, train_labels), "test": records(test, test_labels)}, features)
    assert_is(data.load("cifar10"), (train, train_labels), (test, test_labels))


def test_downsampled_imagenet_has_no_labels_and_no_test_split(root):
    (train, _), (valid, _) = draw(NUM_TRAIN, (32, 32, 3)), draw(NUM_TEST, (32, 32, 3), seed=1)
    content = {
        split: [example({"image": png(i)}) for i in images] for split, images in (("train", train), ("validation", valid))
    }
    features = {"image": image_feature(-1, -1, 3)}  # TFDS does not fix its size
    write(root / "downsampled_imagenet" / "32x32" / "2.0.0", content, features, supervised=None)
    loaded = data.load("downsampled_imagenet/32x32")
    held_out = splits.validation_mask(NUM_TRAIN)
    for split, images in (("train", train[~held_out]), ("validation", train[held_out]), ("test", valid)):
        np.testing.assert_array_equal(loaded.examples[split], images)
    assert (loaded.num_classes, loaded.labels) == (None, {})


def test_newest_version_unless_one_is_named(root):
    for version, train in (("3.0.9", draw(20, (28, 28, 1), seed=5)), ("3.0.10", TRAIN)):
        write_mnist(root / "mnist" / version, train=train)
    (root / "mnist" / "incomplete.3.0.11").mkdir()
    assert_is(data.load("mnist"))
    assert len(data.load("mnist:3.0.9").examples["train"]) == 18


def test_default_configuration_is_found(root):
    import tensorflow_datasets as tfds

    write_mnist(Path(tfds.builder("emnist", data_dir=root).data_path))
    assert root / "emnist" / "byclass" in next(root.rglob("dataset_info.json")).parents
    assert_is(data.load("emnist"))


def test_second_time_needs_no_tfds(root, monkeypatch):
    write_mnist(root / "mnist" / "3.0.1")
    data.load("mnist")
    monkeypatch.setitem(sys.modules, "tensorflow_datasets", None)  # an import would fail
    assert_is(data.load("mnist"))


def test_replaced_data_set_is_decoded_again(root):
    folder = write_mnist(root / "mnist" / "3.0.1", train=draw(20, (28, 28, 1), seed=5))
    data.load("mnist")
    kept = root / "kept"
    (folder / "iresnet_jax.decoded").rename(kept)
    shutil.rmtree(folder)
    kept.rename(write_mnist(folder) / "iresnet_jax.decoded")
    assert_is(data.load("mnist"))


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
    assert {split: images.shape for split, images in loaded.examples.items()} == {
        "train": (55_000, 28, 28, 1),
        "validation": (5000, 28, 28, 1),
        "test": (10_000, 28, 28, 1),
    }
    published = np.concatenate([loaded.examples["train"], loaded.examples["validation"]])
    assert published.mean() / 255 == pytest.approx(0.1307, abs=5e-5)
    assert published.std() / 255 == pytest.approx(0.3081, abs=5e-5)
    assert np.bincount(loaded.labels["test"]).tolist() == [980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009]


# Mistakes -----------------------------------------------------------------------------------------------------------------


def test_labels_out_of_range(root):
    write_mnist(root / "mnist" / "3.0.1", test=(TEST[0], np.arange(7, 13)))
    with pytest.raises(
        ValueError, match="label 10 of example 3 of split 'test' of mnist is out of range: there are 10 classes"
    ):
        data.load("mnist")


def test_missing_split(root):
    write(root / "mnist" / "3.0.1", {"train": records_of(*TRAIN)}, {"image": image_feature(28, 28, 1), "label": LABEL})
    with pytest.raises(ValueError, match=r"mnist has no split 'test' \(nor 'validation'\): it has 'train', and both"):
        data.load("mnist")


def test_images_of_different_sizes(root):
    images = [*TRAIN[0][:5], np.zeros((28, 30, 1), np.uint8), *TRAIN[0][5:]]
    records = [example({"image": png(image), "label": 1}) for image in images]
    features = {"image": image_feature(-1, -1, 1), "label": LABEL}
    folder = write(root / "flowers" / "1.0.0", {"train": records, "test": records[:2]}, features)
    with pytest.raises(
        ValueError, match="image 5 of split 'train' of flowers is 28x30x1 where 28x28x1 was expected: all images"
    ):
        data.load("flowers")
    assert not list(folder.glob("*decoded*/*"))


def test_other_file_format(root):
    write_mnist(root / "mnist" / "3.0.1", file_format="tfrecord")
    with pytest.raises(
        ValueError, match=r"mnist was prepared in .*3.0.1 as tfrecord, which only TensorFlow can read: delete that"
    ):
        data.load("mnist")


@pytest.mark.parametrize("damage", [lambda content: content[:-70_000], lambda content: b"\0" * len(content)])
def test_damaged_records(root, damage):
    folder = write_mnist(root / "mnist" / "3.0.1")
    [path] = folder.glob("*-train.array_record-*")
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(
        ValueError, match=r"cannot read split 'train' of mnist in .*3.0.1, which seems damaged: delete it to have"
    ):
        data.load("mnist")
    assert not list(folder.glob("*decoded*/*"))


@pytest.mark.parametrize("content", [b"\xff\xfe{}", b"{", b"[]"], ids=["not UTF-8", "not JSON", "no object"])
def test_damaged_description_is_named(root, content):
    folder = write_mnist(root / "mnist" / "3.0.1")
    (folder / "dataset_info.json").write_bytes(content)
    with pytest.raises(ValueError, match=rf"{folder}/dataset_info.json is damaged: .*; delete its folder to have mnist"):
        data.load("mnist")


def test_a_file_in_the_place_of_the_data_sets_is_named(root):
    root.write_text("a file")
    with pytest.raises(ValueError, match=rf"the folder {root} for mnist is a file, not a folder: check the path"):
        data.load("mnist")


def test_images_without_classes_to_learn(root):
    features = {"image": image_feature(28, 28, 1), "label": feature("Scalar", tensor={"shape": {}, "dtype": "int64"})}
    write(root / "ages" / "1.0.0", {"train": records_of(*TRAIN), "test": records_of(*TEST)}, features)
    with pytest.raises(ValueError, match="ages is not a classification data set: its feature 'label' is not a class"):
        data.load("ages")


# Preparing ----------------------------------------------------------------------------------------------------------------


@pytest.fixture
def tensorflow(monkeypatch):
    """Makes TensorFlow look installed or not."""
    real = importlib.util.find_spec

    def pretend(installed):
        spec = importlib.util.spec_from_loader("tensorflow", None) if installed else None
        monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: spec if name == "tensorflow" else real(name, *a))

    return pretend


def test_unprepared_without_tensorflow_says_what_to_install(root, tensorflow):
    tensorflow(False)
    with pytest.raises(
        ValueError,
        match=rf"kmnist is not prepared in {root}, and preparing needs TensorFlow, once: "
        r"run pip install 'iresnet_jax\[prepare\]' and start again to download it, or set TFDS_DATA_DIR \(or data_dir\)",
    ):
        data.load("kmnist")
    assert not root.exists()


def test_unprepared_with_tensorflow_is_prepared_once(root, tensorflow, monkeypatch):
    import tensorflow_datasets as tfds

    prepared = []

    def download_and_prepare(builder, *, file_format):
        prepared.append(file_format)
        write_mnist(Path(builder.data_path))

    monkeypatch.setattr(tfds.core.DatasetBuilder, "download_and_prepare", download_and_prepare)
    tensorflow(True)
    assert_is(data.load("kmnist"))
    assert_is(data.load("kmnist"))
    assert prepared == ["array_record"]


def test_failure_to_prepare_is_one_sentence(root, tensorflow, monkeypatch):
    import tensorflow_datasets as tfds

    def download_and_prepare(builder, *, file_format):
        raise ConnectionError("Max retries exceeded\n with url: /kmnist")

    monkeypatch.setattr(tfds.core.DatasetBuilder, "download_and_prepare", download_and_prepare)
    tensorflow(True)
    with pytest.raises(RuntimeError, match=rf"download and prepare kmnist in {root}: Max retries exceeded with url: /kmnist"):
        data.load("kmnist")


def test_unknown_configurations_and_other_kinds_of_data_are_refused_before_any_download(root, tensorflow):
    tensorflow(True)
    with pytest.raises(
        ValueError, match="the TFDS data set downsampled_imagenet has no configuration '31x31': it has 32x32, 64x64"
    ):
        data.load("downsampled_imagenet/31x31")
    with pytest.raises(ValueError, match="the TFDS data set mnist has no configuration 'big': it has none"):
        data.load("mnist/big")
    with pytest.raises(ValueError, match=r"TFDS cannot prepare version 9.9.9 of mnist: leave :9.9.9 out of the name"):
        data.load("mnist:9.9.9")
    with pytest.raises(
        ValueError, match="ag_news_subset is not a data set of images with classes: its features are description,"
    ):
        data.load("ag_news_subset")
