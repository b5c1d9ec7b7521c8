"""Tasks of the SBI benchmark: simulators by closed forms and other solvers, and C2ST."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest
from scipy.integrate import solve_ivp

pytestmark = pytest.mark.slow

RNG = np.random.default_rng(0)


@pytest.fixture(scope="module")
def tasks():
    """The module, which nobody else finds."""
    path = Path(__file__).parents[1] / "benchmarks" / "_sbibm_tasks.py"
    spec = importlib.util.spec_from_file_location("_sbibm_tasks", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def moments(simulate, theta, num=20_000):
    """Mean and covariance of observations of one vector of parameters."""
    x = simulate(np.random.default_rng(0), np.repeat(theta[None], num, axis=0))
    return x.mean(axis=0), np.cov(x.T)


def test_all_draw_what_they_say_and_a_folder_keeps_it(tasks, tmp_path):
    for task in tasks.TASKS.values():
        theta, x = task.draw(50, cache=tmp_path)
        assert theta.shape == (50, task.num_parameters)
        assert x.shape == (50, task.num_observed)
        assert np.isfinite(x).all()
        if task.bound is not None:
            assert np.abs(theta).max() < task.bound
        np.testing.assert_allclose(task.from_fit(task.to_fit(theta)), theta, rtol=1e-6)
        for drawn, again in zip((theta, x), task.draw(50, cache=tmp_path), strict=True):
            np.testing.assert_array_equal(drawn, again)


def test_gaussians_have_their_moments(tasks):
    theta = RNG.normal(size=10) / 5
    mean, covariance = moments(tasks.TASKS["gaussian_linear"].simulate, theta)
    np.testing.assert_allclose(mean, theta, atol=5 * np.sqrt(0.1 / 20_000))
    np.testing.assert_allclose(covariance, 0.1 * np.eye(10), atol=5 * 0.1 * np.sqrt(2 / 20_000))
    theta = np.array([3.0, -7.0])
    mean, covariance = moments(tasks.TASKS["gaussian_mixture"].simulate, theta)
    np.testing.assert_allclose(mean, theta, atol=5 * np.sqrt(0.505 / 20_000))
    np.testing.assert_allclose(covariance, 0.505 * np.eye(2), atol=0.04)


def test_c2st_is_a_half_of_equal_samples_and_one_of_others(tasks):
    a, b = RNG.normal(size=(2, 200, 2))
    assert tasks.c2st(a, b) < 0.6
    assert tasks.c2st(a + 4, b) > 0.95
    assert np.isnan(tasks.c2st(np.full_like(a, np.nan), b))


@pytest.mark.parametrize("name", ["lotka_volterra", "sir"])
def test_solvers_agree_with_scipy(tasks, name):
    theta = tasks.TASKS[name].prior(np.random.default_rng(0), 5)
    found = (tasks._populations if name == "lotka_volterra" else tasks._infected)(theta)

    def of_animals(_, y, a, b, c, d):
        return [a * y[0] - b * y[0] * y[1], d * y[0] * y[1] - c * y[1]]

    def of_the_ill(_, y, beta, gamma):
        return [-beta * y[0] * y[1], beta * y[0] * y[1] - gamma * y[1]]

    settings = {"rtol": 1e-9, "atol": 1e-13, "method": "LSODA"}
    for one, own in zip(theta, found, strict=True):
        if name == "lotka_volterra":
            expected = solve_ivp(
                of_animals, (0, 20), [30, 1], t_eval=2.1 * np.arange(10), args=one, **settings
            ).y
        else:
            start = [1 - 1e-6, 1e-6]
            expected = solve_ivp(
                of_the_ill, (0, 153), start, t_eval=17 * np.arange(10), args=one, **settings
            ).y[1]
        np.testing.assert_allclose(own, expected, rtol=1e-3, atol=1e-9)
