"""Images that a classifier's features give back, with and without the constraint, and the error by depth.

Test images are encoded, and their features are inverted block by block by Banach iteration. What each block gives back is
compared with what it was given on the way forward: errors add up from the last block to the first.
"""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Num

from iresnet_jax.bijections.actnorm import actnorm_bijection
from iresnet_jax.bijections.chain import after_exact, chain
from iresnet_jax.bijections.residual import Solver
from iresnet_jax.data.dataset import DataSet
from iresnet_jax.figures import style
from iresnet_jax.figures.drawing import Drawing, Row
from iresnet_jax.maths.inverse.fixed_point import example_norm
from iresnet_jax.maths.logdet.exact import ExactLogdet
from iresnet_jax.models.architecture import StageSpec
from iresnet_jax.models.classifier import Classifier
from iresnet_jax.training.unconstrained import Unconstrained

SOLVER = Solver(atol=1e-5, max_evals=100, memory=0)  # 100 Banach steps, as many as the authors take at most
NUM_SHOWN = 12
LEARNING_RATE = 3e-3
STAGES = (
    StageSpec(4, (64, 64), (3, 1, 3), squeeze=2),
    StageSpec(4, (64, 64), (3, 1, 3), squeeze=2, preactivation=True),
)

CONSTRAINED, FREE = "with the constraint", "without"


def fit(
    data: DataSet, *, stages: Sequence[StageSpec] = STAGES, num_steps: int = 600, batch_size: int = 64, seed: int = 0
) -> dict[str, Classifier]:
    """Trains a classifier at c = .9 and its twin without a constraint, from the same weights by Adam.

    Args:
        data: Images with classes.
        stages: Stages of the network.
        num_steps: Updates.
        batch_size: Images of an update.
        seed: Of weights and batches.
    """
    assert data.num_classes is not None
    assert data.num_levels is not None
    images, labels = data.examples["train"], data.labels["train"]
    key_weights, key_batches = jax.random.split(jax.random.key(seed))
    start = Classifier.init(
        key_weights, images[:512], data.num_classes, stages=stages, num_levels=data.num_levels, pad_channels=3
    )
    free = start.with_(spec=dataclasses.replace(start.spec, constrained=False))
    batches = jax.random.randint(key_batches, (num_steps, batch_size), 0, len(images))
    images, labels = jnp.asarray(images), jnp.asarray(labels)
    return {
        name: _trained(Unconstrained.of(model), images, labels, batches).certified()
        for name, model in ((CONSTRAINED, start), (FREE, free))
    }


@jax.jit
def _trained(free: Unconstrained[Classifier], images: Array, labels: Array, batches: Array) -> Unconstrained[Classifier]:
    optimizer = optax.adam(optax.cosine_decay_schedule(LEARNING_RATE, len(batches)))

    def step(state, places):
        params, iterates, own = state

        def loss(params):
            model, new = free.with_(iterates=iterates).constrain(params)
            logits = model.logits(images[places])
            return optax.softmax_cross_entropy_with_integer_labels(logits, labels[places]).mean(), new

        gradient, iterates = jax.grad(loss, has_aux=True)(params)
        updates, own = optimizer.update(gradient, own, params)
        return (optax.apply_updates(params, updates), iterates, own), None

    (params, iterates, _), _ = jax.lax.scan(step, (free.params, free.iterates, optimizer.init(free.params)), batches)
    return free.with_(params=params, iterates=iterates)


def figure(models: Mapping[str, Classifier], images: Num[np.ndarray, "n h w c"], labels: Num[np.ndarray, " n"]) -> Drawing:
    """Measures and draws.

    Args:
        models: Classifiers by name, of the same images.
        images: Test images.
        labels: Their classes.
    """
    rows, found = [], {}
    for name, model in models.items():
        own, found[name] = measure(name, model, images, labels)
        rows += own
    levels = next(iter(models.values())).spec.num_levels - 1
    return Drawing(draw(rows, np.asarray(images[:NUM_SHOWN]) / levels, found), rows)


def measure(
    name: str, model: Classifier, images: Num[np.ndarray, "n h w c"], labels: Num[np.ndarray, " n"]
) -> tuple[list[dict[str, Any]], Float[np.ndarray, "n h w c"]]:
    """Rows of one model, one for each block, and the images that its features give back.

    ``relative_error`` is the Euclidean error of what a block gives back, divided by the norm of what it was given;
    ``lipschitz_bound`` the certified bound of its branch. Arguments are those of `figure`.

    Raises:
        ValueError: If the network has BatchNorm in its branches.
    """
    model.require_bijection()
    wrong = np.asarray(model.logits(images)).argmax(axis=-1) != np.asarray(labels)
    steps, there = [], [model.preprocess(images)]
    for stage in model.spec.flow.layout:
        blocks = model.weights[stage.name]
        steps.append((chain(stage.reshapes), None, 0.0, ""))
        there.append(chain(stage.reshapes).forward(there[-1]))
        for k in range(stage.spec.num_blocks):
            block = jax.tree.map(lambda leaf, k=k: leaf[k], blocks)
            steps.append((stage.block, block, float(block.branch.lipschitz_bound), f"{stage.name}/block{k:02d}"))
            there.append(_forward(stage.block, block, there[-1]))
    back, rows = there[-1], []
    for depth, (kind, block, bound, place) in reversed(list(enumerate(steps))):
        if block is None:
            back = kind.inverse(back)[0]
            continue
        back, converged = _inverse(kind, block, back)
        errors = np.asarray(example_norm(back - there[depth]) / example_norm(there[depth]))
        rows.append(
            {
                "model": name,
                "block": place,
                "mean_relative_error": float(errors.mean()),
                "max_relative_error": float(errors.max()),
                "converged": float(np.mean(converged)),
                "lipschitz_bound": bound,
                "test_error": float(wrong.mean()),
                "num_images": len(images),
            }
        )
    return rows[::-1], np.asarray(model.spec.unpad(back))


@functools.partial(jax.jit, static_argnums=0)
def _forward(kind: Any, block: Any, x: Array) -> Array:
    return _bijection(kind, block).forward(x)


@functools.partial(jax.jit, static_argnums=0)
def _inverse(kind: Any, block: Any, y: Array) -> tuple[Array, Array]:
    x, info = _bijection(kind, block).inverse(y)
    return x, info.converged


def _bijection(kind: Any, block: Any) -> Any:
    return after_exact(actnorm_bijection(block.actnorm), kind.bijection(block.branch, ExactLogdet(), SOLVER))


def draw(rows: Sequence[Row], images: Float[np.ndarray, "n h w c"], found: Mapping[str, Float[np.ndarray, "_ h w c"]]) -> Any:
    """Images and what came back above, the error by depth below."""
    strips = {"image": images, **{name: back[: len(images)] for name, back in found.items()}}
    figure = style.figure(width=style.PAGE_WIDTH, height=2.8 + 0.8 * len(strips))
    grid = figure.subplots(1 + len(strips), 1, height_ratios=[0.8] * len(strips) + [2.8])
    for axes, (name, own) in zip(grid[:-1], strips.items(), strict=True):
        style.strip(axes, own, name)
    for which, name in enumerate(found):
        own = [row for row in rows if row["model"] == name]
        largest, error = max(row["lipschitz_bound"] for row in own), own[0]["test_error"]
        said = f"{name}: test error {100 * error:.2g} %, Lip(g) at most {largest:.3g}"
        blocks = range(1, 1 + len(own))
        style.curve(grid[-1], which, blocks, [row["mean_relative_error"] for row in own], said)
    grid[-1].set_yscale("log")
    style.label(grid[-1], "block, from the image to the features", "mean relative error")
    style.legend(grid[-1])
    return figure


def of_run(run: Any) -> Classifier:
    """The classifier of a run.

    Raises:
        ValueError: If it is another model.
    """
    if not isinstance(run.model, Classifier):
        raise ValueError(f"{run.folder} holds no classifier: this figure is about reconstructions from a classifier's features")
    return run.model
