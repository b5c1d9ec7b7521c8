"""Which examples make up a batch."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from iresnet_jax.data import batches


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
        lambda step: batches.batch_indices(seed, step, batch_size, num_examples), batch_size, num_examples
    )


def test_permutation_check_rejects_draws_with_replacement():
    rng = np.random.default_rng(0)
    assert not epochs_are_permutations(lambda step: rng.integers(0, 50, 10), 10, 50)


def test_resumed_run_sees_the_same_batches():
    first = [batches.batch_indices(3, step, 7, 50).copy() for step in range(40)]
    batches._epoch_order.cache_clear()  # a new process knows nothing of the first 20 steps
    resumed = [batches.batch_indices(3, step, 7, 50) for step in range(20, 40)]
    assert np.array_equal(first[20:], resumed)


def test_batches_differ_between_epochs_and_seeds():
    epochs = [batches.batch_indices(0, epoch, 50, 50) for epoch in range(4)]
    seeds = [batches.batch_indices(seed, 0, 50, 50) for seed in range(1, 4)]
    assert len({order.tobytes() for order in epochs + seeds}) == 7


def test_a_caller_cannot_change_the_order():
    with pytest.raises(ValueError, match="read-only"):
        batches.batch_indices(0, 0, 5, 50)[0] = 1


def test_impossible_batches_are_refused():
    with pytest.raises(ValueError, match=r"\[1, num_examples = 50\], got 51"):
        batches.batch_indices(0, 0, 51, 50)
    with pytest.raises(ValueError, match="got 0"):
        batches.batch_indices(0, 0, 0, 50)
    with pytest.raises(ValueError, match="got seed 0 and step -1"):
        batches.batch_indices(0, -1, 5, 50)
    with pytest.raises(ValueError, match="got seed -2 and step 0"):
        batches.batch_indices(-2, 0, 5, 50)
