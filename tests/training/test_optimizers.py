"""Schedules at their corners, optimisers against those of optax, and weight decay that acts."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from iresnet_jax.training.optimizers import (
    OptimizerConfig,
    ema_update,
    make_optimizer,
    make_schedule,
)

RTOL = 1e-6  # a handful of float32 operations
PEAK = 0.25  # exact in binary, so that "exactly the peak" can be asked for


def params_and_grads():
    rng = np.random.default_rng(0)
    params = {
        "conv1": {"kernel": rng.normal(size=(3, 2)), "bias": rng.normal(size=2)},
        "activation": {"beta": rng.normal(size=())},
    }
    grads = jax.tree.map(lambda p: rng.normal(size=p.shape), params)
    return jax.tree.map(jnp.float32, params), jax.tree.map(jnp.float32, grads)


def optimizer_of(name, learning_rate, clip_norm=0.0, **settings):
    """The optimizer at this learning rate instead of 1."""
    made = make_optimizer(OptimizerConfig(name=name, clip_norm=clip_norm, **settings))
    return optax.chain(made, optax.scale(learning_rate))


def run(optimizer, params, grads_of_step):
    @jax.jit
    def step(params, opt_state, grads):
        updates, opt_state = optimizer.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state

    opt_state = optimizer.init(params)
    for grads in grads_of_step:
        params, opt_state = step(params, opt_state, grads)
    return params


def schedule_of(total_steps, **settings):
    return make_schedule(
        OptimizerConfig(**{"learning_rate": PEAK, "warmup_steps": 0, **settings}), total_steps
    )


@pytest.mark.parametrize("schedule", ["constant", "cosine", "step"])
def test_warmup_is_linear_and_meets_the_peak_exactly(schedule):
    eta = schedule_of(1000, schedule=schedule, warmup_steps=8, boundaries=(0.5,))
    values = jax.jit(eta)(np.arange(12))
    np.testing.assert_array_equal(values[:9], PEAK * np.arange(9) / 8)
    assert np.all(values <= PEAK)
    np.testing.assert_allclose(values[9:], PEAK, rtol=1e-4)  # a cosine is flat at its top


@pytest.mark.parametrize(
    ("total_steps", "settings", "steps", "expected"),
    [
        (10, {}, [0], [1.0]),  # without a warm-up the first update uses the peak
        # one longer than the run is cut to it
        (5, {"warmup_steps": 8, "schedule": "constant"}, [0, 4, 5], [0.0, 0.8, 1.0]),
        (
            110,
            {"warmup_steps": 10},
            [10, 35, 60, 110, 500],
            [1.0, 0.5 * (1 + np.cos(np.pi / 4)), 0.5, 0.0, 0.0],
        ),
        (
            200,
            {
                "warmup_steps": 10,
                "schedule": "step",
                "boundaries": (0.3, 0.6, 0.8),
                "decay_factor": 0.2,
            },
            [10, 59, 60, 119, 120, 159, 160, 199, 1000],
            [1, 1, 0.2, 0.2, 0.04, 0.04, 0.008, 0.008, 0.008],
        ),
        (
            *(100, {"warmup_steps": 50, "schedule": "step", "boundaries": (0.6, 0.3)}),
            *([25, 49, 50, 59, 60], [0.5, 0.98, 0.1, 0.1, 0.01]),
        ),
    ],
    ids=["first", "short", "cosine", "step", "within the warm-up"],
)
def test_schedules_pass_these_points(total_steps, settings, steps, expected):
    eta = schedule_of(total_steps, **settings)
    np.testing.assert_allclose(jax.jit(eta)(np.array(steps)) / PEAK, expected, rtol=RTOL)


def kernels(params):
    return jax.tree.map_with_path(lambda path, _: path[-1].key == "kernel", params)


def penalised(optimizer):
    """An optimizer of the gradient with that of an L2 penalty on kernels."""
    return optax.chain(optax.add_decayed_weights(0.5, kernels), optimizer)


@pytest.mark.parametrize(
    ("settings", "of_optax"),
    [
        (
            {"name": "adamw", "b1": 0.8, "b2": 0.99},
            optax.adamw(0.1, 0.8, 0.99, weight_decay=0.5, mask=kernels),
        ),
        ({"name": "adam", "b1": 0.8, "b2": 0.99}, penalised(optax.adam(0.1, 0.8, 0.99))),
        ({"name": "adamax", "b1": 0.8, "b2": 0.99}, penalised(optax.adamax(0.1, 0.8, 0.99))),
        (
            {"name": "sgd", "momentum": 0.9, "nesterov": True},
            penalised(optax.sgd(0.1, 0.9, nesterov=True)),
        ),
        ({"name": "sgd", "momentum": 0.0}, penalised(optax.sgd(0.1))),
        (
            {"name": "muon", "momentum": 0.7, "nesterov": True, "b2": 0.999},
            optax.contrib.muon(
                0.1, beta=0.7, weight_decay=0.5, weight_decay_mask=kernels, consistent_rms=0.2
            ),
        ),
    ],
)
def test_updates_are_those_of_optax_with_weight_decay_on_kernels(settings, of_optax):
    """Decoupled in "adamw", and through momentum and preconditioner in the others."""
    params, grads = params_and_grads()
    gradients = [grads, jax.tree.map(lambda g: -2 * g, grads), params]
    found = run(optimizer_of(learning_rate=0.1, weight_decay=0.5, **settings), params, gradients)
    expected = run(of_optax, params, gradients)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=RTOL, atol=RTOL), found, expected
    )


def test_muon_equalises_the_singular_values_of_each_block_s_kernel():
    lr, blocks = 0.1, 2
    rng = np.random.default_rng(0)
    grads = {
        "blocks": {
            "conv0": {
                "kernel": rng.normal(size=(blocks, 3, 3, 4, 8)),
                "bias": rng.normal(size=(blocks, 8)),
            }
        },
        "head": {"kernel": rng.normal(size=(5, 3))},
        # matrices that are no operators: they move as Adam moves them
        "prior": {"lower": rng.normal(size=(2, 3, 3))},
    }
    grads = jax.tree.map(jnp.float32, grads)
    zero = jax.tree.map(jnp.zeros_like, grads)
    moved = run(
        optimizer_of(name="muon", learning_rate=lr, momentum=0.95, nesterov=True), zero, [grads]
    )
    matrices = [(grads["head"]["kernel"], moved["head"]["kernel"])]
    for block in range(blocks):
        matrices.append(
            tuple(
                tree["blocks"]["conv0"]["kernel"][block].reshape(36, 8) for tree in (grads, moved)
            )
        )
    for gradient, update in matrices:
        u, _, vt = np.linalg.svd(gradient, full_matrices=False)
        core = -u.T @ update @ vt.T / (lr * 0.2 * max(gradient.shape) ** 0.5)
        np.testing.assert_allclose(core, np.diag(np.diag(core)), atol=1e-3)
        # five Newton-Schulz steps come no closer
        assert np.all((np.diag(core) > 0.6) & (np.diag(core) < 1.3))
    np.testing.assert_allclose(
        np.sign(moved["blocks"]["conv0"]["bias"]), -np.sign(grads["blocks"]["conv0"]["bias"])
    )
    of_prior = np.asarray(-moved["prior"]["lower"] * np.sign(grads["prior"]["lower"]))
    np.testing.assert_allclose(of_prior, of_prior.max(), rtol=1e-3)
    assert of_prior.max() > 0


def test_clipping_bounds_the_global_norm_of_the_gradient_before_decay():
    params = {"kernel": jnp.array([3.0]), "bias": jnp.array([5.0])}
    grads = {"kernel": jnp.array([30.0]), "bias": jnp.array([40.0])}
    optimizer = optimizer_of(
        name="sgd", learning_rate=1.0, momentum=0.0, clip_norm=1.0, weight_decay=0.5
    )
    result = run(optimizer, params, [grads])
    np.testing.assert_allclose(result["kernel"], [3.0 - 0.6 - 1.5], rtol=RTOL)
    np.testing.assert_allclose(result["bias"], [5.0 - 0.8], rtol=RTOL)


def test_ema_ramps_up_to_its_decay():
    ema, params = {"w": jnp.array([1.0])}, {"w": jnp.array([3.0])}
    update = jax.jit(ema_update, static_argnums=3)
    for step, rate in ((0, 0.1), (8, 0.5), (89, 90 / 99), (10**6, 0.999)):
        result = update(ema, params, step, 0.999)
        np.testing.assert_allclose(result["w"], [rate * 1.0 + (1 - rate) * 3.0], rtol=RTOL)
