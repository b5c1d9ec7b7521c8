"""Verified accuracy and accuracy under attack on a small classifier; certificates that are wrong are found out."""

import functools

import kept
import numpy as np
import pytest

from iresnet_jax import certify
from iresnet_jax.evaluation import robustness
from iresnet_jax.evaluation.robustness import Attack

NUM, RADII = 12, (1e-4, 1.0, 30.0)
ATTACK = Attack(num_restarts=2, num_steps=10)
IMAGES, _ = kept.images(NUM)


@functools.cache
def model():
    return kept.model(kept.CLASSIFIER, seed=1)


@functools.cache
def certified():
    return certify.radius(model(), IMAGES)


def evaluate(labels=None, **settings):
    own, labels = certified(), certified().predicted if labels is None else labels
    settings = {"radii": RADII, "attack": ATTACK, "certified": own, **settings}
    return robustness.evaluate(model(), IMAGES, labels, **settings)


def test_what_holds_lies_between_verified_and_attacked():
    labels = certified().predicted.copy()
    labels[0] = (labels[0] + 1) % kept.CLASSES
    result = evaluate(labels)
    verified, attacked = ([getattr(row, name) for row in result.at] for name in ("verified", "attacked"))
    assert result.accuracy == (NUM - 1) / NUM
    assert verified == [np.mean((certified().radius >= r) & (np.arange(NUM) > 0)) for r in RADII]
    assert all(low <= high for low, high in zip(verified, attacked, strict=True))
    assert attacked == sorted(attacked, reverse=True)
    assert attacked[-1] < attacked[0] == result.accuracy, "an attack without success tests nothing"
    assert result.num_broken == 0
    assert "broken" not in str(result)
    assert all(low <= row.verified <= high for row in result.at for low, high in [row.interval])


def test_a_certificate_that_is_wrong_is_broken():
    result = evaluate(certified=certified()._replace(radius=np.full(NUM, np.inf)))
    assert result.num_broken > 0
    assert "certificates were broken" in str(result)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"radii": (0.1, 0.1)}, "positive and increasing"),
        ({"radii": (0.0, 0.1)}, "positive and increasing"),
        ({"radii": ()}, "positive and increasing"),
        ({"labels": np.zeros(3, int)}, "a label each"),
    ],
)
def test_mistakes_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        evaluate(**settings)
    with pytest.raises(ValueError, match="at least 1 restart"):
        Attack(num_steps=0)
