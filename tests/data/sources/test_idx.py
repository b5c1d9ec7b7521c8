"""IDX files, written byte by byte."""

import gzip
import struct

import numpy as np
import pytest
from image_sets import assert_holds, examples

from iresnet_jax import data
from iresnet_jax.data.sources import idx


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
