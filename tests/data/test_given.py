"""What `fit` is given, data frames above all: samples and models keep to it."""

import contextlib
import io

import jax
import kept
import numpy as np
import pandas as pd
import pytest

import iresnet_jax as ir

RNG = np.random.default_rng(0)
# One small program for each number of columns.
QUICK = {
    "steps": 4,
    "architecture": (ir.StageSpec(num_blocks=1, hidden=(8,), activation="clipswish"),),
    "progress": False,
    "learning_rate": 1e-3,
    "batch_size": 16,
}


def table(num=1200):
    rng = np.random.default_rng(0)
    return pd.DataFrame(
        {
            "flag": rng.random(num) < 0.1,
            "age": rng.integers(18, 91, num),
            "share": np.concatenate([[0.0, 1.0], rng.random(num - 2)]),  # both ends of its bounds
            "colour": pd.Categorical(rng.choice(["red", "green", "blue"], num)),
            "height": rng.normal(size=num),
        }
    )


@pytest.fixture(scope="module")
def of_table():
    """The model of a data frame that was trained with noise, and what `fit` said."""
    said = io.StringIO()
    options = {"progress": True, "noise": 1.0}
    with contextlib.redirect_stderr(said):
        model = ir.fit(table(), bounds={"share": (0, 1), "age": (18, None)}, **QUICK | options)
    return model, said.getvalue()


@pytest.mark.slow
def test_no_sample_of_a_table_leaves_its_support(of_table):
    model, said = of_table
    assert np.isfinite(model.history.train["nll"]).all()
    x, _ = jax.jit(ir.Density.sample, static_argnums=2)(model, jax.random.key(0), 10_000)
    x = np.asarray(x, np.float64)
    for column, values in ((0, range(2)), (3, range(3))):
        assert set(np.unique(x[:, column])) == set(values)
    assert np.all(x[:, 1] == np.rint(x[:, 1]))
    assert x[:, 1].min() == 18
    assert x[:, 2].min() > 0
    assert x[:, 2].max() < 1
    for line in ("flag: 2 levels", "age: whole numbers, 18 to 90", "share: numbers, 0 to 1"):
        assert line in said


@pytest.mark.slow
def test_a_model_takes_and_gives_the_table_that_it_was_fitted_to(of_table, tmp_path):
    frame, (model, *_) = table()[:20], of_table
    model.save(tmp_path / "model.npz")
    model = ir.load(tmp_path / "model.npz")
    found = model.log_prob(frame)
    codes = frame.assign(colour=frame.colour.cat.codes).to_numpy(np.float32)
    np.testing.assert_array_equal(model.log_prob(codes), found)
    np.testing.assert_array_equal(model.log_prob(frame[frame.columns[::-1]]), found)
    samples = model.to_frame(model.sample(jax.random.key(0), 7)[0])
    assert samples.dtypes.equals(frame.dtypes)
    assert list(samples.columns) == list(frame.columns)
    assert len(samples) == 7


def test_log_prob_takes_integers_and_contexts_of_every_kind():
    x, context = RNG.integers(0, 5, (300, 2)), RNG.normal(size=300)
    flow = ir.FlowSpec((2,), QUICK["architecture"], context_dim=1)
    model = kept.model(
        ir.DensitySpec(
            flow, transform=ir.Bounded((-0.5, -0.5), 4.5), cells=ir.Marginals.lines([1, 1])
        ),
    )
    found = model.log_prob(x[:5], context=context[:5])
    np.testing.assert_array_equal(
        found, model.log_prob(x[:5].astype(np.float32), context=context[:5, None])
    )
    samples, _ = model.sample(jax.random.key(0), 200, context=context[:200])
    assert set(np.unique(samples)) <= set(range(5))
    np.testing.assert_array_equal(
        found, model.log_prob(x[:5].astype(np.longdouble), context=context[:5])
    )
    assert model.log_prob(x[:5] > 1, context=context[:5]).shape == (5,)
