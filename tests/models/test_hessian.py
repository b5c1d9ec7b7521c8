"""The Hessian of an energy through the inverse of a flow against differences in 50 digits."""

import functools
import itertools

import jax
import kept
import numpy as np
import plain_flow

import iresnet_jax as ir

CLOSE = 1e-8  # float64, absolute; the Hessians' entries are of size 1
COUPLING = np.array([[2.0, 0.5], [0.5, 1.0]])
Z = np.array([0.3, -0.7])


def model():
    """Two dimensions and two blocks, which are scanned, in float64."""
    stage = ir.StageSpec(2, (3,), activation="clipswish")
    return kept.exact_model(ir.DensitySpec(ir.FlowSpec((2,), (stage,))), atol=1e-14)


def energy(x):
    """A quartic of the entries and a coupling of them."""
    return (x**4).sum() / 4 + (x @ (COUPLING @ x)) / 2


@jax.jit
def hessian(model, z):
    return jax.hessian(lambda z: energy(model.decode(z)[0]))(z)


def in_50_digits(model, z):
    """Central differences of step 1e-14, of the preimage to the last digit."""
    numbers = plain_flow.DECIMAL
    step = numbers.of(1e-14)
    spec, weights = model.spec.flow, jax.device_get(model.weights)
    near = np.asarray(model.decode(z)[0])
    to_x = np.linalg.inv(jax.jit(jax.jacfwd(model.encode))(near))

    @functools.cache
    def energy_at(shift):
        goal = numbers.of(z) + step * numbers.of(shift)
        x = plain_flow.invert(numbers, spec, weights, goal, near, to_x, num_steps=6)
        assert abs(goal - plain_flow.forward(numbers, spec, weights, x)).max() < 1e-46
        return (x**4).sum() / 4 + (x @ (numbers.of(COUPLING) @ x)) / 2

    found, unit = np.zeros((2, 2)), np.eye(2, dtype=int)
    for i, j in itertools.combinations_with_replacement(range(2), 2):
        signs = itertools.product((1, -1), repeat=2)
        total = sum(
            a * b * energy_at(tuple((a * unit[i] + b * unit[j]).tolist())) for a, b in signs
        )
        found[i, j] = found[j, i] = float(total / (4 * step * step))
    return found


def test_it_is_that_of_differences_in_50_digits(x64):
    flow = model()
    np.testing.assert_allclose(hessian(flow, Z), in_50_digits(flow, Z), rtol=0, atol=CLOSE)
