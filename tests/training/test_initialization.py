"""ActNorm fitted by all devices is the one that a single device fits; a mixture is the prior that latents have."""

import chex
import jax
import numpy as np
import pytest
import tiny_runs as runs

import iresnet_jax as ir
from iresnet_jax.data import load
from iresnet_jax.models import contractions
from iresnet_jax.models.priors import Gaussian
from iresnet_jax.runs import loop, objective_from_config, trained_run
from iresnet_jax.runs.model_from_config import model_spec
from iresnet_jax.runs.objective_from_config import initial_variables

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
    for values, first in zip(*map(jax.tree.leaves, (trained.prior, start["params"]["prior"])), strict=True):
        assert np.any(values != first)
        assert np.all(np.isfinite(values))
    points = load(config.data.name).held_out("test", 256)
    model, x = ir.load(trained.save(tmp_path / "model.npz")), points[:4]
    assert model.spec.num_components == 3
    np.testing.assert_allclose(model.log_prob(x), trained.log_prob(x), rtol=1e-5)
    samples, info = model.sample(jax.random.key(0), 4)
    assert info.converged.all()
    assert np.all(np.isfinite(samples))
    z = model.encode(points)  # of modes that no single normal distribution has
    assert np.mean(model.prior.log_prob(z)) > np.mean(Gaussian.fit(z).log_prob(z)) + 0.1
