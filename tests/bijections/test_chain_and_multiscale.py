"""Bijections: one dictionary of cases drives the generic tests, and how information composes is tested by hand."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest

from iresnet_jax.bijections.actnorm import ActNormParams, actnorm_bijection
from iresnet_jax.bijections.bijection import Bijection, fold_in, follow_inverse_info, isometric_bijection, no_inverse_error
from iresnet_jax.bijections.chain import chain, repeat
from iresnet_jax.bijections.multiscale import Stage, multiscale
from iresnet_jax.bijections.reshape import flatten_bijection, squeeze_bijection
from iresnet_jax.bijections.residual import Solver, residual_bijection
from iresnet_jax.branches.branch import CallableBranch
from iresnet_jax.branches.feedforward import FeedforwardSpec
from iresnet_jax.maths.logdet.exact import ExactLogdet
from iresnet_jax.maths.logdet.hutchinson_series import SeriesLogdet
from iresnet_jax.models import flow as model
from iresnet_jax.models import priors
from iresnet_jax.models.architecture import FlowSpec, StageSpec

EXACT = 1e-9  # the same mathematics by another route in float64; slogdet of up to 32 dimensions
LAYOUT = 1e-12  # the same operations in the same order, fused differently
INVERSE_ATOL = 1e-8  # asked of the solver
PREIMAGE = 1e-6  # what that leaves after a handful of blocks, in a latent or a log-determinant
QUADRATURE = 1e-3
BATCH = 3
SOLVER = Solver(atol=INVERSE_ATOL)


def residual(g, lipschitz_bound, estimator, solver=SOLVER):
    return residual_bijection(CallableBranch(g, lipschitz_bound), estimator, solver)


def random_actnorm(rng, channels):
    return ActNormParams(*(jnp.asarray(0.4 * rng.normal(size=channels)) for _ in range(2)))


@functools.cache
def random_weights(spec, seed=0, num_steps=None):
    """Constrained weights of a flow away from its start: biases and scales are not zero."""
    rng = np.random.default_rng(seed)

    @jax.jit
    def draw(key):
        params, spectral = {}, {}
        for name, stage, _, branch in spec.layout:
            keys = jax.random.split(key, stage.num_blocks)
            blocks: dict[str, Any] = jax.vmap(branch.initial_weights)(keys)
            blocks["actnorm"] = {
                "bias": jnp.zeros((stage.num_blocks, branch.in_shape[-1])),
                "log_scale": jnp.zeros((stage.num_blocks, branch.in_shape[-1])),
            }
            params[name] = {"blocks": jax.tree.map(lambda a: a + jnp.asarray(0.3 * rng.normal(size=a.shape)), blocks)}
            spectral[name] = {"blocks": jax.vmap(branch.initial_iterates)(keys)}
        return model.constrain(spec, params, spectral, num_steps=num_steps).weights

    return draw(jax.random.key(seed))


DENSE = FlowSpec((3,), (StageSpec(2, hidden=(4,), activation="tanh"),))
IMAGES = FlowSpec(
    (4, 2, 2),
    (
        StageSpec(1, hidden=(3,), kernel_sizes=(3, 1), squeeze=2, factor_out=True, padding="CIRCULAR"),
        StageSpec(1, hidden=(6,), preactivation=True),
    ),
)


CONVOLUTIONAL = FeedforwardSpec((3, 3, 2), (3,), (2, 3), activation="lipswish", preactivation=True)


def residual_case(branch_spec, coeff=0.8):
    rng = np.random.default_rng(3)

    @jax.jit
    def draw(key_weights, key_vectors):
        weights = branch_spec.initial_weights(key_weights)
        weights = jax.tree.map(lambda w: w + jnp.asarray(0.3 * rng.normal(size=w.shape)), weights)
        vectors = branch_spec.singular_vectors(weights, branch_spec.initial_iterates(key_vectors), num_steps=50)
        return branch_spec.constrained(weights, vectors, coeff=coeff).branch

    branch = draw(jax.random.key(3), jax.random.key(4))
    return residual(branch, branch.lipschitz_bound, ExactLogdet(), SOLVER)


def chain_case():
    rng = np.random.default_rng(1)
    return chain(
        [
            squeeze_bijection(2),
            actnorm_bijection(random_actnorm(rng, 4)),
            flatten_bijection((1, 2, 4)),
            residual(lambda x: 0.5 * jnp.sin(x), 0.5, ExactLogdet(), SOLVER),
        ]
    )


def repeat_case(**layout):
    rng = np.random.default_rng(2)
    weights = {"scale": jnp.asarray(rng.uniform(0.2, 0.8, size=4)), "actnorm": jnp.asarray(0.3 * rng.normal(size=(4, 2, 3)))}

    def make(w):
        actnorm = actnorm_bijection(ActNormParams(w["actnorm"][0], w["actnorm"][1]))
        block = residual(lambda x: w["scale"] * jnp.sin(x[:, ::-1]), w["scale"], ExactLogdet(), SOLVER)
        return chain([actnorm, block])

    return repeat(make, weights, **layout)


def multiscale_case():
    rng = np.random.default_rng(4)
    first = chain([squeeze_bijection(2), actnorm_bijection(random_actnorm(rng, 8))])
    second = residual(lambda x: 0.6 * jnp.tanh(x), 0.6, ExactLogdet(), SOLVER)
    return multiscale([Stage(first, factor_out=True), Stage(second)], (2, 4, 2))


def model_case(spec, **layout):
    return model.flow_bijection(spec, random_weights(spec), ExactLogdet(), SOLVER, **layout)


# Shape of an example, and the bijection. A new bijection is one line here.
CASES: dict[str, tuple[tuple[int, ...], Callable[[], Bijection]]] = {
    "actnorm": ((2, 3, 4), lambda: actnorm_bijection(random_actnorm(np.random.default_rng(0), 4))),
    "squeeze": ((4, 6, 1), lambda: squeeze_bijection(2)),
    "flatten": ((2, 3, 2), lambda: flatten_bijection((2, 3, 2))),
    "convolutional residual": ((3, 3, 2), lambda: residual_case(CONVOLUTIONAL)),
    "chain": ((2, 4, 1), chain_case),
    "scanned blocks": ((3,), repeat_case),
    "unrolled blocks": ((3,), functools.partial(repeat_case, unroll=True)),
    "multi-scale": ((2, 4, 2), multiscale_case),
    "dense model": ((3,), lambda: model_case(DENSE)),
    "image model": ((4, 2, 2), lambda: model_case(IMAGES)),
}


class Measured(NamedTuple):
    x: Any
    y: Any
    logdet: Any
    logdet_info: Any
    jacobian: Any
    back: Any
    inverse_logdet: Any
    inverse_info: Any


@functools.cache
def measure(name) -> Measured:
    """Everything a case is asked about, in float64, from one compilation."""
    shape, make = CASES[name]
    with jax.enable_x64(True):
        bijection = make()
        x = jnp.asarray(np.random.default_rng(5).normal(size=(BATCH, *shape)))

        @jax.jit
        def run(x, key):
            y, logdet, logdet_info = bijection.forward_and_logdet(x, key)
            back, inverse_logdet, _, inverse_info = bijection.inverse_and_logdet(y, key)
            jacobian = jax.vmap(jax.jacfwd(lambda row: bijection.forward(row[None])[0].ravel()))(x)
            return Measured(x, y, logdet, logdet_info, jacobian, back, inverse_logdet, inverse_info)

        return jax.tree.map(np.asarray, run(x, jax.random.key(0)))


def assert_logdet(logdet, jacobian):
    expected = np.linalg.slogdet(jacobian.reshape(len(jacobian), jacobian.shape[1], -1))[1]
    np.testing.assert_allclose(logdet, expected, rtol=EXACT, atol=EXACT)


@pytest.mark.parametrize("name", CASES)
def test_round_trip(name):
    m = measure(name)
    assert m.y.shape[0] == BATCH
    assert m.y.size == m.x.size
    assert np.all(m.inverse_info.converged)
    np.testing.assert_allclose(m.back, m.x, atol=PREIMAGE)
    error = np.linalg.norm((m.back - m.x).reshape(BATCH, -1), axis=1)
    assert np.all(error <= m.inverse_info.error_bound + 1e-13)


@pytest.mark.parametrize("name", ["chain", "scanned blocks", "unrolled blocks", "multi-scale"])
def test_without_logdet_the_maps_are_the_same(name):
    m = measure(name)
    with jax.enable_x64(True):
        bijection = CASES[name][1]()
        y, (back, info) = jax.jit(lambda x, y: (bijection.forward(x), bijection.inverse(y)))(m.x, m.y)
    np.testing.assert_allclose(y, m.y, rtol=EXACT)
    np.testing.assert_allclose(back, m.back, rtol=EXACT)
    np.testing.assert_array_equal(info.num_evals, m.inverse_info.num_evals)


@pytest.mark.parametrize("name", CASES)
def test_logdet_against_the_jacobian(name):
    m = measure(name)
    assert m.logdet.shape == (BATCH,)
    assert_logdet(m.logdet, m.jacobian)
    np.testing.assert_array_equal(m.logdet_info.truncation_bound, 0)
    np.testing.assert_allclose(m.inverse_logdet, -m.logdet, atol=PREIMAGE)


def test_the_logdet_check_rejects_a_forgotten_part():
    m = measure("chain")
    actnorm = random_actnorm(np.random.default_rng(1), 4)
    with pytest.raises(AssertionError):
        assert_logdet(m.logdet - 2 * np.sum(actnorm.log_scale), m.jacobian)


def test_the_inverse_logdet_belongs_to_the_preimage(x64):
    bijection = residual(lambda x: 0.9 * jnp.sin(x), 0.9, ExactLogdet(), SOLVER)
    x = jnp.array([[3.0], [2.0], [0.3]])
    y = bijection.forward(x)
    _, logdet, _, _ = jax.jit(bijection.inverse_and_logdet)(y, jax.random.key(0))
    at_preimage, at_image = (-np.log(1 + 0.9 * np.cos(np.asarray(point)[:, 0])) for point in (x, y))
    np.testing.assert_allclose(logdet, at_preimage, atol=PREIMAGE)
    assert np.all(np.abs(at_preimage - at_image) > 0.01)


# ---------------------------------------------------------------------------------------------------- layouts


def test_layouts_change_neither_values_nor_gradients(x64):
    weights = random_weights(DENSE)
    x = jnp.asarray(np.random.default_rng(0).normal(size=(BATCH, 3)))
    estimator = SeriesLogdet(3)  # with random probes: every layout must draw the same

    def results(**layout):
        @jax.jit
        @functools.partial(jax.value_and_grad, argnums=(0, 1), has_aux=True)
        def run(weights, x):
            z, logdet, info = model.flow_bijection(DENSE, weights, estimator, **layout).forward_and_logdet(x, jax.random.key(0))
            return jnp.sum(jnp.sin(z)) + jnp.sum(logdet * jnp.arange(1.0, 4.0)), (z, logdet, info.truncation_bound)

        return run(weights, x)

    scanned = results()
    layouts = [
        {"unroll": unroll, "rematerialize": kind} for unroll in (False, True) for kind in ("nothing", "elementwise", "blocks")
    ]
    for layout in layouts[1:]:
        jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=LAYOUT, atol=LAYOUT), results(**layout), scanned)


def test_a_backward_pass_keeps_less_the_more_it_computes_anew():
    spec = FlowSpec((3,), (StageSpec(8, hidden=(32,), activation="clipswish"),))
    weights = jax.eval_shape(lambda: random_weights.__wrapped__(spec, num_steps=1))

    def kept(rematerialize):
        def loss(weights, x):
            whole = model.flow_bijection(spec, weights, ExactLogdet(), rematerialize=rematerialize)
            return jnp.mean(whole.forward_and_logdet(x, jax.random.key(0))[1])

        compiled = jax.jit(jax.grad(loss)).lower(weights, jax.ShapeDtypeStruct((256, 3), jnp.float32)).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    assert kept("nothing") > 2 * kept("elementwise") > 2 * kept("blocks")


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="about fusion by XLA:CPU")
def test_work_of_unrolled_blocks_grows_with_their_number_not_its_square():
    def flops(num_blocks):
        stage = StageSpec(num_blocks, hidden=(4,), kernel_sizes=(3, 3), activation="clipswish")
        spec = FlowSpec((4, 4, 2), (stage,))
        weights = jax.eval_shape(lambda: random_weights.__wrapped__(spec, num_steps=1))

        def loss(weights, x):
            flow = model.flow_bijection(spec, weights, SeriesLogdet(2), unroll=True)
            z, logdet, _ = flow.forward_and_logdet(x, jax.random.key(0))
            return jnp.mean(logdet) - jnp.mean(z**2)

        x = jax.ShapeDtypeStruct((BATCH, 4, 4, 2), jnp.float32)
        return jax.jit(jax.grad(loss)).lower(weights, x).compile().cost_analysis()["flops"]

    few, more, most = (flops(n) for n in (2, 3, 4))
    assert most - more == pytest.approx(more - few, rel=0.05)


def test_program_size_does_not_depend_on_the_number_of_blocks():
    def num_lines(num_blocks, *, unroll):
        spec = dataclasses.replace(DENSE, stages=(dataclasses.replace(DENSE.stages[0], num_blocks=num_blocks),))
        weights = jax.eval_shape(lambda: random_weights(spec, num_steps=1))

        def run(weights, x):
            bijection = model.flow_bijection(spec, weights, SeriesLogdet(3), unroll=unroll)
            z, logdet, _ = bijection.forward_and_logdet(x, jax.random.key(0))
            return logdet, bijection.inverse(z)

        return len(jax.jit(run).lower(weights, jax.ShapeDtypeStruct((2, 3), jnp.float32)).as_text().splitlines())

    assert num_lines(12, unroll=False) == num_lines(3, unroll=False)
    assert num_lines(6, unroll=True) > 1.5 * num_lines(3, unroll=True)


# ---------------------------------------------------------------------------------------------------- information


def test_error_bounds_of_a_chain_compose_by_the_lipschitz_constants_of_the_inverses(x64):
    coarse = Solver(atol=1e-3)  # so that errors stand out from rounding
    scale = ActNormParams(jnp.zeros(2), jnp.array([-1.0, 0.5]))
    parts = [
        residual(lambda x: -0.8 * jnp.sin(x), 0.8, ExactLogdet(), coarse),
        actnorm_bijection(scale),
        residual(lambda x: -0.5 * jnp.tanh(x), 0.5, ExactLogdet(), coarse),
    ]
    x = jnp.asarray(np.random.default_rng(0).normal(size=(20, 2)))
    chained = chain(parts)
    y = chained.forward(x)
    back, info = chained.inverse(y)
    middle, last = parts[2].inverse(y)
    scaled, _ = parts[1].inverse(middle)
    by_hand, first = parts[0].inverse(scaled)
    np.testing.assert_array_equal(back, by_hand)
    np.testing.assert_allclose(info.error_bound, first.error_bound + np.e / (1 - 0.8) * last.error_bound, rtol=EXACT)
    np.testing.assert_array_equal(info.num_evals, first.num_evals + last.num_evals)
    np.testing.assert_array_equal(info.residual, np.maximum(first.residual, last.residual))
    np.testing.assert_allclose(chained.inverse_lipschitz, 5 * np.e * 2, rtol=EXACT)
    error = np.linalg.norm(back - x, axis=1)
    assert np.all(error <= info.error_bound)
    assert np.max(error) > 1e-4
    assert np.any(error > first.error_bound)  # the first solver's own bound is not enough


def test_one_failed_block_fails_the_chain():
    good, bad = (residual(lambda x: 0.5 * x, bound, ExactLogdet(), Solver(max_evals=50)) for bound in (0.5, 1.0))
    for parts in ([good, bad], [bad, good]):
        _, info = jax.jit(chain(parts).inverse)(jnp.ones((1, 2)))
        assert not info.converged[0]
        assert jnp.isinf(info.error_bound[0])


def test_a_bound_that_is_no_number_is_not_taken_for_no_error():
    later = no_inverse_error(jnp.ones((3, 1)))._replace(error_bound=jnp.array([0.0, jnp.nan, 1.0]))
    own = no_inverse_error(jnp.ones((3, 1)))._replace(error_bound=jnp.ones(3))
    np.testing.assert_array_equal(follow_inverse_info(later, own, 2.0).error_bound, [1.0, np.nan, 3.0])
    np.testing.assert_array_equal(follow_inverse_info(later, own, jnp.inf).error_bound, [1.0, np.nan, np.inf])


def test_errors_of_logdets_add_up(x64):
    estimator = SeriesLogdet(2, num_probes=16, probe="gaussian")
    part = residual(lambda x: 0.5 * jnp.sin(x[:, ::-1]), 0.5, estimator)
    x, key = jnp.asarray(np.random.default_rng(0).normal(size=(2, 3))), jax.random.key(0)
    y, total, info = chain([part, part]).forward_and_logdet(x, key)
    middle, first, first_info = part.forward_and_logdet(x, fold_in(key, 0))
    last_y, second, second_info = part.forward_and_logdet(middle, fold_in(key, 1))
    np.testing.assert_array_equal(y, last_y)
    np.testing.assert_allclose(total, first + second, rtol=EXACT)
    np.testing.assert_allclose(info.stderr, np.hypot(first_info.stderr, second_info.stderr), rtol=EXACT)
    np.testing.assert_allclose(info.truncation_bound, first_info.truncation_bound + second_info.truncation_bound, rtol=EXACT)


def test_a_latent_that_leaves_early_skips_the_later_inverses(x64):
    shrinking_inverse = actnorm_bijection(ActNormParams(jnp.zeros(1), jnp.full(1, 2.0)))
    identity = isometric_bijection(lambda x: x, lambda y: y)
    split = multiscale([Stage(identity, factor_out=True), Stage(shrinking_inverse)], (2,))
    jacobian = jax.jit(jax.jacfwd(lambda z: split.inverse(z[None])[0][0]))(jnp.ones(2))
    np.testing.assert_allclose(oracles.operator_norm(jacobian), 1, rtol=EXACT)
    np.testing.assert_allclose(split.inverse_lipschitz, 1, rtol=EXACT)


@pytest.mark.parametrize("name", ["actnorm", "chain", "scanned blocks", "multi-scale", "image model"])
def test_inverse_lipschitz_bounds_the_inverse(name):
    with jax.enable_x64(True):
        bound = float(CASES[name][1]().inverse_lipschitz)
    jacobians = measure(name).jacobian.reshape(BATCH, measure(name).x[0].size, -1)
    assert all(1 / np.linalg.svd(j)[1].min() <= bound * (1 + EXACT) for j in jacobians)


# ---------------------------------------------------------------------------------------------------- multi-scale


def test_latents_are_the_parts_in_the_order_in_which_they_leave():
    x = jnp.arange(2 * 16.0).reshape(2, 2, 4, 2)
    stages = [
        Stage(squeeze_bijection(2), factor_out=True),
        Stage(squeeze_bijection(1), factor_out=True),
    ]
    with pytest.raises(ValueError, match="stage 0 factors out half of its channels but has 3"):
        multiscale([Stage(squeeze_bijection(1), factor_out=True)], (2, 2, 3))
    bijection = multiscale(stages, (2, 4, 2))
    squeezed = squeeze_bijection(2).forward(x)  # (2, 1, 2, 8)
    first, rest = squeezed[..., 4:], squeezed[..., :4]
    second, last = rest[..., 2:], rest[..., :2]
    expected = jnp.concatenate([part.reshape(2, -1) for part in (first, second, last)], axis=1)
    np.testing.assert_array_equal(bijection.forward(x), expected)
    np.testing.assert_array_equal(bijection.inverse(expected)[0], x)


def test_float32_data_stay_float32_in_a_float64_session():
    with jax.enable_x64(True):
        spec = DENSE
        weights = jax.tree.map(lambda a: a.astype(jnp.float32), random_weights(spec))
        bijection = model.flow_bijection(spec, weights, SeriesLogdet(2))
        x, key = jax.ShapeDtypeStruct((1, 3), jnp.float32), jax.random.key(0)
        z, logdet, info = jax.eval_shape(lambda x: bijection.forward_and_logdet(x, key), x)
        back, solver_info = jax.eval_shape(bijection.inverse, z)
        assert {a.dtype for a in (z, logdet, *info, back, solver_info.error_bound)} == {jnp.dtype("float32")}


# ---------------------------------------------------------------------------------------------------- the model


def test_blocks_of_a_constrained_model_are_contractions(x64):
    weights = random_weights(IMAGES)
    for name, _, _, branch in IMAGES.layout:
        norms = []
        for layer in branch.layers:
            kernel = weights[name].branch.weights[layer.name]["kernel"][0]
            if layer.name.startswith("conv"):
                kernel = oracles.dense_conv_matrix(kernel, *layer.in_shape[:2], padding=branch.padding)
            norms.append(oracles.operator_norm(kernel))
        assert max(norms) <= IMAGES.coeff * (1 + 1e-3)
        np.testing.assert_allclose(weights[name].branch.lipschitz_bound[0], np.prod(norms), rtol=1e-3)


def test_a_model_in_the_plane_is_a_density(x64):
    spec = FlowSpec((2,), (StageSpec(2, hidden=(8,), activation="tanh"),), coeff=0.9)
    bijection = model.flow_bijection(spec, random_weights(spec, seed=1, num_steps=20))
    prior = priors.standard("gaussian", 2)

    @jax.jit
    def density(x):
        z, logdet, _ = bijection.forward_and_logdet(x, jax.random.key(0))
        log_prior = priors.log_prob("gaussian", prior, z)
        return jnp.exp(log_prior + logdet), jnp.exp(log_prior)

    axis, step = np.linspace(-20, 20, 201, retstep=True)
    grid = np.stack(np.meshgrid(axis, axis), axis=-1).reshape(-1, 2)
    with_logdet, without_logdet = (float(jnp.sum(values) * step**2) for values in density(grid))
    assert abs(with_logdet - 1) < QUADRATURE
    assert abs(without_logdet - 1) > 0.05  # the log-determinant is what makes it one


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: FlowSpec((2,), (StageSpec(1, (4,)),), coeff=1.0), r"coeff must lie in \(0, 1\), got 1.0"),
        (lambda: FlowSpec((2,), (StageSpec(1, (4,)),), coeff=0.0), r"coeff must lie in \(0, 1\), got 0.0"),
        (lambda: FlowSpec((2,), ()), "at least one stage"),
        (lambda: FlowSpec((3,), (StageSpec(1, (4,), factor_out=True),)), "stage 0 factors out half .* has 3"),
        (lambda: FlowSpec((5, 4, 1), (StageSpec(1, (4,), (3, 3), squeeze=2),)), "stage 0 cannot squeeze"),
        (lambda: StageSpec(0, (4,)), "num_blocks must be at least 1, got 0"),
        (lambda: StageSpec(1, (4,), squeeze=0), "squeeze must be a positive factor"),
        (lambda: FeedforwardSpec((4, 4, 1), (4,)), "a dense branch takes vectors, got examples of shape"),
        (lambda: FeedforwardSpec((4,), (4,), (3, 3)), "a convolutional branch takes images"),
        (lambda: FeedforwardSpec((4, 4, 1), (4,), (3,)), "kernel_sizes needs 2 entries"),
        (lambda: FeedforwardSpec((4, 4, 1), (4,), (3, 3), padding="VALID"), "padding must be SAME or CIRCULAR"),
        (lambda: FeedforwardSpec((4,), (4,), activation="swish"), "activation must be one of .* got 'swish'"),
        (lambda: FeedforwardSpec((4,), ()), "hidden must name at least one positive width"),
    ],
)
def test_mistakes_are_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_a_bias_by_pixel_is_a_bias_of_every_pixel_and_leaves_the_jacobian_alone():
    shared = FeedforwardSpec((3, 2, 1), (4,), (3, 3))
    by_pixel = FeedforwardSpec((3, 2, 1), (4,), (3, 3), positional_bias=True)
    weights = by_pixel.initial_weights(jax.random.key(0))
    assert [weights[layer.name]["bias"].shape for layer in by_pixel.layers] == [(3, 2, 4), (3, 2, 1)]
    x = jax.random.normal(jax.random.key(1), (2, 3, 2, 1))
    same = {name: {**layer, "bias": layer["bias"][0, 0]} for name, layer in weights.items()}
    np.testing.assert_array_equal(by_pixel.apply(weights, x), shared.apply(same, x))
    shift = jnp.arange(6.0).reshape(3, 2, 1)
    moved = {**weights, "conv1": {**weights["conv1"], "bias": shift}}
    difference = by_pixel.apply(moved, x) - by_pixel.apply(weights, x)
    np.testing.assert_allclose(difference, jnp.broadcast_to(shift, x.shape), atol=1e-5)
    norms_of = jax.jit(by_pixel.norm_bounds)
    assert norms_of(moved) == norms_of(weights)


@pytest.mark.parametrize("spec", [DENSE, IMAGES], ids=["dense", "images"])
def test_other_shapes_than_the_flow_s_are_refused(x64, spec):
    bijection = model_case(spec)
    size = int(np.prod(spec.event_shape))
    wrong = jnp.zeros((2, *spec.event_shape[:-1], spec.event_shape[-1] + 1))
    for call in (lambda: bijection.forward(wrong), lambda: bijection.forward_and_logdet(wrong, jax.random.key(0))):
        with pytest.raises(ValueError, match="the flow takes examples of shape"):
            call()
    latents = jnp.zeros((2, size + 5))
    for call in (lambda: bijection.inverse(latents), lambda: bijection.inverse_and_logdet(latents, jax.random.key(0))):
        with pytest.raises(ValueError, match=f"the flow's inverse takes latents of shape .{size},., got an array of shape"):
            call()
