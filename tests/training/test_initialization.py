"""ActNorm fitted by all devices is the one that a single device fits; a mixture is the prior that latents have."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_runs as runs

import iresnet_jax as ir
from iresnet_jax.data import load
from iresnet_jax.models import contractions, priors
from iresnet_jax.runs import loop, objective_from_config, trained_run
from iresnet_jax.runs.model_from_config import model_spec
from iresnet_jax.runs.objective_from_config import initial_variables
from iresnet_jax.training.initialization import fitted_mixture

CONVERGED = 2e-3  # twice the tolerance of the power iterations
RTOL, ATOL = 1e-4, 1e-5  # float32 means over the same numbers, summed in another order, and what blocks make of that
STAGES = (
    {"num_blocks": 1, "hidden": (3,), "kernel_sizes": (3, 3), "squeeze": 2, "factor_out": True},
    {"num_blocks": 1, "hidden": (3,)},
)
CASES = {
    "toy": (runs.TOY_CONFIG, {}),
    "hybrid": (runs.HYBRID_CONFIG, {"hybrid.fitted_priors": True, "model.stages": STAGES}),
    "classifier": (runs.CLASSIFIER_CONFIG, {}),
}


def variables_of(name, **changes):
    source, own = CASES[name]
    config = runs.config_of(source, **own, **changes)
    data = load(config.data.name)
    return jax.device_get(initial_variables(config, model_spec(config, data), data))


def norms_by(name, params, both_vectors):
    """Norms by one power iteration: iterates of a norm that is no simple singular value are not unique."""
    source, own = CASES[name]
    config = runs.config_of(source, **own)
    spec = model_spec(config, load(config.data.name)).flow
    norms = jax.jit(lambda params, vectors: contractions.constrain(spec, params, vectors, num_steps=1).norms)
    return [norms({stage.name: params[stage.name] for stage in spec.all_stages}, vectors) for vectors in both_vectors]


@pytest.mark.parametrize("name", CASES)
def test_two_devices_fit_what_one_fits(name, monkeypatch):
    assert jax.local_device_count() == 2
    found = variables_of(name)
    one = jax.local_devices()[:1]
    monkeypatch.setattr(jax, "local_device_count", lambda: 1)
    monkeypatch.setattr(jax, "device_count", lambda: 1)
    monkeypatch.setattr(jax, "local_devices", lambda: one)
    expected = variables_of(name)
    norms, expected_norms = norms_by(name, found["params"], [variables.pop("spectral") for variables in (found, expected)])
    chex.assert_trees_all_close(norms, expected_norms, rtol=CONVERGED)
    chex.assert_trees_all_close(found, expected, rtol=RTOL, atol=ATOL)


def test_examples_that_do_not_split_evenly_leave_some_out():
    found, expected = (variables_of("toy", **{"training.actnorm_examples": num}) for num in (33, 32))
    chex.assert_trees_all_equal(found, expected)


def test_a_mixture_is_fitted_to_latents():
    """Of three points each is a component, and the fourth component is absent; of three modes the components are the modes."""
    modes = np.array([[-5.0, 0.0], [5.0, 0.0], [0.0, 300.0]])
    few = fitted_mixture(modes, 4)
    np.testing.assert_allclose(np.exp(few["logits"]), [1 / 3, 1 / 3, 1 / 3, 0], atol=1e-3)
    z = np.repeat(modes, 400, axis=0) + np.random.default_rng(0).normal(size=(1200, 2)) * [0.5, 2.0]
    found = fitted_mixture(z, 3)
    order = np.lexsort(np.asarray(found["mean"]).round().T)
    np.testing.assert_allclose(np.asarray(found["mean"])[order], modes, atol=0.5)
    np.testing.assert_allclose(np.exp(-found["log_diagonal"][:, 0]), 0.5, rtol=0.15)
    np.testing.assert_allclose(np.exp(found["logits"]), 1 / 3, atol=0.01)


def test_a_density_with_a_mixture_is_trained_saved_loaded_and_certified(tmp_path, monkeypatch):
    changes = {"model.prior": "mixture", "model.prior_components": 3, "training.total_steps": 3, "training.eval_every_steps": 3}
    changes |= {"logdet.kind": "exact", "evaluation.logdet.kind": "exact"}
    changes |= {"model.stages": ({"num_blocks": 1, "hidden": (8,)},), "training.blocks": "unroll"}
    config = runs.config_of(runs.TOY_CONFIG, **changes)
    started = []

    def noted(*arguments):
        started.append(jax.device_get(variables := initial_variables(*arguments)))
        return variables

    monkeypatch.setattr(objective_from_config, "initial_variables", noted)
    loop.train(config, tmp_path / "run")
    trained, [start] = trained_run.load(tmp_path / "run").model, started
    for name, values in trained.prior.items():
        assert np.any(values != start["params"]["prior"][name])
        assert np.all(np.isfinite(values))
    points = load(config.data.name).held_out("test", 256)
    model, x = ir.load(trained.save(tmp_path / "model.npz")), points[:4]
    assert model.spec.num_components == 3
    np.testing.assert_allclose(model.log_prob(x), trained.log_prob(x), rtol=1e-5)
    samples, info = model.sample(jax.random.key(0), 4)
    assert info.converged.all()
    assert np.all(np.isfinite(samples))
    z = model.encode(points)  # of modes that no single normal distribution has
    moments = {"mean": jnp.mean(z, axis=0), "log_std": jnp.log(jnp.std(z, axis=0))}
    assert np.mean(priors.log_prob("mixture", model.prior, z)) > np.mean(priors.log_prob("gaussian", moments, z)) + 0.1
