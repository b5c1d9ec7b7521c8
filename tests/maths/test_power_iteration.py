"""Operator norms and soft normalisation against singular values of the unfolded layers."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest

from iresnet_jax.maths.convolution import conv
from iresnet_jax.maths.power_iteration import soft_normalize, spectral_norm

RTOL = 1e-3  # the default tolerance of the iteration
ROUNDING = 1e-5  # a few hundred units of float32
# how far one power step for each step of a drifting kernel stays behind, worst where the leading
# vector changes
LAG = 0.04
CONVERGED = 1e-6  # gradients through an iteration that has converged in float64
COEFF = 0.9


def norm_of(apply, kernel, v, **settings):
    """`spectral_norm` as one program."""
    return jax.jit(functools.partial(spectral_norm, apply, **settings))(kernel, v)


def dense(kernel, x):
    return x @ kernel


def gaussian(rng, shape):
    return rng.normal(size=shape) / np.sqrt(np.prod(shape[:-1]))


def kernels_of_every_kind(shape, seed=0):
    """Kernels that power iteration may find hard, all larger than the ball of ``COEFF``."""
    rng = np.random.default_rng(seed)
    kinds = {
        "gaussian": 3 * gaussian(rng, shape),
        "low-pass": np.abs(gaussian(rng, shape)) + 0.5,  # long smooth singular vectors, tiny gaps
        "rank one": 9 * functools.reduce(np.multiply.outer, [rng.normal(size=n) for n in shape]),
        "one tap": np.zeros(shape),  # all singular values equal
        "huge": 1e6 * gaussian(rng, shape),
        "mostly zero": np.where(rng.random(shape) < 0.8, 0, 5 * rng.normal(size=shape)),
    }
    kinds["one tap"][tuple((n - 1) // 2 for n in shape[:-2])] = 2 * np.eye(*shape[-2:])
    return kinds


# spatial shape, kernel shape, padding; six kinds of kernels each
CONVOLUTIONS = {
    "3x3": ((5, 7), (3, 3, 2, 4), "SAME"),
    "3x3 circular on 2x1 pixels": ((2, 1), (3, 3, 8, 3), "CIRCULAR"),
    "5x5 on 2x2 pixels": ((2, 2), (5, 5, 2, 3), "SAME"),
}


def with_spectrum(rng, values):
    left, right = (np.linalg.qr(rng.normal(size=(len(values), len(values))))[0] for _ in range(2))
    return 2 * left @ np.diag(values) @ right


def spiked(rng, size, gap):
    """One singular value a little above a crowd: a stop on small growth gets it wrong."""
    return with_spectrum(rng, np.r_[1, np.full(size - 1, 1 - gap)])


DENSE = {
    "80 x 80": lambda rng: {
        "gaussian": rng.normal(size=(80, 80)),
        "orthogonal": with_spectrum(rng, np.ones(80)),
        "linear spectrum": with_spectrum(rng, np.linspace(1, 0.9, 80)),
        "rank one": np.outer(rng.normal(size=80), rng.normal(size=80)),
        **{f"spike of {gap}": spiked(rng, 80, gap) for gap in (0.1, 0.03, 0.01, 0.002)},
    },
    "8 x 8": lambda rng: {f"spike of {gap}": spiked(rng, 8, gap) for gap in (0.1, 0.003)},
    "1 x 1": lambda rng: {"positive": np.ones((1, 1)), "negative": -np.ones((1, 1))},
}


def assert_normalises(apply, matrix_of, kernels, in_shape):
    """Every kernel ends within tolerance of its ball, from an estimate below the norm."""

    @jax.jit
    @jax.vmap
    def normalize(kernel, v):
        sigma, _, info = spectral_norm(apply, kernel, v)
        return soft_normalize(kernel, sigma, COEFF), sigma, info.converged

    stacked = jnp.asarray(np.stack(list(kernels.values())), jnp.float32)
    starts = jax.random.normal(jax.random.key(1), (len(kernels), *in_shape))
    for name, kernel, normalized, sigma, converged in zip(
        kernels, stacked, *normalize(stacked, starts), strict=True
    ):
        true = oracles.operator_norm(matrix_of(kernel))
        assert converged, name
        assert true * (1 - RTOL) <= sigma <= true * (1 + ROUNDING), name
        assert true > COEFF, f"{name}: nothing to normalise"
        assert oracles.operator_norm(matrix_of(normalized)) <= COEFF * (1 + RTOL), name


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_normalised_convolutions_are_contractions(name):
    space, shape, padding = CONVOLUTIONS[name]
    assert_normalises(
        lambda kernel, x: conv(x[None], kernel, padding=padding, implementation="xla")[0],
        lambda kernel: oracles.dense_conv_matrix(kernel, *space, padding=padding),
        kernels_of_every_kind(shape),
        (*space, shape[2]),
    )


@pytest.mark.parametrize("name", DENSE)
def test_normalised_dense_layers_are_contractions(name):
    rng = np.random.default_rng(0)
    kernels = DENSE[name](rng)
    assert_normalises(dense, lambda kernel: kernel, kernels, next(iter(kernels.values())).shape[:1])


@pytest.mark.parametrize("shape", [(300, 5), (5, 300), (300, 60)])
def test_the_iteration_is_in_the_space_of_fewer_dimensions(shape):
    kernel = gaussian(np.random.default_rng(0), shape).astype(np.float32)
    sigma, v, info = norm_of(dense, kernel, jnp.ones(shape[0]) / 10)
    left, values, _ = np.linalg.svd(kernel)
    np.testing.assert_allclose(sigma, values[0], rtol=ROUNDING if min(shape) == 5 else RTOL)
    if min(shape) == 60:
        # 32 vectors a cycle gain cosh(31 acosh(1 + 4 RTOL)) each on all that is lower by RTOL: five
        # cycles are enough for a start with a leading component of a thousandth of 1 / sqrt(60)
        assert info.num_steps >= 160
    if min(shape) == 5:
        assert info.num_steps == 5
        np.testing.assert_allclose(np.abs(v @ left[:, 0]), 1, rtol=ROUNDING)


def test_the_tolerance_does_not_depend_on_the_warm_start():
    run = jax.jit(jax.vmap(functools.partial(spectral_norm, dense), in_axes=(None, 0)))
    for rest in (1, 40):  # as a whole matrix, and in cycles
        kernel = jnp.diag(jnp.array([2.0, 3.0, *[1.0] * rest]))
        # no start at all, and one orthogonal to the answer
        sigmas, vectors, info = run(kernel, jnp.zeros((2, len(kernel))).at[1, 0].set(1))
        assert jnp.all(info.converged)
        np.testing.assert_allclose(sigmas, [3, 3], rtol=RTOL)
        np.testing.assert_allclose(jnp.abs(vectors[:, 1]), 1, atol=0.01)


def test_one_power_step_follows_a_drifting_kernel():
    rng = np.random.default_rng(0)
    start, drift = (jnp.asarray(gaussian(rng, (3, 3, 3, 4)), jnp.float32) for _ in range(2))

    def apply(kernel, x):
        return conv(x[None], kernel, implementation="xla")[0]

    v = jax.random.normal(jax.random.key(0), (6, 6, 3))
    _, v, info = norm_of(apply, start, v, num_steps=50)
    assert not info.converged  # which power steps alone do not show

    def step(v, time):
        kernel = start + time * drift
        sigma, v, _ = spectral_norm(apply, kernel, v, num_steps=1)
        return v, sigma

    times = jnp.linspace(0, 1, 201)  # half a per cent of the kernel a step, as in training
    _, sigmas = jax.jit(lambda v: jax.lax.scan(step, v, times))(v)
    for time, sigma in zip(times[::50], sigmas[::50], strict=True):
        true = oracles.operator_norm(oracles.dense_conv_matrix(start + time * drift, 6, 6))
        assert (1 - LAG) * true <= sigma <= (1 + ROUNDING) * true


@pytest.mark.parametrize("num_steps", [None, 2])
def test_zero_tiny_and_huge_kernels_have_finite_values_and_gradients(num_steps):
    rng = np.random.default_rng(0)
    kernel = jnp.asarray(gaussian(rng, (3, 3, 2, 3)), jnp.float32)
    v = jax.random.normal(jax.random.key(0), (4, 4, 2))
    true = oracles.operator_norm(oracles.dense_conv_matrix(kernel, 4, 4))

    @jax.jit
    @functools.partial(jax.vmap, in_axes=0)
    def value_and_gradient(scale):
        def loss(kernel):
            sigma, new_v, _ = spectral_norm(
                lambda k, x: conv(x[None], k, implementation="xla")[0],
                kernel,
                v,
                num_steps=num_steps,
            )
            return jnp.sum(soft_normalize(kernel, sigma, COEFF)), (sigma, new_v)

        return jax.value_and_grad(loss, has_aux=True)(scale * kernel)

    scales = jnp.array([0, 1e-30, 1e-12, 1, 1e6, 1e30])
    (values, (sigmas, vectors)), gradients = value_and_gradient(scales)
    assert all(jnp.all(jnp.isfinite(a)) for a in (values, sigmas, vectors, gradients))
    np.testing.assert_allclose(sigmas, scales * true, rtol=RTOL if num_steps is None else 0.3)
    # a zero layer is free to move
    np.testing.assert_array_equal(gradients[0], jnp.ones_like(kernel))


def test_a_layer_inside_the_ball_is_unchanged_bit_for_bit():
    kernel = jnp.asarray(0.3 * gaussian(np.random.default_rng(0), (5, 4)), jnp.float32)
    sigma, _, _ = norm_of(dense, kernel, jnp.ones(5))
    assert sigma < COEFF
    np.testing.assert_array_equal(soft_normalize(kernel, sigma, COEFF), kernel)
    gradient = jax.grad(lambda k: jnp.sum(soft_normalize(k, jnp.linalg.norm(k), COEFF)))(
        0.1 * kernel
    )
    np.testing.assert_array_equal(gradient, jnp.ones_like(kernel))


def test_the_gradient_of_a_dense_norm_is_that_of_the_svd(x64):
    rng = np.random.default_rng(0)
    kernel, weights = jnp.asarray(rng.normal(size=(6, 4))), jnp.asarray(rng.normal(size=(6, 4)))
    left, _, right = np.linalg.svd(kernel)
    sigma, pullback = jax.vjp(
        jax.jit(lambda k: spectral_norm(dense, k, jnp.ones(6), rtol=1e-6)[0]), kernel
    )
    np.testing.assert_allclose(
        pullback(1.0)[0], np.outer(left[:, 0], right[0]), rtol=CONVERGED, atol=CONVERGED
    )

    def normalized(kernel, norm):
        return jnp.sum(weights * soft_normalize(kernel, norm, COEFF))

    through_svd = jax.grad(lambda k: normalized(k, jnp.linalg.svd(k, full_matrices=False)[1][0]))(
        kernel
    )
    direct, along_norm = jax.grad(normalized, argnums=(0, 1))(kernel, sigma)
    np.testing.assert_allclose(
        direct + pullback(along_norm)[0], through_svd, rtol=CONVERGED, atol=CONVERGED
    )
    # the path through the norm is not a detail
    assert not np.allclose(direct, through_svd, rtol=0.1)
