"""Upper bounds, tested strictly: dense float64 norm <= bound, without tolerance."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest

from iresnet_jax.maths import convolution_certificate as certify
from iresnet_jax.maths import gram_iteration

EXACT = 1e-11  # "exact" in float64: slack 2.3e-13, and rounding bounds of at most a few 1e-12
EXACT_F32 = 1e-3  # the same in float32: slack 1.2e-4, and a rounding inflation below 6e-4
# the embedding's own slack for these random kernels on images of 8 x 8 and more; mean 1.02 at 8 x 8
TIGHT = 1.03
GRADIENT = 1e-6  # central differences in float64

# (taps, image, cin, cout, padding)
GEOMETRIES = {
    "3x3 one channel": ((3, 3), (8, 8), 1, 1, "SAME"),
    "3x3 oblong": ((3, 3), (5, 9), 3, 2, "SAME"),
    "3x3 on a row": ((3, 3), (1, 8), 2, 2, "SAME"),
    "3x3 on a pixel": ((3, 3), (1, 1), 3, 2, "SAME"),
    "1x1": ((1, 1), (4, 4), 4, 6, "SAME"),
    "5x5 on 3x2": ((5, 5), (3, 2), 3, 2, "SAME"),
    "4x2": ((4, 2), (6, 5), 2, 3, "SAME"),
    "circular 5x5 on 3x3": ((5, 5), (3, 3), 2, 2, "CIRCULAR"),
}
# What the reductions leave is the layer itself.
EXACT_EMBEDDINGS = ("1x1", "3x3 on a pixel", "circular 5x5 on 3x3")
# small layers are written out as matrices unless twists are asked for
EMBEDDED = {"twists": certify.TWISTS}


def kernels_of_every_kind(shape, seed=0):
    """Named kernels that are random, concentrated at one frequency or tap, or badly scaled."""
    rng = np.random.default_rng(seed)
    height, width, cin, cout = shape
    mixing = rng.normal(size=(cin, cout))
    row_signs, column_signs = (-1.0) ** np.arange(height), (-1.0) ** np.arange(width)
    blur = np.outer(*(np.poly1d([1, 1]) ** (k - 1) for k in (height, width)))
    delta = np.zeros((height, width))
    delta[rng.integers(height), rng.integers(width)] = 1
    single = np.zeros(shape)
    single[-1, 0, -1, 0] = -2
    gauss = rng.normal(size=(3, *shape))
    named = {
        "gauss": gauss[0],
        "gauss 2": gauss[1],
        "constant": np.ones(shape),
        "low pass": np.abs(gauss[2]),
        "blur": np.multiply.outer(blur, mixing),
        "nyquist": np.multiply.outer(np.outer(row_signs, column_signs), mixing),
        "row nyquist": np.abs(gauss[2]) * row_signs[:, None, None, None],
        "delta": np.multiply.outer(delta, mixing),
        "rank one": np.einsum("a,b,i,o->abio", *(rng.normal(size=n) for n in shape)),
        "single weight": single,
        "huge": 1e6 * gauss[0],
        "tiny": 1e-12 * gauss[1],
        "zero": np.zeros(shape),
    }
    return list(named), np.stack(list(named.values()))


def dense_norms(kernels, image, padding):
    matrices = [oracles.dense_conv_matrix(kernel, *image, padding=padding) for kernel in kernels]
    return np.linalg.norm(matrices, 2, axis=(1, 2))


@functools.partial(
    jax.jit, static_argnums=1, static_argnames=("padding", "num_squarings", "twists")
)
def mapped_bound(kernels, image, **options):
    """One after the other: a batch of them would be traced again, function by function."""
    return jax.lax.map(lambda kernel: certify.conv_norm_bound(kernel, image, **options), kernels)


def bounds_of(kernels, image, **options):
    return np.asarray(mapped_bound(jnp.asarray(kernels), image, **options))


def assert_upper_bounds(bounds, norms, names):
    below = [
        f"{name}: {bound} < {norm}"
        for bound, norm, name in zip(bounds, norms, names, strict=True)
        if not bound >= norm
    ]
    assert not below, below


@pytest.mark.parametrize("case", GEOMETRIES)
def test_embedding_is_above_the_dense_norm(case, x64):
    taps, image, cin, cout, padding = GEOMETRIES[case]
    names, kernels = kernels_of_every_kind((*taps, cin, cout))
    norms = dense_norms(kernels, image, padding)
    bounds = bounds_of(kernels, image, padding=padding, **EMBEDDED)
    assert_upper_bounds(bounds, norms, names)
    assert bounds[names.index("zero")] == 0
    ratios = bounds[norms > 0] / norms[norms > 0]
    if case in EXACT_EMBEDDINGS:
        assert ratios.max() <= 1 + EXACT
    if min(image) >= 8 and max(taps) <= 3:
        assert ratios[:2].max() <= TIGHT  # the Gaussian kernels


def test_the_check_rejects_the_plain_circulant(x64):
    """The periodic layer's norm is no bound for zero padding, and the comparison above sees it."""
    kernels = np.random.default_rng(0).normal(size=(64, 3, 3, 1, 1))
    norms = dense_norms(kernels, (5, 5), "SAME")
    names = [str(i) for i in range(64)]
    assert_upper_bounds(bounds_of(kernels, (5, 5), **EMBEDDED), norms, names)
    circulant = bounds_of(kernels, (5, 5), padding="CIRCULAR")
    with pytest.raises(AssertionError, match="<"):
        assert_upper_bounds(circulant, norms, names)
    assert np.min(circulant / norms) < 0.98


@pytest.mark.parametrize("shape", [(1, 1), (7, 3), (3, 200), (64, 64), (90, 70)])
def test_dense_bound(shape, x64):
    rng = np.random.default_rng(7)
    matrix = rng.normal(size=shape)
    for scale in (1, 1e-150, 1e150):
        norm = np.linalg.norm(scale * matrix, 2)
        bound = certify.dense_norm_bound(jnp.asarray(scale * matrix))
        assert norm <= bound <= norm * (1 + EXACT)


@pytest.mark.parametrize("parts", [1, 2])
def test_errors_of_computed_gram_matrices_are_within_their_bound(parts):
    matrix = np.random.default_rng(0).normal(size=(parts, 20, 300)).astype(np.float32)
    units = np.array([1, 1j])[:parts]
    exact = np.tensordot(units, matrix.astype(np.float64), 1)
    computed = np.tensordot(units, np.asarray(gram_iteration._gram(jnp.asarray(matrix))), 1)
    error = np.linalg.norm(computed - exact @ exact.conj().T, 2)
    assert 0 < error <= gram_iteration._gram_error(jnp.asarray(matrix)) <= 1000 * error


def test_gradient_of_the_gram_bound_against_differences(x64):
    rng = np.random.default_rng(9)
    kernel, direction = (jnp.asarray(rng.normal(size=(3, 3, 2, 3))) for _ in range(2))

    def bound(step):
        return certify.conv_norm_bound(kernel + step * direction, (5, 5), num_squarings=4)

    (ahead, behind, _), slopes = jax.jit(jax.vmap(jax.value_and_grad(bound)))(
        jnp.array([1e-5, -1e-5, 0])
    )
    np.testing.assert_allclose(slopes[2], (ahead - behind) / 2e-5, rtol=GRADIENT)


def test_bounds_compile_and_keep_low_precision_and_bad_weights_visible():
    kernel = jnp.asarray(np.random.default_rng(13).normal(size=(3, 3, 2, 2)), jnp.bfloat16)
    bound_of = jax.jit(lambda k: certify.conv_norm_bound(k, (4, 4)))
    assert bound_of(kernel).dtype == jnp.float32
    np.testing.assert_allclose(bound_of(kernel), bound_of(kernel.astype(jnp.float32)), rtol=1e-6)
    assert jnp.isnan(bound_of(kernel.at[0, 0, 0, 0].set(jnp.nan)))
    assert not jnp.isfinite(certify.dense_norm_bound(jnp.array([[1.0, jnp.inf]])))


def users_jit(function):
    """Compiles as users do; the suite compiles without optimisation."""
    return jax.jit(function, compiler_options={"xla_backend_optimization_level": 3})


user_dense = users_jit(certify.dense_norm_bound)
user_conv = users_jit(lambda k: certify.conv_norm_bound(k, (4, 4), **EMBEDDED))


def test_subnormal_weights_add_to_the_norm():
    """Processors may take subnormal numbers for 0."""
    tiny, rng = np.finfo(np.float32).tiny, np.random.default_rng(0)
    matrices = [np.full((8, 1), size, np.float32) for size in (1e-41, 1e-45, 4 * tiny)]
    # one normal entry among many that are just not
    matrices.append(np.float32([[tiny], *[[tiny / 1.001]] * 7]))
    matrices += [(tiny * 2.0 ** rng.uniform(-2, 1, (8, 1))).astype(np.float32) for _ in range(40)]
    norms = [np.linalg.norm(matrix.astype(np.float64)) for matrix in matrices]
    assert_upper_bounds(
        [float(user_dense(matrix)) for matrix in matrices], norms, range(len(norms))
    )
    kernels = (tiny * 2.0 ** rng.uniform(-2, 1, (20, 3, 3, 2, 2))).astype(np.float32)
    norms = dense_norms(kernels, (4, 4), "SAME")
    assert_upper_bounds([float(user_conv(kernel)) for kernel in kernels], norms, range(len(norms)))
    assert user_dense(jnp.zeros((8, 1))) == user_conv(jnp.zeros((3, 3, 2, 2))) == 0


def test_norms_of_huge_weights_are_not_taken_for_zeros():
    """Two divisions by powers of two may be one, whose reciprocal is subnormal."""
    for entry in (1e25, 1e29, 5e37, 3e38):
        assert entry * np.sqrt(35) <= float(user_dense(jnp.full((5, 7), entry, jnp.float32)))
        kernel = np.full((3, 3, 2, 2), entry, np.float32)
        assert dense_norms(kernel[None], (4, 4), "SAME")[0] <= float(user_conv(kernel))
        assert np.isinf(user_dense(jnp.full((5, 7), entry, jnp.float32))) == (entry > 1e30)


@pytest.mark.parametrize("options", [{}, EMBEDDED], ids=["written out", "embedded"])
def test_bounds_hold_at_the_default_level_of_the_compiler(options):
    bound = users_jit(
        lambda kernels: jax.vmap(lambda k: certify.conv_norm_bound(k, (5, 4), **options))(kernels)
    )
    names, kernels = kernels_of_every_kind((3, 3, 3, 2), seed=15)
    kernels = kernels.astype(np.float32)
    norms = dense_norms(kernels, (5, 4), "SAME")
    bounds = np.asarray(bound(kernels))
    assert_upper_bounds(bounds, norms, names)
    np.testing.assert_array_less(bounds, norms * (1.2 if options else 1 + EXACT_F32) + 1e-30)


def test_float32_dense_bounds_hold_where_a_float32_svd_falls_short():
    rng = np.random.default_rng(8)
    gauss = rng.normal(size=(40, 48, 48))
    rank_one = np.einsum("ki,kj->kij", *rng.normal(size=(2, 40, 48)))
    matrices = np.concatenate([gauss, rank_one, np.linalg.qr(gauss)[0]]).astype(np.float32)
    norms = np.linalg.norm(matrices.astype(np.float64), 2, axis=(1, 2))
    names = [str(i) for i in range(len(norms))]
    bounds = np.asarray(users_jit(jax.vmap(certify.dense_norm_bound))(matrices))
    assert_upper_bounds(bounds, norms, names)
    np.testing.assert_array_less(bounds, norms * (1 + EXACT_F32))
