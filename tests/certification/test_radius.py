"""Certified radii of classifiers against searches of the ball in float64."""

import functools

import jax
import jax.numpy as jnp
import kept
import numpy as np
import pytest

from iresnet_jax import certify
from iresnet_jax.models.architecture import FlowSpec, StageSpec
from iresnet_jax.models.classifier import Classifier, ClassifierSpec
from iresnet_jax.models.contractions import freeze

LEVELS, SHAPE, CLASSES = 5, (2, 2, 2), 3
NUM_IMAGES, NUM_STARTS, NUM_STEPS = 6, 64, 60


def spec_of(*stages, **fields):
    fields = {"pad_channels": 2, "mean": (0.4, 0.5), "std": (0.3, 0.6), **fields}
    shape = (2, 2, 2 + fields["pad_channels"])
    return ClassifierSpec(FlowSpec(shape, stages), SHAPE, CLASSES, LEVELS, **fields)


CONV = {"hidden": (4,), "kernel_sizes": (3, 3)}
SPECS = {
    "elu, then dense, not padded": spec_of(
        StageSpec(1, **CONV, activation="elu", preactivation=True, squeeze=2, padding="CIRCULAR"),
        StageSpec(1, hidden=(5, 4), activation="lipswish"),
        pad_channels=0,
    ),
    "relu": spec_of(StageSpec(2, **CONV, activation="relu")),
    "potentials": spec_of(
        StageSpec(2, **CONV, activation="relu", kind="potential", actnorm=False, squeeze=2),
        StageSpec(2, hidden=(9,), activation="softplus4", kind="potential", actnorm=False),
        head="linear",
    ),
}


@functools.cache
def model(name):
    """A classifier with random weights, its head's statistics those of random features."""
    spec = SPECS[name]
    frozen = freeze(spec.flow, kept.random_params(spec.flow, seed=3))
    channels, rng = spec.feature_shape[-1], np.random.default_rng(1)
    head, statistics = spec.initial_arrays(jax.random.key(4)).values()
    if spec.head == "pooled":
        statistics = {
            "head": {"mean": rng.normal(0, 0.3, channels), "var": rng.uniform(0.3, 1, channels)}
        }
        head["norm"] = {
            "scale": jnp.linspace(0.5, 1.5, channels),
            "bias": jnp.linspace(-0.5, 0.5, channels),
        }
    head["linear"]["bias"] = jnp.array([0.05, -0.05, 0.0])  # no ties where all rectifiers are off
    as_float32 = functools.partial(jax.tree.map, lambda a: np.asarray(a, np.float32))
    return Classifier(spec, as_float32(frozen), as_float32(head), as_float32(statistics))


@functools.cache
def images():
    return np.random.default_rng(0).integers(0, LEVELS, (NUM_IMAGES, *SHAPE), np.uint8)


@jax.jit
def logits_of(own, pixels):
    return own.logits_of_input(own.spec.pad(pixels))


@jax.jit
def least_margins(own, pixels, classes, radii, key):
    """The least margins that gradient descent from many starts finds in balls around images."""

    def margins(moves):
        found = logits_of(own, pixels + moves)
        rest = jnp.where(jax.nn.one_hot(classes, CLASSES) > 0, -jnp.inf, found)
        return found[jnp.arange(len(classes)), classes] - rest.max(axis=1)

    def summed(moves):  # for gradients and values by one pass
        found = margins(moves)
        return found.sum(), found

    def onto(moves):
        lengths = jnp.sqrt(jnp.sum(moves**2, axis=(1, 2, 3)))
        return moves * jnp.minimum(1, radii / jnp.maximum(lengths, 1e-300))[:, None, None, None]

    def search(key):
        def step(_, state):
            moves, least = state
            slopes, found = jax.grad(summed, has_aux=True)(moves)
            slopes /= jnp.sqrt(jnp.sum(slopes**2, axis=(1, 2, 3), keepdims=True)) + 1e-300
            return onto(moves - 0.1 * radii[:, None, None, None] * slopes), jnp.minimum(
                least, found
            )

        moves = onto(jax.random.normal(key, pixels.shape) * radii[:, None, None, None])
        return jax.lax.fori_loop(0, NUM_STEPS, step, (moves, jnp.full_like(radii, jnp.inf)))[1]

    return jax.vmap(search)(jax.random.split(key, NUM_STARTS)).min(axis=0)


def searched(own, classes, radii):
    with jax.enable_x64():
        precise = jax.tree.map(
            lambda a: jnp.asarray(a, jnp.float64), (own.weights, own.head, own.statistics)
        )
        precise = own.with_(**dict(zip(("weights", "head", "statistics"), precise, strict=True)))
        pixels = jnp.asarray(images() / (LEVELS - 1), jnp.float64)
        return np.asarray(
            least_margins(
                precise, pixels, jnp.asarray(classes), jnp.asarray(radii), jax.random.key(0)
            )
        )


@functools.cache
def certified(name):
    return certify.radius(model(name), images())


@pytest.mark.parametrize("name", SPECS)
def test_no_search_breaks_a_certified_radius(name):
    own, found = model(name), certified(name)
    assert np.all(found.radius == np.maximum(found.radius, 0))
    assert np.all(found.radius[found.margin > 1e-3] > 0)
    np.testing.assert_array_equal(
        found.predicted,
        np.asarray(logits_of(own, images() / np.float32(LEVELS - 1))).argmax(axis=1),
    )
    assert np.all(searched(own, found.predicted, found.radius) > 0)
    assert np.mean(searched(own, found.predicted, 50 * found.radius + 3) < 0) > 0.5, (
        "a search that finds nothing proves nothing"
    )


def test_constants_are_those_of_the_head_for_potentials_alone():
    own, found = model("potentials"), certified("potentials")
    kernel = np.asarray(own.head["linear"]["kernel"], np.float64)
    unit = kernel / np.linalg.norm(kernel, axis=0)
    # the least divisor of pixels
    distances = np.linalg.norm(unit[:, found.predicted].T[:, :, None] - unit, axis=1) / 0.3
    closest = np.abs(distances / found.lipschitz[:, None] - 1).min(axis=1)
    assert np.all(closest < 1e-5)
    assert np.all(certified("relu").lipschitz > 7)


def test_rounding_of_logits_only_shrinks_radii():
    own = model("potentials")
    # the same decisions; in float32 the logits of the second are all equal
    pairs = ([0, 0, -(2**30)], [2**30, 2**30, 0])
    near, far = ({"linear": {**own.head["linear"], "bias": np.float32(bias)}} for bias in pairs)
    plain, shifted = (certify.radius(own.with_(head=head), images()) for head in (near, far))
    np.testing.assert_array_equal(plain.predicted, shifted.predicted)
    assert np.all(shifted.radius <= plain.radius)
    assert np.all(shifted.radius > plain.radius - 1e-4)
