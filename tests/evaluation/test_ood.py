"""Areas under the ROC curve against all pairs, and images brought to another size."""

import numpy as np
import pytest

from iresnet_jax.data.dataset import DataSet
from iresnet_jax.evaluation import ood


@pytest.mark.parametrize("ends", [(5.0, 7.0), (np.inf, np.inf)])
def test_auroc_is_the_fraction_of_pairs_in_order(ends):
    rng = np.random.default_rng(0)
    inside, outside = rng.integers(0, 6, 50).astype(float), rng.integers(2, 8, 70).astype(float)
    inside[inside == 5], outside[outside == 7] = ends
    pairs = (outside[:, None] > inside).mean() + (outside[:, None] == inside).mean() / 2
    np.testing.assert_allclose(ood.auroc(inside, outside), pairs, rtol=1e-12)
    assert ood.auroc(inside, inside) == 0.5


@pytest.mark.parametrize("others", [[np.nan], []])
def test_auroc_refuses_what_has_no_order(others):
    with pytest.raises(ValueError, match="none of them NaN"):
        ood.auroc(np.ones(3), np.array(others))


def test_other_images_are_brought_to_the_size_and_levels_of_the_model():
    images = np.arange(2 * 2 * 2, dtype=np.uint8).reshape(2, 2, 2, 1)
    found = ood.adapt(images, 8, (4, 4, 3), 15)
    np.testing.assert_array_equal(found[..., 0], 2 * np.kron(images[..., 0], np.ones((1, 2, 2), np.uint8)))
    np.testing.assert_array_equal(found[..., 1], found[..., 2])


def test_images_that_are_not_square_are_turned_upside_down():
    test = np.arange(2 * 2 * 3, dtype=np.uint8).reshape(2, 2, 3, 1)
    tall = DataSet("tall", (2, 3, 1), 256, None, "", {"train": test, "test": test})
    np.testing.assert_array_equal(ood.others(tall, "rotated", 2, 0), test[:, ::-1, ::-1])
    square = DataSet("square", (2, 2, 1), 256, None, "", {"test": test[:, :, :2]})
    np.testing.assert_array_equal(ood.others(square, "rotated", 2, 0), np.rot90(test[:, :, :2], axes=(1, 2)))
    untested = DataSet("untested", (2, 3, 1), 256, None, "", {"train": test})
    with pytest.raises(ValueError, match="no split 'test'"):
        ood.others(untested, "rotated", 2, 0)
