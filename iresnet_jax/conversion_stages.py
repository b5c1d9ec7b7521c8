"""Arrays of a network in PyTorch, and its stages, which are collected in that code's order.

Codes differ in the order of channels after a squeeze, in the half that leaves as latents and in
where an ActNorm stands. The flow here is the same function through `StageSpec.channel_order`,
through the order of kernels' rows and columns, and by moving an ActNorm past permutations to the
next branch. Where no branch follows, a block has a branch of zeros.
"""

import math
import os
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Float, Int

from iresnet_jax.models.architecture import StageSpec

# Last parts of the names of arrays that do not enter the network's function.
UNUSED = (
    "weight_sigma num_batches_tracked scale initialized spatial_dims geom_p lamb last_n_samples "
    "last_firmom last_secmom"
).split()


class Arrays:
    """Arrays by their names; each must be taken once or be known as unused.

    Args:
        given: A ``.npz`` file, or arrays by name; a wrapper for several GPUs puts "module." in
            front of names.
    """

    def __init__(self, given: str | os.PathLike[str] | Mapping[str, Any]):
        arrays = given if isinstance(given, Mapping) else np.load(given)
        self._left = {
            name.removeprefix("module."): np.asarray(array) for name, array in arrays.items()
        }

    def take(self, name: str, *shape: int) -> Float[np.ndarray, "..."]:
        """The array with this name in float64."""
        array = self._left.pop(name, None)
        if array is None or array.shape != shape or not np.all(np.isfinite(array)):
            found = "none" if array is None else f"{array.dtype} of shape {array.shape}"
            raise ValueError(
                f"{name} must be finite numbers of shape {shape}, got {found}: give the command "
                "that trained the network, and all of its arrays as npz"
            )
        return array.astype(np.float64)

    def take_layer(
        self,
        name: str,
        shape: tuple[int, ...],
        *,
        names: tuple[str, str, str],
        coeff: float,
        margin: float = 0.0,
    ) -> "Layer":
        """A layer with its bias, whose kernel is the one that the other codes apply: ``W / (max(1,
        <u, W v> / coeff) + margin)``.

        Args:
            name: Name of the layer.
            shape: Shape of its kernel.
            names: Names of the kernel that is trained, and of its left and right singular vector by
                power iteration, which are images of any side, the same for both.
            coeff: Largest norm.
            margin: Number that the code adds to the divisor.
        """
        cout, cin, *taps = shape
        side, (high, wide) = math.isqrt(self.size(f"{name}.{names[2]}") // cin), taps or (1, 1)
        kernel, u, v = (
            self.take(f"{name}.{each}", *own)
            for each, own in zip(names, (shape, (cout * side**2,), (cin * side**2,)), strict=True)
        )
        padding = ((0, 0), (high // 2, high // 2), (wide // 2, wide // 2))
        padded = np.pad(v.reshape(cin, side, side), padding)
        each_tap = kernel.reshape(cout, cin, high, wide)
        image = sum(
            np.tensordot(each_tap[:, :, i, j], padded[:, i : i + side, j : j + side], 1)
            for i, j in np.ndindex(high, wide)
        )
        divisor = max(1.0, float(np.vdot(u, image)) / coeff) + margin
        return Layer(kernel / divisor, self.take(f"{name}.bias", cout))

    def size(self, name: str) -> int:
        """Number of entries of an array that will be taken; 0 if it is missing."""
        return np.size(self._left.get(name, ()))

    def ignore(self, *beginnings: str) -> None:
        """Marks the arrays whose names begin like this as unused."""
        for name in [name for name in self._left if name.startswith(beginnings)]:
            del self._left[name]

    def check(self, source: str) -> None:
        """Raises ``ValueError`` if arrays are left over; the message names them."""
        left = [name for name in self._left if name.rpartition(".")[2] not in UNUSED]
        if left:
            raise ValueError(
                f"{', '.join(left[:12])} are no arrays of {source}: give the command that trained "
                "the network"
            )


class Layer(NamedTuple):
    """A linear layer in PyTorch's layout, as it is applied, with the activation in front of it.

    Attributes:
        kernel: ``(cout, cin, k, k)`` of a convolution, ``(cout, cin)`` of a dense layer.
        bias: One number per output channel.
        beta: Sharpness of the activation in front of the layer, if it has one.
    """

    kernel: Float[np.ndarray, "..."]
    bias: Float[np.ndarray, " cout"]
    beta: float | None = None


class Stages:
    """Collects the stages and parameters of a flow.

    Args:
        shape: Shape of one example, ``(h, w, c)`` or ``(d,)``.
        actnorm: Whether the other code has ActNorm at all.
    """

    def __init__(self, shape: tuple[int, ...], *, actnorm: bool):
        self._shape, self._has_actnorm = tuple(shape), actnorm
        self._specs: list[dict[str, Any]] = []
        self._blocks: list[list[dict[str, dict[str, np.ndarray]]]] = []
        self._latents: list[np.ndarray] = []
        self._theirs = np.arange(shape[-1])  # their channel for each channel here
        # An ActNorm that no branch follows yet, in the order here.
        self._actnorm: tuple[np.ndarray, np.ndarray] | None = None
        self._squeeze, self._order = 1, None  # of the next stage

    @property
    def num_channels(self) -> int:
        """Channels of an image, or entries of a vector, where the collection stands."""
        return self._shape[-1]

    @property
    def num_entries(self) -> int:
        """Entries of an example where the collection stands."""
        return math.prod(self._shape)

    def squeeze(self, *, channel_major: bool) -> None:
        """A squeeze by 2, whose channels list the pixels of a patch, or with ``channel_major``
        each channel's pixels.
        """
        if self._is_moved:
            self._append_zero_branch()
        space, channels = self._shape[:-1], self.num_channels
        self._shape, self._squeeze = (*(side // 2 for side in space), 4 * channels), 2
        self._theirs = np.arange(4 * channels)
        self._move_actnorm(np.tile(np.arange(channels), 4))
        if channel_major:
            self.order(self._theirs.reshape(4, channels).T.ravel())
            self._theirs = np.arange(4 * channels)

    def order(self, order: Int[np.ndarray, " c"]) -> None:
        """Changes the order of channels here, ``i`` where ``order[i]`` was, and not theirs."""
        self._order = order if self._order is None else self._order[order]
        self._theirs = self._theirs[order]
        self._move_actnorm(order)

    def actnorm(self, bias: Float[np.ndarray, " c"], log_scale: Float[np.ndarray, " c"]) -> None:
        """An ActNorm ``(x + bias) exp(log_scale)``."""
        self._actnorm = bias[self._theirs], log_scale[self._theirs]

    def block(self, layers: Sequence[Layer], activation: str, *, preactivation: bool) -> None:
        """A residual block ``x + g(x)`` with an activation between layers and, with
        ``preactivation``, in front.
        """
        is_dense = layers[0].kernel.ndim == 2
        if is_dense and len(self._shape) > 1:
            self._flatten()
        weights, entries = {}, self._theirs
        for i, layer in enumerate(layers):
            out = self._theirs if i == len(layers) - 1 else np.arange(len(layer.bias))
            kernel = layer.kernel[out][:, entries]
            kernel = kernel.T if is_dense else kernel.transpose(2, 3, 1, 0)
            arrays = {"kernel": kernel, "bias": layer.bias[out]}
            if layer.beta is not None:
                arrays["beta"] = np.asarray(layer.beta)
            weights[f"{'dense' if is_dense else 'conv'}{i}"] = arrays
            entries = out
        spec = {
            "hidden": tuple(len(layer.bias) for layer in layers[:-1]),
            "kernel_sizes": None if is_dense else tuple(layer.kernel.shape[2] for layer in layers),
            "activation": activation,
            "preactivation": preactivation,
        }
        bias, log_scale = self._actnorm or (np.zeros(self.num_channels),) * 2
        weights["actnorm"] = {"bias": bias, "log_scale": log_scale}
        before = self._specs[-1:]
        if self._is_moved or not before or before[0] != {**before[0], **spec, "factor_out": False}:
            order = None if self._order is None else tuple(self._order.tolist())
            place = {"squeeze": self._squeeze, "channel_order": order, "factor_out": False}
            self._specs.append({**spec, **place})
            self._blocks.append([])
        self._blocks[-1].append(weights)
        self._squeeze, self._order, self._actnorm = 1, None, None

    def factor_out(self) -> None:
        """The second half of the channels here leaves as latents."""
        half = self.num_channels // 2
        self._complete_stage()
        self._specs[-1]["factor_out"] = True
        space = self._shape[:-1]
        self._leave((*space, half), self._theirs[half:] - self._theirs[half:].min())
        self._shape, self._theirs = (*space, half), self._theirs[:half] - self._theirs[:half].min()

    def finish(self) -> tuple[tuple[StageSpec, ...], dict[str, Any], Int[np.ndarray, " d"]]:
        """The stages, their parameters, and for each latent here its place among theirs."""
        self._complete_stage()
        self._leave(self._shape, self._theirs)
        stages, params = [], {}
        for i, (spec, blocks) in enumerate(zip(self._specs, self._blocks, strict=True)):
            stages.append(StageSpec(num_blocks=len(blocks), actnorm=self._has_actnorm, **spec))
            params[f"stage{i}"] = {
                "blocks": jax.tree.map(lambda *arrays: np.stack(arrays), *blocks)
            }
        return tuple(stages), params, np.concatenate(self._latents)

    def _complete_stage(self) -> None:
        """Makes sure that a branch follows all maps so far."""
        if not self._specs or self._is_moved or self._actnorm is not None:
            self._append_zero_branch()

    @property
    def _is_moved(self) -> bool:
        """Whether a squeeze or an order of channels waits for a branch."""
        return self._squeeze > 1 or self._order is not None

    def _flatten(self) -> None:
        *space, channels = self._shape
        self._move_actnorm(np.tile(np.arange(channels), math.prod(space)))
        self._theirs = _flat(self._shape, self._theirs)
        self._shape = (math.prod(self._shape),)

    def _move_actnorm(self, index: Int[np.ndarray, " c"]) -> None:
        """Moves the remaining ActNorm past a map of entries, in which entry ``i`` comes from
        channel ``index[i]``.
        """
        if self._actnorm is not None:
            bias, log_scale = self._actnorm
            self._actnorm = bias[index], log_scale[index]

    def _append_zero_branch(self) -> None:
        """A block that consists of its ActNorm."""
        channels, taps = self.num_channels, (1, 1) if len(self._shape) == 3 else ()
        sizes = ((1, channels), (channels, 1))
        layers = [Layer(np.zeros((out, inside, *taps)), np.zeros(out)) for out, inside in sizes]
        self.block(layers, "identity", preactivation=False)

    def _leave(self, shape: tuple[int, ...], theirs: Int[np.ndarray, " c"]) -> None:
        self._latents.append(sum(map(len, self._latents)) + _flat(shape, theirs))


def _flat(shape: tuple[int, ...], theirs: Int[np.ndarray, " c"]) -> Int[np.ndarray, " d"]:
    """For each entry of the flattened array here, its place in theirs, which has channels first."""
    *space, channels = shape
    places = np.arange(math.prod(shape)).reshape(channels, *space)[theirs]
    return np.moveaxis(places, 0, -1).ravel()
