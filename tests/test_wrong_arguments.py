"""Wrong arguments are refused by a ``ValueError`` before anything is compiled."""

import sys
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import kept
import numpy as np
import pytest

import iresnet_jax as ir
from iresnet_jax.branches import kinds
from iresnet_jax.estimators import ResidualFlowClassifier, ResidualFlowDensity
from iresnet_jax.maths import activations

X = np.random.default_rng(0).normal(size=(60, 2)).astype(np.float32)
LABELS = np.arange(60) % 2
KEY = jax.random.key(0)


STAGE = ir.StageSpec(1, (4,))
KERNEL = jnp.ones((3, 3, 1, 1))


def model():
    return kept.model(kept.POINTS)


def fit(x: Any = X, *arguments: Any, **options: Any) -> Any:
    return ir.fit(x, *arguments, **{"steps": 1, "progress": False} | options)


def fit_density(x: Any = X, **options: Any) -> Any:
    return ResidualFlowDensity(**{"steps": 1} | options).fit(x)


# What is called, and a fragment of the sentence that answers it.
WRONG: dict[str, list[tuple[Callable[[], Any], str]]] = {
    "key": [
        (lambda: fit(key=7), r"jax.random.key\(7\), got 7"),
        (
            lambda: fit(key=jax.random.split(KEY, (2, 2))),
            r"a key array of shape \(2, 2\)",
        ),
        (lambda: model().sample(0, 3), "key must be a key"),
    ],
    "minutes and steps": [
        (lambda: fit(minutes=1), "not both"),
    ],
    "settings": [
        (lambda: fit(lerning_rate=1), "unexpected keyword argument 'lerning_rate'"),
        (lambda: fit(learning_rate=-1), "learning_rate must lie in"),
    ],
    "validation": [
        (lambda: fit(validation_fraction=0.999), "too few"),
        (lambda: fit(validation=X[:, :1]), "must agree in type and shape"),
        (lambda: fit(validation=(X, LABELS)), "in having no labels"),
    ],
    "objective and folder": [
        (lambda: fit(objective="classification"), "objective classification needs labels"),
        (
            lambda: fit(X, LABELS, context=X, objective="classification"),
            "classification needs labels, the class of each example, and no contexts",
        ),
    ],
    "examples": [
        (lambda: fit(X[:, 0]), r"x\[:, None\]"),
        (lambda: fit(X[:2]), "needs 10 rows or more, got 2"),
        (lambda: fit_density(X[:, 0]), "1D array"),
        (lambda: model().log_prob(X[:, :1]), r"takes floats of shape \(batch, 2\)"),
    ],
    "labels": [
        (lambda: fit(X, np.zeros(3, int)), "labels must be 60"),
        (lambda: fit(X, LABELS * 2**32), "got 4294967296"),  # which int32 would make 0
        (lambda: ResidualFlowClassifier(steps=1).fit(X, [None] * 30 + ["a"] * 30), "label"),
    ],
    "layers": [
        (lambda: ir.conv(jnp.ones((1, 4, 4, 1)), KERNEL, padding="VALID"), "one of SAME, CIRCULAR"),
        (lambda: activations.get("swish"), "one of clipswish, elu, .*, got 'swish'"),
        (lambda: activations.maxmin(jnp.zeros((2, 3))), "even number of them, got 3"),
        (
            lambda: activations.register_activation("elu", activations.ACTIVATIONS["tanh"]),
            "another activation 'elu' already",
        ),
        (
            lambda: activations.register_activation(
                "steep", activations.Activation(lambda x: jnp.sin(5 * x), slope_lipschitz=1.0)
            ),
            r"the slope of the activation 'steep' reaches (5|4\.9\d*)",
        ),
        (lambda: ir.SeriesLogdet()(jnp.tanh, X), "key must be a key"),
        (
            lambda: ir.SeriesLogdet()(jnp.tanh, X, jax.random.split(KEY, 3)),
            "one key, or one for each of 60 examples",
        ),
    ],
    "branches": [
        (lambda: ir.FlowSpec((2,), (STAGE,), coeff=1.0), r"coeff must lie in \(0, 1\), got 1.0"),
        (lambda: ir.FlowSpec((2,), (STAGE,), budget="all"), "budget must be layer or block"),
        (lambda: ir.StageSpec(1, (3,), kind="dens"), "kind must be one of feedforward"),
        (lambda: ir.FeedforwardSpec((4, 4, 1), (4,)), "branch of vectors has none; got examples"),
        (lambda: ir.FeedforwardSpec((4, 4, 1), (4,), (3,)), r"kernel_sizes=\(3,\) and hidden"),
        (lambda: kinds.get("potential")((4,), (4, 4)), "one hidden layer"),
        (lambda: kinds.get("sandwich")((4,), (4,), activation="maxmin"), "with slopes in"),
        (lambda: kinds.get("sandwich")((4, 4, 1), (4,), (3, 2)), "kernels of odd sizes"),
        (
            lambda: ir.Branch(ir.FeedforwardSpec((4,), (4,)), {})(X),
            r"bounds are for examples of shape \(4,\), got \(2,\)",
        ),
    ],
    "number of samples": [
        (
            lambda: model().sample(KEY, 2.5),
            r"num .*got 2.5: give a whole number",
        ),
    ],
}


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        pytest.param(*case, id=f"{argument} {number}")
        for argument, cases in WRONG.items()
        for number, case in enumerate(cases)
    ],
)
@pytest.mark.usefixtures("unchecked_annotations")
def test_a_wrong_argument_is_refused_in_a_sentence(call, sentence):
    with pytest.raises((ValueError, TypeError), match=sentence):
        call()


@pytest.mark.usefixtures("unchecked_annotations")
def test_lists_are_taken_for_tuples_and_arrays():
    assert hash(ir.FlowSpec([2], [STAGE])) == hash(ir.FlowSpec((2,), (STAGE,)))
    own = kept.model(kept.HYBRID).continuous
    by_array = own.sample_and_log_prob(KEY, 2, labels=jnp.array([1, 0]))
    np.testing.assert_array_equal(
        own.sample_and_log_prob(KEY, 2, labels=[1, 0]).log_prob, by_array.log_prob
    )


def test_a_missing_package_is_named_with_the_extra_that_has_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "gcsfs", None)
    with pytest.raises(ValueError, match=r"for gs:// pip install 'iresnet_jax\[gcs\]'"):
        ir.load("gs://bucket/model.npz")
    monkeypatch.setitem(sys.modules, "iresnet_jax.energies", None)
    with pytest.raises(
        ModuleNotFoundError,
        match=r"^iresnet_jax.fit_energy needs .*: pip install 'iresnet_jax\[energies\]'$",
    ):
        ir.fit_energy  # noqa: B018
