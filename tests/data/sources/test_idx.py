"""IDX files, written byte by byte."""

import gzip

import numpy as np
import pytest
from image_sets import assert_holds, examples, idx_bytes, write_idx

from iresnet_jax import data
from iresnet_jax.data.sources import idx

TWO_IMAGES = idx_bytes(np.zeros((2, 3, 3), np.uint8))


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
        (TWO_IMAGES[:-1], r"2 x 3 x 3 = 18 bytes .* holds 17"),
        (TWO_IMAGES + b"\0", "holds 19"),
        (TWO_IMAGES[:9], "within its header"),
        (idx_bytes(np.zeros((2, 3), np.float32), kind=13), "type 13"),
        (b"<html>not found</html>", "not an IDX file"),
        # Without the time of day, which would give the test another name in every process.
        (gzip.compress(TWO_IMAGES, mtime=0)[:-5], "not an intact gzip file"),
        (gzip.compress(b"", mtime=0)[:4] + b"\xff" * 20, "not an intact gzip file"),
        (b"", "not an IDX file"),
    ],
)
def test_damaged_idx_files_are_refused(tmp_path, content, message):
    path = tmp_path / "train-images-idx3-ubyte"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message):
        idx.read(path)


def test_missing_ambiguous_and_mixed_up_idx_files_are_named(tmp_path, mnist_like):
    write_idx(tmp_path, *mnist_like)
    labels = tmp_path / "train-labels-idx1-ubyte"
    labels.rename(tmp_path / "kept")
    with pytest.raises(ValueError, match=r"one file train-labels-idx1-ubyte\[.gz\] in .* train split, found none"):
        data.load(f"idx:{tmp_path}")
    labels.write_bytes((tmp_path / "train-images-idx3-ubyte").read_bytes())
    with pytest.raises(ValueError, match=r"label of each of its 30 images, got uint8 of shape \(30, 28, 28\)"):
        data.load(f"idx:{tmp_path}")
    (tmp_path / "emnist-train-images-idx3-ubyte.gz").touch()
    with pytest.raises(ValueError, match=r"found emnist-train-images-idx3-ubyte.gz, train-images-idx3-ubyte"):
        data.load(f"idx:{tmp_path}")
