"""Any leading axes: results are those of the batch, and contexts broadcast as documented."""

import dataclasses

import jax
import jax.numpy as jnp
import kept
import numpy as np
import pytest

import iresnet_jax as ir

SAME = {"rtol": 1e-5, "atol": 1e-5}  # float32, the same sums in programs of other batch sizes
PLANE = ir.DensitySpec(ir.FlowSpec((2,), (ir.StageSpec(2, (6,), activation="tanh"),)))
GIVEN = ir.DensitySpec(
    dataclasses.replace(PLANE.flow, context_dim=3),
    context=ir.Standardize((0.1, 0.2, 0.3), (1.0, 2.0, 3.0)),
)
GIVEN_A_NUMBER = ir.DensitySpec(dataclasses.replace(PLANE.flow, context_dim=1))


rng = np.random.default_rng(0)
POINTS = rng.normal(size=(6, 2)).astype(np.float32)
CONTEXTS = rng.normal(size=(6, 3)).astype(np.float32)


def with_axes(tree, axes):
    return jax.tree.map(lambda a: a.reshape(*axes, *a.shape[1:]), tree)


def assert_same(found, expected):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, **SAME), found, expected)
    assert jax.tree.map(jnp.shape, found) == jax.tree.map(jnp.shape, expected)


@pytest.mark.parametrize(
    ("x", "context", "axes"),
    [
        (POINTS, CONTEXTS[0], (6,)),
        (POINTS[0], CONTEXTS, (6,)),
        (POINTS[:2, None], CONTEXTS[:3], (2, 3)),
    ],
)
def test_contexts_broadcast_against_examples(x, context, axes):
    """Outside of jit, where all examples of one number share a program, whatever their axes."""
    model = kept.model(GIVEN)
    x_all, context_all = (
        np.broadcast_to(a, (*axes, a.shape[-1])).reshape(-1, a.shape[-1]) for a in (x, context)
    )
    assert_same(
        model.log_prob(x, context=context),
        with_axes(model.log_prob(x_all, context=context_all), axes),
    )
    z = model.encode(x_all, context=context_all)
    assert_same(model.encode(x, context=context), with_axes(z, axes))
    assert_same(
        model.decode(with_axes(z, axes), context=context)[0], np.broadcast_to(x, (*axes, 2))
    )


def test_a_number_is_a_context_of_length_one():
    model = kept.model(GIVEN_A_NUMBER)
    expected = model.log_prob(POINTS, context=jnp.full((6, 1), 0.5))
    for context in (np.array(0.5), np.full(6, 0.5), np.array([0.5]), np.full((1, 1), 0.5)):
        assert_same(model.log_prob(POINTS, context=context), expected)


def test_samples_under_one_context_are_those_of_as_many_equal_ones():
    model, key = kept.model(GIVEN), jax.random.key(3)
    sample = jax.jit(ir.Density.sample, static_argnums=2)
    expected, _ = sample(model, key, 6, context=np.tile(CONTEXTS[0], (6, 1)))
    assert_same(sample(model, key, 6, context=CONTEXTS[0])[0], expected)


def test_classes_have_the_axes_of_the_examples():
    images, _ = kept.images(6)
    logits = jax.jit(ir.Classifier.logits)
    for compute, spec, x in (
        (logits, kept.CLASSIFIER, images),
        (ir.Density.class_log_probs, kept.CLASSES_OF_POINTS, POINTS),
    ):
        model = kept.model(spec)
        whole = compute(model, x)
        assert_same(compute(model, with_axes(x, (2, 3))), with_axes(whole, (2, 3)))
        assert_same(compute(model, x[2]), whole[2])
