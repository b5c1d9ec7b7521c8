"""Checks that the examples of all sources pass."""

import numpy as np
import pytest

from iresnet_jax.data.sources.source import Contents, checked

IMAGES, LABELS = np.zeros((20, 4, 4, 1), np.uint8), np.arange(20) % 3


@pytest.mark.parametrize(
    ("chunk", "message"),
    [
        ((IMAGES[:3], LABELS[:3]), "should hold 4 examples but holds 3"),
        ((IMAGES[:0], LABELS[:0]), "should hold 4 examples but holds 0"),
        ((IMAGES[:5], LABELS[:5]), "should hold 4 examples but holds more"),
        ((IMAGES[:4].astype(np.uint16), LABELS[:4]), r"got uint16 of shape \(4, 4, 1\)"),
        ((IMAGES[:4, ..., 0], LABELS[:4]), r"got uint8 of shape \(4, 4\)"),
    ],
)
def test_sources_that_break_their_word_are_refused(chunk, message):
    contents = Contents({"train": 4}, 3, lambda split: iter([chunk]))
    with pytest.raises(ValueError, match=message):
        list(checked("x", contents, ["train"]))
