"""The ten tasks of the SBI benchmark (Lueckmann et al. 2021, appendix T): priors and simulators in
NumPy, and C2ST.

Observations and 10,000 samples of each reference posterior are files of the package ``sbibm``,
whose dependencies are not needed: ``pip install --no-deps sbibm``. Constants that the benchmark
drew at random are drawn again from its seed.

ODEs are integrated by Runge-Kutta steps of fourth order in float64, all parameters at once. Both
are in logarithms of what is positive, where no step can overshoot 0.
"""

import bz2
import functools
import importlib.metadata
import math
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np

NUM_OBSERVATIONS = 10
_BLOCK = 10_000  # parameters that are simulated at once


class Task(NamedTuple):
    """A prior and a simulator.

    Attributes:
        name: Name in `TASKS`.
        num_parameters: Length of a vector of parameters.
        num_observed: Length of an observation.
        prior: ``(generator, n) ->`` parameters ``(n, num_parameters)``.
        simulate: ``(generator, parameters) ->`` observations ``(n, num_observed)``.
        bound: Parameters of a uniform prior lie between ``-bound`` and ``bound``; None for other
            priors.
        is_positive: Whether the prior is one of positive numbers; models are then of logarithms.
        folder: Folder of the package with the posterior's files.
        observed: Name of the files with observations.
    """

    name: str
    num_parameters: int
    num_observed: int
    prior: Callable[[np.random.Generator, int], np.ndarray]
    simulate: Callable[[np.random.Generator, np.ndarray], np.ndarray]
    bound: float | None = None
    is_positive: bool = False
    folder: str = ""
    observed: str = "observation"

    @property
    def bounds(self):
        """Ends of the parameters, as `iresnet_jax.fit` takes them."""
        return (
            {}
            if self.bound is None
            else {i: (-self.bound, self.bound) for i in range(self.num_parameters)}
        )

    def to_fit(self, parameters):
        """Parameters as models take them: logarithms of positive ones."""
        return np.log(parameters) if self.is_positive else parameters

    def from_fit(self, samples):
        """Parameters of a model's samples."""
        return np.exp(samples) if self.is_positive else samples

    def draw(self, num, seed=0, cache=None):
        """So many parameters of the prior with an observation each; of a folder, if they were
        drawn before.
        """
        path = None if cache is None else Path(cache) / f"{self.name}_{num}_{seed}.npz"
        if path is not None and path.exists():
            with np.load(path) as saved:
                return saved["parameters"], saved["observations"]
        generator = np.random.default_rng([seed, *self.name.encode()])
        parameters = self.prior(generator, num)
        blocks = [
            self.simulate(generator, parameters[i : i + _BLOCK]) for i in range(0, num, _BLOCK)
        ]
        drawn = parameters.astype(np.float32), np.concatenate(blocks).astype(np.float32)
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            np.savez(path, parameters=drawn[0], observations=drawn[1])
        return drawn

    def observation(self, number):
        """Observation of this number, from 1 to 10."""
        return _read(self.folder or self.name, number, f"{self.observed}.csv")[0]

    def reference(self, number):
        """10,000 samples of the posterior."""
        return _read(self.folder or self.name, number, "reference_posterior_samples.csv.bz2")


def _read(folder, number, name):
    try:  # by its metadata, as benchmarks/sbibm.py has its name
        package = importlib.metadata.distribution("sbibm")
    except importlib.metadata.PackageNotFoundError:
        raise SystemExit("error: there is no sbibm: pip install --no-deps sbibm") from None
    path = Path(
        str(package.locate_file(f"sbibm/tasks/{folder}/files/num_observation_{number}/{name}"))
    )
    with bz2.open(path, "rt") if name.endswith(".bz2") else path.open() as file:
        return np.loadtxt(file, delimiter=",", skiprows=1, ndmin=2)


def _uniform(bound, num_parameters):
    return lambda generator, n: generator.uniform(-bound, bound, (n, num_parameters))


# Gaussians: x ~ N(theta, .1 I), theta ~ N(0, .1 I) or U(-1, 1); a mixture of two widths, theta ~
# U(-10, 10)

_VARIANCE = 0.1


def _around(generator, parameters):
    return parameters + math.sqrt(_VARIANCE) * generator.normal(size=parameters.shape)


def _two_widths(generator, parameters):
    width = generator.choice([1.0, 0.1], size=(len(parameters), 1))
    return parameters + width * generator.normal(size=parameters.shape)


# Two moons: theta ~ U(-1, 1)^2 --------------------------------------------------------------------


def _moons(generator, parameters):
    angle = generator.uniform(-math.pi / 2, math.pi / 2, len(parameters))
    radius = generator.normal(0.1, 0.01, len(parameters))
    u, v = (
        (parameters[:, 0] + parameters[:, 1]) / math.sqrt(2),
        (parameters[:, 1] - parameters[:, 0]) / math.sqrt(2),
    )
    return np.stack([radius * np.cos(angle) + 0.25 - np.abs(u), radius * np.sin(angle) + v], axis=1)


# SLCP: four points of a normal distribution in the plane, theta ~ U(-3, 3)^5; 92 distractors beside
# them

_DISTRACTORS, _NOISE_COMPONENTS = 92, 20


def _slcp(generator, parameters):
    mean, (s1, s2), rho = (
        parameters[:, None, :2],
        parameters[:, 2:4].T ** 2,
        np.tanh(parameters[:, 4]),
    )
    first, second = generator.normal(size=(2, len(parameters), 4))
    x1 = s1[:, None] * first
    x2 = s2[:, None] * (rho[:, None] * first + np.sqrt(1 - rho**2)[:, None] * second)
    return (mean + np.stack([x1, x2], axis=2)).reshape(-1, 8)


@functools.cache
def _noise():
    """Centres and factors of the distractors' mixture of t distributions with 2 degrees of
    freedom; the order of columns.
    """
    state = np.random.RandomState(42)
    centres = np.stack([15 * state.normal(size=_DISTRACTORS) for _ in range(_NOISE_COMPONENTS)])
    factors = [
        np.tril(state.normal(size=(_DISTRACTORS, _DISTRACTORS)))
        + np.diag(np.exp(state.normal(size=_DISTRACTORS)))
        for _ in range(_NOISE_COMPONENTS)
    ]
    return centres, 3 * np.stack(factors), state.permutation(_DISTRACTORS + 8)


def _slcp_distractors(generator, parameters):
    centres, factors, order = _noise()
    component = generator.integers(_NOISE_COMPONENTS, size=len(parameters))
    t = generator.normal(size=(len(parameters), _DISTRACTORS)) / np.sqrt(
        generator.chisquare(2, (len(parameters), 1)) / 2
    )
    noise = np.zeros_like(t)
    for k in range(_NOISE_COMPONENTS):
        noise[component == k] = centres[k] + t[component == k] @ factors[k].T
    return np.concatenate([_slcp(generator, parameters), noise], axis=1)[:, order]


# Bernoulli GLM: 100 spikes of probability sigmoid(offset + filtered stimulus), a prior of smooth
# filters


@functools.cache
def _design():
    """Rows of ones and of the stimulus delayed by 0 to 8 steps, and a factor ``A`` of the
    prior's covariance ``A A^T``.
    """
    stimulus = np.random.RandomState(42).randn(100).astype(np.float32).astype(np.float64)
    delayed = [np.concatenate([np.zeros(j), stimulus[: 100 - j]]) for j in range(9)]
    differences = np.eye(9) - np.eye(9, k=-1)
    smooth = differences @ differences + np.diag(np.sqrt(np.arange(9) / 9))
    precision = np.zeros((10, 10))
    precision[0, 0], precision[1:, 1:] = 0.5, smooth.T @ smooth
    return np.stack([np.ones(100), *delayed], axis=1), np.linalg.inv(
        np.linalg.cholesky(precision)
    ).T


def _glm_prior(generator, n):
    return generator.normal(size=(n, 10)) @ _design()[1].T


def _glm_raw(generator, parameters):
    probability = 1 / (1 + np.exp(-parameters @ _design()[0].T))
    return (generator.random(probability.shape) < probability).astype(np.float64)


def _glm(generator, parameters):
    return _glm_raw(generator, parameters) @ _design()[0]


# ODEs ---------------------------------------------------------------------------------------------


def _log_normal(mean, std):
    return lambda generator, n: np.exp(generator.normal(mean, std, (n, len(mean))))


def _integrate(slopes, start, num_saved, between, step):
    """States at ``num_saved`` times, ``between`` apart, from the start on, by Runge-Kutta steps
    of at most ``step``.
    """
    num_steps = math.ceil(between / step)
    h, state, saved = between / num_steps, start, [start]
    for _ in range((num_saved - 1) * num_steps):
        k1 = slopes(state)
        k2 = slopes(state + h / 2 * k1)
        k3 = slopes(state + h / 2 * k2)
        k4 = slopes(state + h * k3)
        state = state + h / 6 * (k1 + 2 * k2 + 2 * k3 + k4)
        saved.append(state)
    return np.stack(saved[::num_steps], axis=-1)


def _populations(parameters, step=0.01):
    """Prey and predators at 10 times from 0 to 18.9, ``(n, 2, 10)``, from 30 and 1."""
    alpha, beta, gamma, delta = np.asarray(parameters, np.float64).T

    def slopes(state):
        prey, predators = np.exp(state)
        return np.stack([alpha - beta * predators, delta * prey - gamma])

    start = np.tile(np.log([[30.0], [1.0]]), (1, len(alpha)))
    return np.exp(np.moveaxis(_integrate(slopes, start, 10, 2.1, step), 0, 1))


def _lotka_volterra(generator, parameters):
    states = np.clip(_populations(parameters), 1e-10, 1e4).reshape(-1, 20)
    return states * np.exp(0.1 * generator.normal(size=states.shape))


def _infected(parameters, step=0.25):
    """Shares of a million that are infected at 10 times from 0 to 153 days, ``(n, 10)``, from
    one.
    """
    beta, gamma = np.asarray(parameters, np.float64).T

    def slopes(state):  # logarithms of the susceptible and of the infected
        susceptible, infected = np.exp(state)
        return np.stack([-beta * infected, beta * susceptible - gamma])

    start = np.tile(np.log([[1 - 1e-6], [1e-6]]), (1, len(beta)))
    return np.exp(_integrate(slopes, start, 10, 17.0, step)[1])


def _sir(generator, parameters):
    return generator.binomial(1000, np.clip(_infected(parameters), 0, 1)).astype(np.float64)


_LINEAR = {"num_parameters": 10, "num_observed": 10, "simulate": _around}
_SLCP = {"num_parameters": 5, "prior": _uniform(3.0, 5), "bound": 3.0, "folder": "slcp"}
_GLM = {"num_parameters": 10, "prior": _glm_prior, "folder": "bernoulli_glm"}

TASKS = {
    task.name: task
    for task in (
        Task("bernoulli_glm", **_GLM, num_observed=10, simulate=_glm),
        Task(
            "bernoulli_glm_raw",
            **_GLM,
            num_observed=100,
            simulate=_glm_raw,
            observed="observation_raw",
        ),
        Task(
            "gaussian_linear",
            **_LINEAR,
            prior=lambda generator, n: math.sqrt(_VARIANCE) * generator.normal(size=(n, 10)),
        ),
        Task("gaussian_linear_uniform", **_LINEAR, prior=_uniform(1.0, 10), bound=1.0),
        Task("gaussian_mixture", 2, 2, _uniform(10.0, 2), _two_widths, bound=10.0),
        Task(
            "lotka_volterra",
            4,
            20,
            _log_normal([-0.125, -3.0] * 2, 0.5),
            _lotka_volterra,
            is_positive=True,
        ),
        Task(
            "sir",
            2,
            10,
            _log_normal([math.log(0.4), math.log(0.125)], [0.5, 0.2]),
            _sir,
            is_positive=True,
        ),
        Task("slcp", **_SLCP, num_observed=8, simulate=_slcp),
        Task(
            "slcp_distractors",
            **_SLCP,
            num_observed=100,
            simulate=_slcp_distractors,
            observed="observation_distractors",
        ),
        Task("two_moons", 2, 2, _uniform(1.0, 2), _moons, bound=1.0),
    )
}


def c2st(ours: np.ndarray, theirs: np.ndarray) -> float:
    """Accuracy of a classifier that tells samples ``(n, d)`` of a model from others; NaN if one of
    ours is not finite.

    As in the SBI benchmark: both sets are standardised by the mean and standard deviation of the
    reference; a perceptron with two hidden layers of ``10 d`` rectified units, trained by Adam; the
    mean accuracy of 5-fold cross-validation.
    """
    from sklearn.model_selection import KFold, cross_val_score
    from sklearn.neural_network import MLPClassifier

    if not np.all(np.isfinite(ours)):
        return math.nan
    mean, scale = theirs.mean(axis=0), theirs.std(axis=0, ddof=1)
    x = (np.concatenate([theirs, ours]).astype(np.float64) - mean) / scale
    is_ours, width = np.repeat([0, 1], [len(theirs), len(ours)]), 10 * x.shape[1]
    classifier = MLPClassifier(
        (width, width), activation="relu", solver="adam", max_iter=1000, random_state=1
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a classifier that could have been trained for longer
        folds = KFold(5, shuffle=True, random_state=1)
        return float(np.mean(cross_val_score(classifier, x, is_ours, cv=folds, scoring="accuracy")))
