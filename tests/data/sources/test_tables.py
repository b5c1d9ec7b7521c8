"""Arrays and tables in files: one file or one a split, headers, classes, contexts, and what is wrong with them."""

import numpy as np
import pytest

from iresnet_jax import data

RNG = np.random.default_rng(0)
X = RNG.normal(size=(60, 2)).astype(np.float32)


def csv(path, rows, header=None):
    lines = [header] if header else []
    path.write_text("\n".join([*lines, *(",".join(map(str, row)) for row in rows)]) + "\n")
    return f"csv:{path}"


def test_one_file_is_split_by_fraction(tmp_path):
    np.save(tmp_path / "mine.npy", X)
    np.savez(tmp_path / "mine.npz", x=X)
    names = [f"npy:{tmp_path}/mine.npy", f"npz:{tmp_path}/mine.npz", csv(tmp_path / "mine.csv", X.astype(str))]
    sets = [data.load(name, fractions=(0.2, 0.1)) for name in names]
    for found in sets:
        assert (len(found.examples["validation"]), len(found.examples["test"])) == (12, 6)
        np.testing.assert_array_equal(found.examples["train"], sets[0].examples["train"])
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


def test_images_of_8_bits_go_the_way_of_images(tmp_path, monkeypatch):
    monkeypatch.setenv("IRESNET_JAX_CACHE_DIR", str(tmp_path / "cache"))
    images = RNG.integers(0, 256, (30, 4, 4)).astype(np.uint8)
    np.savez(tmp_path / "a.npz", x_train=images, x_test=images)
    assert data.load(f"npz:{tmp_path}/a.npz").num_levels == 256
    np.savez(tmp_path / "b.npz", x=images[..., None])
    assert data.load(f"npz:{tmp_path}/b.npz").event_shape == (4, 4, 1)


def test_a_header_names_columns_classes_and_contexts(tmp_path):
    rows = [[*x, label, 0.5 * x[0]] for x, label in zip(X.tolist(), [0, 1] * 30, strict=True)]
    found = data.load(csv(tmp_path / "a.csv", rows, "height,width,label,context_age"))
    assert (found.event_shape, found.num_classes, found.context_dim) == ((2,), 2, 1)
    np.testing.assert_allclose(found.contexts["train"][:, 0], 0.5 * found.examples["train"][:, 0], rtol=1e-6)
    without = data.load(csv(tmp_path / "b.csv", X.tolist()))
    assert without.event_shape == (2,)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a,b\n1,2\n3,\n", r"row 2, column 2 \('b'\) of .* is missing"),
        ("1,2\n3,nan\n", "row 2, column 2 of .* is missing"),
        ("a,b\n1,2\n3,x\n", "'x', which is no number"),
        ("1,2\n3\n", "row 2 of .* has 1 columns"),
        ("", "is empty"),
        ("a,b\n", "a header and no rows"),
        ("a,label\n1.5,0\n2.5,0.5\n", "whole numbers"),
    ],
)
def test_wrong_tables_are_refused_with_row_and_column(tmp_path, text, message):
    (tmp_path / "a.csv").write_text(text)
    with pytest.raises(ValueError, match=message):
        data.load(f"csv:{tmp_path}/a.csv")


def test_damaged_and_missing_files_are_named(tmp_path):
    (tmp_path / "a.npy").write_bytes(b"no array")
    (tmp_path / "latin.csv").write_bytes("é,b\n1,2\n".encode("latin-1"))
    for name, message in {
        "npy:a.npy": "not an intact",
        "npy:b.npy": "does not exist",
        "csv:b.csv": "does not exist",
        "csv:latin.csv": "not UTF-8",
        "npy:.": "no training examples",
    }.items():
        with pytest.raises(ValueError, match=message):
            data.load(name, str(tmp_path))
