"""What Python's prompt shows of models and results: a few lines with the worst number, of arrays
with numbers and of those that a program traces.
"""

from typing import Any

import jax
import jax.numpy as jnp
import kept
import pytest
from certified_flows import times

import iresnet_jax as ir
from iresnet_jax.maths.fixed_point import FixedPointInfo
from iresnet_jax.models.model import Attempt, History

LONGEST = 300  # characters, of at most three lines


def shown(value):
    said = repr(value)
    assert said.count("\n") < 3, said
    assert len(said) < LONGEST, said
    return said


@pytest.mark.parametrize("spec", ["POINTS", "IMAGES", "CLASSES_OF_POINTS"])
def test_a_model_says_what_it_is_how_large_and_whether_it_is_certified(spec):
    model = kept.model(getattr(kept, spec))
    num = sum(array.size for array in jax.tree.leaves(ir.Free.of(model).params))
    for value in (model, ir.Free.of(model)):
        assert f"{num:,}" in shown(value)
    assert "certified: every block is invertible" in shown(model.freeze())
    stretched = times(model, 9)
    assert "print(model.certificate())" in shown(stretched)  # nothing is computed to be shown
    assert not stretched.certificate().certified
    assert "NOT CERTIFIED" in shown(stretched)
    traced = []
    jax.eval_shape(lambda model: traced.append(shown(model)), model)
    assert traced[0].splitlines()[0] == shown(model).splitlines()[0]


def test_results_say_how_many_converged_and_the_worst_error():
    info = FixedPointInfo(*map(jnp.array, ([5, 9], [1e-7, 3e-6], [2e-7, 0.5], [True, False])))
    assert shown(info) == (
        "FixedPointInfo: 1 of 2 converged, error_bound at most 0.5, at most 9 evaluations"
    )
    model, z = kept.model(kept.POINTS), jnp.zeros((3, 2))
    (_, info), (_, certified) = model.decode(z), ir.certify.decode(model, z)
    assert "3 of 3 converged" in shown(info)
    assert f"{certified.error_bound.max():.2g}" in shown(certified)
    traced = []
    jax.eval_shape(lambda z: traced.append(shown(model.decode(z)[1])), z)
    assert "residual=float32[3]" in traced[0]
    assert "nan" not in shown(
        ir.SeriesLogdet(2)(jnp.tanh, z, jax.random.key(0), lipschitz_bound=1.0)
    )
    unknown: Any = None
    assert shown(FixedPointInfo(*[unknown] * 4)).startswith("FixedPointInfo(num_evals=None")


def test_a_history_and_a_certificate_are_one_line():
    history = History({"step": [float(i) for i in range(99)]}, {}, 40, loss=1.25, num_steps=99)
    assert "step 40 of 99, validation loss 1.2500" in shown(history)
    start = Attempt("normal distribution", 1.25, 0, 0, 0.0)
    of_start = str(History({}, {}, 0, 1.25, attempts=(start,)))
    assert of_start == "normal distribution: 1.2500 at step 0 of 0, 0.0 s"
    certificate = kept.model(kept.POINTS).certificate()
    assert shown(certificate) == f"Certificate: {certificate.verdict}"
