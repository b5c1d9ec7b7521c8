"""Checks that the examples of all sources pass."""

import numpy as np
import pytest

from iresnet_jax.data.sources.source import Contents, checked

X, Y = np.zeros((20, 4, 4), np.uint8), np.arange(20) % 3


def contents(chunks, num=4, num_classes=3):
    return Contents({"train": num}, num_classes, lambda split: iter(chunks))


@pytest.mark.parametrize(
    ("chunk", "message"),
    [
        (
            (X[:3, ..., None], Y[:3]),
            "split 'train' of x should hold 4 examples but holds 3: its files are damaged, fetch them again",
        ),
        ((X[:5, ..., None], Y[:5]), "should hold 4 examples but holds more"),
        ((X[:4, ..., None], Y[:3]), "split 'train' of x has 3 labels for 4 images"),
        (
            (X[:4, ..., None].astype(np.uint16), Y[:4]),
            r"must hold uint8 images .* got uint16 of shape \(4, 4, 1\): convert them first",
        ),
        ((X[:4], Y[:4]), r"got uint8 of shape \(4, 4\)"),
    ],
)
def test_sources_that_break_their_word_are_refused(chunk, message):
    with pytest.raises(ValueError, match=message):
        list(checked("x", contents([chunk]), "train"))
