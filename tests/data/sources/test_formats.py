"""Readers of files, on archives of the true byte format that the tests write byte by byte."""

import gzip
import io
import struct
import tarfile

import numpy as np
import pytest
from PIL import Image

from iresnet_jax import data
from iresnet_jax.data import splits
from iresnet_jax.data.sources import idx
from iresnet_jax.data.sources.source import Contents, checked

NUM_TRAIN, NUM_TEST = 30, 7


@pytest.fixture(autouse=True)
def _no_other_cache(monkeypatch):
    monkeypatch.delenv("IRESNET_JAX_CACHE_DIR", raising=False)


def examples(num, shape, seed=0, num_classes=10):
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, num_classes, num).astype(np.uint8)
    labels[:2] = 0, num_classes - 1  # so that the number of classes can be told
    return rng.integers(0, 256, (num, *shape), np.uint8), labels


def assert_holds(loaded, train, test):
    """The published examples, each in its split and with its label, in order."""
    held_out = splits.validation_mask(len(train[0]))
    expected = {"train": (train, ~held_out), "validation": (train, held_out), "test": (test, slice(None))}
    assert set(loaded.examples) == set(expected)
    for split, ((images, labels), rows) in expected.items():
        np.testing.assert_array_equal(loaded.examples[split], images[rows])
        assert loaded.examples[split].dtype == np.uint8
        if labels is None:
            assert loaded.labels == {}
        else:
            np.testing.assert_array_equal(loaded.labels[split], labels[rows])
            assert loaded.labels[split].dtype == np.int32
    assert loaded.num_levels == 256


# IDX ----------------------------------------------------------------------------------------------------------------------


def idx_bytes(array, kind=8):
    return bytes([0, 0, kind, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()


def write_idx(folder, train, test, *, suffix="", separator="-"):
    folder.mkdir(parents=True, exist_ok=True)
    for prefix, (images, labels) in (("train", train), ("t10k", test)):
        for kind, array in (("images", images), ("labels", labels)):
            content = idx_bytes(array)
            path = folder / f"{prefix}-{kind}{separator}idx{array.ndim}-ubyte{suffix}"
            path.write_bytes(gzip.compress(content) if suffix == ".gz" else content)
    return folder


@pytest.fixture
def mnist_like():
    return examples(NUM_TRAIN, (28, 28)), examples(NUM_TEST, (28, 28), seed=1)


@pytest.mark.parametrize("naming", [{}, {"suffix": ".gz"}, {"separator": "."}])
def test_idx_files_as_mnist_is_published(tmp_path, mnist_like, naming):
    train, test = mnist_like
    write_idx(tmp_path / "mnist", train, test, **naming)
    loaded = data.load("idx:mnist", data_dir=str(tmp_path))
    assert_holds(loaded, (train[0][..., None], train[1]), (test[0][..., None], test[1]))
    assert (loaded.name, loaded.num_classes, loaded.event_shape) == ("idx:mnist", 10, (28, 28, 1))


def test_idx_prefers_the_unpacked_file_beside_its_archive(tmp_path, mnist_like):
    write_idx(tmp_path, *mnist_like)
    write_idx(tmp_path, examples(4, (9, 9)), examples(4, (9, 9)), suffix=".gz")
    assert data.load(f"idx:{tmp_path}").event_shape == (28, 28, 1)


def test_idx_header_is_big_endian(tmp_path):
    """Bytes as they stand in the description of the format, not made by the writer above."""
    path = tmp_path / "file"
    path.write_bytes(bytes([0, 0, 8, 3, 0, 0, 0, 2, 0, 0, 0, 1, 0, 0, 0, 3, 10, 11, 12, 20, 21, 22]))
    np.testing.assert_array_equal(idx.read(path), [[[10, 11, 12]], [[20, 21, 22]]])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            idx_bytes(np.zeros((2, 3, 3), np.uint8))[:-1],
            r"should hold 2 x 3 x 3 = 18 bytes after its header but holds 17: fetch",
        ),
        (idx_bytes(np.zeros((2, 3, 3), np.uint8)) + b"\0", "but holds 19"),
        (idx_bytes(np.zeros((2, 3, 3), np.uint8))[:9], "truncated within its header"),
        (idx_bytes(np.zeros((2, 3), np.float32), kind=13), "holds values of IDX type 13: only unsigned bytes"),
        (b"<html>not found</html>", "is not an IDX file"),
        # Without the time of day, which would give the test another name in every process.
        (
            gzip.compress(idx_bytes(np.zeros((2, 3, 3), np.uint8)), mtime=0)[:-5],
            "is not an intact gzip file: .*; fetch it again",
        ),
        (gzip.compress(b"", mtime=0)[:4] + b"\xff" * 20, "is not an intact gzip file"),
        (b"", "is not an IDX file"),
    ],
)
def test_damaged_idx_files_are_refused(tmp_path, content, message):
    path = tmp_path / "train-images-idx3-ubyte"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message):
        idx.read(path)


def test_missing_and_ambiguous_idx_files_are_named(tmp_path, mnist_like):
    write_idx(tmp_path, *mnist_like)
    (tmp_path / "t10k-labels-idx1-ubyte").unlink()
    with pytest.raises(ValueError, match=r"one file t10k-labels or test-labels-idx1-ubyte\[.gz\] in .* test split, found none"):
        data.load(f"idx:{tmp_path}")
    write_idx(tmp_path, *mnist_like)
    (tmp_path / "emnist-train-images-idx3-ubyte.gz").touch()
    with pytest.raises(ValueError, match=r"found emnist-train-images-idx3-ubyte.gz, train-images-idx3-ubyte"):
        data.load(f"idx:{tmp_path}")


def test_idx_images_and_labels_mixed_up(tmp_path, mnist_like):
    write_idx(tmp_path, *mnist_like)
    (tmp_path / "train-labels-idx1-ubyte").write_bytes((tmp_path / "train-images-idx3-ubyte").read_bytes())
    with pytest.raises(ValueError, match=r"should have 3 \(or 4\) dimensions and 1, but have 3 and 3"):
        data.load(f"idx:{tmp_path}")


# CIFAR --------------------------------------------------------------------------------------------------------------------


def cifar_bytes(images, *labels):
    """Label bytes, then the red, the green and the blue plane of each image."""
    rows = [
        bytes(int(of_label[i]) for of_label in labels) + b"".join(image[:, :, channel].tobytes() for channel in range(3))
        for i, image in enumerate(images)
    ]
    return b"".join(rows)


def cifar10_files(train, test):
    parts = np.array_split(np.arange(len(train[0])), 5)
    files = {f"data_batch_{i + 1}.bin": cifar_bytes(train[0][rows], train[1][rows]) for i, rows in enumerate(parts)}
    return {**files, "test_batch.bin": cifar_bytes(*test), "batches.meta.txt": b"airplane\n"}


def write_archive(path, folder, files):
    with tarfile.open(path, "w:gz") as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(f"{folder}/{name}")
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return path


@pytest.fixture
def cifar_like():
    return examples(NUM_TRAIN, (32, 32, 3)), examples(NUM_TEST, (32, 32, 3), seed=1)


def test_cifar10_as_its_authors_publish_it(tmp_path, cifar_like):
    archive = write_archive(tmp_path / "cifar-10-binary.tar.gz", "cifar-10-batches-bin", cifar10_files(*cifar_like))
    loaded = data.load(f"cifar:{archive}")
    assert_holds(loaded, *cifar_like)
    assert (loaded.num_classes, loaded.event_shape) == (10, (32, 32, 3))
    with tarfile.open(archive) as unpacking:
        unpacking.extractall(tmp_path, filter="data")
    assert_holds(data.load(f"cifar:{tmp_path}/cifar-10-batches-bin"), *cifar_like)


def test_cifar100_has_the_fine_label_second(tmp_path, cifar_like):
    (train, train_labels), (test, test_labels) = cifar_like
    coarse = np.arange(NUM_TRAIN) % 20
    (tmp_path / "train.bin").write_bytes(cifar_bytes(train, coarse, train_labels + 90))
    (tmp_path / "test.bin").write_bytes(cifar_bytes(test, coarse[:NUM_TEST], test_labels + 90))
    loaded = data.load(f"cifar:{tmp_path}")
    assert_holds(loaded, (train, train_labels + 90), (test, test_labels + 90))
    assert loaded.num_classes == 100


def test_cifar_mistakes_are_explained(tmp_path, cifar_like):
    files = cifar10_files(*cifar_like)
    with pytest.raises(ValueError, match=r"there is no folder or file .*nowhere for cifar:.*: check the path"):
        data.load(f"cifar:{tmp_path}/nowhere")
    python_version = {name.removesuffix(".bin"): content for name, content in files.items()}
    archive = write_archive(tmp_path / "python.tar.gz", "cifar-10-batches-py", python_version)
    with pytest.raises(ValueError, match=r"lacks data_batch_1.bin.*: the binary version of CIFAR is needed"):
        data.load(f"cifar:{archive}")
    cut = write_archive(tmp_path / "cut.tar.gz", "x", {**files, "data_batch_3.bin": files["data_batch_3.bin"][:-1]})
    with pytest.raises(ValueError, match=r"data_batch_3.bin in .* has 18437 bytes, not a multiple of 3073: it is damaged"):
        data.load(f"cifar:{cut}")
    cut.write_bytes(cut.read_bytes()[:5000])
    with pytest.raises(ValueError, match=r"is not an intact archive: .*; fetch it again"):
        data.load(f"cifar:{cut}")
    images, labels = cifar_like[1]
    wrong = write_archive(tmp_path / "wrong.tar.gz", "x", {**files, "test_batch.bin": cifar_bytes(images, labels + 5)})
    with pytest.raises(
        ValueError, match=r"label 1\d of example \d of split 'test' of .* there are 10 classes, so labels run from 0"
    ):
        data.load(f"cifar:{wrong}")


# NPZ ----------------------------------------------------------------------------------------------------------------------


def test_npz_with_the_names_of_keras(tmp_path, mnist_like):
    train, test = mnist_like
    np.savez(tmp_path / "mnist.npz", x_train=train[0], y_train=train[1], x_test=test[0], y_test=test[1].astype(np.int64))
    loaded = data.load(f"npz:{tmp_path}/mnist.npz")
    assert_holds(loaded, (train[0][..., None], train[1]), (test[0][..., None], test[1]))
    assert loaded.num_classes == 10


def test_npz_with_the_names_of_medmnist_keeps_its_validation_split(tmp_path, cifar_like):
    (train, train_labels), (test, test_labels) = cifar_like
    val, val_labels = examples(5, (32, 32, 3), seed=2)
    arrays = {"train_images": train, "val_images": val, "test_images": test}
    labels = {"train_labels": train_labels, "val_labels": val_labels, "test_labels": test_labels}
    np.savez_compressed(tmp_path / "a.npz", **arrays, **{name: array[:, None] for name, array in labels.items()})
    loaded = data.load(f"npz:{tmp_path}/a.npz")
    for split, images, of_images in (
        ("train", train, train_labels),
        ("validation", val, val_labels),
        ("test", test, test_labels),
    ):
        np.testing.assert_array_equal(loaded.examples[split], images)
        np.testing.assert_array_equal(loaded.labels[split], of_images)


def test_npz_without_labels(tmp_path, cifar_like):
    (train, _), (test, _) = cifar_like
    np.savez(tmp_path / "a.npz", x_train=train, x_test=test)
    loaded = data.load(f"npz:{tmp_path}/a.npz")
    assert_holds(loaded, (train, None), (test, None))
    assert loaded.num_classes is None


X, Y = np.zeros((20, 4, 4), np.uint8), np.arange(20) % 3


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        (
            {"x_train": X, "x_test": X[:, :3]},
            r"image 0 of split 'test' of npz:.* is 3x4x1 where 4x4x1 was expected: all images must",
        ),
        (
            {"x_train": X, "y_train": Y, "x_test": X, "y_test": Y + 1},
            r"label 3 of example 2 of split 'test' .* labels run from 0 to 2",
        ),
        (
            {"x_train": X, "y_train": Y - 1, "x_test": X, "y_test": Y},
            r"label -1 of example 0 of split 'train' of npz:.* out of range",
        ),
        ({"x_train": X, "y_train": Y}, r"npz:.* has no split 'test' \(nor 'validation'\): it has 'train', and both"),
        ({"x_test": X, "y_test": Y}, r"npz:.* has no split 'train': it has 'test', and both 'train' and 'test' are needed"),
        ({"x_train": X[:1], "x_test": X}, r"split 'train' of npz:.* holds 1 examples: at least 2 are needed"),
        ({"x_train": X, "x_test": X[:0]}, r"split 'test' of npz:.* holds 0 examples: at least 1 are needed"),
        ({"x_train": X, "y_train": Y, "x_test": X}, r"split 'test' of npz:.* has no labels although the training images have"),
        (
            {"x_train": X / 255, "x_test": X},
            r"x_train of .*a.npz must be uint8 with levels 0 to 255 .*, got float64 of shape \(20, 4, 4\)",
        ),
        (
            {"x_train": X, "y_train": Y[:3], "x_test": X},
            r"y_train of .* must hold one integer for each of 20 images, got int64 of shape \(3,\)",
        ),
        ({"x_train": X, "y_train": Y / 2, "x_test": X}, "must hold one integer .*, got float64"),
        ({"images": X, "labels": Y}, "a.npz holds images, labels: x_train and x_test are needed"),
    ],
)
def test_npz_mistakes_are_explained(tmp_path, arrays, message):
    np.savez(tmp_path / "a.npz", **arrays)
    with pytest.raises(ValueError, match=message):
        data.load(f"npz:{tmp_path}/a.npz")
    assert {path.name for path in tmp_path.iterdir()} == {"a.npz", ".a.npz.decoded.lock"}  # no half-written cache


def test_npz_that_is_none_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"the file .*a.npz for npz:.* does not exist: check the path"):
        data.load(f"npz:{tmp_path}/a.npz")
    np.savez(tmp_path / "a.npz", x_train=X, x_test=X)
    whole = (tmp_path / "a.npz").read_bytes()
    (tmp_path / "a.npz").write_bytes(whole[:-30])
    with pytest.raises(ValueError, match=r"is not an intact .npz file of plain arrays"):
        data.load(f"npz:{tmp_path}/a.npz")
    np.savez(tmp_path / "a.npz", x_train=np.array([{"code": 1}]))  # a pickle, which could run anything
    with pytest.raises(ValueError, match="of plain arrays: Object arrays cannot be loaded"):
        data.load(f"npz:{tmp_path}/a.npz")
    np.save(tmp_path / "b", X)
    with pytest.raises(ValueError, match=r"is not an intact .npz file"):
        data.load(f"npz:{tmp_path}/b.npy")


# Folders of images --------------------------------------------------------------------------------------------------------


def write_folder(folder, images, labels=None):
    for i, image in enumerate(images):
        path = folder / ("" if labels is None else f"class{labels[i]}") / f"{i:03d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(path)


def in_order_of_files(images, labels):
    order = np.lexsort((np.arange(len(images)), labels))  # by class, then by name
    return images[order], labels[order]


@pytest.mark.parametrize("shape", [(9, 7), (9, 7, 3)])
def test_folder_of_images_by_class(tmp_path, shape):
    train, test = examples(NUM_TRAIN, shape, num_classes=3), examples(NUM_TEST, shape, seed=1, num_classes=3)
    write_folder(tmp_path / "train", *train)
    write_folder(tmp_path / "test", *test)
    (tmp_path / "train/class0/notes.txt").touch()
    (tmp_path / "train/class0/._001.png").touch()
    loaded = data.load(f"folder:{tmp_path}")
    train, test = in_order_of_files(*train), in_order_of_files(*test)
    channels = 1 if len(shape) == 2 else 3
    assert_holds(loaded, (train[0].reshape(-1, 9, 7, channels), train[1]), (test[0].reshape(-1, 9, 7, channels), test[1]))
    assert (loaded.num_classes, loaded.event_shape) == (3, (9, 7, channels))


def test_folder_without_classes_and_with_validation(tmp_path):
    (train, _), (val, _), (test, _) = (examples(12, (5, 5), seed=i) for i in range(3))
    for split, images in (("train", train), ("val", val), ("test", test)):
        write_folder(tmp_path / split, images)
    loaded = data.load(f"folder:{tmp_path}")
    for split, images in (("train", train), ("validation", val), ("test", test)):
        np.testing.assert_array_equal(loaded.examples[split][..., 0], images)
    assert (loaded.num_classes, loaded.labels) == (None, {})


def test_folder_mistakes_are_explained(tmp_path):
    images, labels = examples(6, (5, 5), num_classes=2)
    with pytest.raises(ValueError, match=r"the folder .*nowhere for folder:.* does not exist: check the path"):
        data.load(f"folder:{tmp_path}/nowhere")
    with pytest.raises(ValueError, match="has no split 'train': it has none"):
        data.load(f"folder:{tmp_path}")
    write_folder(tmp_path / "train", images, labels)
    write_folder(tmp_path / "test", images, labels + 1)
    with pytest.raises(
        ValueError, match=r"the class of .*test/class2/\d+.png does not occur in .*train: folder:.* needs training"
    ):
        data.load(f"folder:{tmp_path}")


@pytest.mark.parametrize(
    ("image", "file", "message"),
    [
        (np.zeros((5, 6), np.uint8), "train/class0/x.png", r"train/class0/x.png is 5x6x1 where 5x5x1 was expected"),
        (np.zeros((5, 5, 3), np.uint8), "train/class0/x.png", r"train/class0/x.png is 5x5x3 where 5x5x1 was expected"),
        (np.zeros((5, 5, 4), np.uint8), "train/class0/x.png", "x.png has pixels of type RGBA: convert it to 8-bit grey or RGB"),
        (np.zeros((5, 5), np.uint8), "train/x.png", "train/x.png lies beside the folders of the classes: move it into one"),
        (None, "test/class1/x.png", "test/class1/x.png is not an intact image: cannot identify"),
    ],
)
def test_images_that_do_not_belong_are_named(tmp_path, image, file, message):
    for split in ("train", "test"):
        write_folder(tmp_path / split, *examples(6, (5, 5), num_classes=2))
    if image is None:
        (tmp_path / file).write_bytes(b"GIF89a, says its maker")
    else:
        Image.fromarray(image).save(tmp_path / file)
    with pytest.raises(ValueError, match=message):
        data.load(f"folder:{tmp_path}")
    assert not list(tmp_path.glob("*decoded*/*"))


def test_truncated_image_is_named(tmp_path):
    for split in ("train", "test"):
        write_folder(tmp_path / split, *examples(6, (25, 25), num_classes=2))
    path = next((tmp_path / "train/class1").iterdir())
    path.write_bytes(path.read_bytes()[:-400])
    with pytest.raises(ValueError, match=f"{path} is not an intact image"):
        data.load(f"folder:{tmp_path}")


# Splits and checks --------------------------------------------------------------------------------------------------------


def test_validation_split_is_pinned():
    """Reported numbers belong to this very split: if one of these changes, they are void."""
    assert np.flatnonzero(splits.validation_mask(30)).tolist() == [8, 20, 23]
    assert [splits.validation_mask(n).sum() for n in (2, 19, 20, 1000, 50_000, 60_000)] == [1, 1, 2, 100, 5000, 5000]
    assert np.flatnonzero(splits.validation_mask(60_000))[:4].tolist() == [8, 20, 23, 31]


def test_validation_never_comes_from_the_test_split():
    routes = splits.routes({"train": 100, "test": 10}, "x")
    assert {published: set(ours) for published, ours in routes.items()} == {"train": {"train", "validation"}, "test": {"test"}}
    assert not np.any(routes["train"]["train"] & routes["train"]["validation"])
    assert np.all(routes["train"]["train"] | routes["train"]["validation"])
    published = splits.routes({"train": 100, "validation": 20, "test": 10, "extra": 5}, "x")
    assert {p: {s: int(m.sum()) for s, m in ours.items()} for p, ours in published.items()} == {
        "train": {"train": 100},
        "validation": {"validation": 20},
        "test": {"test": 10},
    }
    only = splits.routes({"train": 100, "validation": 20}, "x")  # as the downsampled ImageNet
    assert {p: {s: int(m.sum()) for s, m in ours.items()} for p, ours in only.items()} == {
        "train": {"train": 90, "validation": 10},
        "validation": {"test": 20},
    }


def contents(chunks, num=4, num_classes=3):
    return Contents({"train": num}, num_classes, lambda split: iter(chunks))


@pytest.mark.parametrize(
    ("chunk", "message"),
    [
        (
            (X[:3, ..., None], Y[:3]),
            "split 'train' of x should hold 4 examples but holds 3: its files are damaged, fetch them again",
        ),
        ((X[:5, ..., None], Y[:5]), "should hold 4 examples but holds more"),
        ((X[:4, ..., None], Y[:3]), "split 'train' of x has 3 labels for 4 images"),
        (
            (X[:4, ..., None].astype(np.uint16), Y[:4]),
            r"must hold uint8 images .* got uint16 of shape \(4, 4, 1\): convert them first",
        ),
        ((X[:4], Y[:4]), r"got uint8 of shape \(4, 4\)"),
    ],
)
def test_sources_that_break_their_word_are_refused(chunk, message):
    with pytest.raises(ValueError, match=message):
        list(checked("x", contents([chunk]), "train"))


def test_unknown_names_and_formats_list_the_known_ones():
    expected = (
        r"unknown data set '{}': known are the images digits, mnist, .*, the toys .*moons.*, and own images as idx:PATH, "
    )
    for name in ("moon", "h5:/a/b", "../mnist", "", "mnist:", "/etc/passwd"):
        with pytest.raises(ValueError, match=expected.format(name)):
            data.load(name)


def test_hidden_folders_are_no_classes_and_a_split_has_one_name(tmp_path, mnist_like):
    images = np.zeros((2, 8, 8), np.uint8)
    for of_class in ("cat", "dog", ".ipynb_checkpoints", "cat/.thumbs"):
        for split in ("train", "test"):
            folder = tmp_path / split / of_class
            folder.mkdir(parents=True)
            for i, image in enumerate(images):
                Image.fromarray(image).save(folder / f"{i}.png")
    assert data.load(f"folder:{tmp_path}").num_classes == 2
    (tmp_path / "val").mkdir()
    (tmp_path / "validation").mkdir()
    with pytest.raises(ValueError, match="has both validation and val: remove or rename one of them"):
        data.load(f"folder:{tmp_path}")


def test_a_folder_with_both_versions_of_cifar_is_ambiguous(tmp_path, cifar_like):
    for name, content in cifar10_files(*cifar_like).items():
        (tmp_path / name).write_bytes(content)
    for name in ("train.bin", "test.bin"):
        (tmp_path / name).write_bytes(bytes(3074))
    with pytest.raises(ValueError, match="holds both CIFAR-10 and CIFAR-100: give the folder of one of them"):
        data.load(f"cifar:{tmp_path}")


def test_npz_with_labels_of_the_test_alone(tmp_path, mnist_like):
    (images, _), (test_images, test_labels) = mnist_like
    np.savez(tmp_path / "my.npz", x_train=images, x_test=test_images, y_test=test_labels)
    with pytest.raises(ValueError, match="holds labels of test and none of its training images: add y_train or drop them"):
        data.load(f"npz:{tmp_path / 'my.npz'}")
