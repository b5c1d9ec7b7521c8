"""What models and bijections refuse, as without it a number would be wrong in silence, or the
cause could not be found.
"""

import dataclasses

import jax
import jax.numpy as jnp
import kept
import numpy as np
import pytest

import iresnet_jax as ir
from iresnet_jax.bijections.chain import Multiscale, Stage
from iresnet_jax.bijections.equalize import Equalize
from iresnet_jax.bijections.reshape import squeeze_bijection
from iresnet_jax.models.density_spec import DensitySpec
from iresnet_jax.models.mixtures import expectation_maximisation

KEY, X = jax.random.key(0), np.random.default_rng(0).normal(size=(5, 2)).astype(np.float32)
STAGES = (ir.StageSpec(1, (4,)),)
HALF = ir.StageSpec(1, (4,), factor_out=True)
IMAGES, LABELS = kept.images(5)
BOUNDED = dataclasses.replace(kept.POINTS, transform=ir.Bounded((-9.0, -np.inf), (9.0, np.inf)))
SCALED = dataclasses.replace(kept.GIVEN, context=ir.Standardize((0.0,) * 3, (1.0,) * 3))
points, images, given = (
    lambda spec=spec: kept.model(spec) for spec in (kept.POINTS, kept.IMAGES, kept.GIVEN)
)
bounded, scaled, classifier = (
    lambda spec=spec: kept.model(spec) for spec in (BOUNDED, SCALED, kept.CLASSIFIER)
)


def init(x=X, **settings):
    return ir.Density.init(KEY, x, stages=STAGES, **settings)


def flow(*stages, shape=(4, 4, 1)):
    return ir.FlowSpec(shape, stages)


def multiscale():
    return Multiscale([Stage(squeeze_bijection(2))], (2, 4, 2))


class EachEntry:
    """A prior that gives a number for each entry."""

    def log_prob(self, z):
        return -jnp.abs(z)

    def sample(self, key, shape):
        return jax.random.normal(key, (*shape, 2))


CASES = {
    "levels as floats": (lambda: images().encode(IMAGES / 255), "undo the scaling"),
    "levels beyond": (lambda: images().log_prob(IMAGES.astype(int) + 200), "got levels from"),
    "a shape": (lambda: images().log_prob(IMAGES[:, :3]), r"got an array of shape \(5, 3, 4, 1\)"),
    "levels for floats": (
        lambda: images().continuous.encode(IMAGES),
        r"takes floats of shape \(batch, 4, 4, 1\), got uint8",
    ),
    "latents": (lambda: points().decode(np.zeros((2, 5, 3))), r"latents of shape \(2,\), got"),
    "values out of range": (lambda: bounded().log_prob(X + 10), "not within the range -9 to 9"),
    "no context": (lambda: given().encode(X), r"a context of shape \(batch, 3\), got none"),
    "a long context": (lambda: scaled().encode(X, context=np.ones((5, 4))), "length 3.*got shape"),
    "several contexts": (lambda: given().given(np.ones((2, 3))), "contexts of length 3"),
    "a context that is not taken": (lambda: points().given(np.ones(3)), "0 for none"),
    "contexts of a classifier": (
        lambda: classifier().logits(IMAGES, context=X),
        "has no context: leave it out",
    ),
    "samples of levels": (lambda: images().sample_and_log_prob(KEY, 2), r"model\.continuous"),
    "a temperature": (lambda: points().sample(KEY, 1, temperature=-1.0), "temperature must lie in"),
    "too few labels": (
        lambda: kept.model(kept.HYBRID).sample(KEY, 2, labels=jnp.array([0])),
        r"labels must be 2 integers, .* of shape \(1,\)",
    ),
    "a prior of entries": (lambda: init(prior=EachEntry()), r"got shape \(5, 2\)"),
    "vectors of one entry": (lambda: init(X[:, 0]), r"x\[:, None\]"),
    "values far from 0": (
        lambda: init(X + np.array([0.0, 1e8])),
        "cannot tell the values of entry 1 of x",
    ),
    "contexts of others": (lambda: init(context=X[:3]), "a vector for each of 5 examples"),
    "levels of floats": (lambda: init(num_levels=4), "integer levels 0 to 3, got float32"),
    "data beyond their transform": (
        lambda: init(transform=ir.Logit(0.05)),
        "out of the range of their transform, Logit",
    ),
    "a transform of other entries": (
        lambda: init(transform=ir.Standardize((0.0,), (1.0,))),
        "Standardize has 1 entries",
    ),
    "channels in no order": (
        lambda: flow(ir.StageSpec(1, (4,), channel_order=(0, 0))),
        "must name each of its 1 channels once",
    ),
    "sides": (lambda: flow(ir.StageSpec(1, (4,), squeeze=3)), "sides divisible by 3"),
    "half of one": (lambda: flow(HALF, shape=(3,)), "squeeze before it"),
    "constants": (
        lambda: ir.FlowSpec.bilipschitz((2,), STAGES, mu=2.0, nu=1.0),
        "mu must be below nu",
    ),
    "constants of a part": (
        lambda: ir.FlowSpec.bilipschitz((2,), [HALF], mu=1.0, nu=2.0),
        "no stage may factor_out",
    ),
    "features of a part": (
        lambda: ir.ClassifierSpec(flow(HALF), (4, 4, 1), 3),
        "no stage may factor_out",
    ),
    "a divisor": (
        lambda: dataclasses.replace(kept.CLASSIFIER, std=(-1.0,)),
        "std must be positive",
    ),
    "another spec": (
        lambda: points().with_(spec=DensitySpec(flow(*STAGES, shape=(2,)))),
        "do not fit the new spec",
    ),
    "no constraint": (
        lambda: kept.model(dataclasses.replace(kept.CLASSIFIER, constrained=False)).freeze(),
        "nothing to freeze",
    ),
    "numbers": (
        lambda: jax.tree.map(lambda leaf: leaf * jnp.inf, points()).save("nowhere.npz"),
        "numbers that are not finite",
    ),
    "no frame": (lambda: points().to_frame(X), "not fitted to a data frame"),
    "components": (
        lambda: expectation_maximisation(np.ones((2, 2)), 5, random_state=0),
        "singular covariances, or are more",
    ),
    "a flow's examples": (lambda: multiscale().forward(jnp.zeros((2, 2, 4, 3))), "takes examples"),
    "a flow's latents": (lambda: multiscale().inverse(jnp.zeros((2, 21))), r"shape \(16,\)"),
    "frequencies": (lambda: Equalize((0.5, 0.0)), "frequencies must be positive"),
    "shares": (lambda: Equalize((0.5, 0.5), (0.5,)).map(jnp.zeros((1, 2))), "each of 2 entries"),
    "a constant entry": (lambda: ir.Standardize.fit(np.full((100, 1), 0.1)), "entry is constant"),
    "a scale for others": (
        lambda: ir.Standardize((0.0,), (2.0,)).map(jnp.ones((2, 3))),
        r"for 1 entries, got .* \(2, 3\)",
    ),
    "a factor": (lambda: ir.Whiten((0.0, 0.0), ((1.0, 0.5), (0.0, 1.0))), "lower triangular"),
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.usefixtures("unchecked_annotations")
def test_it_is_refused_in_a_sentence(name):
    call, sentence = CASES[name]
    with pytest.raises(ValueError, match=sentence):
        call()
