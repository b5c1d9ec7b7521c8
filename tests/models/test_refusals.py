"""What models and bijections refuse, as a number would be wrong in silence."""

import dataclasses

import jax
import jax.numpy as jnp
import kept
import numpy as np
import pytest

import iresnet_jax as ir
from iresnet_jax.bijections.chain import Multiscale, Stage
from iresnet_jax.bijections.reshape import squeeze_bijection
from iresnet_jax.models.density_spec import DensitySpec

KEY, X = jax.random.key(0), np.random.default_rng(0).normal(size=(5, 2)).astype(np.float32)
STAGES = (ir.StageSpec(1, (4,)),)
HALF = ir.StageSpec(1, (4,), factor_out=True)
IMAGES, _ = kept.images(5)
BOUNDED = dataclasses.replace(kept.POINTS, transform=ir.Bounded((-9.0, -np.inf), (9.0, np.inf)))
points, images, given = (
    lambda spec=spec: kept.model(spec) for spec in (kept.POINTS, kept.IMAGES, kept.GIVEN)
)
bounded = lambda: kept.model(BOUNDED)  # noqa: E731


def init(x=X, **settings):
    return ir.Density.init(KEY, x, stages=STAGES, **settings)


def flow(*stages, shape=(4, 4, 1)):
    return ir.FlowSpec(shape, stages)


def multiscale():
    return Multiscale([Stage(squeeze_bijection(2))], (2, 4, 2))


CASES = {
    "levels as floats": (lambda: images().encode(IMAGES / 255), "undo the scaling"),
    "levels beyond": (lambda: images().log_prob(IMAGES.astype(int) + 200), "got levels from"),
    "latents": (lambda: points().decode(np.zeros((2, 5, 3))), r"latents of shape \(2,\), got"),
    "values out of range": (lambda: bounded().log_prob(X + 10), "not within the range -9 to 9"),
    "no context": (lambda: given().encode(X), r"a context of shape \(batch, 3\), got none"),
    "samples of levels": (lambda: images().sample_and_log_prob(KEY, 2), r"model\.continuous"),
    "too few labels": (
        lambda: kept.model(kept.HYBRID).sample(KEY, 2, labels=jnp.array([0])),
        r"labels must be 2 integers, .* of shape \(1,\)",
    ),
    "values far from 0": (
        lambda: init(X + np.array([0.0, 1e8])),
        "cannot tell the values of entry 1 of x",
    ),
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
    "features of a part": (
        lambda: ir.ClassifierSpec(flow(HALF), (4, 4, 1), 3),
        "no stage may factor_out",
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
    "a flow's examples": (lambda: multiscale().forward(jnp.zeros((2, 2, 4, 3))), "takes examples"),
    "a flow's latents": (lambda: multiscale().inverse(jnp.zeros((2, 21))), r"shape \(16,\)"),
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
