"""Densities sum and integrate to 1, whatever their bounds, cells, atoms and tails."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import iresnet_jax as ir
from iresnet_jax.models.priors import MIXTURES
from iresnet_jax.models.saved import model_of

TOLERANCE = 1e-3
NUM_SAMPLES, NUM_NOISE, NUM_ROWS = 20_000, 512, 2**17
log_prob = jax.jit(ir.Density.log_prob)
LINE = (-np.inf, np.inf)
# Scores of values off a grid, and of an atom at 0, where scores jump.
LISTED = ir.Marginals.of(
    [
        {
            "values": [-2, -1.7, 0, 0.1, 3, 4],
            "units": np.log([0.3, 1, 0.9, 1.5, 1.95, 1]),
            "has_levels": 2,
            "lower": [[-np.inf, -1, -0.5, 0, 0.4, 1]],
            "upper": [[-1, -0.5, 0, 0.4, 1, np.inf]],
        }
    ]
)
ATOM = ir.Marginals.of(
    [
        {
            **{"at": [0, 0], "to": [-0.2, 0.9], "slopes": [1, 1]},
            **{"values": [0], "units": [0], "lower": [[-0.2]], "upper": [[0.9]]},
        }
    ]
)
# Cells, ends and preprocessing of one or two entries, and the prior.
CASES = {
    "logistic, wide on the line": (
        None,
        ((-1.0, 3.0),),
        ir.Standardize((0.5,), (2.5,)),
        "logistic",
    ),
    "one end": (None, ((0.0, np.inf, 0.0, 2.0),), ir.Standardize((0.0,), (0.7,)), "logistic"),
    "counts from 0 on": (
        ir.Marginals.lines([5]),
        ((-2.5, np.inf, 0.0, 20.0),),
        ir.Standardize((0.0,), (0.5,)),
        "gaussian",
    ),
    "mixture": (None, ((-3.0, 0.0),), ir.Standardize((0.0,), (2.0,)), "mixture"),
    "levels that own half-lines": (
        ir.Marginals.lines([1], least=[0], most=[4]),
        (LINE,),
        ir.Standardize((2.0,), (0.8,)),
        "gaussian",
    ),
    "decimals with heavy tails": (
        ir.Marginals.lines([0.5]),
        ((*LINE, 3.0, 1.0),),
        ir.Standardize((0.0,), (0.4,)),
        "gaussian",
    ),
    "values off a grid": (LISTED, (LINE,), ir.Standardize((0.0,), (0.6,)), "gaussian"),
    "an atom of a continuous entry": (ATOM, (LINE,), ir.Standardize((0.3,), (0.8,)), "gaussian"),
    "a rounded amount and a free entry": (
        ir.Marginals.lines([0.5, 0]),
        (LINE, LINE),
        ir.Whiten((4.0, 1.0), ((3.0, 0.0), (0.4, 1.0))),
        "gaussian",
    ),
}


def mapped(ends):
    """The map of entries with these ends, centers and scales to the line."""
    return ir.Bounded(*np.array([(*row, 0.0, 0.0)[:4] for row in ends]).T)


def density(name):
    """A density of random weights that reach far from the identity."""
    cells, ends, then, prior = CASES[name]
    rng, key = np.random.default_rng(len(name)), jax.random.key(0)
    flow = ir.FlowSpec(
        (len(ends),), (ir.StageSpec(num_blocks=4, hidden=(16,), activation="clipswish"),), coeff=0.9
    )
    transform = mapped(ends) if then is None else dataclasses.replace(mapped(ends), then=then)
    spec = ir.DensitySpec(
        flow, prior, transform, cells=cells, num_components=3 if prior in MIXTURES else None
    )
    params = flow.initial_params(key)
    # Normal noise in half-lines reaches a density that is not much wider.
    size = 0.15 if cells is LISTED else 0.5
    params = jax.tree.map(
        lambda leaf: leaf + size * rng.normal(size=leaf.shape).astype(leaf.dtype), params
    )
    return model_of(spec, {"params": params, "prior": spec.standard_prior()}).freeze()


def support(cells, ends, line, num):
    """Values of one entry, and what each stands for: a cell's width, 1 of an atom, a step."""
    t = np.linspace(line.min() - np.ptp(line) / 2, line.max() + np.ptp(line) / 2, num + 1)[:, None]
    edges = ends.from_line(t, np)[0]
    if cells is None:
        return (edges[1:, 0] + edges[:-1, 0]) / 2, np.diff(edges[:, 0])
    spacing = float(cells.spacing[0])
    if spacing > 0 or cells.has_levels[0] > 0:
        dense = np.arange(edges[0, 0], edges[-1, 0], spacing / 2 or 0.01)
        x = np.unique(np.asarray(cells.from_line(jnp.asarray(dense, jnp.float32)[:, None])[0]))
        return x, np.exp(-np.asarray(cells.places(jnp.asarray(x)[:, None]).log_factor))[:, 0]
    atoms = np.asarray(cells.values[0])
    atoms = atoms[np.isfinite(atoms)][:, None]
    places = cells.places(jnp.asarray(atoms))
    edges = np.unique(np.concatenate([edges, places.low, places.high]))
    middles, steps = (edges[1:] + edges[:-1]) / 2, np.diff(edges)
    x = np.asarray(cells.from_line(jnp.asarray(middles, jnp.float32)[:, None])[0])[:, 0]
    is_free = ~np.isin(x, atoms)
    return np.concatenate([x[is_free], atoms[:, 0]]), np.concatenate(
        [steps[is_free], np.ones(len(atoms))]
    )


def numbers(model):
    """Rows of values, the density's number for each, averaged over noise, and their sizes."""
    transform, cells = model.spec.transform, model.spec.cells
    samples = np.asarray(model.continuous.sample(jax.random.key(1), NUM_SAMPLES)[0], np.float64)
    line, found = transform.to_line(samples, np)[0], []
    rows = np.stack([transform.low, transform.high, transform.center, transform.scale], axis=1)
    for entry in range(samples.shape[1]):
        own = (
            None
            if cells is None
            else jax.tree.map(lambda table, entry=entry: table[entry : entry + 1], cells)
        )
        found.append(
            support(
                own, mapped(rows[[entry]]), line[:, entry], 4000 if samples.shape[1] == 1 else 200
            )
        )
    x, sizes = (
        np.stack([of.ravel() for of in np.meshgrid(*parts, indexing="ij")], axis=1)
        for parts in zip(*found, strict=True)
    )
    x = jnp.asarray(x, jnp.float32)
    if cells is None:
        return x, np.exp(np.asarray(log_prob(model, x), np.float64)), sizes.prod(axis=1)
    num_noise = NUM_NOISE if len(x) < 200 else 32
    middles = (np.arange(num_noise) + 0.5) / num_noise
    # a Latin square
    orders = [np.random.default_rng(entry).permutation(middles) for entry in range(x.shape[1])]
    noise = jnp.repeat(jnp.asarray(np.stack(orders, axis=1), x.dtype), len(x), axis=0)
    z, log_factors = jax.jit(cells.placed)(jnp.tile(x, (num_noise, 1)), noise)
    # of one number of rows, for a program that cases share
    padded = np.resize(z, (max(NUM_ROWS, len(z)), z.shape[1]))
    log_probs = np.asarray(log_prob(model.continuous, padded), np.float64)[: len(z)]
    log_probs += np.asarray(log_factors, np.float64).sum(axis=1)
    values = np.exp(log_probs).reshape(num_noise, -1).mean(axis=0)
    return x, values, sizes.prod(axis=1)


SLOW = ("a rounded amount and a free entry",)  # two entries


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=[pytest.mark.slow] if name in SLOW else []) for name in CASES],
)
def test_all_numbers_add_up_to_1_and_samples_have_the_shares_that_they_say(name):
    model = density(name)
    x, values, sizes = numbers(model)
    assert np.sum(values * sizes) == pytest.approx(1, abs=TOLERANCE)
    samples = np.asarray(model.sample(jax.random.key(0), NUM_SAMPLES)[0])
    # atoms and values are their own quantiles
    for entry, places in enumerate(np.quantile(samples, [0.1, 0.5, 0.9], axis=0).T):
        for place in places:
            # nodes of two entries are far apart
            for is_there in (np.equal, np.less) if x.shape[1] == 1 else (np.equal,):
                share = np.sum(np.where(is_there(x[:, entry], place), values * sizes, 0))
                error = np.sqrt(max(share * (1 - share), 1 / NUM_SAMPLES) / NUM_SAMPLES)
                assert (
                    abs(np.mean(is_there(samples[:, entry], place)) - share) < 3 * error + TOLERANCE
                )


def test_a_density_of_potentials_integrates_to_1_on_a_grid():
    stage, x = (
        ir.StageSpec(6, (8,), activation="softplus4", kind="potential"),
        np.random.default_rng(0).normal(size=(200, 2)).astype(np.float32),
    )
    model = ir.Density.init(jax.random.key(0), x, stages=[stage], coeff=0.95)
    edges = np.linspace(-80, 80, 801, dtype=np.float32)  # it shrinks what is far from the data
    values = jax.jit(ir.Density.log_prob)(
        model, np.stack(np.meshgrid(edges, edges), axis=-1).reshape(-1, 2)
    )
    assert np.exp(np.asarray(values, np.float64)).sum() * (160 / 800) ** 2 == pytest.approx(
        1, abs=TOLERANCE
    )
