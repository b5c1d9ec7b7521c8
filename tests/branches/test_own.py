"""Branches that a function of the user makes: weights, constants, files, what is no branch."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import kept
import numpy as np
from jax.tree_util import register_dataclass

import iresnet_jax as ir
from iresnet_jax.branches import kinds
from iresnet_jax.models.contractions import freeze, of_stored
from iresnet_jax.models.flow import bounds_of
from iresnet_jax.models.linen import ResidualFlow
from iresnet_jax.models.priors import Gaussian

DIMS, BLOCKS, COEFF = 3, 3, 0.8
GRAPH = np.array([[0.5, 1, 0], [0, 1, 1], [0, 0, 1]])  # a constant, which is not trained


@functools.partial(
    register_dataclass, data_fields=["there", "back", "bias", "graph"], meta_fields=[]
)
@dataclasses.dataclass(frozen=True)
class Masked:
    """``g(x) = tanh(x (graph there) + bias) back``."""

    there: jax.Array
    back: jax.Array
    bias: jax.Array
    graph: np.ndarray

    def __call__(self, x):
        return jnp.tanh(x @ (self.graph * self.there) + self.bias[None]) @ self.back

    def lipschitz_bound(self):
        return jnp.linalg.norm(self.graph * self.there) * jnp.linalg.norm(self.back)


def masked(key):
    there, back = jax.random.normal(key, (2, DIMS, DIMS))
    return Masked(there, back, jnp.zeros(DIMS), GRAPH)


FLOW = ir.FlowSpec((DIMS,), (ir.StageSpec(BLOCKS, branch=masked),), coeff=COEFF)
PRIOR = Gaussian.standard(DIMS)
X = np.random.default_rng(0).normal(size=(8, DIMS)).astype(np.float32)


def model_of(flow):
    return kept.model(ir.DensitySpec(flow))


def test_constants_are_refined_in_double_precision():
    """After a program in single precision has seen them."""
    model = model_of(FLOW)
    z = model.encode(X)
    with jax.enable_x64():
        back, info = model.with_(solver=ir.Solver(atol=1e-12, refine=True)).decode(z)
    assert info.converged.all()
    np.testing.assert_allclose(back, X, atol=1e-5)


def test_a_file_knows_it_by_name(tmp_path):
    model = model_of(FLOW)
    path = model.save(tmp_path / "model.npz")
    loaded = ir.load(path, branches={"masked": masked, "another": None})
    assert loaded.spec == model.spec
    np.testing.assert_array_equal(loaded.log_prob(X), model.log_prob(X))


@dataclasses.dataclass(frozen=True)
class ScaledSpec(ir.BranchSpec):
    """``g(x) = scale * sin(x)``."""

    def initial_weights(self, key, *, last_scale=1.0, sharpness=0.0):
        return {"scale": jnp.full((), 0.5 * last_scale)}

    def apply(self, weights, x, context):
        return weights["scale"] * jnp.sin(x)

    def lipschitz_bound(self, weights):
        return jnp.abs(weights["scale"])


def test_a_stage_takes_a_class_of_specs_an_instance_or_a_registered_name():
    kinds.register("scaled", ScaledSpec)
    kinds.register("scaled", ScaledSpec)
    kinds.register("masked", masked)
    image = (4, 4, 1)
    stages = [
        {"branch": ScaledSpec},
        {"branch": ScaledSpec((16,))},
        {"branch": ScaledSpec(image)},
        {"kind": "scaled"},
    ]
    branches = [
        ir.FlowSpec(image, (ir.StageSpec(1, **stage),)).layout[0].branch for stage in stages
    ]
    assert [branch.in_shape for branch in branches] == [(16,), (16,), image, (16,)]
    assert (
        ir.FlowSpec((DIMS,), (ir.StageSpec(BLOCKS, kind="masked"),)).layout[0].branch
        == FLOW.layout[0].branch
    )


def test_without_actnorm_the_density_of_odd_branches_is_even():
    odd = odd_one(__call__=lambda self, x: jnp.sin(x @ self.there))
    flow = ir.FlowSpec((DIMS,), (ir.StageSpec(2, branch=odd, actnorm=False),))
    params = jax.jit(ResidualFlow(flow).init)(jax.random.key(0), X + 1)["params"]
    assert not any(np.any(leaf) for leaf in params["stage0"]["blocks"]["actnorm"].values())
    moved = jax.tree.map(lambda leaf: leaf + 0.5, params)  # as no optimizer would
    for weights in (freeze(flow, moved), ir.constrain(flow, moved, {}).weights):
        model = ir.Density(ir.DensitySpec(flow), weights, PRIOR)
        np.testing.assert_array_equal(model.log_prob(X), model.log_prob(-X))
        shifted = jax.tree.map(lambda leaf: leaf + 0.5, PRIOR)
        assert np.all(
            model.with_(prior=shifted).log_prob(X) != model.with_(prior=shifted).log_prob(-X)
        )


def odd_one(**methods):
    """A function that makes modules with other methods than `Masked`."""
    changed = register_dataclass(type("Changed", (Masked,), methods))
    return lambda key: changed(
        **{field.name: getattr(masked(key), field.name) for field in dataclasses.fields(Masked)}
    )


def test_a_bound_that_is_said_as_a_number_is_rounded_up():
    stage = ir.StageSpec(1, branch=odd_one(lipschitz_bound=lambda self: 0.7))
    spec = ir.FlowSpec((DIMS,), (stage,)).layout[0].branch
    assert 0.7 <= float(spec.lipschitz_bound(spec.initial_weights(jax.random.key(0)))) <= 0.700001


def test_without_a_constraint_branches_run_as_they_are_after_training_too():
    params = kept.random_params(FLOW)
    free = of_stored(FLOW, params, constrained=False)
    found, free = bounds_of(FLOW, free)["stage0"].lipschitz, free["stage0"].branch
    bounds = jax.vmap(free.spec.lipschitz_bound)(free.weights)
    assert free.gain is None
    np.testing.assert_allclose(found, bounds, rtol=1e-6)
    assert bounds.max() > COEFF
    assert bounds_of(FLOW, of_stored(FLOW, params))["stage0"].lipschitz.max() <= COEFF


def test_a_bound_that_training_made_negative_promises_nothing():
    flow = ir.FlowSpec(
        (DIMS,),
        (ir.StageSpec(1, branch=odd_one(lipschitz_bound=lambda self: jnp.sum(self.there))),),
    )
    params = kept.random_params(flow)
    negative = jax.tree.map(lambda leaf: -jnp.abs(leaf), params)
    for weights in (freeze(flow, negative), of_stored(flow, negative)):
        certificate = ir.Density(ir.DensitySpec(flow), weights, PRIOR).certificate()
        assert not certificate.certified, certificate.verdict
