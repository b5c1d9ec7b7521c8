"""What the Linen modules create: a data-dependent start, norms before the first step."""

import functools
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest

from iresnet_jax.bijections.reshape import squeeze
from iresnet_jax.models import linen as modules
from iresnet_jax.models.architecture import FlowSpec, StageSpec
from iresnet_jax.models.contractions import constrain

SPECTRAL = 1e-3  # the tolerance of the norms
STATISTICS = 3e-4  # ActNorm adds 1e-5 to variances of at least .05; the rest is float32
ROUND_TRIP = 1e-4  # float32, a few blocks

SPEC = FlowSpec(
    (4, 4, 1),
    (
        StageSpec(2, hidden=(3,), kernel_sizes=(3, 1), squeeze=2, factor_out=True),
        StageSpec(1, hidden=(5,), activation="lipswish"),
    ),
)
MODULE = modules.ResidualFlow(SPEC)


@pytest.fixture(scope="module")
def batch():
    scale = jnp.linspace(0.5, 3, 16).reshape(1, 4, 4, 1)
    return 2 + scale * jax.random.normal(jax.random.key(1), (32, 4, 4, 1))


@pytest.fixture(scope="module")
def start(batch):
    """The latents of the batch as ``init`` makes them, and the variables."""
    return cast(
        tuple[Any, Any], jax.jit(lambda x: MODULE.init_with_output(jax.random.key(0), x))(batch)
    )


@pytest.fixture(scope="module")
def variables(start):
    return start[1]


@pytest.fixture(scope="module")
def constrained(variables):
    """After one power step from the fresh iterates, as a training step makes it."""
    return jax.jit(lambda params, spectral: constrain(SPEC, params, spectral, num_steps=1))(
        **variables
    )


def test_the_input_of_every_branch_has_mean_zero_and_variance_one(constrained, batch):
    x = squeeze(batch, 2)
    for stage, (name, *_) in enumerate(SPEC.layout):
        for k in range(SPEC.stages[stage].num_blocks):
            block = jax.tree.map(lambda a, k=k: a[k], constrained.weights[name])
            x = block.actnorm.forward(x)
            axes = tuple(range(x.ndim - 1))
            np.testing.assert_allclose(jnp.mean(x, axes), 0, atol=STATISTICS)
            np.testing.assert_allclose(jnp.var(x, axes), 1, atol=STATISTICS)
            x = x + block.branch(x)
        x = x[..., :2].reshape(len(x), -1) if stage == 0 else x


def test_norms_hold_before_the_first_step(variables, constrained):
    for name, layers in [(stage.name, stage.branch.layers) for stage in SPEC.layout]:
        for layer in layers:
            raw = variables["params"][name]["blocks"][layer.name]["kernel"][0]
            kernel = constrained.weights[name].branch.weights[layer.name]["kernel"][0]
            unfold = (
                functools.partial(oracles.dense_conv_matrix, height=2, width=2)
                if raw.ndim == 4
                else np.asarray
            )
            true = oracles.operator_norm(unfold(raw))
            np.testing.assert_allclose(constrained.norms[name][layer.name][0], true, rtol=SPECTRAL)
            assert oracles.operator_norm(unfold(kernel)) <= SPEC.coeff * (1 + SPECTRAL)


def test_calling_the_module_uses_the_stored_scales(start, batch):
    """Later batches are not normalised by themselves."""
    z, variables = start
    apply = jax.jit(MODULE.apply)
    np.testing.assert_allclose(apply(variables, batch), z, atol=ROUND_TRIP)
    other_mates = batch.at[3:].multiply(10)
    np.testing.assert_allclose(apply(variables, other_mates)[:3], z[:3], atol=ROUND_TRIP)
