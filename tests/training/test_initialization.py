"""ActNorm fitted by all devices is the one that a single device fits."""

import chex
import jax
import pytest
import tiny_runs as runs

from iresnet_jax.data import load
from iresnet_jax.models import flow
from iresnet_jax.runs.model_from_config import model_spec
from iresnet_jax.runs.objective_from_config import initial_variables

CONVERGED = 2e-3  # twice the tolerance of the power iterations
RTOL, ATOL = 1e-4, 1e-5  # float32 means over the same numbers, summed in another order, and what blocks make of that
STAGE = {"num_blocks": 1, "hidden": (3,), "kernel_sizes": (3, 3), "squeeze": 2}
CASES = {
    "toy": (runs.TOY_CONFIG, {}),
    "simulator": (runs.TOY_CONFIG, {"data.name": "sbi_two_moons"}),
    "hybrid": (runs.HYBRID_CONFIG, {"hybrid.fitted_priors": True, "model.stages": ({**STAGE, "factor_out": True}, STAGE)}),
    "classifier": (runs.CLASSIFIER_CONFIG, {}),
    "vanilla": (runs.CLASSIFIER_CONFIG, {"constraint.norms": "none"}),
}


def variables_of(name, **changes):
    source, own = CASES[name]
    config = runs.config_of(source, **own, **changes)
    data = load(config.data.name)
    return jax.device_get(initial_variables(config, model_spec(config, data), data))


def norms_by(name, vectors):
    """Norms by one power iteration: iterates of a norm that is no simple singular value are not unique."""
    source, own = CASES[name]
    config = runs.config_of(source, **own)
    spec = model_spec(config, load(config.data.name)).flow
    params = {stage.name: variables_of(name)["params"][stage.name] for stage in spec.layout}
    return jax.jit(lambda params, vectors: flow.constrain(spec, params, vectors, num_steps=1).norms)(params, vectors)


@pytest.mark.parametrize("name", CASES)
def test_two_devices_fit_what_one_fits(name, monkeypatch):
    assert jax.local_device_count() == 2
    found = variables_of(name)
    one = jax.local_devices()[:1]
    monkeypatch.setattr(jax, "local_device_count", lambda: 1)
    monkeypatch.setattr(jax, "device_count", lambda: 1)
    monkeypatch.setattr(jax, "local_devices", lambda: one)
    expected = variables_of(name)
    norms, expected_norms = (norms_by(name, variables.pop("spectral")) for variables in (found, expected))
    chex.assert_trees_all_close(norms, expected_norms, rtol=CONVERGED)
    chex.assert_trees_all_close(found, expected, rtol=RTOL, atol=ATOL)


def test_examples_that_do_not_split_evenly_leave_some_out():
    found, expected = (variables_of("toy", **{"training.actnorm_examples": num}) for num in (33, 32))
    chex.assert_trees_all_equal(found, expected)
