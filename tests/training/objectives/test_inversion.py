"""Training through the inverse: the loss and its gradient, a run and its resume, and what it refuses."""

import dataclasses
import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_runs as runs

from iresnet_jax.bijections.actnorm import ActNormParams
from iresnet_jax.bijections.residual import Solver
from iresnet_jax.branches.branch import Branch
from iresnet_jax.models.architecture import FlowSpec, StageSpec
from iresnet_jax.models.contractions import Block
from iresnet_jax.models.reconstructor import Reconstructor, ReconstructorSpec
from iresnet_jax.runs import trained_run
from iresnet_jax.runs.metrics import read_metrics
from iresnet_jax.training.objectives import inversion

ITERATION = 1e-6  # gradients through an iteration, float64


# --- the loss and its gradient ----------------------------------------------------------------------------------------


@functools.cache
def small():
    """Two dense blocks on images of 2 x 2, in float64, with images and measurements partly outside [0, 1]."""
    flow = FlowSpec((2, 2, 1), (StageSpec(2, hidden=(3,), activation="softplus"),), 0.8, "block")
    [stage] = flow.layout
    rng = np.random.default_rng(0)

    def drawn(layer):
        kernels = rng.normal(size=(2, *layer["kernel"].shape))
        norms = np.linalg.norm(kernels, ord=2, axis=(1, 2), keepdims=True)
        return {"kernel": jnp.asarray(0.8 * kernels / norms), "bias": jnp.asarray(rng.normal(size=(2, *layer["bias"].shape)))}

    shapes = jax.eval_shape(stage.branch.initial_weights, jax.random.key(0))
    branch = Branch(stage.branch, {name: drawn(layer) for name, layer in shapes.items()}, jnp.full(2, 0.64))
    weights = {"stage0": Block(ActNormParams(jnp.zeros((2, 4)), jnp.zeros((2, 4))), branch)}
    x, y = rng.uniform(size=(3, 2, 2, 1)), rng.normal(size=(3, 2, 2, 1))
    return Reconstructor(ReconstructorSpec(flow), weights, solver=Solver(atol=1e-12)), jnp.asarray(x), jnp.asarray(y)


def block(branch, k, x):
    """A residual block in matrices."""
    first, second = branch["dense0"], branch["dense1"]
    hidden = x @ first["kernel"][k] + first["bias"][k][None]
    return x + jax.nn.softplus(hidden) @ second["kernel"][k] + second["bias"][k][None]


def unrolled_loss(branch, x, y, forward_share):
    """The loss with a fixed number of steps to each preimage, which reverse mode differentiates one by one."""
    x, y = x.reshape(3, 4), y.reshape(3, 4)
    found = y
    for k in (1, 0):
        step = lambda at, _, k=k, target=found: (target - (block(branch, k, at) - at), None)  # noqa: E731
        found, _ = jax.lax.scan(step, found, length=120)  # .64^120 = 6e-24
    back = jnp.mean(jnp.sum((jnp.clip(found, 0, 1) - x) ** 2, axis=1))
    there = jnp.mean(jnp.sum((block(branch, 1, block(branch, 0, x)) - y) ** 2, axis=1))
    return (1 - forward_share) * back + forward_share * there


unrolled = jax.jit(jax.value_and_grad(unrolled_loss))


@pytest.mark.parametrize("forward_share", [0.3, 1.0])
def test_the_loss_and_its_gradient_are_those_of_the_iteration_step_by_step(x64, forward_share):
    model, x, y = small()

    def ours(branch):
        of_stage = model.weights["stage0"]
        of_stage = of_stage._replace(branch=dataclasses.replace(of_stage.branch, weights=branch))
        return inversion.loss_of_measurements(
            model.with_(weights={"stage0": of_stage}), x, y, forward_share=forward_share
        ).value

    branch = model.weights["stage0"].branch.weights
    value, gradient = jax.jit(jax.value_and_grad(ours))(branch)
    expected, of_steps = unrolled(branch, x, y, forward_share)
    np.testing.assert_allclose(value, expected, rtol=1e-9)
    chex.assert_trees_all_close(gradient, of_steps, rtol=ITERATION, atol=ITERATION * float(value))
    assert max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(gradient)) > 1e-2 * float(value)


def test_the_check_rejects_a_gradient_that_stops_at_the_inverse(x64):
    """A few steps of the iteration from the solution, as truncated back-propagation has it, give another gradient."""
    model, x, y = small()
    branch = model.weights["stage0"].branch.weights

    def one_step(branch):
        found, start = y.reshape(3, 4), model.invert(y)[0].reshape(3, 4)
        middle = block(branch, 0, start)
        for k, at in ((1, middle), (0, start)):
            at = jax.lax.stop_gradient(at)
            found = found - (block(branch, k, at) - at)
        return jnp.mean(jnp.sum((jnp.clip(found, 0, 1) - x.reshape(3, 4)) ** 2, axis=1))

    _, exact = unrolled(branch, x, y, 0.0)
    wrong = jax.jit(jax.grad(one_step))(branch)
    with pytest.raises(AssertionError):
        chex.assert_trees_all_close(wrong, exact, rtol=0.05, atol=1e-3)


def test_an_image_that_is_black_all_over_has_a_finite_error():
    x = jnp.zeros((2, 2, 2, 1)).at[1].set(0.5)
    np.testing.assert_allclose(inversion.relative_error(x + 0.5, x), [1.0, 1.0])


# --- a run ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    return runs.trained(tmp_path_factory, "reconstructor")


def test_training_lowers_the_loss_and_logs_its_parts(workdir):
    records = read_metrics(workdir)
    validated = [record for record in records if record["split"] == "validation"]
    assert validated[-1]["loss"] < validated[0]["loss"]
    assert validated[-1]["converged"] == 1
    trained = [record for record in records if record["split"] == "train"]
    assert all(record["solver_evals"] > 2 and np.isfinite(record["grad_norm"]) for record in trained)


def test_the_trained_model_keeps_its_bound_and_has_no_actnorm(workdir, tmp_path):
    run = trained_run.load(workdir)
    assert 1 < run.model.noise_amplification <= 1 / (1 - run.config.model.coeff)
    for stage in run.model.weights.values():
        assert not any(np.any(np.asarray(leaf)) for leaf in stage.actnorm)
    kept = trained_run.load(trained_run.save(run, tmp_path / "model.npz").parent)
    assert kept.model.spec == run.model.spec
    assert kept.model.noise_amplification == run.model.noise_amplification
