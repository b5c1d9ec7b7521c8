"""The binary version of CIFAR, written byte by byte."""

import io
import tarfile

import numpy as np
import pytest
from image_sets import NUM_TEST, NUM_TRAIN, assert_holds

from iresnet_jax import data


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


def write_archive(path, files):
    with tarfile.open(path, "w:gz") as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(f"cifar-10-batches-bin/{name}")
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return path


def test_cifar10_as_its_authors_publish_it(tmp_path, cifar_like):
    archive = write_archive(tmp_path / "cifar-10-binary.tar.gz", cifar10_files(*cifar_like))
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


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (lambda files: {name.removesuffix(".bin"): content for name, content in files.items()}, "lacks data_batch_1.bin"),
        (lambda files: files | {"data_batch_3.bin": files["data_batch_3.bin"][:-1]}, "18437 bytes, not a multiple of 3073"),
        (lambda files: files | {"test_batch.bin": b"\12" + files["test_batch.bin"][1:]}, "label 10 of example 0 .* 'test'"),
        (lambda files: files | {"train.bin": bytes(3074)}, "both CIFAR-10 and CIFAR-100"),
    ],
)
def test_cifar_mistakes_are_explained(tmp_path, cifar_like, changed, message):
    archive = write_archive(tmp_path / "wrong.tar.gz", changed(cifar10_files(*cifar_like)))
    with pytest.raises(ValueError, match=message):
        data.load(f"cifar:{archive}")


def test_damaged_and_missing_archives_are_named(tmp_path, cifar_like):
    archive = write_archive(tmp_path / "cut.tar.gz", cifar10_files(*cifar_like))
    archive.write_bytes(archive.read_bytes()[:5000])
    with pytest.raises(ValueError, match=r"cut.tar.gz is not an intact archive"):
        data.load(f"cifar:{archive}")
    with pytest.raises(ValueError, match=r"nowhere for cifar:.* does not exist"):
        data.load(f"cifar:{tmp_path}/nowhere")
