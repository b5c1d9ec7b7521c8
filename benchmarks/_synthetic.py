"""Arrays of known density, drawn by seed: each is a sampler ``(rng, num)`` and its log-density in
nats.

Five of them were looked at while the defaults of `fit` were chosen, separated, spiral, square, t2
and gaussian; the others only afterwards.
"""

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
from scipy.special import logsumexp
from scipy.stats import multivariate_normal, multivariate_t, norm, poisson, t


class Synthetic(NamedTuple):
    """A distribution of vectors.

    Attributes:
        sample: Draws ``num`` vectors.
        log_prob: Log-density of vectors; of discrete columns the log-probability of the values.
        discrete: Places of the columns of whole numbers.
        bounds: Ends of columns that samples may pass, by their places.
    """

    sample: Callable[[np.random.Generator, int], np.ndarray]
    log_prob: Callable[[np.ndarray], Any]
    discrete: tuple[int, ...] = ()
    bounds: Mapping[int, tuple[float, float]] = MappingProxyType({})


def _mixture(weights, means, covariances) -> Synthetic:
    """A mixture of Gaussians."""
    parts = [multivariate_normal(mean, cov) for mean, cov in zip(means, covariances, strict=True)]

    def sample(rng, num):
        chosen = rng.choice(len(weights), size=num, p=weights)
        factors = np.linalg.cholesky(np.stack(covariances))
        noise = rng.normal(size=(num, len(means[0])))
        return np.stack(means)[chosen] + np.einsum("nij,nj->ni", factors[chosen], noise)

    def log_prob(x):
        return logsumexp(
            [np.log(weight) + part.logpdf(x) for weight, part in zip(weights, parts, strict=True)],
            axis=0,
        )

    return Synthetic(sample, log_prob)


def _separated() -> Synthetic:
    """Five round blobs on a circle, eight standard deviations from their neighbours."""
    angles = 2 * np.pi * np.arange(5) / 5
    means = 3.5 * np.stack([np.cos(angles), np.sin(angles)], axis=1)
    return _mixture(np.full(5, 0.2), means, [0.25 * np.eye(2)] * 5)


def _overlapping() -> Synthetic:
    """Four long Gaussians in 3-D that lie across each other."""
    rng = np.random.default_rng(4)
    factors = [np.linalg.qr(rng.normal(size=(3, 3)))[0] * [1.5, 0.6, 0.25] for _ in range(4)]
    return _mixture(
        np.array([0.4, 0.3, 0.2, 0.1]),
        rng.normal(size=(4, 3)),
        [factor @ factor.T for factor in factors],
    )


def _spiral() -> Synthetic:
    """A line wound one and a half times around an axis in 3-D, with normal noise; its density is
    a sum over 2000 places.
    """
    width, places = 0.1, (np.arange(2000) + 0.5) / 2000

    def line(place):
        angle = 3 * np.pi * place
        return np.stack(
            [(0.5 + place) * np.cos(angle), (0.5 + place) * np.sin(angle), 2 * place - 1], axis=-1
        )

    def sample(rng, num):
        return line(rng.random(num)) + width * rng.normal(size=(num, 3))

    def log_prob(x):
        def of_part(part) -> Any:
            return logsumexp(norm.logpdf(part[:, None], line(places), width).sum(-1), axis=1)

        parts = [of_part(part) for part in np.array_split(x, len(x) // 500 + 1)]
        return np.concatenate(parts) - np.log(len(places))

    return Synthetic(sample, log_prob)


def _square() -> Synthetic:
    """The uniform distribution on the square from -1 to 1."""
    return Synthetic(
        lambda rng, num: rng.uniform(-1, 1, (num, 2)), lambda x: np.full(len(x), -np.log(4))
    )


def _triangle() -> Synthetic:
    """The uniform distribution on the triangle ``0 < x_2 < x_1 < 1``."""
    return Synthetic(
        lambda rng, num: np.sort(rng.random((num, 2)), axis=1)[:, ::-1],
        lambda x: np.full(len(x), np.log(2)),
    )


def _t2() -> Synthetic:
    """Three independent columns of Student's t with 2 degrees of freedom, whose variance is
    infinite.
    """
    return Synthetic(
        lambda rng, num: rng.standard_t(2, size=(num, 3)), lambda x: t.logpdf(x, 2).sum(-1)
    )


def _t5() -> Synthetic:
    """Student's t with 5 degrees of freedom in 10 correlated dimensions."""
    factor = np.random.default_rng(5).normal(size=(10, 10))
    spread: Any = multivariate_t(np.zeros(10), factor @ factor.T + 0.1 * np.eye(10), 5)  # pyright: ignore[reportArgumentType]
    return Synthetic(lambda rng, num: spread.rvs(num, random_state=rng), spread.logpdf)


def _gaussian() -> Synthetic:
    """A Gaussian in 20 correlated dimensions."""
    factor = np.random.default_rng(20).normal(size=(20, 20))
    return _mixture(np.ones(1), np.zeros((1, 20)), [factor @ factor.T / 20 + 0.1 * np.eye(20)])


def _ring() -> Synthetic:
    """A ring of radius 1 and normal width .1, beside an independent Gaussian column."""
    width = 0.1

    def sample(rng, num):
        angle, radius = rng.uniform(0, 2 * np.pi, num), 1 + width * rng.normal(size=num)
        return np.stack(
            [radius * np.cos(angle), radius * np.sin(angle), rng.normal(size=num)], axis=1
        )

    def log_prob(x):
        radius = np.hypot(x[:, 0], x[:, 1])
        both = np.logaddexp(norm.logpdf(radius, 1, width), norm.logpdf(-radius, 1, width))
        return both - np.log(2 * np.pi * radius) + norm.logpdf(x[:, 2])

    return Synthetic(sample, log_prob)


def _mixed() -> Synthetic:
    """A yes or no, a count and two numbers that depend on them."""
    rates, shifts = np.array([2.0, 6.0]), np.array([-1.0, 1.0])

    def sample(rng, num):
        answer = (rng.random(num) < 0.3).astype(int)
        count = rng.poisson(rates[answer])
        first = shifts[answer] + 0.5 * rng.normal(size=num)
        return np.stack(
            [answer, count, first, 0.3 * count + np.abs(first) * rng.normal(size=num)], axis=1
        )

    def log_prob(x):
        answer, count = np.round(x[:, 0]).astype(int), np.round(x[:, 1])
        discrete = np.log([0.7, 0.3])[answer] + poisson.logpmf(count, rates[answer])
        return (
            discrete
            + norm.logpdf(x[:, 2], shifts[answer], 0.5)
            + norm.logpdf(x[:, 3], 0.3 * count, np.abs(x[:, 2]))
        )

    # a count, which few rows do not show the end of
    return Synthetic(sample, log_prob, discrete=(0, 1), bounds={1: (0, 30)})


def _checkerboard() -> Synthetic:
    """The uniform distribution on the eight dark fields of a board of four by four, from -2 to
    2.
    """

    def sample(rng, num):
        column, row = rng.integers(0, 4, num), rng.integers(0, 2, num)
        return np.stack(
            [column - 2 + rng.random(num), 2 * row + column % 2 - 2 + rng.random(num)], axis=1
        )

    return Synthetic(sample, lambda x: np.full(len(x), -np.log(8)))


SYNTHETIC = {
    "separated": _separated(),
    "overlapping": _overlapping(),
    "spiral": _spiral(),
    "square": _square(),
    "triangle": _triangle(),
    "t2": _t2(),
    "t5": _t5(),
    "gaussian": _gaussian(),
    "ring": _ring(),
    "mixed": _mixed(),
    "checkerboard": _checkerboard(),
}
