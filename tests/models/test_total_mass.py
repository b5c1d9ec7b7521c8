"""Densities of entries within bounds and on grids integrate to 1, whatever the weights."""

import jax
import numpy as np
import pytest
from scipy import integrate

import iresnet_jax as ir
from iresnet_jax.bijections.bounded import Bounded, Bounds
from iresnet_jax.bijections.dequantize import Grid
from iresnet_jax.bijections.standardize import Standardize, Whiten
from iresnet_jax.models.architecture import FlowSpec, StageSpec
from iresnet_jax.models.density_spec import DensitySpec
from iresnet_jax.models.priors import MIXTURES
from iresnet_jax.models.saved import model_of

TOLERANCE = 1e-3
RNG = np.random.default_rng(0)


def nodes(low, high):
    """Numbers of single precision that resolve both ends of an interval, and its middle."""
    distances = (high - low) * np.concatenate([np.geomspace(1e-12, 0.01, 1500), np.linspace(0.01, 0.5, 1500)])
    return np.unique(np.concatenate([[low], low + distances, high - distances, [high]]).astype(np.float32))


def mass(model, low, high, others=None):
    """Total mass of a density of one bounded entry, or of one with a second entry that is integrated over such nodes."""
    x, inner = nodes(low, high), np.zeros((1, 0)) if others is None else others[:, None]
    rows = np.concatenate([np.repeat(x, len(inner))[:, None], np.tile(inner, (len(x), 1))], axis=1).astype(np.float32)
    values = np.exp(np.asarray(jax.jit(ir.Density.log_prob)(model, rows), np.float64)).reshape(len(x), len(inner))
    of_x = values[:, 0] if others is None else np.trapezoid(values, others, axis=1)
    return np.trapezoid(of_x, x.astype(np.float64))


def density(transform, prior="gaussian", grid=None, seed=0):
    """A density with random weights that reach far from the identity."""
    num = len(transform.intervals)
    flow = FlowSpec((num,), (StageSpec(num_blocks=4, hidden=(16,), activation="clipswish"),), coeff=0.9)
    spec = DensitySpec(flow, prior, transform, grid=grid, num_components=3 if prior in MIXTURES else None)
    key = jax.random.key(seed)
    params = {stage.name: stage.initial_params(key) for stage in flow.all_stages}
    params = jax.tree.map(lambda leaf: leaf + 0.5 * RNG.normal(size=leaf.shape).astype(leaf.dtype), params)
    return model_of(spec, {"params": params, "prior": spec.standard_prior()}).freeze()


CASES = {
    "unit interval": (Bounded.of((Bounds(0.0, 1.0),)), "gaussian"),
    "logistic, wide on the line": (Bounded.of((Bounds(-1.0, 3.0),), Standardize((0.5,), (2.5,))), "logistic"),
    "far from zero": (Bounded.of((Bounds(100.0, 102.0),), Standardize((-1.0,), (1.5,))), "gaussian"),
    "mixture": (Bounded.of((Bounds(-3.0, 0.0),), Standardize((0.0,), (2.0,))), "mixture"),
}


def test_a_density_of_potentials_integrates_to_1_on_a_grid():
    stage, x = StageSpec(6, (8,), activation="softplus4", kind="potential"), RNG.normal(size=(200, 2)).astype(np.float32)
    model = ir.Density.init(jax.random.key(0), x, stages=[stage], coeff=0.95)
    edges = np.linspace(-80, 80, 801, dtype=np.float32)  # it shrinks what is far from the data
    values = jax.jit(ir.Density.log_prob)(model, np.stack(np.meshgrid(edges, edges), axis=-1).reshape(-1, 2))
    assert np.exp(np.asarray(values, np.float64)).sum() * (160 / 800) ** 2 == pytest.approx(1, abs=TOLERANCE)


@pytest.mark.parametrize("name", CASES)
def test_a_density_of_random_weights_integrates_to_1(name):
    transform, prior = CASES[name]
    ends = transform.intervals[0]
    assert mass(density(transform, prior), ends.low, ends.high) == pytest.approx(1, abs=TOLERANCE)


def test_a_bounded_entry_beside_a_free_one_integrates_to_1():
    transform = Bounded.of((Bounds(0.0, 2.0), None), Whiten((0.0, 1.0), ((1.5, 0.0), (0.4, 1.0))))
    assert mass(density(transform), 0.0, 2.0, np.linspace(-12, 14, 150)) == pytest.approx(1, abs=TOLERANCE)


def test_the_cells_of_a_grid_hold_all_mass():
    transform, grid = Bounded.of((Bounds(-0.5, 4.5),)), Grid((0.0,), (1.0,))
    model = density(transform, grid=grid)
    assert mass(model.continuous, -0.5, 4.5) == pytest.approx(1, abs=TOLERANCE)


def test_samples_are_inside_and_as_frequent_as_the_density_says():
    """With preprocessing that is fitted to data, one at each end."""
    bounds = (Bounds(0.0, 1.0),)
    x = np.concatenate([[[0.0], [1.0]], np.random.default_rng(0).beta(2, 2, (1498, 1))])
    on_line, _ = Bounded.of(bounds).to_line(x, np)
    model = density(Bounded.of(bounds, Standardize.fit(on_line)))
    x = nodes(0.0, 1.0)
    values = np.exp(np.asarray(jax.jit(ir.Density.log_prob)(model, x[:, None]), np.float64))
    shares = integrate.cumulative_trapezoid(values, x.astype(np.float64), initial=0)
    assert shares[-1] == pytest.approx(1, abs=TOLERANCE)
    samples = np.asarray(model.sample(jax.random.key(0), 20_000)[0])[:, 0]
    assert 0 < samples.min()
    assert samples.max() < 1
    places = np.linspace(0.05, 0.95, 19)
    np.testing.assert_allclose([np.mean(samples < place) for place in places], np.interp(places, x, shares), atol=0.02)
