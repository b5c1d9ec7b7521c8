"""Images that a classifier's features give back, with and without the constraint, and the error by depth.

Test images are encoded, and their features are inverted block by block by Banach iteration. What each block gives back is
compared with what it was given on the way forward: errors add up from the last block to the first.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jaxtyping import Array, Float, Num

from iresnet_jax import data
from iresnet_jax.bijections.actnorm import actnorm_bijection
from iresnet_jax.bijections.bijection import Bijection
from iresnet_jax.bijections.chain import after_exact, chain
from iresnet_jax.bijections.residual import Solver, residual_bijection
from iresnet_jax.data.dataset import DataSet
from iresnet_jax.figures import style
from iresnet_jax.figures.drawing import Drawing, Row
from iresnet_jax.figures.training import trained
from iresnet_jax.maths.inverse.fixed_point import example_norm
from iresnet_jax.maths.logdet.exact import ExactLogdet
from iresnet_jax.models.architecture import StageSpec
from iresnet_jax.models.classifier import Classifier
from iresnet_jax.models.head import cross_entropy
from iresnet_jax.runs.trained_run import Run

SOLVER = Solver(atol=1e-5, max_evals=100, memory=0)  # Banach iteration
NUM_IMAGES, NUM_SHOWN = 360, 12
LEARNING_RATE = 3e-3
STAGES = (
    StageSpec(4, (64, 64), (3, 1, 3), squeeze=2),
    StageSpec(4, (64, 64), (3, 1, 3), squeeze=2, preactivation=True),
)

CONSTRAINED, FREE = "with the constraint", "without"


def figure(run: Run | None) -> Drawing:
    """The figure of a run, or of two fresh classifiers of digits.

    Raises:
        ValueError: If the run is of another model, or of a network with BatchNorm in its branches.
    """
    if run is None:
        digits = data.load("digits")
        return drawing_of(fit(digits), digits.examples["test"], digits.labels["test"])
    if not isinstance(run.model, Classifier):
        raise ValueError(f"{run.folder} holds no classifier: this figure is about reconstructions from a classifier's features")
    run.model.require_bijection()
    name = CONSTRAINED if run.model.spec.constrained else FREE
    return drawing_of({name: run.model}, run.test_examples(), run.data.labels["test"])


def fit(
    digits: DataSet, *, stages: Sequence[StageSpec] = STAGES, num_steps: int = 600, batch_size: int = 64
) -> dict[str, Classifier]:
    """Trains a classifier at c = .9 and its twin without a constraint, from the same weights by Adam.

    Args:
        digits: Images with classes.
        stages: Stages of the network.
        num_steps: Updates.
        batch_size: Images of an update.
    """
    assert digits.num_classes is not None
    assert digits.num_levels is not None
    images, labels = digits.examples["train"], digits.labels["train"]
    key_weights, key_places = jax.random.split(jax.random.key(0))
    settings = {"stages": stages, "num_levels": digits.num_levels, "pad_channels": 3}
    start = Classifier.init(key_weights, images[:512], digits.num_classes, **settings)
    free = start.with_(spec=dataclasses.replace(start.spec, constrained=False))
    places = jax.random.randint(key_places, (num_steps, batch_size), 0, len(images))
    return {
        name: trained(model, _loss, [images, labels], places, learning_rate=LEARNING_RATE)
        for name, model in ((CONSTRAINED, start), (FREE, free))
    }


def _loss(model: Classifier, images: Array, labels: Array) -> Array:
    return cross_entropy(model.logits(images), labels).mean()


def drawing_of(models: Mapping[str, Classifier], images: Num[np.ndarray, "n h w c"], labels: Num[np.ndarray, " n"]) -> Drawing:
    """Measures and draws classifiers of the same images, of which the first are taken."""
    rows, found = [], {}
    images, labels = images[:NUM_IMAGES], labels[:NUM_IMAGES]
    for name, model in models.items():
        own, found[name] = measure(name, model, images, labels)
        rows += own
    levels = next(iter(models.values())).spec.num_levels
    return Drawing(draw(rows, images[:NUM_SHOWN] / (levels - 1), found), rows)


def measure(
    name: str, model: Classifier, images: Num[np.ndarray, "n h w c"], labels: Num[np.ndarray, " n"]
) -> tuple[list[dict[str, Any]], Float[np.ndarray, "n h w c"]]:
    """Rows of one model, one for each block, and the images that its features give back.

    Relative errors are Euclidean errors of what a block gives back, divided by the norm of what it was given;
    ``lipschitz_bound`` is the certified bound of its branch.
    """
    wrong = np.asarray(model.logits(images)).argmax(axis=-1) != labels
    errors, converged, back = _there_and_back(model, model.preprocess(images))
    rows = [
        {
            "model": name,
            "block": f"{stage}/block{k:02d}",
            "mean_relative_error": float(np.mean(error)),
            "max_relative_error": float(np.max(error)),
            "converged": float(np.mean(converged[stage][k])),
            "lipschitz_bound": float(model.weights[stage].branch.lipschitz_bound[k]),
            "test_error": float(wrong.mean()),
            "num_images": len(images),
        }
        for stage, of_blocks in errors.items()
        for k, error in enumerate(of_blocks)
    ]
    return rows, np.asarray(model.spec.unpad(back))


@jax.jit
def _there_and_back(model: Classifier, x: Array) -> tuple[dict[str, Array], dict[str, Array], Array]:
    """Relative errors and verdicts of the solver, by stage, block and example, and what comes back at the end."""
    layout, weights = model.spec.flow.layout, model.weights
    there, errors, converged = {}, {}, {}
    for stage in layout:
        x, there[stage.name] = jax.lax.scan(
            lambda x, block: (_bijection(block).forward(x), x),
            chain(stage.reshapes).forward(x),
            weights[stage.name],
        )

    def undo(back: Array, given: tuple[Any, Array]) -> tuple[Array, tuple[Array, Array]]:
        block, was = given
        back, info = _bijection(block).inverse(back)
        return back, (example_norm(back - was) / example_norm(was), info.converged)

    for stage in reversed(layout):
        given = weights[stage.name], there[stage.name]
        x, found = jax.lax.scan(undo, x, given, reverse=True)
        errors[stage.name], converged[stage.name] = found
        x = chain(stage.reshapes).inverse(x)[0]
    return {stage.name: errors[stage.name] for stage in layout}, converged, x


def _bijection(block: Any) -> Bijection:
    return after_exact(actnorm_bijection(block.actnorm), residual_bijection(block.branch, ExactLogdet(), SOLVER))


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
