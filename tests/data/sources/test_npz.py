"""Arrays of images in one .npz file."""

import numpy as np
import pytest
from image_sets import assert_holds, examples

from iresnet_jax import data


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
            r"data must be vectors \(n, d\) or images \(n, h, w, c\), got shape \(18, 4, 4\): add a channel axis",
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
    assert {path.name for path in tmp_path.iterdir()} <= {"a.npz", ".a.npz.decoded.lock"}  # no half-written cache


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


def test_npz_with_labels_of_the_test_alone(tmp_path, mnist_like):
    (images, _), (test_images, test_labels) = mnist_like
    np.savez(tmp_path / "my.npz", x_train=images, x_test=test_images, y_test=test_labels)
    with pytest.raises(ValueError, match="holds labels of test and none of its training images: add y_train or drop them"):
        data.load(f"npz:{tmp_path / 'my.npz'}")
