"""Images in every format, arrays and tables in files, and what is wrong with them."""

import functools
import gzip
import io
import struct

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_digits

from iresnet_jax import data
from iresnet_jax.data.dataset import SPLITS, validation_mask
from iresnet_jax.data.images import split_digits


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("IRESNET_JAX_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path / "tfds"))


def examples(num, shape, seed=0):
    """Random images sorted by class, as folders of classes give them, of which all ten occur."""
    rng = np.random.default_rng(seed)
    return rng.integers(0, 256, (num, *shape), np.uint8), np.sort(np.arange(num) % 10).astype(
        np.uint8
    )


GREY = examples(40, (28, 28, 1)), examples(10, (28, 28, 1), seed=1)
COLOUR = examples(40, (32, 32, 3)), examples(10, (32, 32, 3), seed=1)


def idx_bytes(array, kind=8):
    return (
        bytes([0, 0, kind, array.ndim])
        + struct.pack(f">{array.ndim}I", *array.shape)
        + array.tobytes()
    )


def write_idx(folder, train, test, *, ending="", separator="-"):
    """Images and labels as the files of MNIST are called."""
    folder.mkdir(parents=True, exist_ok=True)
    for prefix, (images, labels) in (("train", train), ("t10k", test)):
        for kind, array in (("images", images[..., 0]), ("labels", labels)):
            content = idx_bytes(array)
            path = folder / f"{prefix}-{kind}{separator}idx{array.ndim}-ubyte{ending}"
            path.write_bytes(gzip.compress(content) if ending else content)
    return f"idx:{folder}"


def write_npz(folder, train, test):
    folder.mkdir(parents=True, exist_ok=True)
    np.savez(folder / "a.npz", x_train=train[0], y_train=train[1], x_test=test[0], y_test=test[1])
    return f"npz:{folder}/a.npz"


def cifar_records(images, labels, before=b""):
    """The label, then the red, the green and the blue plane of each image."""
    return [
        before + bytes([label]) + image.transpose(2, 0, 1).tobytes()
        for image, label in zip(images, labels, strict=True)
    ]


def cifar10_files(train, test):
    records = cifar_records(*train)
    files = {f"data_batch_{i + 1}.bin": b"".join(records[8 * i : 8 * i + 8]) for i in range(5)}
    return {
        **files,
        "test_batch.bin": b"".join(cifar_records(*test)),
        "batches.meta.txt": b"airplane\n",
    }


def write_cifar(folder, train, test, change=lambda files: files):
    inside = folder / "cifar-10-batches-bin"
    inside.mkdir(parents=True, exist_ok=True)
    for name, content in change(cifar10_files(train, test)).items():
        (inside / name).write_bytes(content)
    return f"cifar:{folder}"


def save(path, pixels):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels).save(path, "PNG")


def write_folder(folder, train, test):
    for split, (images, labels) in (("train", train), ("test", test)):
        for number, (image, label) in enumerate(zip(images, labels, strict=True)):
            save(folder / split / f"class{label}" / f"{number:03d}.png", image)
    (folder / "train/class0/notes.txt").touch()
    (folder / "train/class0/._001.png").touch()
    save(folder / "train/.ipynb_checkpoints/000.png", train[0][0])
    return f"folder:{folder}"


@functools.cache
def tfds():
    """TFDS, imported by the one process that runs this file, and not by all, which collect it."""
    import tensorflow_datasets

    return tensorflow_datasets


def write_tfds(folder, train, test, *, version="3.0.1", shards=1, test_split="test"):
    """A prepared data set, by the writer of TFDS."""
    place = folder.parent / "tfds" / "mnist" / version
    place.mkdir(parents=True)
    identity = tfds().core.dataset_info.DatasetIdentity(
        name="mnist", version=version, data_dir=str(place), module_name=""
    )
    kinds = {"image": tfds().features.Image(shape=(None, None, train[0].shape[-1]))}
    if train[1] is not None:
        kinds |= {
            "label": tfds().features.ClassLabel(num_classes=10),
            "id": tfds().features.Text(),
        }
    info = tfds().core.DatasetInfo(
        builder=identity,
        features=tfds().features.FeaturesDict(kinds),
        supervised_keys=("image", "label") if train[1] is not None else None,
    )
    size = -(-len(train[0]) // shards)
    writer = tfds().core.SequentialWriter(
        info, max_examples_per_shard=size, overwrite=True, file_format="array_record"
    )
    records = {split: [] for split in ("train", test_split)}
    for split, (images, labels) in zip(records, (train, test), strict=True):
        for number, image in enumerate(images):
            encoded = io.BytesIO()  # as TFDS takes an image where TensorFlow is not installed
            Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image).save(encoded, "PNG")
            encoded.seek(0)
            others = {} if labels is None else {"label": labels[number], "id": "x"}
            records[split].append({"image": encoded, **others})
    writer.initialize_splits(list(records))
    writer.add_examples(records)
    writer.close_all()
    return "mnist"


def assert_holds(loaded, train, test):
    """The published examples, each in its split and with its label, in order."""
    held_out = validation_mask(len(train[0]))
    expected = {
        "train": (train, ~held_out),
        "validation": (train, held_out),
        "test": (test, slice(None)),
    }
    assert set(loaded.examples) == set(expected)
    for split, ((images, labels), rows) in expected.items():
        np.testing.assert_array_equal(loaded.examples[split], images[rows])
        assert loaded.examples[split].dtype == np.uint8
        if labels is not None:
            np.testing.assert_array_equal(loaded.labels[split], labels[rows])
            assert loaded.labels[split].dtype == np.int32
    assert (loaded.num_levels, loaded.num_classes) == (256, None if train[1] is None else 10)


FORMATS = {
    "idx": (functools.partial(write_idx, ending=".gz"), GREY),
    "idx, as some archives unpack": (functools.partial(write_idx, separator="."), GREY),
    "npz": (write_npz, GREY),
    "cifar": (write_cifar, COLOUR),
    "folder": (write_folder, GREY),
    "tfds": (functools.partial(write_tfds, shards=3), COLOUR),
}


@pytest.mark.parametrize("form", FORMATS)
def test_every_format_gives_the_published_images_and_one_fingerprint(tmp_path, form):
    write, (train, test) = FORMATS[form]
    name = write(tmp_path / "set", train, test)
    first = data.load(name)
    assert_holds(first, train, test)
    again = data.load(name)  # decoded images are mapped
    assert_holds(again, train, test)
    of_arrays = data.load(write_npz(tmp_path / "other", train, test))
    assert first.fingerprint == again.fingerprint == of_arrays.fingerprint
    assert (first.name, first.event_shape) == (name, train[0].shape[1:])


def test_cifar100_has_the_fine_label_second(tmp_path):
    for (images, labels), name in zip(COLOUR, ("train", "test"), strict=True):
        (tmp_path / f"{name}.bin").write_bytes(
            b"".join(cifar_records(images, labels + 90, before=b"\3"))
        )
    loaded = data.load(f"cifar:{tmp_path}")
    np.testing.assert_array_equal(loaded.examples["test"], COLOUR[1][0])
    np.testing.assert_array_equal(loaded.labels["test"], COLOUR[1][1] + 90)
    assert loaded.num_classes == 100


def test_npz_with_the_names_of_medmnist_keeps_its_validation_split(tmp_path):
    published = {
        name: examples(20, (4, 4, 3), seed=i) for i, name in enumerate(("train", "val", "test"))
    }
    images = {f"{name}_images": found for name, (found, _) in published.items()}
    labels = {f"{name}_labels": found[:, None] for name, (_, found) in published.items()}
    np.savez_compressed(tmp_path / "a.npz", **images, **labels)
    loaded = data.load(f"npz:{tmp_path}/a.npz")
    for split, (of_split, labels) in zip(SPLITS, published.values(), strict=True):
        np.testing.assert_array_equal(loaded.examples[split], of_split)
        np.testing.assert_array_equal(loaded.labels[split], labels)


def test_digits_keep_their_labels_and_lose_no_image_and_every_split_has_its_share_of_each():
    pixels, classes = load_digits(return_X_y=True)
    digits, splits = data.load("digits"), split_digits(classes)
    assert (digits.num_levels, digits.num_classes, digits.event_shape) == (17, 10, (8, 8, 1))
    np.testing.assert_array_equal(np.sort(np.concatenate(list(splits.values()))), np.arange(1797))
    for split, share in zip(SPLITS, (0.7, 0.1, 0.2), strict=True):
        np.testing.assert_array_equal(digits.examples[split].reshape(-1, 64), pixels[splits[split]])
        np.testing.assert_array_equal(digits.labels[split], classes[splits[split]])
        assert np.all(
            np.abs(np.bincount(classes[splits[split]]) - share * np.bincount(classes)) < 2
        )


def test_what_is_not_prepared_is_prepared_once(tmp_path, monkeypatch):
    prepared = []

    def prepare(builder, *, file_format):
        prepared.append(file_format)
        write_tfds(tmp_path / "set", *GREY)

    monkeypatch.setattr(tfds().core.DatasetBuilder, "download_and_prepare", prepare)
    monkeypatch.setattr("importlib.util.find_spec", lambda name, *rest: True)
    for _ in range(2):
        assert_holds(data.load("mnist"), *GREY)
    assert prepared == ["array_record"]


X = np.random.default_rng(0).normal(size=(60, 2)).astype(np.float32)


def csv(path, rows, header=None):
    lines = [header] if header else []
    path.write_text("\n".join([*lines, *(",".join(map(str, row)) for row in rows)]) + "\n")
    return f"csv:{path}"


def test_one_file_is_split_by_fraction(tmp_path):
    np.save(tmp_path / "mine.npy", X)
    np.savez(tmp_path / "mine.npz", x=X)
    names = [
        f"npy:{tmp_path}/mine.npy",
        f"npz:{tmp_path}/mine.npz",
        csv(tmp_path / "mine.csv", X.astype(str)),
    ]
    sets = [data.load(name, fractions=(0.2, 0.1)) for name in names]
    assert {split: len(rows) for split, rows in sets[0].examples.items()} == {
        "train": 42,
        "validation": 12,
        "test": 6,
    }
    assert len({found.fingerprint for found in sets}) == 1


def test_a_folder_holds_a_file_a_split_with_labels_and_contexts(tmp_path):
    for split, rows in {
        "train": slice(0, 40),
        "validation": slice(40, 50),
        "test": slice(50, 60),
    }.items():
        np.save(tmp_path / f"{split}.npy", X[rows])
        np.save(tmp_path / f"{split}_labels.npy", (X[rows, 0] > 0).astype(int))
        np.save(tmp_path / f"{split}_context.npy", X[rows, :1])
    found = data.load(f"npy:{tmp_path}")
    np.testing.assert_array_equal(found.examples["test"], X[50:])
    np.testing.assert_array_equal(found.labels["test"], X[50:, 0] > 0)
    np.testing.assert_array_equal(found.contexts["validation"], X[40:50, :1])
    assert (found.num_classes, found.context_dim) == (2, 1)


def test_a_header_names_columns_classes_and_contexts(tmp_path):
    rows = [[*x, label, 0.5 * x[0]] for x, label in zip(X.tolist(), [0, 1] * 30, strict=True)]
    found = data.load(csv(tmp_path / "a.csv", rows, "height,7,label,context_age"))
    assert (found.event_shape, found.num_classes, found.context_dim) == ((2,), 2, 1)
    assert [column.name for column in found.columns] == ["height", "7"]
    np.testing.assert_allclose(
        found.contexts["train"][:, 0], 0.5 * found.examples["train"][:, 0], rtol=1e-6
    )


# Mistakes -----------------------------------------------------------------------------------------
