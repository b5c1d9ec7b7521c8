"""Arrays and tables in files: one file or one a split, headers, classes, contexts, images, and what is wrong with them."""

import numpy as np
import pytest
from image_sets import assert_holds, examples

from iresnet_jax import data

RNG = np.random.default_rng(0)
X = RNG.normal(size=(60, 2)).astype(np.float32)
IMAGES, CLASSES = np.zeros((20, 4, 4), np.uint8), np.arange(20) % 3


def csv(path, rows, header=None):
    lines = [header] if header else []
    path.write_text("\n".join([*lines, *(",".join(map(str, row)) for row in rows)]) + "\n")
    return f"csv:{path}"


def test_one_file_is_split_by_fraction(tmp_path):
    np.save(tmp_path / "mine.npy", X)
    np.savez(tmp_path / "mine.npz", x=X)
    names = [f"npy:{tmp_path}/mine.npy", f"npz:{tmp_path}/mine.npz", csv(tmp_path / "mine.csv", X.astype(str))]
    sets = [data.load(name, fractions=(0.2, 0.1)) for name in names]
    assert {split: len(rows) for split, rows in sets[0].examples.items()} == {"train": 42, "validation": 12, "test": 6}
    assert len({found.fingerprint for found in sets}) == 1


def test_a_folder_holds_a_file_a_split_with_labels_and_contexts(tmp_path):
    for split, rows in {"train": slice(0, 40), "validation": slice(40, 50), "test": slice(50, 60)}.items():
        np.save(tmp_path / f"{split}.npy", X[rows])
        np.save(tmp_path / f"{split}_labels.npy", (X[rows, 0] > 0).astype(int))
        np.save(tmp_path / f"{split}_context.npy", X[rows, :1])
    found = data.load(f"npy:{tmp_path}")
    np.testing.assert_array_equal(found.examples["test"], X[50:])
    np.testing.assert_array_equal(found.labels["test"], X[50:, 0] > 0)
    np.testing.assert_array_equal(found.contexts["validation"], X[40:50, :1])
    assert (found.num_classes, found.context_dim) == (2, 1)


def test_an_npz_file_with_splits_and_contexts_gets_a_validation_split(tmp_path):
    np.savez(tmp_path / "a.npz", x_train=X[:50], context_train=X[:50], x_test=X[50:], context_test=X[50:])
    found = data.load("npz:a.npz", str(tmp_path))
    assert {split: len(rows) for split, rows in found.examples.items()} == {"train": 45, "test": 10, "validation": 5}
    for split, rows in found.examples.items():
        np.testing.assert_array_equal(found.contexts[split], rows)


@pytest.mark.parametrize("labelled", [True, False])
def test_npz_with_the_names_of_keras(tmp_path, mnist_like, labelled):
    train, test = mnist_like
    labels = {"y_train": train[1], "y_test": test[1].astype(np.int64)} if labelled else {}
    np.savez(tmp_path / "mnist.npz", x_train=train[0], x_test=test[0], **labels)
    loaded = data.load(f"npz:{tmp_path}/mnist.npz")
    published = ((images[..., None], of_images if labelled else None) for images, of_images in mnist_like)
    assert_holds(loaded, *published)
    assert loaded.num_classes == (10 if labelled else None)


def test_npz_with_the_names_of_medmnist_keeps_its_validation_split(tmp_path):
    published = {name: examples(12, (4, 4, 3), seed=i) for i, name in enumerate(("train", "val", "test"))}
    images = {f"{name}_images": found for name, (found, _) in published.items()}
    labels = {f"{name}_labels": found[:, None] for name, (_, found) in published.items()}
    np.savez_compressed(tmp_path / "a.npz", **images, **labels)
    loaded = data.load(f"npz:{tmp_path}/a.npz")
    for split, (of_split, labels) in zip(("train", "validation", "test"), published.values(), strict=True):
        np.testing.assert_array_equal(loaded.examples[split], of_split)
        np.testing.assert_array_equal(loaded.labels[split], labels)


def test_a_header_names_columns_classes_and_contexts(tmp_path):
    rows = [[*x, label, 0.5 * x[0]] for x, label in zip(X.tolist(), [0, 1] * 30, strict=True)]
    found = data.load(csv(tmp_path / "a.csv", rows, "height,7,label,context_age"))
    assert (found.event_shape, found.num_classes, found.context_dim) == ((2,), 2, 1)
    np.testing.assert_allclose(found.contexts["train"][:, 0], 0.5 * found.examples["train"][:, 0], rtol=1e-6)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a,b\n1,2\n3,\n", "row 2, column b of .* holds ''"),
        ("1,NA\n3,4\n", "row 1, column 2 of .* holds 'NA'"),
        ("1,2\n3,nan\n", "row 2, column 2 of .* holds 'nan'"),
        ("a,b\n1,2\n3,x\n", "holds 'x'"),
        ("1,2\n3\n", "row 2 of .* has 1 columns"),
        ("", "no rows"),
        ("a,b\n", "no rows"),
        ("a,label\n1.5,0\n2.5,0.5\n", "whole numbers"),
        ("é,b\n1,2\n", "not UTF-8"),
        ('a,b\n1,"2\n' + 40_000 * "3,4\n", "is no table: field larger than .* quotation mark"),
        (",a,b\n0,1,2\n1,3,4\n", "column 1 of .* has no name, .* index=False"),
    ],
)
def test_wrong_tables_are_refused_with_row_and_column(tmp_path, text, message):
    (tmp_path / "a.csv").write_text(text, encoding="latin-1")
    with pytest.raises(ValueError, match=message):
        data.load(f"csv:{tmp_path}/a.csv")


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"x_train": IMAGES, "x_test": IMAGES[:, :3]}, "image 0 of split 'test' of npz:.* is 3x4x1 where 4x4x1"),
        ({"x_train": IMAGES, "y_train": CLASSES - 1, "x_test": IMAGES, "y_test": CLASSES}, "label -1 of example 0"),
        ({"x_train": IMAGES, "y_train": CLASSES, "x_test": IMAGES, "y_test": CLASSES + 1}, "label 3 of example 2 .* 0 to 2"),
        ({"x_train": IMAGES, "y_train": CLASSES, "x_test": IMAGES}, "'test' .* has no labels, unlike the training images"),
        ({"x_train": IMAGES, "x_test": IMAGES, "y_test": CLASSES}, "'test' .* has labels, unlike the training images"),
        ({"x_train": IMAGES, "y_train": CLASSES[:3], "x_test": IMAGES}, r"its 20 images, got int64 of shape \(3,\)"),
        ({"x_train": IMAGES, "y_train": CLASSES / 2, "x_test": IMAGES}, "got float64"),
        ({"x_train": IMAGES / 255, "x_test": IMAGES}, "add a channel axis"),
        ({"images": IMAGES, "labels": CLASSES}, "a.npz holds images, labels: x_train and x_test are needed"),
        ({"x_train": np.array([{"code": 1}])}, "Object arrays cannot be loaded"),  # a pickle, which could run anything
    ],
)
def test_npz_mistakes_are_explained(tmp_path, arrays, message):
    np.savez(tmp_path / "a.npz", **arrays)
    with pytest.raises(ValueError, match=message):
        data.load(f"npz:{tmp_path}/a.npz")
    assert {path.name for path in tmp_path.iterdir()} <= {"a.npz", ".a.npz.decoded.lock"}  # no half-written cache


def test_damaged_and_missing_files_are_named(tmp_path):
    np.savez(tmp_path / "cut.npz", x_train=IMAGES, x_test=IMAGES)
    (tmp_path / "cut.npz").write_bytes((tmp_path / "cut.npz").read_bytes()[:-30])
    np.save(tmp_path / "single.npy", IMAGES)
    (tmp_path / "a.npy").write_bytes(b"no array")
    with (tmp_path / "huge.npy").open("wb") as file:  # a header alone, of more than any memory
        np.lib.format.write_array_header_1_0(file, {"descr": "<f4", "fortran_order": False, "shape": (10**12, 2)})
    for name, message in {
        "npz:cut.npz": "not an intact .npz file",
        "npz:single.npy": "not an intact .npz file",
        "npy:a.npy": "not an intact .npy file",
        "npy:huge.npy": "not an intact .npy file",
        "npy:b.npy": "does not exist",
        "csv:b.csv": "does not exist",
        "npy:.": "no training examples",
    }.items():
        with pytest.raises(ValueError, match=message):
            data.load(name, str(tmp_path))
