"""Every wrong argument is refused by a ``ValueError`` that says what is wrong with it, before
anything is compiled.
"""

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
WHOLE = np.round(X)  # on a grid


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
        (lambda: fit(steps=None, minutes=0), "minutes must lie in"),
        (lambda: fit(steps=0), "steps must lie in"),
        (
            lambda: fit(callbacks=[ir.Checkpoints("nosuch://bucket/run")], steps=1),
            "Protocol not known: nosuch",
        ),
    ],
    "settings": [
        (lambda: fit(lerning_rate=1), "unexpected keyword argument 'lerning_rate'"),
        (lambda: fit(learning_rate=-1), "learning_rate must lie in"),
    ],
    "validation": [
        (lambda: fit(validation_fraction=0), "validation_fraction must lie in"),
        (lambda: fit(validation_fraction=0.999), "too few"),
        (lambda: fit(validation=X[:, :1]), "must agree in type and shape"),
        (lambda: fit(validation=(X, LABELS)), "in having no labels"),
    ],
    "objective and folder": [
        (
            lambda: fit(objective="regression"),
            "objective must be density, classification or hybrid, got 'regression'",
        ),
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
        (lambda: ir.certify.conv_norm_bound(KERNEL, (8, 8), padding="REFLECT"), "got 'REFLECT'"),
        (lambda: ir.spectral_norm(jnp.dot, jnp.eye(2), jnp.ones(2), num_steps=0), "num_steps=0"),
        (lambda: activations.get("swish"), "one of clipswish, elu, .*, got 'swish'"),
        (lambda: activations.maxmin(jnp.zeros((2, 3))), "even number of them, got 3"),
        (
            lambda: activations.register_activation("elu", activations.ACTIVATIONS["tanh"]),
            "another activation 'elu' already",
        ),
        (lambda: ir.FlowSpec((2, 0), (STAGE,)), r"event_shape\[1\] must lie in \[1, inf\), got 0"),
        (
            lambda: ir.Density.init(KEY, X, stages=[STAGE], last_scale=-1.0),
            "last_scale must lie in",
        ),
        (lambda: ir.Density.init(KEY, X, stages=[STAGE], sharpness=-1.0), "sharpness must lie in"),
        (
            lambda: kept.model(kept.CLASSIFIER).check_branches(kept.images(2)[0], context=X[:2]),
            "has no context: leave it out",
        ),
        (
            lambda: ir.Equalize.fit(np.full((2, 2, 2, 1), 9), 4, entrywise=False, alpha=0.05),
            "with integer levels 0 to 3",
        ),
        (lambda: ir.SeriesLogdet()(jnp.tanh, X), "key must be a key"),
        (lambda: ir.RouletteLogdet(parameter=-1.0), r"must lie in \(0, 500\), got -1"),
        (lambda: ir.RouletteLogdet("geometric", 1.0), r"must lie in \(0, 1\), got 1"),
        (
            lambda: ir.SeriesLogdet()(jnp.tanh, X, jax.random.split(KEY, 3)),
            "one key, or one for each of 60 examples",
        ),
    ],
    "branches": [
        (lambda: ir.FlowSpec((2,), (STAGE,), coeff=1.0), r"coeff must lie in \(0, 1\), got 1.0"),
        (lambda: ir.FlowSpec((2,), (STAGE,), budget="all"), "budget must be layer or block"),
        (
            lambda: ir.FlowSpec((3,), (ir.StageSpec(1, (4,), factor_out=True),)),
            "stage0 factors out half .* has 3",
        ),
        (
            lambda: ir.FlowSpec((5, 4, 1), (ir.StageSpec(1, (4,), (3, 3), squeeze=2),)),
            "stage0 cannot squeeze",
        ),
        (
            lambda: ir.FlowSpec((3,), (ir.StageSpec(1, (4,), channel_order=(1, 0)),)),
            "channel_order of stage0 must name each of its 3 channels once",
        ),
        (lambda: ir.StageSpec(0, (4,)), r"num_blocks must lie in \[1, inf\), got 0"),
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
    monkeypatch.setitem(sys.modules, "iresnet_jax.energy_fitting", None)
    with pytest.raises(
        ModuleNotFoundError,
        match=r"^iresnet_jax.fit_energy needs .*: pip install 'iresnet_jax\[energies\]'$",
    ):
        ir.fit_energy  # noqa: B018
