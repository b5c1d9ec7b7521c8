"""Variational dequantisation: noise is a density, by dense Jacobians in float64."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import kept
import numpy as np
import pytest

import iresnet_jax as ir

DENSE_RTOL = 1e-9  # the same maths by another route, float64
DIFFERENCE_RTOL = 1e-6  # central differences in float64
SAME_RTOL = 1e-5  # the same maths by another route, float32
QUADRATURE_ATOL = 1e-4  # of a smooth density on a grid
LEVELS, NUM = 4, 5
NOISE = ir.NoiseSpec(num_blocks=2, hidden=(6,), network=(8, 3), window=3)
VECTORS = ir.DensitySpec(
    ir.FlowSpec((2,), (ir.StageSpec(2, hidden=(8, 8)),), noise=NOISE),
    transform=ir.Logit(0.05),
    num_levels=LEVELS,
)
IMAGES = dataclasses.replace(
    VECTORS, flow=ir.FlowSpec((3, 2, 1), (ir.StageSpec(1, hidden=(8,)),), noise=NOISE)
)
KEYS = functools.cache(lambda: tuple(jax.random.split(jax.random.key(5), 2)))

terms = jax.jit(ir.Density.terms)


def case(spec):
    """A model in float64, by the fixture of the test, and levels."""
    x = np.random.default_rng(0).integers(0, LEVELS, (NUM, *spec.flow.event_shape))
    return kept.exact_model(spec, seed=1), jnp.asarray(x, jnp.uint8)


@jax.jit
def log_density_of_noise(model, x, noise, bounds):
    """``log q(noise | x)`` by the inverse of the flow and the dense Jacobian of ``e -> noise``."""
    e, info = model.noise_flow(x, bounds).inverse(jnp.log(noise / (1 - noise)).reshape(len(x), -1))
    e = e.reshape(len(x), -1)

    def column(direction):  # of the Jacobians of all examples
        made = lambda e: jax.nn.sigmoid(model.noise_flow(x).forward(e.reshape(x.shape)))  # noqa: E731
        return jax.jvp(made, (e,), (jnp.broadcast_to(direction[None], e.shape),))[1]

    jacobians = jax.vmap(column, out_axes=2)(jnp.eye(e.shape[1], dtype=e.dtype))
    return jax.scipy.stats.logistic.logpdf(e).sum(axis=1) - jnp.linalg.slogdet(jacobians)[
        1
    ], info.converged


def test_log_likelihoods_are_those_of_the_dense_density_of_the_noise(x64):
    model, x = case(IMAGES)
    found = terms(model, x, *KEYS())
    u = jax.jit(ir.Density.dequantize)(model, x, KEYS()[0])
    np.testing.assert_array_equal(np.floor(u * LEVELS), x)
    log_q, converged = log_density_of_noise(model, x, u * LEVELS - x, model.bounds())
    assert converged.all()
    of_point = jax.jit(ir.Density.log_prob)(model.continuous, u)
    expected = of_point - log_q - IMAGES.flow.num_dims * np.log(LEVELS)
    np.testing.assert_allclose(found.log_prob, expected, rtol=DENSE_RTOL)
    assert np.ptp(log_q) > 0.1  # noise is not uniform


def test_the_density_of_the_noise_integrates_to_1_whatever_the_image(x64):
    model, x = case(VECTORS)
    t = np.linspace(-30, 30, 201)  # on the line, where the density has no poles at its ends
    grid = 1 / (1 + np.exp(-jnp.asarray(np.stack(np.meshgrid(t, t), axis=-1).reshape(-1, 2))))
    sizes = jnp.prod(grid * (1 - grid), axis=1) * (t[1] - t[0]) ** 2
    for row in x[:2]:
        log_q, converged = log_density_of_noise(
            model, jnp.broadcast_to(row, (len(grid), 2)), grid, model.bounds()
        )
        assert converged.all()
        np.testing.assert_allclose(np.sum(np.exp(log_q) * sizes), 1, atol=QUADRATURE_ATOL)


def test_gradients_of_all_that_makes_noise_are_those_of_differences(x64):
    (model, x), keys = case(IMAGES), KEYS()
    of_noise = {name: block for name, block in model.weights.items() if name.startswith("noise_")}

    @jax.jit
    @jax.value_and_grad
    def value_and_slope(step):
        weights, network = jax.tree.map(
            lambda a, d: a + step * d, (of_noise, model.noise_network), direction
        )
        moved = model.with_(weights={**model.weights, **weights}, noise_network=network)
        return moved.terms(x, *keys).log_prob.mean()

    leaves, tree = jax.tree.flatten((of_noise, model.noise_network))
    rng = np.random.default_rng(1)
    direction = jax.tree.unflatten(
        tree, [jnp.asarray(rng.normal(size=np.shape(leaf))) for leaf in leaves]
    )
    (_, slope), (ahead, _), (behind, _) = map(value_and_slope, (0.0, 1e-5, -1e-5))
    assert abs(slope) > 1e-2
    np.testing.assert_allclose(slope, (ahead - behind) / 2e-5, rtol=DIFFERENCE_RTOL)


def squares():
    """Images of four pixels that are all the same but for one, which is random."""
    rng = np.random.default_rng(0)
    x = np.repeat(rng.integers(0, LEVELS, (256, 1)), 4, axis=1)
    x[:, 0] = rng.integers(0, LEVELS, 256)
    return x.reshape(-1, 2, 2, 1).astype(np.uint8)


def with_uniform_noise(model):
    """The same density of points."""
    spec = dataclasses.replace(model.spec, flow=dataclasses.replace(model.spec.flow, noise=None))
    return model.with_(spec=spec, weights={"stage0": model.weights["stage0"]}, noise_network={})


def test_noise_starts_uniform():
    first = ir.Density.init(
        jax.random.key(0),
        squares(),
        stages=[ir.StageSpec(1, (16,), activation="clipswish")],
        num_levels=LEVELS,
        noise=ir.NoiseSpec(1, (8,), (8, 4), window=3),
    )
    uniform, key = with_uniform_noise(first), jax.random.key(1)
    expected = uniform.log_prob(squares(), key)
    np.testing.assert_allclose(first.log_prob(squares(), key), expected, rtol=SAME_RTOL)
    assert (uniform.spec.bound, first.spec.bound) == ("uniform mean", "variational mean")
    assert first.noise_certificate().certified
    assert uniform.noise_certificate() is None


@pytest.mark.slow
def test_probes_of_the_noise_are_others_than_those_of_the_data():
    """With the same probes, the errors of two equal flows would be equal."""
    flow = ir.FlowSpec(
        (3, 3, 1), (ir.StageSpec(2, (6,), (3, 3), activation="clipswish"),), noise=NOISE
    )
    model = kept.model(dataclasses.replace(IMAGES, flow=flow)).with_(
        estimator=ir.SeriesLogdet(2, num_probes=1, exact_trace=False)
    )
    own, blocks = model.weights["stage0"], model.weights["noise_stage0"]
    weights = {
        name: layer | own.branch.weights[name] for name, layer in blocks.branch.weights.items()
    }
    equal = blocks._replace(
        branch=dataclasses.replace(blocks.branch, weights=weights), actnorm=own.actnorm
    )
    model = model.with_(weights=model.weights | {"noise_stage0": equal})
    x = np.full((2000, 3, 3, 1), 1, np.uint8)
    keys = jax.random.split(jax.random.key(0), len(x))
    fixed = jnp.broadcast_to(jax.random.key(1), len(x))
    found = terms(model, x, fixed, keys)
    correlation = np.corrcoef(found.log_det, found.log_det_transform)[0, 1]
    assert abs(correlation) < 0.1  # 4.5 standard deviations of one that is 0
