"""Trains a model by a loss, in an environment with optax and without the extras."""

import importlib.util

import jax
import optax

import iresnet_jax as ir

assert importlib.util.find_spec("ml_collections") is None, (
    "the environment has more than optax and the core"
)
x = jax.random.normal(jax.random.key(0), (256, 2))
model = ir.Density.init(
    jax.random.key(1), x, stages=[ir.StageSpec(2, (8,), activation="clipswish")]
)


def loss(model, batch, key):
    """The negative log-likelihood."""
    return -model.log_prob(batch, key).mean()


trained = ir.train(
    model, loss, x, optimizer=optax.adam(1e-2), steps=20, key=jax.random.key(2), progress=False
)
assert trained.certificate().certified
print(
    f"trained without the extras: loss {loss(model, x, None):.3f} -> {loss(trained, x, None):.3f}"
)
