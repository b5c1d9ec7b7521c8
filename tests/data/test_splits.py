"""The splits that reported numbers belong to."""

import numpy as np
import pytest

from iresnet_jax.data import splits


def test_validation_split_is_pinned():
    """Reported numbers belong to this very split: if one of these changes, they are void."""
    assert np.flatnonzero(splits.validation_mask(30)).tolist() == [8, 20, 23]
    assert [splits.validation_mask(n).sum() for n in (2, 19, 20, 1000, 50_000, 60_000)] == [1, 1, 2, 100, 5000, 5000]
    assert np.flatnonzero(splits.validation_mask(60_000))[:4].tolist() == [8, 20, 23, 31]


def test_fractions_depend_on_the_number_alone_and_their_parts_are_disjoint():
    masks = splits.fraction_masks(50, (0.1, 0.1))
    assert sum(mask.astype(int) for mask in masks.values()).tolist() == [1] * 50
    assert list(splits.fraction_masks(50, (0.1, 0.0))) == ["train", "validation"]
    np.testing.assert_array_equal(masks["test"], splits.fraction_masks(50, (0.2, 0.1))["test"])
    for num, fractions, message in (
        (3, (0.1, 0.1), "too few"),
        (10, (0.95, 0.0), "10 would be"),
        (30, (0.6, 0.5), "shares"),
    ):
        with pytest.raises(ValueError, match=message):
            splits.fraction_masks(num, fractions)
