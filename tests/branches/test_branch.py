"""Initial weights of branches, and biases."""

import jax
import numpy as np
import pytest

from iresnet_jax.branches.feedforward import FeedforwardSpec, apply_branch, initial_weights
from iresnet_jax.maths import platforms as target


def test_sharp_activations_see_what_others_see_of_unconstrained_layers():
    """`sharpness * input` of a wide constrained layer is as large as for a layer of norm about 1 without a wide side."""
    spec = FeedforwardSpec((6,), hidden=(512,), activation="clipswish", preactivation=True)
    plain, sharp = (spec.initial_weights(jax.random.key(0), sharp=sharp) for sharp in (False, True))
    first, second = (layer.name for layer in spec.layers)
    np.testing.assert_array_equal(plain[first]["kernel"], sharp[first]["kernel"])
    assert float(plain[first]["beta"]) == float(sharp[first]["beta"])  # in front of any layer
    kernel = np.asarray(plain[first]["kernel"], np.float64)
    shrunk = np.linalg.norm(kernel, axis=0).mean() / np.linalg.norm(kernel, ord=2)  # an output's size over the layer's norm
    ratio = np.log1p(np.exp(float(sharp[second]["beta"]))) / np.log1p(np.exp(float(plain[second]["beta"])))
    np.testing.assert_allclose(ratio * shrunk, np.linalg.norm(kernel, axis=0).mean(), rtol=0.1)


@pytest.mark.parametrize(
    "spec",
    [
        FeedforwardSpec((5,), hidden=(7,)),
        FeedforwardSpec((4, 3, 2), hidden=(6,), kernel_sizes=(3, 1)),
        FeedforwardSpec((4, 3, 2), hidden=(6,), kernel_sizes=(1, 3), positional_bias=True),
    ],
)
def test_a_bias_is_the_same_where_results_should_not_overwrite_operands(spec, monkeypatch):
    weights = {
        name: {**layer, "bias": jax.random.normal(jax.random.key(i), layer["bias"].shape)}
        for i, (name, layer) in enumerate(spec.initial_weights(jax.random.key(0)).items())
    }
    x = jax.random.normal(jax.random.key(9), (3, *spec.in_shape))
    outputs = []
    for is_slow in (False, True):
        monkeypatch.setattr(target, "is_slow_in_place", lambda value=is_slow: value)
        outputs.append(spec.apply(weights, x))
    np.testing.assert_array_equal(*outputs)
    assert np.ptp(outputs[0]) > 0


def test_results_overwrite_operands_slowly_with_the_older_emitters_of_cpus(monkeypatch):
    for flags, platform, is_slow in [
        ("--xla_cpu_use_fusion_emitters=false", "cpu", True),
        ("--xla_cpu_use_fusion_emitters=false", "gpu", False),
        ("", "cpu", False),
    ]:
        monkeypatch.setenv("XLA_FLAGS", flags)
        with target.compiling_for(platform):
            assert target.is_slow_in_place() == is_slow
