"""What benchmarks share: settings of a config file, a trained model on the command line, and its blocks one by one."""

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from iresnet_jax.bijections.actnorm import actnorm_bijection
from iresnet_jax.bijections.chain import chain
from iresnet_jax.bijections.reshape import split_channels
from iresnet_jax.branches.branch import Branch
from iresnet_jax.models.architecture import FlowSpec
from iresnet_jax.models.density import Density
from iresnet_jax.models.flow import Block as Blocks
from iresnet_jax.models.flow import Weights
from iresnet_jax.runs.command_line import parse_train_flags
from iresnet_jax.runs.config import Config
from iresnet_jax.runs.trained_run import Run


def read_config(file: str | Path, *overrides: str) -> Config:
    """The settings of a config file.

    Args:
        file: The file; a variant follows after a colon, as in ``configs/toy_2d.py:moons``.
        overrides: Changes such as ``constraint.norms=none``.
    """
    flags = [f"--config={file}", *(f"--config.{override}" for override in overrides)]
    return parse_train_flags(["benchmark", *flags], default_config=str(file)).config


def add_workdir(options: argparse.ArgumentParser) -> None:
    """Adds the option that names a trained model."""
    options.add_argument("--workdir", type=Path, required=True, metavar="DIR", help="folder of a training run or of model.npz")


def flow_input(run: Run, num: int) -> Any:
    """The flow's input for the first test examples of the model's data."""
    examples = run.data.held_out("test", num, run.config.seed)
    noise = (jax.random.key(0),) if isinstance(run.model, Density) else ()
    return jax.jit(run.model.preprocess)(examples, *noise)


class Block(NamedTuple):
    """A residual block and where test examples meet it.

    Attributes:
        name: "stage0/block03".
        branch: The branch.
        x: Input of the branch.
        y: Output of the block, ``x + g(x)``.
    """

    name: str
    branch: Branch
    x: jax.Array
    y: jax.Array


def blocks(flow: FlowSpec, weights: Weights, x: Any) -> Iterator[Block]:
    """Every residual block on the way of ``x`` through a flow."""
    for stage in flow.layout:
        x = chain(stage.entry).forward(jnp.asarray(x))
        for k in range(stage.spec.num_blocks):
            block = jax.tree.map(lambda w, k=k: jnp.asarray(w)[k], weights[stage.name])
            inside, x = _through(block, x)
            yield Block(f"{stage.name}/block{k:02d}", block.branch, inside, x)
        if stage.spec.factor_out:
            x, _ = split_channels(x)


@jax.jit
def _through(block: Blocks, x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """``x`` behind a block's ActNorm, and the output of the block."""
    x = actnorm_bijection(block.actnorm).forward(x)
    return x, x + block.branch(x)
