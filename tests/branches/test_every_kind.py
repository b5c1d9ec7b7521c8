"""Every kind of branch, a line in `CASES`, against dense Jacobians in float64."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import kept
import numpy as np
import pytest
from jax.tree_util import register_dataclass

import iresnet_jax as ir
from iresnet_jax.branches import kinds
from iresnet_jax.models.flow import as_params

EXACT = 1e-9  # the same by another route, float64
NUM, NUM_PROBES, CONTEXT_DIM = 3, 200, 2


@register_dataclass
@dataclasses.dataclass
class Shifted:
    """``g(x; c)`` of images, which any function ``key -> module`` may make."""

    scale: jax.Array

    def __call__(self, x, context):
        return self.scale * jnp.sin(jnp.roll(x, 1, axis=1) + context[:, None, None, :1])

    def lipschitz_bound(self):
        return jnp.abs(self.scale)


def shifted(key):
    return Shifted(jax.random.normal(key))


@dataclasses.dataclass(frozen=True)
class WaveSpec(ir.BranchSpec):
    """``g(x) = B sin(A x + b)``, with ``Lip(g) <= |A|_F |B|_F``: a kind of one's own."""

    width: int = 4
    knows = frozenset({"jacobian"})

    @classmethod
    def of_stage(cls, stage, in_shape, context_dim):
        return cls(in_shape, width=stage.hidden[0])

    def initial_weights(self, key, *, last_scale=1.0, sharpness=0.0):
        there, back = jax.random.normal(key, (2, self.in_shape[0], self.width))
        return {"there": there, "back": last_scale * back.T, "bias": jnp.zeros(self.width)}

    def apply(self, weights, x, context):
        return jnp.sin(x @ weights["there"] + weights["bias"][None]) @ weights["back"]

    def lipschitz_bound(self, weights):
        return jnp.linalg.norm(weights["there"]) * jnp.linalg.norm(weights["back"])

    def jacobian(self, weights, x, context):
        slopes = jnp.cos(x @ weights["there"] + weights["bias"][None])
        return jnp.einsum("ki,bk,jk->bij", weights["back"], slopes, weights["there"])


kinds.register("wave", WaveSpec)

CONV = {"hidden": (3,), "kernel_sizes": (3, 3), "squeeze": 2}
DENSE = ir.StageSpec(1, (4,), activation="clipswish")
CASES = {
    "dense": ir.FlowSpec((3,), (ir.StageSpec(2, (4,), activation="clipswish"),)),
    "pre-activated": ir.FlowSpec(
        (3,), (ir.StageSpec(2, (4, 5), preactivation=True),), budget="block"
    ),
    "convolutional": ir.FlowSpec(
        (4, 4, 1), (ir.StageSpec(1, **CONV, activation="lipswish", factor_out=True), DENSE)
    ),
    "periodic": ir.FlowSpec(
        (2, 3, 1), (ir.StageSpec(2, (3,), (3, 1), padding="CIRCULAR", activation="tanh"),)
    ),
    "sandwich": ir.FlowSpec(
        (4, 4, 1),
        (
            ir.StageSpec(1, **CONV, activation="softplus4", preactivation=True, kind="sandwich"),
            ir.StageSpec(1, (4, 3), activation="tanh", kind="sandwich"),
        ),
        budget="block",
    ),
    "contexts": ir.FlowSpec(
        (4, 4, 1),
        (
            ir.StageSpec(
                1, **CONV, activation="tanh", positional_bias=True, kind="sandwich", factor_out=True
            ),
            DENSE,
        ),
        context_dim=CONTEXT_DIM,
    ),
    "potential": ir.FlowSpec(
        (4, 4, 1),
        (
            ir.StageSpec(
                1,
                **CONV,
                activation="softplus4",
                positional_bias=True,
                kind="potential",
                factor_out=True,
            ),
            ir.StageSpec(1, (9,), activation="tanh", kind="potential"),
        ),
        coeff=0.7,  # roulette has an infinite variance for eigenvalues beyond the root of 1/2
        context_dim=CONTEXT_DIM,
    ),
    "function": ir.FlowSpec((2, 2, 1), (ir.StageSpec(2, branch=shifted),), context_dim=CONTEXT_DIM),
    "registered": ir.FlowSpec((3,), (ir.StageSpec(2, (4,), kind="wave", actnorm=False),)),
}


# what is in test_closed_forms.py, test_feedforward.py and test_sandwich.py, too
SLOW = ("pre-activated", "periodic", "sandwich")
NAMES = [pytest.param(name, marks=[pytest.mark.slow] if name in SLOW else []) for name in CASES]


def on_its_word(name):
    return name in ("function", "registered")


@functools.cache
def model(name):
    """A frozen density, whatever the precision of the test."""
    with jax.enable_x64(False):
        return kept.model(ir.DensitySpec(CASES[name]))


@functools.cache
def certificate(name):
    with jax.enable_x64(False):
        return model(name).certificate()


def examples(name):
    rng = np.random.default_rng(0)
    context = rng.normal(size=(NUM, CONTEXT_DIM)) if CASES[name].context_dim else None
    return rng.normal(size=(NUM, *CASES[name].event_shape)), context


def each(context):
    return None if context is None else context[None]


@functools.cache
def found(name):
    """What a model says, and Jacobians of the flow and of each block's branch, in float64."""

    def branch_jacobians(block, x, context):
        return jax.vmap(jax.jacfwd(lambda x, c: block.branch.given(each(c))(x[None])[0]))(
            x, context
        )

    @jax.jit
    def run(model, x, context, points, bounds):
        z, log_det, _ = model.flow(context).forward_and_logdet(x, key)
        one = jax.jacfwd(lambda x, c: model.encode(x[None], context=each(c))[0])
        own = [
            jax.vmap(branch_jacobians, in_axes=(0, None, None))(
                model.weights[stage.name], points[stage.name], context
            )
            for stage in model.spec.flow.layout
        ]
        back = model.decode(z, context=context, bounds=bounds)
        return log_det, back, jax.vmap(one)(x, context), own

    with jax.enable_x64(True):
        key = jax.random.key(0)
        exact = kept.exact_model(ir.DensitySpec(CASES[name]))
        rng = np.random.default_rng(1)
        points = {
            stage.name: rng.normal(size=(NUM, *stage.branch.in_shape))
            for stage in CASES[name].layout
        }
        return jax.device_get(run(exact, *examples(name), points, exact.bounds()))


def matrices(jacobians, num_dims):
    return jacobians.reshape(-1, num_dims, num_dims)


@pytest.mark.parametrize("name", NAMES)
def test_bounds_hold_for_dense_jacobians(name):
    flow, (*_, whole, own) = CASES[name], found(name)
    assert certificate(name).certified != on_its_word(name)
    blocks = iter(certificate(name).blocks)
    for stage, of_stage in zip(flow.layout, own, strict=True):
        for jacobians in of_stage:
            block = next(blocks)
            largest = np.linalg.norm(
                matrices(jacobians, np.prod(stage.branch.in_shape)), 2, axis=(1, 2)
            ).max()
            assert 0.02 < largest <= block.bound <= flow.coeff * (1 + 1e-6)
            assert bool(block.claim) == on_its_word(name)
            assert [part.name for part in block.layers] == [
                part.name for part in stage.branch.parts
            ]
    sizes = np.linalg.svd(matrices(whole, flow.num_dims), compute_uv=False)
    assert sizes.max() <= certificate(name).forward < 1e5
    assert 1 / sizes.min() <= certificate(name).inverse
    assert ("  not proven" in str(certificate(name))) == on_its_word(name)
    x, context = examples(name)
    model(name).check_branches(x.astype(np.float32), context=context)


@pytest.mark.parametrize("name", NAMES)
def test_it_inverts_and_has_its_log_determinant(name):
    log_det, (back, info), whole, _ = found(name)
    assert info.converged.all()
    np.testing.assert_allclose(back, examples(name)[0], atol=1e-10)
    exact = np.linalg.slogdet(matrices(whole, CASES[name].num_dims))[1]
    np.testing.assert_allclose(log_det, exact, rtol=EXACT, atol=EXACT)
    assert np.abs(exact).max() > 1e-2


@pytest.mark.parametrize("name", ["dense", "convolutional", "function"])
def test_every_estimator_finds_the_log_determinant(name):
    (x, context), exact, key = examples(name), found(name)[0], jax.random.key(4)
    estimators = (
        ir.SeriesLogdet(40, num_probes=NUM_PROBES),
        ir.RouletteLogdet(num_probes=NUM_PROBES),
        ir.KrylovLogdet(3, num_probes=NUM_PROBES),
    )

    @jax.jit
    def run(model, x):
        return [
            model.with_(estimator=estimator).terms(x, key, key, context=context)
            for estimator in estimators
        ]

    for terms in run(model(name), x):
        stderr = np.nan_to_num(terms.info.stderr, posinf=0)
        assert np.all(np.abs(terms.log_det - exact) < 5 * stderr + 1e-4)


@pytest.mark.parametrize("name", NAMES)
def test_every_weight_has_a_gradient_and_is_in_the_file(name, tmp_path):
    """The gradient of the latents of a training step, with kernels that are beyond the budget."""
    flow, (x, context) = CASES[name], examples(name)
    params = jax.tree.map(
        lambda a: np.float32(1.5) * a, jax.device_get(as_params(model(name).weights))
    )
    iterates = flow.initial_iterates(jax.random.key(0))

    @jax.jit
    def gradient(params, x):
        def loss(params):
            weights = ir.constrain(flow, params, iterates, num_steps=1).weights
            return jnp.sum(jnp.sin(model(name).with_(weights=weights).encode(x, context=context)))

        return jax.grad(loss)(params)

    for path, leaf in jax.tree.leaves_with_path(
        jax.device_get(gradient(params, x.astype(np.float32)))
    ):
        assert np.all(np.isfinite(leaf)), path
        assert np.any(leaf != 0) or (name == "registered" and "actnorm" in str(path)), path
    loaded = ir.load(model(name).save(tmp_path / "model.npz"), branches={"shifted": shifted})
    assert loaded.spec == model(name).spec
    jax.tree.map(
        np.testing.assert_array_equal, as_params(loaded.weights), as_params(model(name).weights)
    )


@pytest.mark.parametrize("kind", ["feedforward", "sandwich", "potential"])
def test_a_branch_of_layers_subtracts_the_first_entries_of_its_context(kind):
    spec = kinds.get(kind)((3,), context_dim=5, hidden=(4,), activation="tanh")
    weights, name = spec.initial_weights(jax.random.key(0)), spec.layers[-1].name
    without = {**weights, name: {**weights[name], "context": jnp.zeros((5, 3))}}
    x, context = (jax.random.normal(jax.random.key(i), (7, size)) for i, size in ((1, 3), (2, 5)))
    shift = spec.apply(spec.less_context(weights), x, context) - spec.apply(without, x, context)
    np.testing.assert_allclose(shift, -context[:, :3], rtol=1e-5, atol=1e-5)
