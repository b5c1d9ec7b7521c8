"""Models by any loss: `train`, and loops of your own on `Free`."""

import functools
import signal

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import iresnet_jax as ir
from iresnet_jax.training.signals import Stopped

STAGES = [ir.StageSpec(1, (8,), activation="clipswish")]
X = np.random.default_rng(0).normal(size=(64, 2)).astype(np.float32) * np.float32([1.0, 3.0]) + 2
QUICK = {"key": jax.random.key(1), "steps": 6, "batch_size": 16, "progress": False}
# where the optimizer does not matter: it compiles sooner than Muon
PLAIN = QUICK | {"optimizer": optax.sgd(1e-3)}


@functools.cache
def start():
    """The model that all begin with."""
    # compiles sooner
    return ir.Density.init(jax.random.key(0), X, stages=STAGES).with_(unroll=True)


def nll(model, batch, key):
    return -model.log_prob(batch, key).mean()


def test_train_lowers_the_loss_of_a_certified_model_and_a_callback_ends_it():
    steps = []
    options = QUICK | {"steps": 100, "optimizer": optax.adam(3e-2)}
    trained = ir.train(
        start(), nll, X, **options, callback=lambda step, *_: steps.append(step) or step == 70
    )
    assert steps == list(range(5, 71, 5))  # twenty validations, however long a run is
    assert nll(trained, X, None) < nll(start(), X, None) - 0.02
    assert trained.certificate().certified
    assert trained.history.step == 70
    losses = trained.history.train["loss"]
    assert np.mean(losses[-3:]) < np.mean(losses[:3])


def test_a_loop_of_ones_own_gives_the_same_model():
    free, optimizer = ir.Free.of(start()), optax.adam(1e-2)
    options = QUICK | {"batch_size": len(X), "optimizer": optimizer, "ema_decay": 0}
    trained = ir.train(free, nll, X, **options | {"key": 3})  # also a seed

    @jax.jit
    def step(free, state):
        def loss(params):
            model, iterates = free.constrain(params)
            return nll(model, X, None), iterates

        gradient, iterates = jax.grad(loss, has_aux=True)(free.params)
        updates, state = optimizer.update(gradient, state, free.params)
        return free.with_(
            params=optax.apply_updates(free.params, updates), iterates=iterates
        ), state

    state = optimizer.init(free.params)
    for _ in range(6):
        free, state = step(free, state)
    own = free.certified()
    assert own.certificate().certified
    np.testing.assert_allclose(own.log_prob(X), trained.log_prob(X), atol=2e-4)
    assert np.abs(own.log_prob(X) - start().log_prob(X)).max() > 0.01


def test_the_best_model_on_validation_is_returned_and_training_ends_without_improvement():
    def loss(model, batch, key):
        return nll(model, batch, key), {"rows": jnp.float32(len(batch))}

    seen = []
    trained = ir.train(
        *(start(), loss, X),
        **QUICK | {"steps": 50, "optimizer": optax.adam(-1e-2)},
        validation=X[:3],
        patience=2,
        every=5,
        callback=lambda step, model, metrics: seen.append((step, metrics, nll(model, X[:3], None))),
    )
    assert [step for step, _, _ in seen] == [5, 10, 15]  # uphill: the first one was the best
    for _, metrics, recomputed in seen:
        np.testing.assert_allclose(metrics["validation_loss"], recomputed, rtol=1e-4)
        assert (metrics["rows"], metrics["validation_rows"]) == (16 // jax.local_device_count(), 3)
    assert (trained.history.step, trained.history.ended) == (5, "validation no longer improved")
    np.testing.assert_allclose(
        nll(trained, X[:3], None), trained.history.validation["loss"][0], rtol=1e-3
    )


def test_a_training_that_is_stopped_between_validations_goes_on_to_the_same_bits(tmp_path):
    """With the optimizer that `train` has by itself, and a loss with a key."""

    class Stops(ir.Callback):
        order = 35

        def after_step(self, run):
            if run.step == 5:
                signal.raise_signal(signal.SIGTERM)

    def loss(model, batch, key):
        return nll(model, batch + 0.1 * jax.random.normal(key, batch.shape), key)

    options = QUICK | {"validation": X[:3], "every": 3, "log_every": 1}
    expected = ir.train(start(), loss, X, **options)
    with pytest.raises(Stopped):
        ir.train(start(), loss, X, **options, callbacks=[Stops(), ir.Checkpoints(tmp_path)])
    found = ir.train(start(), loss, X, **options, callbacks=[ir.Checkpoints(tmp_path)])
    chex.assert_trees_all_equal(found.weights, expected.weights)
    chex.assert_trees_all_equal(found.prior, expected.prior)
    assert found.history.validation["loss"] == expected.history.validation["loss"]
    assert found.history.train["loss"] == expected.history.train["loss"]


def test_parts_of_a_batch_have_keys_of_their_own_and_the_gradient_of_the_whole():
    def with_a_number(model, batch, key):
        return nll(model, batch, key), {"size": jnp.float32(len(batch)), "drawn": draw(key)}

    def draw(key):
        return jax.random.uniform(key)

    options = PLAIN | {"steps": 2, "log_every": 1, "ema_decay": 0}
    whole, parts = (ir.train(start(), with_a_number, X, **options, num_parts=num) for num in (1, 4))
    assert set(whole.history.train["size"]) == {16 / jax.local_device_count()}
    assert set(parts.history.train["size"]) == {16 / jax.local_device_count() / 4}
    assert set(whole.history.train["drawn"]).isdisjoint(parts.history.train["drawn"])
    np.testing.assert_allclose(parts.log_prob(X), whole.log_prob(X), atol=1e-5)


def test_validation_without_data_to_train_on_has_its_rows():
    def loss(model, batch, key):
        rows = 0 if batch is None else len(batch)
        x = jax.random.normal(key, (16, 2)) if batch is None else batch
        return nll(model, x, key), {"rows": jnp.float32(rows)}

    trained = ir.train(start(), loss, **PLAIN, validation=X[:5])
    assert set(trained.history.train["rows"]) == {0}
    assert set(trained.history.validation["rows"]) == {5}
