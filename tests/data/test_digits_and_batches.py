import hashlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from iresnet_jax import data
from iresnet_jax.data import digits, feed

SPLITS = ("train", "validation", "test")


@pytest.fixture(scope="module")
def dataset():
    return data.load("digits")


# The digits


def test_digits_have_the_documented_shapes_and_levels(dataset):
    assert (dataset.name, dataset.num_levels, dataset.num_classes) == ("digits", 17, 10)
    assert dataset.image_shape == (8, 8, 1)
    assert {split: len(dataset.images[split]) for split in SPLITS} == {"train": 1257, "validation": 180, "test": 360}
    for split in SPLITS:
        assert dataset.images[split].shape == (len(dataset.labels[split]), 8, 8, 1)
        assert dataset.images[split].dtype == np.uint8
        assert dataset.labels[split].dtype == np.int32
    every_pixel = np.concatenate([dataset.images[split].ravel() for split in SPLITS])
    assert set(np.unique(every_pixel)) == set(range(17))


def test_digits_keep_their_labels_and_lose_no_image(dataset):
    from sklearn.datasets import load_digits

    pixels, labels = load_digits(return_X_y=True)
    expected = sorted((int(y), x.astype(np.uint8).tobytes()) for x, y in zip(pixels, labels, strict=True))
    found = sorted((int(y), x.tobytes()) for s in SPLITS for x, y in zip(dataset.images[s], dataset.labels[s], strict=True))
    assert found == expected


def test_split_is_stratified(dataset):
    per_class = {split: np.bincount(dataset.labels[split], minlength=10) for split in SPLITS}
    total = sum(per_class.values())
    for split, share in (("train", 0.7), ("validation", 0.1), ("test", 0.2)):
        assert np.all(np.abs(per_class[split] - share * total) < 2)


def test_split_is_disjoint_and_pinned():
    """Reported numbers belong to this very split: if the checksum changes, they are void."""
    from sklearn.datasets import load_digits

    splits = digits.split_indices(load_digits(return_X_y=True)[1])
    assert np.array_equal(np.sort(np.concatenate(list(splits.values()))), np.arange(1797))
    text = ";".join(",".join(map(str, splits[split])) for split in SPLITS)
    assert hashlib.sha256(text.encode()).hexdigest() == "09a06fde5fa3dcec27f9c7b1527dd6c48812d3508dc392a3b03ed59dca8a5da9"


def test_unknown_source_names_the_known_ones():
    with pytest.raises(ValueError, match=r"'moons': known are digits.*toys\.get"):
        data.load("moons")


# Batches


def epochs_are_permutations(batch_of_step, batch_size, num_examples, num_epochs=3):
    """True if no example comes twice within an epoch and only the remainder is missing."""
    steps = num_examples // batch_size
    for epoch in range(num_epochs):
        seen = np.concatenate([batch_of_step(epoch * steps + step) for step in range(steps)])
        if len(np.unique(seen)) != steps * batch_size or seen.min() < 0 or seen.max() >= num_examples:
            return False
    return True


@given(seed=st.integers(0, 2**40), num_examples=st.integers(1, 60), data=st.data())
def test_every_epoch_is_a_permutation(seed, num_examples, data):
    batch_size = data.draw(st.integers(1, num_examples))
    assert epochs_are_permutations(
        lambda step: feed.batch_indices(seed, step, batch_size, num_examples), batch_size, num_examples
    )


def test_permutation_check_rejects_draws_with_replacement():
    rng = np.random.default_rng(0)
    assert not epochs_are_permutations(lambda step: rng.integers(0, 50, 10), 10, 50)


def test_resumed_run_sees_the_same_batches():
    first = [feed.batch_indices(3, step, 7, 50).copy() for step in range(40)]
    feed._epoch_order.cache_clear()  # a new process knows nothing of the first 20 steps
    resumed = [feed.batch_indices(3, step, 7, 50) for step in range(20, 40)]
    assert np.array_equal(first[20:], resumed)


def test_batches_differ_between_epochs_and_seeds():
    epochs = [feed.batch_indices(0, epoch, 50, 50) for epoch in range(4)]
    seeds = [feed.batch_indices(seed, 0, 50, 50) for seed in range(1, 4)]
    assert len({order.tobytes() for order in epochs + seeds}) == 7


def test_a_caller_cannot_change_the_order():
    with pytest.raises(ValueError, match="read-only"):
        feed.batch_indices(0, 0, 5, 50)[0] = 1


def test_impossible_batches_are_refused():
    with pytest.raises(ValueError, match=r"\[1, num_examples = 50\], got 51"):
        feed.batch_indices(0, 0, 51, 50)
    with pytest.raises(ValueError, match="got 0"):
        feed.batch_indices(0, 0, 0, 50)
    with pytest.raises(ValueError, match="got seed 0 and step -1"):
        feed.batch_indices(0, -1, 5, 50)
    with pytest.raises(ValueError, match="got seed -2 and step 0"):
        feed.batch_indices(-2, 0, 5, 50)


@given(num_examples=st.integers(1, 100), batch_size=st.integers(1, 120))
def test_evaluation_uses_every_example_once_with_one_shape(num_examples, batch_size):
    batches = list(feed.eval_batches(num_examples, batch_size))
    assert {(indices.shape, mask.shape) for indices, mask in batches} == {((batch_size,), (batch_size,))}
    assert np.array_equal(np.concatenate([indices[mask] for indices, mask in batches]), np.arange(num_examples))
    padding = np.concatenate([indices[~mask] for indices, mask in batches])
    assert np.array_equal(padding, np.zeros(-num_examples % batch_size))


def test_evaluation_refuses_an_empty_split_at_the_call():
    with pytest.raises(ValueError, match="got 0 and 8"):
        feed.eval_batches(0, 8)
    with pytest.raises(ValueError, match="got 8 and 0"):
        feed.eval_batches(8, 0)
