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


def test_names_that_are_not_utf8_are_read(tmp_path):
    for split in ("train", "test"):
        write_folder(tmp_path / split, *examples(6, (5, 5), num_classes=2))
    path = next((tmp_path / "train/class1").iterdir())
    os.rename(path, os.fsencode(path.parent) + b"/\xff.png")
    assert len(data.load(f"folder:{tmp_path}").examples["test"]) == 6


def test_a_file_in_the_place_of_the_folder_is_named(tmp_path):
    (tmp_path / "a").write_text("a file")
    for kind in ("folder", "idx"):
        with pytest.raises(ValueError, match=rf"the folder .*a for {kind}:.* is a file, not a folder: check the path"):
            data.load(f"{kind}:{tmp_path}/a")
    with pytest.raises(ValueError, match=r"the file .* for npz:.* is a folder, not a file: check the path"):
        data.load(f"npz:{tmp_path}")
