"""Samples with their log-densities beside `log_prob`, gradients beside differences."""

import dataclasses

import jax
import jax.numpy as jnp
import kept
import numpy as np

import iresnet_jax as ir

SAME = {"rtol": 1e-8, "atol": 1e-8}  # float64; inverses to 1e-12
FLOW = ir.FlowSpec((2,), (ir.StageSpec(2, (6,), activation="tanh"),))
SCALED = ir.Standardize((0.5, -1.0), (2.0, 0.3))
SPECS = {
    "normal": ir.DensitySpec(FLOW, transform=SCALED),
    "conditional": ir.DensitySpec(dataclasses.replace(FLOW, context_dim=3), transform=SCALED),
    "classes": ir.DensitySpec(FLOW, transform=SCALED, num_classes=3),
}
CONTEXTS = np.random.default_rng(0).normal(size=(4, 3))
LABELS = np.array([2, 0, 1, 1])
KEY = jax.random.key(0)


def model(name):
    """In float64, by the fixture of the test."""
    whole = kept.exact_model(SPECS[name])
    if name != "classes":
        return whole
    return whole.with_(prior=dataclasses.replace(whole.prior, logits=jnp.array([0.1, 1.0, -0.5])))


@jax.jit
def drawn(model, context, labels):
    return model.sample_and_log_prob(KEY, 4, context=context, labels=labels)


terms = jax.jit(ir.Density.terms)


def test_with_labels_the_log_density_is_that_of_the_class(x64):
    whole = model("classes")
    found = drawn(whole, None, LABELS)
    at = terms(whole, found.x, KEY, KEY)
    frequencies = np.exp(whole.prior.logits) / np.exp(whole.prior.logits).sum()
    of_classes = at.log_prior_by_class[np.arange(4), LABELS] - np.log(frequencies)[LABELS]
    np.testing.assert_allclose(
        found.log_prob, of_classes + at.log_det + at.log_det_transform, **SAME
    )


def test_gradients_by_weights_prior_and_context_are_those_of_differences(x64):
    whole, context = model("conditional"), jnp.asarray(CONTEXTS)
    stage = whole.weights["stage0"]

    def changed(parameters):
        kernels, prior, context = parameters
        branch = dataclasses.replace(stage.branch, weights=kernels)
        return whole.with_(weights={"stage0": stage._replace(branch=branch)}, prior=prior), context

    @jax.jit
    @jax.value_and_grad
    def value_and_gradients(parameters):
        model, context = changed(parameters)
        found = model.sample_and_log_prob(KEY, 4, context=context)
        return jnp.sum(jnp.sin(found.x)) + jnp.sum(jnp.cos(found.log_prob))

    parameters = (stage.branch.weights, whole.prior, context)
    leaves, tree = jax.tree.flatten(jax.tree.map(np.asarray, parameters))
    parameters, rng = tree.unflatten(leaves), np.random.default_rng(7)
    direction = tree.unflatten([rng.normal(size=leaf.shape) for leaf in leaves])
    moved = [
        jax.tree.map(lambda a, b, s=step: a + s * b, parameters, direction)
        for step in (1e-5, -1e-5, 0.0)
    ]
    (ahead, _), (behind, _), (_, gradients) = map(value_and_gradients, moved)
    slope = sum(
        np.vdot(a, b)
        for a, b in zip(jax.tree.leaves(gradients), jax.tree.leaves(direction), strict=True)
    )
    np.testing.assert_allclose(slope, (ahead - behind) / 2e-5, rtol=1e-6)
    assert all(np.any(gradient) for gradient in jax.tree.leaves(gradients[1:]))
