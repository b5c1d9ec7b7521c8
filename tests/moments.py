"""First and second moments of draws with their standard errors, to compare two samplers."""

import numpy as np

SIGMAS = 4.5  # of a difference, over all moments and tests of fixed seeds
# standard error of a moment in standard deviations: a comparison of larger ones would see nothing
WORST = 0.12


def moments(draws):
    """The entries of ``x`` and of ``x x^T``, one row a draw."""
    x = np.asarray(draws, np.float64)
    i, j = np.triu_indices(x.shape[1])
    return np.concatenate([x, x[:, i] * x[:, j]], axis=1)


def mean_and_error(values, weights=None, num_batches=20):
    """The weighted mean, and its standard error by means of batches of neighbours."""
    weights = np.ones(len(values)) if weights is None else np.asarray(weights, np.float64)
    mean = weights @ values / weights.sum()
    own = weights[:, None] * (values - mean) / weights.mean()
    batches = np.stack([batch.mean(axis=0) for batch in np.array_split(own, num_batches)])
    return mean, batches.std(axis=0, ddof=1) / np.sqrt(num_batches)


def disagreement(draws, others, weights=None):
    """The largest difference of a moment in its standard errors; weights of the others."""
    (own, own_error), (other, other_error) = (
        mean_and_error(moments(draws)),
        mean_and_error(moments(others), weights),
    )
    error = np.hypot(own_error, other_error)
    assert np.all(error <= WORST * moments(draws).std(axis=0)), error
    return np.max(np.abs(own - other) / error)


def assert_agree(draws, others, weights=None):
    """All moments agree, and would not if the draws were shifted by half a standard deviation."""
    draws = np.asarray(draws)
    assert disagreement(draws, others, weights) < SIGMAS
    assert disagreement(draws + 0.5 * np.std(draws, axis=0), others, weights) > SIGMAS
