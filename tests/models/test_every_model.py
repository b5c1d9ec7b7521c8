"""Every kind of model, a line in `SPECS`: files, axes, gradients, certificates, densities."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import kept
import numpy as np
import pytest
from oracles import dense_conv_matrix, operator_norm

import iresnet_jax as ir
from iresnet_jax.models.saved import read

EXACT = {"rtol": 1e-8, "atol": 1e-8}  # the same by another route, float64; inverses to 1e-12
SAME = {"rtol": 1e-5, "atol": 1e-5}  # float32, the same sums in programs of other batch sizes
NORM_RTOL = 1e-2  # ten times the tolerance of the norms
NUM, LEVELS, SHAPE = 6, 8, (4, 4, 1)

STAGE = ir.StageSpec(2, (4,), activation="tanh")
DENSE, CONV = (
    ir.StageSpec(1, (4,), activation="clipswish"),
    ir.StageSpec(1, (3,), (3, 3), activation="lipswish", squeeze=2),
)
PLANE = ir.FlowSpec((2,), (STAGE,))
SCALED = ir.Standardize((0.5, -1.0), (2.0, 0.3))
PADDED = ir.ClassifierSpec(ir.FlowSpec((4, 4, 2), (CONV,)), SHAPE, 3, LEVELS, pad_channels=1)
SPECS = {
    "vectors": ir.DensitySpec(PLANE, transform=SCALED),
    "bounds": ir.DensitySpec(
        PLANE, "logistic", ir.Bounded((-9.0, -np.inf), (9.0, np.inf), then=SCALED)
    ),
    "no blocks": ir.DensitySpec(ir.FlowSpec((2,), ()), transform=SCALED),
    "mixture": ir.DensitySpec(PLANE, "mixture", num_components=2),
    "contexts": ir.DensitySpec(
        dataclasses.replace(PLANE, context_dim=2),
        context=ir.Standardize((0.1,) * 3, (2.0,) * 3),
        context_hidden=(4, 2),
    ),
    "prescribed constants": ir.DensitySpec(ir.FlowSpec.bilipschitz((2,), [STAGE], mu=0.2, nu=5.0)),
    "grid": ir.DensitySpec(PLANE, cells=ir.Marginals.lines([1, 0])),
    "levels": ir.DensitySpec(
        ir.FlowSpec(SHAPE, (dataclasses.replace(CONV, factor_out=True), DENSE)),
        "logistic",
        ir.Equalize((0.3, *(0.1,) * 7), alpha=1e-3),
        LEVELS,
    ),
    "classes": ir.DensitySpec(
        ir.FlowSpec(SHAPE, (DENSE,)), transform=ir.Logit(0.05), num_levels=LEVELS, num_classes=3
    ),
    "noise": ir.DensitySpec(
        ir.FlowSpec(SHAPE, (DENSE,), noise=ir.NoiseSpec(1, (3,), (4, 2), window=3)),
        transform=ir.Logit(0.05),
        num_levels=LEVELS,
    ),
    "classifier": PADDED,
    "unconstrained": dataclasses.replace(PADDED, constrained=False),
}
DENSITIES = [name for name, spec in SPECS.items() if isinstance(spec, ir.DensitySpec)]
OF_LEVELS = ("levels", "classes", "noise")  # whose programs take long to compile
KEY = jax.random.key(0)


@functools.cache
def model(name):
    """In single precision, whatever that of the test."""
    with jax.enable_x64(False):
        return kept.model(SPECS[name])


def examples(name, num=NUM):
    """Examples and their contexts, if any."""
    rng = np.random.default_rng(0)
    if name in ("levels", "classes", "noise", "classifier", "unconstrained"):
        return rng.integers(0, LEVELS, (num, *SHAPE), np.uint8), {}
    x = rng.normal(size=(num, 2)).astype(np.float32)
    context = (
        {"context": rng.normal(size=(num, 3)).astype(np.float32)} if name == "contexts" else {}
    )
    return (np.round(x) if name == "grid" else x), context


# Compiled: one operation at a time, a classifier takes seconds.
logits, encode, decode = map(
    jax.jit, (ir.Classifier.logits, ir.Classifier.encode, ir.Classifier.decode)
)


def outputs(model, x, context):
    """All that a model says of examples, and what comes back."""
    if isinstance(model, ir.Classifier):
        found = encode(model, x)
        return logits(model, x), found, decode(model, found)[0] * (LEVELS - 1)
    z = model.encode(x, **context)
    said = [model.class_log_probs(x)] if model.spec.num_classes else []
    return model.log_prob(x, **context), z, *said, model.decode(z, **context)[0]


@functools.cache
def of_batch(name):
    with jax.enable_x64(False):
        return outputs(model(name), *examples(name))


@functools.cache
def found(name):
    """What the continuous density says, and its dense Jacobians, in float64."""

    @jax.jit
    def run(density, x, context, bounds):
        latent = jax.jacfwd(
            lambda x, context: density.encode(x[None], **jax.tree.map(lambda c: c[None], context))[
                0
            ]
        )
        drawn = density.sample_and_log_prob(KEY, NUM, bounds=bounds, **context)
        twice = jax.tree.map(lambda c: jnp.concatenate([c, c]), context)
        terms = density.terms(jnp.concatenate([x, drawn.x]), KEY, KEY, **twice)
        of_data, of_drawn = (
            jax.tree.map(lambda a, part=part: a[part], terms)
            for part in (slice(NUM), slice(NUM, None))
        )
        return (
            of_data,
            density.log_prior(density.encode(x, **context)),
            jax.vmap(latent)(x, context),
            drawn,
            of_drawn,
        )

    with jax.enable_x64(True):
        own = model(name).continuous.with_(solver=ir.Solver(atol=1e-12))
        exact = jax.tree.map(lambda a: jnp.asarray(a, jnp.float64), own)
        x, context = examples(name)
        x = (x + 0.5) / LEVELS if len(SHAPE) == x.ndim - 1 else x
        return jax.device_get(run(exact, np.asarray(x, np.float64), context, exact.bounds()))


@pytest.mark.parametrize("name", SPECS)
def test_it_comes_back_from_its_file_bit_for_bit(name, tmp_path):
    own = model(name)
    assert own.save(tmp_path / "model.npz", {"step": 7}) == tmp_path / "model.npz"
    assert [file.name for file in tmp_path.iterdir()] == ["model.npz"]
    loaded, about = read(tmp_path)  # the folder that holds it
    assert about == {"step": 7}
    assert loaded.spec == own.spec
    assert jax.tree.structure(loaded) == jax.tree.structure(own)
    assert all(map(np.array_equal, jax.tree.leaves(loaded), jax.tree.leaves(own)))
    with jax.enable_x64(True):
        loaded = jax.tree.leaves(ir.load(tmp_path).weights)
        assert all(leaf.dtype == np.float32 for leaf in loaded)


@pytest.mark.parametrize("name", SPECS)
def test_data_come_back(name):
    x, _ = examples(name)
    if name == "unconstrained":
        assert not model(name).decode(encode(model(name), x))[1].converged.all()
        return
    back = of_batch(name)[-1]
    if name in DENSITIES:
        assert back.dtype == x.dtype
        np.testing.assert_allclose(back, x, atol=1e-4)
        if SPECS[name].is_discrete:
            np.testing.assert_array_equal(back[..., 0], x[..., 0])
    else:
        np.testing.assert_allclose(back, x, atol=1e-2)


@pytest.mark.parametrize(
    "name",
    [
        *("bounds", "mixture", "contexts", "grid", "classifier"),
        *(pytest.param(name, marks=pytest.mark.slow) for name in OF_LEVELS),
    ],
)
def test_a_model_is_an_argument_of_programs_that_are_mapped_and_differentiated(name):
    (x, context), own = examples(name), model(name)

    def total(model):
        return jnp.sum(
            model.log_prob(x, **context) if name in DENSITIES else jnp.sin(logits(model, x))
        )

    half = jax.tree.map(lambda a: jnp.asarray(np.asarray(a) * np.asarray(0.5, a.dtype)), own)
    both = jax.tree.map(lambda *a: jnp.asarray(np.stack(a)), own, half)
    values, gradients = jax.jit(jax.vmap(jax.value_and_grad(total)))(both)
    np.testing.assert_allclose(values, [total(own), total(half)], rtol=1e-4)
    assert isinstance(gradients, type(own))
    for path, leaf in jax.tree.leaves_with_path(gradients):
        assert np.all(np.isfinite(leaf)), path
        assert np.any(np.asarray(leaf)) or path[0].name == "spec", path


@pytest.mark.parametrize(
    "name",
    [
        *(name for name in SPECS if name not in OF_LEVELS),
        *(pytest.param(name, marks=pytest.mark.slow) for name in OF_LEVELS),
    ],
)
def test_certificates_hold_for_the_singular_values_of_layers(name):
    certificate, layout = model(name).certificate(), SPECS[name].flow.layout
    if not layout:  # nothing has a norm
        assert certificate.certified
        return
    stage = layout[0]
    weights = model(name).weights[stage.name].branch.weights
    assert certificate.certified == (name != "unconstrained")
    for k, block in enumerate(certificate.blocks[: stage.spec.num_blocks]):
        assert block.name == f"{stage.name}/block0{k}"
        norms = []
        for layer, said in zip(stage.branch.layers, block.layers, strict=True):
            kernel = np.asarray(weights[layer.name]["kernel"][k], np.float64)
            norms.append(
                operator_norm(
                    kernel if kernel.ndim == 2 else dense_conv_matrix(kernel, *layer.in_shape[:2])
                )
            )
            assert said.estimate * (1 - 1e-6) <= norms[-1] <= said.bound
            np.testing.assert_allclose([said.estimate, said.bound], norms[-1], rtol=NORM_RTOL)
            assert said.target is None or said.bound <= said.target == SPECS[name].flow.coeff
        assert np.prod(norms) <= block.bound
        assert name == "unconstrained" or block.bound <= block.target * (1 + 1e-6)
        np.testing.assert_allclose(
            [block.estimate, block.bound], np.prod(norms), rtol=2 * NORM_RTOL
        )
    verdict = str(certificate).splitlines()[-1]
    assert ("NOT CERTIFIED" in verdict) == (name == "unconstrained")


@pytest.mark.parametrize("name", DENSITIES)
def test_the_density_is_the_change_of_variables(name):
    terms, log_prior, jacobians, *_ = found(name)
    dims = SPECS[name].flow.num_dims
    expected = log_prior + np.linalg.slogdet(jacobians.reshape(-1, dims, dims))[1]
    np.testing.assert_allclose(terms.log_prob, expected, **EXACT)
    np.testing.assert_allclose(
        terms.log_prior + terms.log_det + terms.log_det_transform, expected, **EXACT
    )


@pytest.mark.parametrize("name", DENSITIES)
def test_samples_have_the_log_density_of_log_prob(name):
    *_, drawn, at = found(name)
    assert drawn.info.converged.all()
    np.testing.assert_allclose(drawn.log_prob, at.log_prob, **EXACT)


@pytest.mark.parametrize("name", [name for name in DENSITIES if SPECS[name].is_discrete])
def test_noise_is_fixed_without_a_key(name):
    x, _ = examples(name)
    np.testing.assert_array_equal(model(name).log_prob(x), of_batch(name)[0])
    assert np.all(model(name).log_prob(x, jax.random.key(1)) != of_batch(name)[0])
