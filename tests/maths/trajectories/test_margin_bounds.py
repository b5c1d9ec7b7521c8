"""Falls of a margin in a ball against sampled points, for a chain with known numbers."""

import numpy as np
import pytest

from iresnet_jax.maths.trajectories import margin_bounds
from iresnet_jax.maths.trajectories.margin_bounds import Adjoints, Step, Tangents


def chain(curvature=None):
    """Two steps ``x + W2 tanh(W1 x)`` in three dimensions, a linear function, and what the bounds take of them."""
    rng = np.random.default_rng(2)
    layers = [[matrix / np.linalg.norm(matrix, 2) for matrix in rng.normal(size=(2, 3, 3))] for _ in range(2)]
    last, center = rng.normal(size=3), rng.normal(size=3)
    known = 4 / (3 * np.sqrt(3)) if curvature is None else curvature
    steps = [
        Step(1.0, (float(np.linalg.norm(first, 2)), float(np.linalg.norm(second, 2))), (1.0, 1.0), (None, known), 0.0)
        for first, second in layers
    ]

    def value(x):
        for first, second in layers:
            x = x + np.tanh(x @ first.T) @ second.T
        return x @ last

    points, jacobians = [center], [np.eye(3)]
    arguments = []
    for first, second in layers:
        h = first @ points[-1]
        arguments.append((first @ jacobians[-1], 1 - np.tanh(h) ** 2))
        jacobians.append(jacobians[-1] + second @ np.diag(arguments[-1][1]) @ arguments[-1][0])
        points.append(points[-1] + second @ np.tanh(h))
    gradients, weights = [last], []
    for (first, second), (_, slope) in zip(layers[::-1], arguments[::-1], strict=True):
        weights.append(np.abs(second.T @ gradients[-1]))
        gradients.append(gradients[-1] + first.T @ (slope * (second.T @ gradients[-1])))
    form = sum(known * a.T @ np.diag(w) @ a for (a, _), w in zip(arguments, weights[::-1], strict=True))
    norm = lambda a: np.linalg.norm(a, 2)  # noqa: E731
    none = np.zeros((2, 1))
    adjoints = Adjoints(
        np.array([[norm(gradients[-1])]]),
        np.zeros(1),
        np.array([[[norm(g)]] for g in gradients[::-1]]),
        np.array([[[w.max()]] for w in weights[::-1]]),
        none,
        none,
    )
    fourth = [[norm(np.linalg.norm(a, axis=1)[:, None] * a)] for a, _ in arguments]
    sizes = np.array([[norm(p)] for p in jacobians])
    tangents = Tangents(sizes, sizes, np.array([[norm(a)] for a, _ in arguments]), np.array(fourth), np.array([[norm(form)]]))
    return steps, adjoints, tangents, value, center


def fall(radius, curvature=None, *, dense=True):
    steps, adjoints, tangents, value, center = chain(curvature)
    tangents = tangents if dense else None
    radii = np.array([[radius]])
    found = margin_bounds.displacements(steps, adjoints, tangents, 1.0, radii)
    bound = margin_bounds.fall(steps, adjoints, tangents, found, radii).item()
    moves = np.random.default_rng(0).normal(size=(20_000, 3))
    moves *= radius / np.linalg.norm(moves, axis=1, keepdims=True)
    return bound, (value(center) - value(center + moves)).max()


@pytest.mark.parametrize("radius", [1e-3, 0.1, 1.0])
@pytest.mark.parametrize("dense", [True, False])
def test_no_point_of_the_ball_falls_further_than_the_bound(radius, dense):
    bound, worst = fall(radius, dense=dense)
    assert 0 < worst <= bound
    if radius == 1e-3:
        assert bound <= 1.01 * worst


def test_the_check_rejects_a_curvature_of_zero():
    bound, worst = fall(1.0, curvature=0.0)
    assert worst > 1.001 * bound
