"""Folders of image files."""

import os

import numpy as np
import pytest
from image_sets import NUM_TEST, NUM_TRAIN, assert_holds, examples
from PIL import Image

from iresnet_jax import data


def write_folder(folder, images, labels=None):
    for i, image in enumerate(images):
        path = folder / ("" if labels is None else f"class{labels[i]}") / f"{i:03d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(path)


def in_order_of_files(images, labels):
    order = np.lexsort((np.arange(len(images)), labels))  # by class, then by name
    return images[order].reshape(len(images), 9, 7, -1), labels[order]


@pytest.mark.parametrize("shape", [(9, 7), (9, 7, 3)])
def test_folder_of_images_by_class(tmp_path, shape):
    train, test = examples(NUM_TRAIN, shape, num_classes=3), examples(NUM_TEST, shape, seed=1, num_classes=3)
    write_folder(tmp_path / "train", *train)
    write_folder(tmp_path / "test", *test)
    (tmp_path / "train/class0/notes.txt").touch()
    (tmp_path / "train/class0/._001.png").touch()
    loaded = data.load(f"folder:{tmp_path}")
    assert_holds(loaded, in_order_of_files(*train), in_order_of_files(*test))
    assert (loaded.num_classes, loaded.event_shape) == (3, (9, 7, 1 if len(shape) == 2 else 3))


def test_folder_without_classes_and_with_validation(tmp_path):
    published = {name: examples(12, (5, 5), seed=i)[0] for i, name in enumerate(("train", "val", "test"))}
    for name, images in published.items():
        write_folder(tmp_path / name, images)
    loaded = data.load(f"folder:{tmp_path}")
    for split, images in zip(("train", "validation", "test"), published.values(), strict=True):
        np.testing.assert_array_equal(loaded.examples[split][..., 0], images)
    assert (loaded.num_classes, loaded.labels) == (None, {})


@pytest.fixture
def folder(tmp_path):
    for split in ("train", "test"):
        write_folder(tmp_path / split, *examples(6, (25, 25), num_classes=2))
    return tmp_path


@pytest.mark.parametrize(
    ("image", "file", "message"),
    [
        (np.zeros((25, 26), np.uint8), "train/class0/x.png", "train/class0/x.png is 25x26x1 where 25x25x1"),
        (np.zeros((25, 25, 3), np.uint8), "train/class0/x.png", "train/class0/x.png is 25x25x3 where 25x25x1"),
        (np.zeros((25, 25, 4), np.uint8), "train/class0/x.png", "x.png has pixels of type RGBA"),
        (np.zeros((25, 25), np.uint8), "train/x.png", "train/x.png lies beside the folders of the classes"),
        (np.zeros((25, 25), np.uint8), "test/class2/x.png", "class of .*test/class2/x.png does not occur"),
        (None, "test/class1/x.png", "test/class1/x.png is not an intact image"),
    ],
)
def test_images_that_do_not_belong_are_named(folder, image, file, message):
    (folder / file).parent.mkdir(exist_ok=True)
    if image is None:
        whole = next((folder / "train/class1").iterdir()).read_bytes()
        (folder / file).write_bytes(whole[:-400])
    else:
        Image.fromarray(image).save(folder / file)
    with pytest.raises(ValueError, match=message):
        data.load(f"folder:{folder}")
    assert not list(folder.glob("*decoded*/*"))


def test_hidden_folders_are_no_classes_and_a_split_has_one_name(folder):
    for hidden in ("train/.ipynb_checkpoints", "train/class0/.thumbs"):
        write_folder(folder / hidden, np.zeros((2, 25, 25), np.uint8))
    assert data.load(f"folder:{folder}").num_classes == 2
    for name in ("val", "validation"):
        (folder / name).mkdir()
    with pytest.raises(ValueError, match="has both validation and val"):
        data.load(f"folder:{folder}")


def test_names_that_are_not_utf8_are_read(folder):
    path = next((folder / "train/class1").iterdir())
    os.rename(path, os.fsencode(path.parent) + b"/\xff.png")
    assert len(data.load(f"folder:{folder}").examples["test"]) == 6


def test_a_file_in_the_place_of_a_folder_and_the_reverse_are_named(tmp_path):
    (tmp_path / "a").touch()
    for name, message in {
        f"folder:{tmp_path}/a": "is a file, not a folder",
        f"idx:{tmp_path}/a": "is a file, not a folder",
        f"folder:{tmp_path}/nowhere": "does not exist",
        f"npz:{tmp_path}": "is a folder, not a file",
        f"folder:{tmp_path}": "has no split 'train': it has none",
    }.items():
        with pytest.raises(ValueError, match=message):
            data.load(name)
