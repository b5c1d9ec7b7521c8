"""The splits that reported numbers belong to."""

import numpy as np

from iresnet_jax.data import splits


def test_validation_split_is_pinned():
    """Reported numbers belong to this very split: if one of these changes, they are void."""
    assert np.flatnonzero(splits.validation_mask(30)).tolist() == [8, 20, 23]
    assert [splits.validation_mask(n).sum() for n in (2, 19, 20, 1000, 50_000, 60_000)] == [1, 1, 2, 100, 5000, 5000]
    assert np.flatnonzero(splits.validation_mask(60_000))[:4].tolist() == [8, 20, 23, 31]


def test_validation_never_comes_from_the_test_split():
    routes = splits.routes({"train": 100, "test": 10}, "x")
    assert {published: set(ours) for published, ours in routes.items()} == {"train": {"train", "validation"}, "test": {"test"}}
    assert not np.any(routes["train"]["train"] & routes["train"]["validation"])
    assert np.all(routes["train"]["train"] | routes["train"]["validation"])
    published = splits.routes({"train": 100, "validation": 20, "test": 10, "extra": 5}, "x")
    assert {p: {s: int(m.sum()) for s, m in ours.items()} for p, ours in published.items()} == {
        "train": {"train": 100},
        "validation": {"validation": 20},
        "test": {"test": 10},
    }
    only = splits.routes({"train": 100, "validation": 20}, "x")  # as the downsampled ImageNet
    assert {p: {s: int(m.sum()) for s, m in ours.items()} for p, ours in only.items()} == {
        "train": {"train": 90, "validation": 10},
        "validation": {"test": 20},
    }
