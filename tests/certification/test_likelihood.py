"""Guaranteed log-likelihoods against mpmath's numbers of 50 digits on small models, and long doubles on the kept digits."""

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import mpmath
import numpy as np
import plain_flow as plain
import pytest
from certified_flows import FLOWS, density

import iresnet_jax as ir
from iresnet_jax import certify
from iresnet_jax.bijections.transforms.dequantize import Grid
from iresnet_jax.bijections.transforms.equalize import Equalize
from iresnet_jax.bijections.transforms.logit import Logit
from iresnet_jax.bijections.transforms.standardize import Standardize, Whiten
from iresnet_jax.certification import likelihood as certified_likelihood
from iresnet_jax.models.density import Density
from iresnet_jax.models.density_spec import DensitySpec

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"

NUMBERS = plain.mpmath_numbers(50)
WHITEN = Whiten((0.1, 0.2, 0.3), ((1.0, 0.0, 0.0), (0.5, 2.0, 0.0), (0.3, -0.2, 0.1)))
SPECS = {
    "tanh": DensitySpec(FLOWS["tanh"]),
    "whitened": DensitySpec(FLOWS["preactivated"], transform=WHITEN),
    "logistic": DensitySpec(FLOWS["lipswish"], "logistic", Standardize((1.0, -1.0), (0.5, 3.0))),
    "classes": DensitySpec(FLOWS["tanh"], num_classes=3),
    "mixture": DensitySpec(FLOWS["tanh"], "mixture", num_components=3),
    "images": DensitySpec(FLOWS["images"], "logistic", Equalize((0.5, 0.125, 0.25, 0.125)), num_levels=4),
    "images by the logit": DensitySpec(FLOWS["images"], transform=Logit(0.05), num_levels=4),
}
log_prob = jax.jit(Density.log_prob)
KEY_NOISE = jax.random.split(jax.random.key(0))[0]  # of `log_prob` without a key


def data(spec, scale=1.0, num=3):
    rng = np.random.default_rng(2)
    if spec.num_levels is not None:
        return rng.integers(0, spec.num_levels, (num, *spec.flow.event_shape)).astype(np.uint8)
    return (scale * rng.normal(size=(num, *spec.flow.event_shape))).astype(np.float32)


def exact(own, x, numbers=NUMBERS):
    """Log-likelihoods in 50 digits, at the noise of `log_prob` without a key."""
    u = np.asarray(own.dequantize(x, KEY_NOISE)) if own.spec.num_levels else x
    return [plain.log_prob(numbers, own, np.asarray(one, np.float64), level) for one, level in zip(u, x, strict=True)]


def contained(interval, values):
    ends = zip(interval.lower, interval.upper, values, strict=True)
    return np.array([mpmath.mpf(float(low)) <= value <= mpmath.mpf(float(high)) for low, high, value in ends])


@pytest.mark.parametrize("name", [name for name in SPECS if name != "tanh"])
def test_intervals_hold_the_value_in_50_digits_and_are_narrow(name):
    spec = SPECS[name]
    own, x = density(spec), data(spec)
    found, values = certify.log_prob(own, x), exact(own, x)
    assert contained(found, values).all()
    assert np.all(found.width <= 1e-7 * spec.flow.num_dims * np.log(2))  # a tenth of the target in bits/dim
    middle = (found.lower + found.upper) / 2
    assert np.all(np.abs(middle - np.array(values, np.float64)) <= 1e-11 * np.abs(middle))
    np.testing.assert_allclose(middle, log_prob(own, x), rtol=1e-4, atol=1e-4)
    too_narrow = found._replace(upper=found.lower + 1e-5 * found.width)
    assert not contained(too_narrow, values).any()


@pytest.mark.parametrize("name", ["tanh", "logistic", "whitened"])
@pytest.mark.parametrize("scale", [0.0, 1e3])
def test_intervals_hold_far_from_the_data(name, scale):
    own, x = density(SPECS[name]), data(SPECS[name], scale)
    found = certify.log_prob(own, x)
    assert contained(found, exact(own, x)).all()
    assert np.all(found.width <= 1e-7 + 1e-13 * np.abs(found.lower))


def test_a_bad_trajectory_widens_intervals_and_without_its_residuals_they_lie(monkeypatch):
    spec = SPECS["tanh"]
    own, x = density(spec), data(spec)
    narrow, values = certify.log_prob(own, x), exact(own, x)
    follow, residuals = certified_likelihood.follow, certified_likelihood.residuals

    def drifting(*arguments):
        points = np.array(follow(*arguments))
        points[:, 2:] += 0.1
        return points

    monkeypatch.setattr(certified_likelihood, "follow", drifting)
    found = certify.log_prob(own, x)
    assert contained(found, values).all()
    assert np.all(found.width > 1e3 * narrow.width)

    def without_residuals(*arguments):
        found = residuals(*arguments)
        return found._replace(values=0 * found.values, errors=0 * found.errors)

    monkeypatch.setattr(certified_likelihood, "residuals", without_residuals)
    assert not contained(certify.log_prob(own, x), values).any()


def test_perturbed_jacobians_are_rejected(monkeypatch):
    own, x = density(SPECS["whitened"]), data(SPECS["whitened"])
    values, factors_of = exact(own, x), certified_likelihood._factors

    def perturbed(*arguments):  # a factor on the matrices is one on the pivots
        return tuple(own._replace(pivots=np.asarray(own.pivots) * (1 + 1e-7)) for own in factors_of(*arguments))

    monkeypatch.setattr(certified_likelihood, "_factors", perturbed)
    assert not contained(certify.log_prob(own, x), values).any()


def test_log_determinants_of_flows_hold_the_dense_one():
    spec = SPECS["images"]
    own = density(spec)
    x = np.random.default_rng(3).normal(size=(3, 4, 4, 1)).astype(np.float32)
    found = certify.log_det(own, x)
    for i, one in enumerate(x):
        _, jacobian = plain.forward_and_jacobian(NUMBERS, spec.flow, own.weights, NUMBERS.of(one))
        assert contained(certify.Interval(*(end[i : i + 1] for end in found)), [plain.log_abs_det(NUMBERS, jacobian)])
    assert np.all(found.width < 1e-9)


def test_noise_is_that_of_the_key_and_of_each_example():
    own, x = density(SPECS["images"]), data(SPECS["images"])
    keys = jax.random.split(jax.random.key(5), len(x))
    by_example = certify.log_prob(own, x, keys)
    np.testing.assert_allclose(by_example.lower, log_prob(own, x, keys), rtol=1e-4)
    np.testing.assert_allclose(certify.log_prob(own, x[::-1], keys[::-1]).lower, by_example.lower[::-1], rtol=1e-12)
    assert np.all(np.abs(by_example.lower - certify.log_prob(own, x).lower) > 1e-3)


def test_densities_on_a_grid_and_of_contexts():
    flow = FLOWS["tanh"]
    own = density(DensitySpec(flow, grid=Grid((0.0, 0.0), (0.5, 0.0))))
    x = np.array([[0.5, 0.3], [1.0, -0.2]], np.float32)
    found = certify.log_prob(own, x)
    noisy = np.asarray(own.dequantize(x, KEY_NOISE), np.float64)
    continuous = [plain.log_prob(NUMBERS, own, one) + NUMBERS.log(NUMBERS.of(0.5)) for one in noisy]
    assert contained(found, continuous).all()
    assert np.all(found.width < 1e-9)

    given = density(DensitySpec(dataclasses.replace(flow, context_dim=2), context=Standardize((0.0, 1.0), (2.0, 3.0))))
    context = np.array([[0.1, 0.2], [2.0, 0.3]], np.float32)
    found = certify.log_prob(given, x, context=context)
    with jax.enable_x64(True):
        precise = jax.tree.map(lambda a: jnp.asarray(a, jnp.float64), given)
        values = np.asarray(log_prob(precise, np.float64(x), context=np.float64(context)))
    np.testing.assert_allclose(found.lower, values, rtol=1e-6)
    assert np.all(found.width < 1e-9)


def test_bits_per_dim_are_rounded_outwards():
    spec = SPECS["images"]
    found = certify.log_prob(density(spec), data(spec))
    bits = found.in_units(spec)
    with mpmath.workdps(30):
        nat = 16 * mpmath.log(2)
        for low, high, least, most in zip(*bits, *found, strict=True):
            assert mpmath.mpf(float(low)) <= -mpmath.mpf(float(most)) / nat
            assert -mpmath.mpf(float(least)) / nat <= mpmath.mpf(float(high))
    assert np.all(bits.width <= 1.001 * found.width / float(nat) + 1e-14)
    points = SPECS["tanh"]
    nats = certify.log_prob(density(points), data(points))
    np.testing.assert_array_equal(nats.in_units(points).lower, -nats.upper)


def test_what_is_no_number_has_the_whole_line():
    own, x = density(SPECS["tanh"]), data(SPECS["tanh"])
    x[1] = np.nan
    found = certify.log_prob(own, x)
    assert np.isneginf(found.lower[1])
    assert np.isposinf(found.upper[1])
    assert np.all(np.isfinite(found.width[[0, 2]]))
    images = SPECS["images"]
    assert np.all(np.isinf(found.in_units(images).width) == [False, True, False])
    assert certify.log_prob(own, x[:0]).lower.shape == (0,)


def test_what_cannot_be_enclosed_is_refused():
    own, x = density(SPECS["tanh"]), data(SPECS["tanh"])
    with pytest.raises(ValueError, match="that of relu jumps"):
        certify.log_prob(density("relu"), x)
    with pytest.raises(ValueError, match=r"the model takes floats of shape \(batch, 2\)"):
        certify.log_prob(own, x[:, :1])
    gridded = own.with_(spec=dataclasses.replace(own.spec, grid=Grid((0.0, 0.0), (0.5, 0.0))))
    with pytest.raises(ValueError, match="is between values of its grid"):
        certify.log_prob(gridded, x)
    for wrong in (x[:, :1], x[0]):
        with pytest.raises(ValueError, match=r"the model takes floats of shape \(batch, 2\)"):
            certify.log_prob(gridded, wrong)
    with pytest.raises(ValueError, match=r"x must have the shape \(b, 2\) of the flow's input"):
        certify.log_det(own, x[:, :1])


def test_kept_digits_against_long_doubles():
    own = ir.load(BENCHMARKS / "results" / "digits_density")
    x = np.random.default_rng(0).integers(0, 17, (2, 8, 8, 1)).astype(np.uint8)
    x[1] = 16  # a constant image
    found = certify.log_prob(own, x)
    for low, high, value in zip(*found, exact(own, x, plain.LONG), strict=True):
        assert low <= value <= high
    assert np.all(found.in_units(own.spec).width <= 1e-8)


def test_continuous_columns_beside_a_grid_keep_their_digits():
    transform = Standardize((0.0, 0.0), (1.0, 0.01))
    own = density(dataclasses.replace(SPECS["tanh"], transform=transform, grid=Grid((0.0, 0.0), (1.0, 0.0))))
    one, two = (certify.log_prob(own, np.array([[0.0, value]])) for value in (0.1, 0.1 + 1e-9))
    assert one.upper < two.lower or two.upper < one.lower
