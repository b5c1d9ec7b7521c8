"""Small flows of every kind with random weights, and dense Jacobians of their steps."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import kept
import numpy as np

from iresnet_jax.certification import steps
from iresnet_jax.certification.prepared import prepared
from iresnet_jax.certification.residuals import residuals
from iresnet_jax.maths.double_double import DoubleDouble
from iresnet_jax.models.architecture import FlowSpec, StageSpec
from iresnet_jax.models.contractions import freeze
from iresnet_jax.models.density import Density
from iresnet_jax.models.density_spec import DensitySpec

CONV = {"hidden": (3,), "kernel_sizes": (3, 3)}
FLOWS = {
    "lipswish": FlowSpec((2,), (StageSpec(2, hidden=(6, 5), activation="lipswish"),), coeff=0.9),
    "preactivated": FlowSpec(
        (3,), (StageSpec(2, hidden=(6,), activation="elu", preactivation=True),)
    ),
    "tanh": FlowSpec((2,), (StageSpec(3, hidden=(6,), activation="tanh"),), coeff=0.999),
    "images": FlowSpec(
        (4, 2, 1),
        (
            StageSpec(
                1, **CONV, activation="clipswish", squeeze=2, factor_out=True, positional_bias=True
            ),
            StageSpec(1, **CONV, activation="softplus4", padding="CIRCULAR"),
            StageSpec(1, hidden=(5,), activation="softplus", kind="sandwich"),
        ),
    ),
}
JUMPS = FlowSpec(
    (2,), tuple(StageSpec(1, hidden=(6,), activation=name) for name in ("tanh", "maxmin"))
)


@functools.cache
def weights(flow):
    """Frozen weights with their bounds."""
    return jax.device_get(freeze(flow, kept.random_params(flow, seed=1)))


@functools.cache
def density(spec):
    """A density with a random prior, of a `DensitySpec` or of the name of a flow."""
    spec = DensitySpec({**FLOWS, "jumps": JUMPS}[spec]) if isinstance(spec, str) else spec
    rng = np.random.default_rng(0)
    prior = jax.tree.map(
        lambda leaf: jnp.asarray(0.3 * rng.normal(size=leaf.shape), jnp.float32),
        spec.standard_prior(),
    )
    return Density(spec, weights(spec.flow), prior)


def times(model, factor):
    """The model with kernels times a factor in the branches of its first stage."""
    block = model.weights["stage0"]
    kernels = {
        name: {**own, "kernel": factor * own["kernel"]}
        for name, own in block.branch.weights.items()
    }
    branch = dataclasses.replace(block.branch, weights=kernels)
    return model.with_(weights={**model.weights, "stage0": block._replace(branch=branch)})


def followed(model, x):
    """The prepared flow of a model, trajectories of inputs in float64 and their residuals."""
    with prepared(model) as (flow, _):
        points = np.asarray(steps.follow(flow.spec, flow.weights, jnp.asarray(x), None))
        return flow, points, residuals(flow.stages, DoubleDouble.of(points))


def entries_of_steps(flow):
    """The entries that each step acts on."""
    places = steps.places_of(flow).stages
    return [
        place.active
        for place, stage in zip(places, flow.layout, strict=True)
        for _ in range(stage.spec.num_blocks)
    ]


@functools.partial(jax.jit, static_argnums=0)
def dense_steps(flow, weights, points):
    """Jacobians of all steps at points ``(t, d)`` by forward differentiation in float64."""
    found, start = [], 0
    for stage, place in zip(flow.layout, steps.places_of(flow).stages, strict=True):

        def step(block, u, stage=stage):
            scale, bias = jnp.exp(block.actnorm.log_scale), block.actnorm.bias
            u = ((u.reshape(-1, len(scale)) + bias[None]) * scale[None]).reshape(
                1, *stage.branch.in_shape
            )
            return (u + block.branch(u)).ravel()

        own = jax.tree.map(lambda a: jnp.asarray(a, jnp.float64), weights[stage.name])
        own_points = points[start : start + stage.spec.num_blocks][:, place.active]
        jacobians = jax.vmap(jax.jacfwd(step, argnums=1))(own, own_points)
        whole = jnp.tile(jnp.eye(flow.num_dims), (stage.spec.num_blocks, 1, 1))
        found.append(whole.at[:, place.active[:, None], place.active[None]].set(jacobians))
        start += stage.spec.num_blocks
    return jnp.concatenate(found)
