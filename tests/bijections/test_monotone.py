"""Monotone blocks against dense float64: Newton's method for the map, slogdet for its Jacobian, bounds, files, refusals."""

import functools

import jax
import jax.numpy as jnp
import kept
import numpy as np
import oracles
import pytest

import iresnet_jax as ir
from iresnet_jax.bijections import monotone
from iresnet_jax.branches.branch import Branch, CallableBranch
from iresnet_jax.branches.feedforward import FeedforwardSpec
from iresnet_jax.evaluation.stated_accuracy import log_prob
from iresnet_jax.maths.lipschitz_bounds import monotone_block_bounds
from iresnet_jax.maths.logdet.hutchinson_series import weighted_series
from iresnet_jax.maths.logdet.krylov import quadratic_form
from iresnet_jax.models import contractions
from iresnet_jax.models.classifier import ClassifierSpec
from iresnet_jax.models.density_spec import DensitySpec
from iresnet_jax.models.flow import branch_inputs

DIM, L = 3, 0.8
EXACT = 1e-9  # float64 by another route, behind a solve to 1e-12
DIFFERENCES = 1e-6  # of central differences in float64
SINGLE = 1e-4  # float32 behind solves to 1e-6
SOLVER = ir.Solver(atol=1e-12)
RNG = np.random.default_rng(0)
FIRST, BIAS, SECOND = RNG.normal(size=(5, DIM)), RNG.normal(size=5), RNG.normal(size=(DIM, 5))
FIRST, SECOND = FIRST / np.linalg.norm(FIRST, 2), L * SECOND / np.linalg.norm(SECOND, 2)
X = RNG.normal(size=(4, DIM))
FLOW = ir.FlowSpec((2,), (ir.StageSpec(2, hidden=(6,), activation="softplus4", block="monotone"),), coeff=0.9)


def branch_of(first, second):
    """``g(x) = W_2 tanh(W_1 x + b)`` of constant ``L``."""
    return CallableBranch(lambda x: jnp.tanh(x @ first.T + BIAS[None]) @ second.T, L)


def by_newton(x, first=FIRST, second=SECOND):
    """``y``, ``w`` and ``J_g(w)`` of one example."""
    network = functools.partial(oracles.tanh_network, w1=first, bias=BIAS, w2=second)
    w = oracles.invert_by_newton(network, np.sqrt(2) * x)
    g, jacobian = network(w)
    return (w - g) / np.sqrt(2), w, jacobian


def slogdet(jacobian):
    return np.linalg.slogdet(np.eye(DIM) - jacobian)[1] - np.linalg.slogdet(np.eye(DIM) + jacobian)[1]


@jax.jit
def both_ways(x):
    bijection = monotone.monotone_bijection(branch_of(FIRST, SECOND), ir.ExactLogdet(), SOLVER)
    y, logdet, _ = bijection.forward_and_logdet(x, None)
    return y, logdet, *bijection.inverse_and_logdet(y, None)


@pytest.fixture(scope="module")
def model():
    """Two blocks, scanned, certified, with a prior of no meaning."""
    return kept.model(DensitySpec(FLOW))


def test_map_and_logdet_are_those_of_newton_and_slogdet(x64):
    y, logdet, back, back_logdet, _, info = both_ways(jnp.asarray(X))
    expected = [by_newton(x) for x in X]
    np.testing.assert_allclose(y, [y for y, _, _ in expected], atol=EXACT)
    np.testing.assert_allclose(logdet, [slogdet(jacobian) for _, _, jacobian in expected], atol=EXACT)
    np.testing.assert_allclose(back_logdet, -logdet, atol=EXACT)
    assert np.all(info.converged)
    assert np.all(np.linalg.norm(back - X, axis=1) <= 10 * info.error_bound)  # that of y comes back up to 9 times as large
    assert np.max(info.error_bound) < 1e-11


def test_jacobians_are_quotients_within_the_bounds():
    for x in X:
        _, _, jacobian = by_newton(x)
        whole = (np.eye(DIM) - jacobian) @ np.linalg.inv(np.eye(DIM) + jacobian)
        step = 1e-6
        differences = [(by_newton(x + step * e)[0] - by_newton(x - step * e)[0]) / (2 * step) for e in np.eye(DIM)]
        np.testing.assert_allclose(np.transpose(differences), whole, atol=DIFFERENCES)
        assert oracles.operator_norm(whole) <= monotone_block_bounds(L).forward
        assert oracles.operator_norm(np.linalg.inv(whole)) <= monotone_block_bounds(L).inverse
    assert float(monotone_block_bounds(L).forward) == pytest.approx(9, rel=1e-5)  # attained by g = -L x, and by L x


def test_gradients_by_weights_and_inputs_are_those_of_differences(x64):
    direction = {"first": RNG.normal(size=FIRST.shape), "second": RNG.normal(size=SECOND.shape), "x": RNG.normal(size=X.shape)}
    point = {"first": FIRST, "second": SECOND, "x": X}

    @jax.jit
    def slope(point, direction):
        def value(point):
            branch = branch_of(point["first"], point["second"])
            bijection = monotone.monotone_bijection(branch, ir.ExactLogdet(), SOLVER)
            y, logdet, _ = bijection.forward_and_logdet(point["x"], None)
            return jnp.sum(jnp.sin(y)) + jnp.sum(logdet)

        products = jax.tree.map(lambda a, b: jnp.sum(a * b), jax.grad(value)(point), direction)
        return sum(jax.tree.leaves(products))

    def value(t):
        moved = {name: point[name] + t * direction[name] for name in point}
        found = [by_newton(x, moved["first"], moved["second"]) for x in moved["x"]]
        return sum(np.sin(y).sum() + slogdet(jacobian) for y, _, jacobian in found)

    differences = (value(1e-5) - value(-1e-5)) / 2e-5
    np.testing.assert_allclose(slope(*jax.tree.map(jnp.asarray, (point, direction))), differences, rtol=DIFFERENCES)


def test_series_and_krylov_spaces_of_the_quotient_and_their_gradients(x64):
    """On a full basis of probes there is no noise: 80 terms, or the whole space, give the exact value and its gradient."""
    probes = jnp.broadcast_to(np.sqrt(DIM) * jnp.eye(DIM)[:, None], (DIM, len(X), DIM))
    ways = {
        "exact": lambda branch, x, trace: ir.dense_logdet(branch, x, quotient=True)[None],
        "series": lambda branch, x, trace: weighted_series(branch, x, probes, jnp.ones(80), 80, trace=trace, quotient=True)[0],
        "lengths": lambda branch, x, trace: weighted_series(
            branch, x, probes, jnp.ones(80), jnp.full(len(x), 79), trace=trace, quotient=True
        )[0],
        "krylov": lambda branch, x, trace: quadratic_form(
            branch, x, probes, DIM, lipschitz_bound=L, trace=trace, quotient=True
        )[0],
    }

    def trace(x):
        return jnp.trace(jax.vmap(jax.jacfwd(lambda x: branch_of(FIRST, SECOND)(x[None])[0]))(x), axis1=1, axis2=2)

    @jax.jit
    def found(x):
        results = {}
        for name, way in ways.items():
            for known in (None, trace):
                total = lambda x, way=way, known=known: (v := way(branch_of(FIRST, SECOND), x, known).mean(0)).sum() + 0 * v[0]  # noqa: E731
                results[name, known is None] = jax.value_and_grad(total)(x)
        return list(results.values())

    expected = sum(slogdet(oracles.tanh_network(x, FIRST, BIAS, SECOND)[1]) for x in X)
    values, gradients = zip(*found(jnp.asarray(X)), strict=True)
    np.testing.assert_allclose(values, np.full(len(values), expected), atol=1e-7)  # 24 nodes, and .8^81
    for gradient in gradients[1:]:
        np.testing.assert_allclose(gradient, gradients[0], atol=1e-6)


def test_errors_are_within_their_bounds_and_roulette_is_unbiased(x64):
    """Of ``g = A x``, whose spectrum is at its worst."""
    matrix = -L * np.diag([1.0, 0.9, 0.8])
    branch, x = CallableBranch(lambda x: x @ matrix.T, L), jnp.zeros((2000, DIM))

    @jax.jit
    def estimates(key):
        estimators = ir.SeriesLogdet(5), ir.KrylovLogdet(1), ir.RouletteLogdet("geometric", 0.3, num_exact_terms=4)
        keys = jax.random.split(key, len(x))
        return [monotone.logdet(branch, x, keys, estimator) for estimator in estimators]

    (series, of_series), (krylov, of_krylov), (roulette, _) = estimates(jax.random.key(0))
    exact = slogdet(matrix)
    terms = -2 * np.trace(matrix + matrix @ matrix @ matrix / 3 + np.linalg.matrix_power(matrix, 5) / 5)
    np.testing.assert_allclose(series, terms, atol=EXACT)  # signs as probes of a diagonal matrix have no variance
    assert np.all(exact - series <= of_series.truncation_bound)
    assert np.all(np.abs(krylov - exact) <= of_krylov.truncation_bound)
    assert np.max(of_krylov.truncation_bound) < 30
    assert abs(np.mean(roulette) - exact) < 5 * np.std(roulette) / np.sqrt(len(x))
    assert np.std(roulette) / np.sqrt(len(x)) < 0.05


def test_the_negative_of_a_branch_has_its_closed_forms(x64):
    spec = FeedforwardSpec((4,), (2,), activation="clipswish", preactivation=True)
    weights = jax.tree.map(lambda a: jnp.asarray(0.3 * RNG.normal(size=a.shape)), spec.initial_weights(jax.random.key(0)))
    branch, x = Branch(spec, weights, L), jnp.asarray(RNG.normal(size=(2, 4)))

    @jax.jit
    def of(branch, x):
        return branch(x), branch.trace(x), branch.jacobian(x), branch.spec.logdet(branch.weights, x)

    value, trace, jacobians, _ = jax.device_get(of(branch, x))
    negative = jax.device_get(of(-branch, x))
    logdets = np.linalg.slogdet(np.eye(4) - jacobians)[1]
    for found, expected in zip(negative, (-value, -trace, -jacobians, logdets), strict=True):
        np.testing.assert_allclose(found, expected, atol=EXACT)


def test_a_model_of_scanned_blocks_inverts_is_saved_and_evaluated(model, tmp_path):
    x = np.random.default_rng(2).normal(size=(16, 2)).astype(np.float32)
    back, info = model.decode(model.encode(x))
    assert np.all(info.converged)
    np.testing.assert_allclose(back, x, atol=SINGLE)
    loaded = ir.load(model.save(tmp_path / "model.npz"))
    assert loaded.spec == model.spec
    assert loaded.spec.flow.stages[0].block == "monotone"
    likelihoods, accuracy = log_prob(loaded, x, target=1e-3)
    np.testing.assert_allclose(likelihoods[:, 0], model.log_prob(x), atol=SINGLE)
    assert accuracy.bias == 0


def test_second_derivatives_go_through_the_solves_of_a_scan(x64, model):
    double = jax.tree.map(lambda a: jnp.asarray(a, jnp.float64), model).with_(solver=SOLVER)
    x, step = jnp.asarray([0.3, -0.5]), 1e-5

    @jax.jit
    def gradient_and_hessian(model, x):
        gradient = jax.grad(lambda x: (model.encode(x) ** 3).sum())
        return gradient(x), jax.jacfwd(gradient)(x)

    _, hessian = gradient_and_hessian(double, x)
    ends = [[gradient_and_hessian(double, x + sign * step * e)[0] for sign in (1, -1)] for e in np.eye(2)]
    differences = [(above - below) / (2 * step) for above, below in ends]
    np.testing.assert_allclose(hessian, differences, atol=1e-5 * np.max(np.abs(differences)))
    assert np.max(np.abs(hessian)) > 0.01


def test_branches_stand_where_the_solve_ends(model):
    x = jax.random.normal(jax.random.key(3), (4, 2))
    block = jax.tree.map(lambda a: a[0], model.weights["stage0"])
    w = branch_inputs(FLOW, model.weights, x)["stage0"][0]
    shifted = (x + block.actnorm.bias[None]) * np.exp(block.actnorm.log_scale)[None]
    np.testing.assert_allclose(w + block.branch(w), np.sqrt(2) * shifted, atol=SINGLE)


def test_what_does_not_converge_is_not_a_number():
    branch = CallableBranch(lambda x: 0.9 * jnp.sin(x), 0.9)
    y, _ = jax.jit(lambda x: monotone.forward(branch, x, ir.Solver(max_evals=1, memory=0)))(jnp.ones((1, 2)))
    assert np.all(np.isnan(y))


def test_what_monotone_blocks_cannot_do_is_refused(model):
    with pytest.raises(ValueError, match="block must be one of residual, monotone, got 'gauss'"):
        ir.StageSpec(1, hidden=(2,), block="gauss")
    with pytest.raises(ValueError, match="bfloat16 is too coarse"):
        model.with_(bfloat16=True).encode(jnp.zeros((1, 2)))
    with pytest.raises(ValueError, match="certificates cannot follow"):
        ir.certify.log_det(model, np.zeros((1, 2)))
    with pytest.raises(ValueError, match="take residual ones without a constraint"):
        contractions.unconstrained(FLOW, contractions.as_params(model.weights), {})
    stage = ir.StageSpec(1, hidden=(2,), kernel_sizes=(3, 3), block="monotone")
    with pytest.raises(ValueError, match="BatchNorm in the branches is for residual blocks"):
        ClassifierSpec(ir.FlowSpec((4, 4, 1), (stage,)), (4, 4, 1), 3, constrained=False, normalization="batchnorm")
