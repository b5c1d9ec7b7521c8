"""Enclosures of the preprocessing's inverse against numbers of many digits; certain values."""

import decimal
import itertools
from decimal import Decimal

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import iresnet_jax as ir
from iresnet_jax.bijections.dequantize import certain_levels

EXACT = 1e-14  # relative error of centres: some units of rounding
ROUGH = {"scores": 1e-10}  # bounded by the rounding of the whole spline over its least slope
BELOW = 1e-60  # rounding of the decimal numbers
KNOTS = {"at": [-3.0, 0.0, 1.0, 4.0], "to": [-2.0, -0.5, 1.0, 2.0], "slopes": [0.2, 1.5, 1.0, 0.1]}
FEW = (0.2, 1e-6, 0.7 - 1e-6, 0.1)
TRANSFORMS = {
    "identity": ir.Identity(),
    "center": ir.Center(),
    "logit": ir.Logit(0.05),
    "logit, small alpha": ir.Logit(1e-6),
    "standardize": ir.Standardize((1.0, -2.0, 1e3), (0.1, 3.0, 7.0)),
    "whiten": ir.Whiten((1.0, -2.0, 5.0), ((2.0, 0.0, 0.0), (-1.5, 0.3, 0.0), (0.2, 0.4, 5.0))),
    "bounded": ir.Bounded(
        (-1.0, -np.inf, 1e3),
        (3.0, np.inf, 1e3 + 0.5),
        then=ir.Standardize((0.2, -2.0, 0.0), (1.0, 3.0, 1.7)),
    ),
    "bounded and whitened": ir.Bounded(
        (0.0, -0.5, -np.inf),
        (1e-3, 9.5, np.inf),
        then=ir.Whiten((1.0, -2.0, 5.0), ((2.0, 0.0, 0.0), (-1.5, 0.3, 0.0), (0.2, 0.4, 5.0))),
    ),
    "one end": ir.Bounded(
        (-2.0, -np.inf, 0.0),
        (np.inf, 1e3, np.inf),
        0.0,
        (3.0, 0.5, 0.0),
        ir.Standardize((0.2, -2.0, 0.0), (0.9, 0.5, 0.7)),
    ),
    "heavy tails": ir.Bounded(
        (-np.inf, -np.inf, 0.0),
        (np.inf, np.inf, 1.0),
        (5.0, 0, 0),
        (0.1, 0, 0),
        ir.Standardize((0.2, -2.0, 0.0), (0.3, 3.0, 1.7)),
    ),
    "scores": ir.Marginals.of(
        [
            {**KNOTS, "center": 5.0, "scale": 0.1},
            {"at": [-1.0, 0.5, 2.0], "to": [-2.0, 0.25, 1.0], "slopes": [1.0, 2.0, 0.25]},
            {**KNOTS, "low": 0.0, "high": 1.0},
        ]
    ),
    "equalize": ir.Equalize(FEW, alpha=0.05),
    "equalize by entry": ir.Equalize(FEW, (0.5, 0.99, 0.02), alpha=1e-3),
}
# By how much a constant may exceed what is attained in the directions that are tried: none is that
# of a matrix, and the largest slopes of two maps may be those of two entries.
LOOSE = {
    "whiten": 1.4,
    "bounded": np.inf,
    "bounded and whitened": np.inf,
    "one end": np.inf,
    "heavy tails": np.inf,
    "scores": np.inf,
}


@pytest.fixture(autouse=True)
def _many_digits():
    with decimal.localcontext(prec=80):  # more than float64 numbers of this size have
        yield


def exact_inverse(transform, y):
    """``t^-1`` of one vector of decimal numbers."""
    if isinstance(transform, ir.Bounded):
        line = exact_inverse(transform.then, y)
        if isinstance(transform, ir.Marginals):
            line = [below_spline(transform, i, v) for i, v in enumerate(line)]
        rows = zip(
            *(
                of.tolist()
                for of in (transform.low, transform.high, transform.center, transform.scale)
            ),
            strict=True,
        )
        return [within(*row, v) for v, row in zip(line, rows, strict=True)]
    if isinstance(transform, ir.Standardize):
        return [
            v * Decimal(float(s)) + Decimal(float(m))
            for v, s, m in zip(y, transform.scale, transform.mean, strict=True)
        ]
    if isinstance(transform, ir.Whiten):
        rows = [[Decimal(float(a)) for a in row] for row in transform.factor]
        products = [sum(a * v for a, v in zip(row, y, strict=True)) for row in rows]
        return [v + Decimal(float(m)) for v, m in zip(products, transform.mean, strict=True)]
    if not isinstance(transform, ir.Logit | ir.Equalize):
        return [v + Decimal("0.5") * isinstance(transform, ir.Center) for v in y]
    alpha = Decimal(float(transform.alpha))
    u = [(1 / (1 + (-v).exp()) - alpha) / (1 - 2 * alpha) for v in y]
    return (
        u
        if isinstance(transform, ir.Logit)
        else [quantile(transform, i, v) for i, v in enumerate(u)]
    )


def below_spline(scores, column, z):
    """The place whose rational quadratic function (Gregory and Delbourgo 1982) is ``z``."""
    tables = (np.asarray(part)[column].tolist() for part in (scores.at, scores.to, scores.slopes))
    knots = [
        tuple(map(Decimal, knot)) for knot in zip(*tables, strict=True) if np.isfinite(knot[0])
    ]
    for (y0, z0, d0), (y1, z1, d1) in itertools.pairwise(knots):
        if z0 <= z < z1:
            s, up = (z1 - z0) / (y1 - y0), (z - z0) / (z1 - z0)
            # s t^2 + d0 t (1 - t) = up (s + (d0 + d1 - 2 s) t (1 - t))
            a = s - d0 + up * (d0 + d1 - 2 * s)
            b = d0 - up * (d0 + d1 - 2 * s)
            return y0 + (y1 - y0) * 2 * up * s / (b + (b * b + 4 * a * up * s).sqrt())
    y, at, slope = knots[0] if z < knots[0][1] else knots[-1]
    return y + (z - at) / slope


def within(low, high, center, scale, v):
    """The logistic, exponential or sinh function, and beyond both the hyperbola of a tail."""
    ends, is_both = [end for end in (low, high) if np.isfinite(end)], np.isfinite(high - low)
    if not ends:
        return Decimal(center) + Decimal(scale) * (v.exp() - (-v).exp()) / 2 if scale else v
    unit = Decimal(high) - Decimal(low) if is_both else Decimal(scale or 1)
    for end in ends:
        sign, e = 1 if end == high else -1, abs(Decimal(end)) / 2**18
        rest = unit - e * int(is_both)
        further = e and (sign * v - (rest / e).ln()) * rest / unit
        if further > 0:
            return Decimal(end) - sign * e / (1 + further)
    if is_both:
        return Decimal(low) + unit / (1 + (-v).exp())
    return Decimal(low) + unit * v.exp() if ends == [low] else Decimal(high) - unit * (-v).exp()


def quantile(transform, entry, u):
    """The inverse of the distribution function of one entry, cell by cell."""
    total = sum(map(Decimal, np.asarray(transform.frequencies).tolist()))
    f = [Decimal(each) / total for each in np.asarray(transform.frequencies).tolist()]
    m = max(range(len(f)), key=f.__getitem__)
    share = f[m] if transform.shares is None else Decimal(float(transform.shares[entry]))
    f = [share if k == m else each * (1 - share) / (1 - f[m]) for k, each in enumerate(f)]
    k = 0
    while k < len(f) - 1 and u >= sum(f[: k + 1]):
        k += 1
    return (k + (u - sum(f[:k])) / f[k]) / len(f)


def distance(x, y):
    return float(sum(((a - b) ** 2 for a, b in zip(x, y, strict=True)), Decimal(0)).sqrt())


@pytest.mark.parametrize("name", TRANSFORMS)
def test_the_map_leads_back_from_its_exact_inverse(name):
    y = np.random.default_rng(0).normal(size=(8, 3))
    x = np.array(
        [exact_inverse(TRANSFORMS[name], list(map(Decimal, one.tolist()))) for one in y], float
    )
    with jax.enable_x64(True):
        found = jax.jit(TRANSFORMS[name].forward)(jnp.asarray(x))
    np.testing.assert_allclose(found, y, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("radius", [0.0, 1e-7, 0.3])
@pytest.mark.parametrize("name", TRANSFORMS)
def test_every_point_of_the_ball_is_enclosed(name, radius):
    transform, rng = TRANSFORMS[name], np.random.default_rng(0)
    y = np.concatenate(
        [rng.normal(size=(8, 3)), 10 * rng.normal(size=(4, 3)), [[0.0, 700.0, -700.0]]]
    )
    found = transform.enclose_inverse(y, np.full(len(y), radius))
    bounds = found.distance_bound(found.center, np.full(len(y), radius))
    steepest = np.zeros(len(y))
    for i, center in enumerate(found.center):
        middle = exact_inverse(transform, list(map(Decimal, y[i].tolist())))
        off = distance(map(Decimal, center.tolist()), middle)
        assert off <= found.error[i] + BELOW
        assert found.error[i] <= ROUGH.get(name, EXACT) * max(1, np.linalg.norm(center))
        directions = np.concatenate([np.eye(3), -np.eye(3), rng.normal(size=(6, 3))])
        for direction in directions / np.linalg.norm(directions, axis=1, keepdims=True):
            # the direction is rounded
            lengths = (Decimal(radius * part) * Decimal("0.999999999999999") for part in (1, 1 / 3))
            for length in lengths:
                moved = [
                    Decimal(a) + length * Decimal(b)
                    for a, b in zip(y[i].tolist(), direction.tolist(), strict=True)
                ]
                image = exact_inverse(transform, moved)
                inside = zip(found.low[i].tolist(), image, found.high[i].tolist(), strict=True)
                assert all(Decimal(low) <= v <= Decimal(high) for low, v, high in inside)
                change = distance(image, middle)
                assert change <= found.lipschitz[i] * radius + BELOW
                assert change <= bounds[i] + BELOW
                steepest[i] = max(steepest[i], change / radius if radius else 0)
    # the constants are attained; that of a matrix nearly, by no direction that was tried
    if radius == 1e-7:
        assert np.all(found.lipschitz[:8] <= LOOSE.get(name, 1.001) * steepest[:8])


@pytest.mark.parametrize("name", TRANSFORMS)
def test_nothing_is_enclosed_where_nothing_is_known(name):
    y = np.array([[0.0, 0.0, 0.0], [np.nan, 0.0, 0.0], [0.0, 0.0, 0.0]])
    found = TRANSFORMS[name].enclose_inverse(y, np.array([np.inf, 0.1, 0.1]))
    assert np.all(np.isneginf(found.low[:2]) & np.isposinf(found.high[:2]))
    bounds = found.distance_bound(found.center, np.array([np.inf, 0.1, 0.1]))
    np.testing.assert_array_equal(np.isfinite(bounds), [False, False, True])


def test_levels_are_certain_where_no_edge_is_near():
    x = np.array([[0.1, 0.25, 0.2501, 0.7, -0.1, 1.2]])
    found = ir.Identity().enclose_inverse(x, np.full(1, 1e-3))
    levels = np.array([[0, 1, 1, 2, 0, 3]], np.uint8)  # of 4: edges at .25, .5, .75
    np.testing.assert_array_equal(
        certain_levels(levels, found, 4), [[True, False, False, True, True, True]]
    )
    assert not certain_levels(levels + 1, found, 4)[0, :1].any()  # a wrong level is not certain
    at_edge = ir.Identity().enclose_inverse(x, np.zeros(1))
    # without any error the edge itself is within the rounding
    assert not certain_levels(levels, at_edge, 4)[0, 1]


def test_values_are_certain_where_the_ends_of_their_cells_are_far():
    cells = ir.Marginals.lines([0.5, 0, 2])
    x = np.array([[10.6, 0.3, 2.9], [10.74, 0.3, 2.9995]])
    found = ir.Identity().enclose_inverse(x, np.full(2, 1e-3))
    rounded = np.array([[10.5, 0.3, 2.0], [10.5, 0.3, 2.0]])
    np.testing.assert_array_equal(
        cells.certain(rounded, found), [[True, False, True], [True, False, False]]
    )
    assert not cells.certain(rounded + 0.5, found)[0, 0]
    scores = ir.Marginals.of(
        [{"values": [0, 1], "has_levels": 1, "lower": [[-np.inf, 0]], "upper": [[0, np.inf]]}]
    )
    near = ir.Identity().enclose_inverse(np.array([[-0.1], [1e-4], [3.0]]), np.full(3, 1e-3))
    assert scores.certain(np.array([[0.0], [1.0], [1.0]]), near)[:, 0].tolist() == [
        True,
        False,
        True,
    ]
