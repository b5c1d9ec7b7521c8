"""Bounds on the user's word: one that data contradict is refused, and a right one never."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.tree_util import register_dataclass

import iresnet_jax as ir
from iresnet_jax.maths.activations import Activation, register_activation
from iresnet_jax.models.contractions import freeze
from iresnet_jax.models.free import initial
from iresnet_jax.models.priors import Gaussian

X = np.random.default_rng(0).normal(size=(64, 2)).astype(np.float32)


@register_dataclass
@dataclasses.dataclass
class Rotated:
    """``g(x) = s (x_2, -x_1) + offset``, whose constant ``|s|`` every pair attains."""

    scale: jax.Array

    def __call__(self, x):
        return self.scale * jnp.stack([x[:, 1], -x[:, 0]], axis=1) + 100.0

    def lipschitz_bound(self):
        return jnp.abs(self.scale)


@register_dataclass
class TooLow(Rotated):
    def lipschitz_bound(self):
        return 0.99 * jnp.abs(self.scale)


@register_dataclass
class Kinked(Rotated):
    """A slope that a quarter of the data see, and no pair of them as a whole."""

    def __call__(self, x):
        return self.scale * jnp.where(jnp.abs(x) > 1.2, jnp.sign(x) * (jnp.abs(x) - 1.2), 0)

    def lipschitz_bound(self):
        return 0.9 * jnp.abs(self.scale)


@functools.cache
def density(kind):
    """A density whose second stage has branches of this class."""

    def own(key):
        return kind(2.0 + jax.random.uniform(key))

    flow = ir.FlowSpec((2,), (ir.StageSpec(1, hidden=(3,)), ir.StageSpec(2, branch=own)))
    params = {}
    for stage in flow.layout:
        blocks = jax.vmap(stage.branch.initial_weights)(
            jax.random.split(jax.random.key(0), stage.spec.num_blocks)
        )
        channels = jnp.zeros((stage.spec.num_blocks, 2))
        params[stage.name] = {
            "blocks": {**blocks, "actnorm": {"bias": channels, "log_scale": channels}}
        }
    return ir.Density(ir.DensitySpec(flow), freeze(flow, params), Gaussian.standard(2))


def test_a_bound_that_is_attained_passes():
    density(Rotated).check_branches(X)


def test_a_claim_is_called_no_proof():
    model = density(Rotated)
    certificate = model.certificate()
    assert certificate.verdict.startswith("not proven: 2 of 3 blocks, the first is stage1/block00")
    assert "nan" not in str(certificate)
    assert "not proven" in repr(model)


def test_an_activation_of_ones_own_is_called_no_proof():
    register_activation("sine", Activation(jnp.sin))
    stages = [ir.StageSpec(1, (4,), activation="sine"), ir.StageSpec(1, (4,))]
    model = ir.Density.init(jax.random.key(0), X, stages=stages)
    certificate = model.certificate()
    assert "1 of 2 blocks, the first is stage0/block00, are invertible if your activation sine" in (
        certificate.verdict
    )
    assert not certificate.certified
    assert "your activation sine is 1-Lipschitz" in repr(model)
    with pytest.raises(ValueError, match="with the library's activations, not with your own"):
        ir.certify.decode(model, model.encode(X[:2]))


def test_an_activation_that_is_steep_beyond_where_it_was_measured_is_refused_by_data():
    steep = Activation(lambda x: jnp.where(jnp.abs(x) > 20, 9 * (x - 20), 0.1 * x))
    register_activation("steep_far_out", steep)
    stages = [ir.StageSpec(1, (4,), activation="steep_far_out", preactivation=True, actnorm=False)]
    with pytest.raises(ValueError, match="was measured on the data"):
        ir.Density.init(
            jax.random.key(0), 99 * X, stages=stages, transform=ir.Identity(), coeff=0.9
        )


def test_a_bound_that_is_one_percent_too_low_is_named_with_both_numbers():
    model = density(TooLow)
    scale = float(model.weights["stage1"].branch.weights["scale"][0])
    with pytest.raises(ValueError, match="'own' of stage1/block00 claims") as caught:
        model.check_branches(X)
    assert f"{0.99 * scale:.4g}, and {scale:.4g} was measured" in str(caught.value)


def test_a_claim_that_no_pair_of_data_contradicts_is_refused_by_a_slope():
    with pytest.raises(ValueError, match="was measured on the data"):
        density(Kinked).check_branches(X)


def test_training_begins_with_the_check():
    spec = density(TooLow).spec
    spec = dataclasses.replace(spec, flow=ir.FlowSpec((2,), spec.flow.stages[1:]))
    with pytest.raises(ValueError, match="was measured on the data"):
        ir.Density.init(jax.random.key(0), X, stages=spec.flow.stages)
    with pytest.raises(ValueError, match="was measured on the data"):
        initial(spec, jax.random.key(0), X)
