"""Initial weights of branches."""

import jax
import numpy as np

from iresnet_jax.models.branch import BranchSpec, initial_weights


def test_sharp_activations_see_what_others_see_of_unconstrained_layers():
    """`sharpness * input` of a wide constrained layer is as large as for a layer of norm about 1 without a wide side."""
    spec = BranchSpec((6,), hidden=(512,), activation="clipswish", preactivation=True)
    plain, sharp = (initial_weights(spec, jax.random.key(0), sharp=sharp) for sharp in (False, True))
    first, second = (layer.name for layer in spec.layers)
    np.testing.assert_array_equal(plain[first]["kernel"], sharp[first]["kernel"])
    assert float(plain[first]["beta"]) == float(sharp[first]["beta"])  # in front of any layer
    kernel = np.asarray(plain[first]["kernel"], np.float64)
    shrunk = np.linalg.norm(kernel, axis=0).mean() / np.linalg.norm(kernel, ord=2)  # an output's size over the layer's norm
    ratio = np.log1p(np.exp(float(sharp[second]["beta"]))) / np.log1p(np.exp(float(plain[second]["beta"])))
    np.testing.assert_allclose(ratio * shrunk, np.linalg.norm(kernel, axis=0).mean(), rtol=0.1)
