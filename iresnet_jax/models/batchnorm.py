"""The ordinary residual network to compare with: BatchNorm inside the branches, no constraint and no inverse."""

from typing import Any

from jax import lax
from jaxtyping import Array, Float

from iresnet_jax.bijections.chain import chain
from iresnet_jax.branches.feedforward import FeedforwardSpec
from iresnet_jax.models.architecture import FlowSpec
from iresnet_jax.models.contractions import Tree
from iresnet_jax.models.head import batch_norm, batch_statistics


def batchnorm_blocks(
    branch: FeedforwardSpec,
    blocks: Tree,
    x: Float[Array, "b ..."],
    *,
    statistics: Tree | None = None,
    axis_name: str | None = None,
) -> tuple[Float[Array, "b ..."], Tree]:
    """The residual blocks of one stage with BatchNorm in front of every layer of their branch.

    They are scanned over: XLA:CPU fuses blocks that are written out with the transposes of their gradients, and a training step
    takes up to four times as long.

    Args:
        branch: The branch.
        blocks: Weights of the branch and ``{"batchnorm": {layer: {"scale", "bias"}}}``, stacked over blocks.
        x: Inputs.
        statistics: Statistics to normalise by, by layer, stacked over blocks; those of the batch by default.
        axis_name: Mapped axis of devices, see `head.batch_statistics`.

    Returns:
        The output and the statistics that were used.
    """

    def step(x, block):
        (norms, weights), given = block
        used = {}

        def normalize(layer, h):
            used[layer] = batch_statistics(h, axis_name=axis_name) if given is None else given[layer]
            return batch_norm(norms[layer], used[layer], h)

        return x + branch.apply(weights, x, before_layer=normalize), used

    weights = {name: layer for name, layer in blocks.items() if name != "batchnorm"}
    return lax.scan(step, x, ((blocks["batchnorm"], weights), statistics))


def batchnorm_features(
    spec: FlowSpec,
    weights: Tree,
    x: Float[Array, "b ..."],
    *,
    statistics: Tree | None = None,
    axis_name: str | None = None,
) -> tuple[Float[Array, "b ..."], dict[str, Any]]:
    """Features of all stages, and the statistics that were used; arguments as in `batchnorm_blocks`, by stage."""
    used = {}
    for stage in spec.layout:
        assert isinstance(stage.branch, FeedforwardSpec)  # BatchNorm stands in front of layers
        x = chain(stage.reshapes).forward(x)
        given = None if statistics is None else statistics[stage.name]["blocks"]
        x, own = batchnorm_blocks(stage.branch, weights[stage.name]["blocks"], x, statistics=given, axis_name=axis_name)
        used[stage.name] = {"blocks": own}
    return x, used
