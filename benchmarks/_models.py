"""Models that are measured: settings of a config file, a trained model on the command line, its
blocks, random weights.
"""

import argparse
import dataclasses
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from _record import ROOT, parser

from iresnet_jax.models.classifier import Classifier
from iresnet_jax.models.contractions import freeze
from iresnet_jax.models.density import Density
from iresnet_jax.models.flow import as_params, bounded, branch_inputs
from iresnet_jax.runs import trained_run
from iresnet_jax.runs.config import Config, parse_train_flags
from iresnet_jax.runs.trained_run import Run

sys.path.append(str(ROOT / "tests"))  # for `plain_flow`, which tests have, too


def config_file(name: str) -> str:
    """Path of a config by its name in configs/, with the variant that follows a colon."""
    file, colon, variant = name.partition(":")
    return f"{ROOT / 'configs' / file}.py{colon}{variant}"


def read_config(file: str | Path, *overrides: str) -> Config:
    """The settings of a config file, a variant behind a colon, with changes such as
    ``constraint.norms=none``.
    """
    flags = [f"--config={file}", *(f"--config.{override}" for override in overrides)]
    return parse_train_flags(["benchmark", *flags]).config


def model_parser(description: str | None) -> argparse.ArgumentParser:
    """The command line of a benchmark of a trained model."""
    options = parser(description)
    options.add_argument(
        "--workdir",
        type=Path,
        required=True,
        metavar="DIR",
        help="folder of a training run or of model.npz",
    )
    return options


def load(folder: Path) -> Run:
    """A run, or what is wrong with its folder as the command's last words."""
    try:
        return trained_run.load(folder)
    except (ValueError, RuntimeError) as error:
        raise SystemExit(f"error: {error}") from None


def load_kind(folder: Path, kind: type[Density] | type[Classifier]) -> tuple[Run, Any]:
    """A run and its model, which the command exits without if it is of another kind."""
    run = load(folder)
    if not isinstance(run.model, kind):
        raise SystemExit(
            f"error: {folder} holds a {type(run.model).__name__}, and this takes a {kind.__name__}"
        )
    return run, run.model


def name_of(run: Run) -> str:
    """Name of a run's data for records; those of classifiers say so."""
    return run.config.data.name + ("" if isinstance(run.model, Density) else "_classification")


def flow_input(run: Run, num: int) -> Any:
    """The flow's input for the first test examples of the model's data."""
    examples = run.data.held_out("test", num, run.config.seed).x
    noise = (jax.random.key(0),) if isinstance(run.model, Density) else ()
    return jax.jit(run.model.preprocess)(examples, *noise)


@jax.jit
def encode(model: Any, x: Any) -> jax.Array:
    """Latents of the flow's inputs."""
    return model.flow().forward(x)


@jax.jit
def decode(model: Any, z: Any, bounds: Any = None) -> Any:
    """Inputs of the flow for latents, and how the inverse ended."""
    return model.flow(bounds=bounds).inverse(z)


def norms(x: Any) -> np.ndarray:
    """Euclidean norm of every example, in float64."""
    return np.linalg.norm(np.asarray(x, np.float64).reshape(len(x), -1), axis=1)


class Block(NamedTuple):
    """Name of a residual block, such as "stage0/block03", its branch, and inputs of the branch
    for test examples.
    """

    name: str
    branch: Any
    x: jax.Array


def blocks(model: Any, x: Any) -> Iterator[Block]:
    """Every residual block on the way of ``x`` through a model's flow."""
    weights = bounded(model.weights, model.bounds())
    inputs = jax.jit(branch_inputs, static_argnums=0)(model.spec.flow, weights, x)
    for stage, own in inputs.items():
        for k, of_block in enumerate(own):
            branch = jax.tree.map(lambda leaf, k=k: jnp.asarray(leaf)[k], weights[stage].branch)
            yield Block(f"{stage}/block{k:02d}", branch, of_block)


def randomized(model: Any, coeff: float, key: jax.Array) -> Any:
    """The same architecture with random weights of the largest norms that the constraint allows,
    ``L = coeff`` a block.
    """
    flow = dataclasses.replace(model.spec.flow, coeff=coeff, budget="block")
    leaves, tree = jax.tree.flatten(as_params(model.weights))
    keys = jax.random.split(key, len(leaves))
    params = jax.tree.unflatten(
        tree, [jax.random.normal(k, leaf.shape) for k, leaf in zip(keys, leaves, strict=True)]
    )
    for stage in params.values():
        stage["blocks"]["actnorm"] = jax.tree.map(lambda a: 0.1 * a, stage["blocks"]["actnorm"])
    frozen = freeze(flow, params)
    return model.with_(spec=dataclasses.replace(model.spec, flow=flow), weights=frozen)
