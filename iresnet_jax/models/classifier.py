"""A classifier on the features of an invertible network, and the way from the features back to the image.

    pixels --normalise, pad with channels of zeros--> F --> features --BatchNorm, ReLU, average pool, linear--> logits

(Behrmann et al. 2019, sec. 3 and 5.1). Only the head loses information: ``F`` takes images to features injectively, and its
inverse takes features to padded arrays, whose padding channels say how far they are from those of any image. All functions are
pure; weights are those of `model.constrain`, `model.freeze` or, for networks without a constraint, `model.unconstrained`.

The network to compare with has BatchNorm inside its branches instead of ActNorm between them, and no inverse; its weights are
its parameters as they are.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int, Num

from iresnet_jax.bijections import bijection as bijections
from iresnet_jax.bijections import reshape
from iresnet_jax.maths.inverse.fixed_point import FixedPointInfo
from iresnet_jax.maths.lipschitz import BiLipschitz, model_bounds
from iresnet_jax.models import branch as branches
from iresnet_jax.models import flow as model

BATCH_NORM_EPS = 1e-5

NORMALIZATIONS = ("actnorm", "batchnorm")

Statistics = Mapping[str, Float[Array, " c"]]  # "mean" and "var" of every channel
Tree = Mapping[str, Any]


@dataclass(frozen=True)
class ClassifierSpec:
    """The classifier without its weights.

    Attributes:
        flow: The network's architecture, on images with their padding channels.
        image_shape: Height, width and channels of an image.
        num_classes: Classes, at least 2.
        num_levels: Grey levels of a pixel.
        pad_channels: Channels of zeros behind those of the image; they make the network wider.
        mean: Of pixels in [0, 1], one a channel or one for all; subtracted.
        std: What the difference is divided by, in the same form.
        constrained: Whether blocks are contractions. False is an ordinary residual network, of which no inverse is promised.
        normalization: "actnorm" in front of every branch, or "batchnorm" inside of it, in front of every layer.
    """

    flow: model.FlowSpec
    image_shape: tuple[int, int, int]
    num_classes: int
    num_levels: int = 256
    pad_channels: int = 0
    mean: tuple[float, ...] = (0.5,)
    std: tuple[float, ...] = (0.5,)
    constrained: bool = True
    normalization: str = "actnorm"

    def __post_init__(self):
        if self.num_classes < 2:
            raise ValueError(f"num_classes must be at least 2, got {self.num_classes}: the data set needs labels")
        if self.pad_channels < 0:
            raise ValueError(f"pad_channels must not be negative, got {self.pad_channels}; 0 is no padding")
        height, width, channels = self.image_shape
        padded = (height, width, channels + self.pad_channels)
        if tuple(self.flow.event_shape) != padded:
            raise ValueError(f"the flow of this classifier starts from padded images {padded}, not {self.flow.event_shape}")
        if any(stage.factor_out for stage in self.flow.stages):
            raise ValueError("a classifier looks at all features: no stage may factor_out channels")
        for name, values in (("mean", self.mean), ("std", self.std)):
            if len(values) not in (1, channels):
                raise ValueError(f"{name} must have 1 or {channels} entries for {channels} channels, got {tuple(values)}")
        if self.normalization not in NORMALIZATIONS:
            raise ValueError(f"normalization must be one of {', '.join(NORMALIZATIONS)}, got {self.normalization!r}")
        if self.constrained and self.normalization == "batchnorm":
            raise ValueError("BatchNorm inside a branch leaves it without a Lipschitz bound: set constraint.norms to none")
        if min(self.std) <= 0:
            raise ValueError(f"std must be positive, got {tuple(self.std)}")

    @property
    def feature_shape(self) -> tuple[int, ...]:
        """Shape of an image's features, ``(h, w, c)`` or, after dense blocks, ``(d,)``."""
        return self.flow.branches[-1].in_shape

    @property
    def is_bijective(self) -> bool:
        """Whether the network is a `model.bijection`, with an inverse to try at least."""
        return self.normalization == "actnorm"


class Reconstruction(NamedTuple):
    """Images that belong to features.

    Attributes:
        images: With pixels on the scale of [0, 1], which they may leave.
        padding_residual: Euclidean norm of the padding channels, in the units of the network's input: 0 for the features of
            an image, and the distance from those of all images otherwise.
        info: How the inverse ended; its error bound is in the units of the network's input.
    """

    images: Float[Array, "b h w c"]
    padding_residual: Float[Array, " b"]
    info: FixedPointInfo


def preprocess(spec: ClassifierSpec, images: Num[Array, "b h w c"]) -> Float[Array, "b h w d"]:
    """The network's input for images of integer levels: scaled to [0, 1], normalised, padded."""
    return pad(spec, images.astype(jnp.result_type(float)) / (spec.num_levels - 1))


def pad(spec: ClassifierSpec, images: Float[Array, "b h w c"]) -> Float[Array, "b h w d"]:
    """The network's input for images with pixels in [0, 1]."""
    mean, std = _by_channel(spec.mean, images), _by_channel(spec.std, images)
    return reshape.pad_channels((images - mean) / std, spec.pad_channels)


def unpad(spec: ClassifierSpec, x: Float[Array, "b h w d"]) -> Float[Array, "b h w c"]:
    """Images with pixels on the scale of [0, 1] for inputs of the network, whatever their padding channels hold."""
    images = reshape.unpad_channels(x, spec.pad_channels)
    return images * _by_channel(spec.std, images) + _by_channel(spec.mean, images)


def input_bounds(spec: ClassifierSpec) -> BiLipschitz:
    """Bounds of the Lipschitz constants of `pad` and of its inverse."""
    return model_bounds([], [-jnp.log(jnp.array(spec.std))])


def features(
    spec: ClassifierSpec, weights: Any, x: Float[Array, "b ..."], *, unroll: bool = False, rematerialize: bool = False
) -> Float[Array, "b ..."]:
    """``F(x)`` as an array with channels last, of `ClassifierSpec.feature_shape`.

    Args:
        spec: The model.
        weights: Of the flow.
        x: Inputs, from `preprocess` or `pad`.
        unroll: See `model.bijection`.
        rematerialize: See `model.bijection`.

    Raises:
        ValueError: If the network has BatchNorm in its branches.
    """
    if not spec.is_bijective:
        raise ValueError("a network with BatchNorm in its branches has no inverse: features and reconstructions take ActNorm")
    bijection = model.bijection(spec.flow, weights, unroll=unroll, rematerialize=rematerialize)
    return reshape.unflatten(bijection.forward(x), spec.feature_shape)


def reconstruct(
    spec: ClassifierSpec,
    weights: Any,
    features: Float[Array, "b ..."],
    solver: bijections.Solver = bijections.Solver(),  # noqa: B008 (immutable)
    *,
    unroll: bool = False,
) -> Reconstruction:
    """The images that features belong to (Behrmann et al. 2019, fig. 3 and 6).

    Without a constraint the iteration may not converge, or to another image; `Reconstruction.info` promises nothing then.
    """
    x, info = model.bijection(spec.flow, weights, solver=solver, unroll=unroll).inverse(reshape.flatten(features))
    return Reconstruction(unpad(spec, x), reshape.padding_residual(x, spec.pad_channels), info)


def batch_statistics(x: Float[Array, "b ... c"], *, axis_name: str | None = None) -> dict[str, Float[Array, " c"]]:
    """Mean and (biased) variance of every channel over the batch and all positions.

    Args:
        x: A batch.
        axis_name: Mapped axis that the batch is spread over in equal shares: the statistics are those of the whole batch.
    """
    over_devices = (lambda value: value) if axis_name is None else (lambda value: lax.pmean(value, axis_name))
    axes = tuple(range(x.ndim - 1))
    mean = over_devices(jnp.mean(x, axis=axes))
    var = over_devices(jnp.mean(jnp.square(x - _by_channel(mean, x)), axis=axes))  # two passes: a large mean costs no digits
    return {"mean": mean, "var": var}


def batch_norm(params: Mapping[str, Array], statistics: Statistics, x: Float[Array, "b ... c"]) -> Float[Array, "b ... c"]:
    """``scale (x - mean) / sqrt(var + eps) + bias`` by channel (Ioffe and Szegedy 2015)."""
    mean, var, scale, bias = (
        _by_channel(a, x) for a in (statistics["mean"], statistics["var"], params["scale"], params["bias"])
    )
    return (x - mean) * (scale * lax.rsqrt(var + BATCH_NORM_EPS)) + bias


def head(params: Any, statistics: Statistics, features: Float[Array, "b ... c"]) -> Float[Array, "b k"]:
    """Logits of features: BatchNorm, ReLU, average over all positions, linear.

    Args:
        params: ``{"norm": {"scale", "bias"}, "linear": {"kernel", "bias"}}``.
        statistics: Of the batch in training, see `batch_statistics`; running averages of those after it.
        features: From `features`.
    """
    return _linear(params["linear"], _pooled(params, statistics, features))


def _pooled(params, statistics, features):
    h = jax.nn.relu(batch_norm(params["norm"], statistics, features))
    return jnp.mean(h, axis=tuple(range(1, h.ndim - 1)))


def _linear(params, pooled):
    return pooled @ params["kernel"] + params["bias"].reshape(1, -1)


def logits(
    spec: ClassifierSpec, weights: Any, head_params: Any, statistics: Tree, x: Float[Array, "b ..."]
) -> Float[Array, "b k"]:
    """Logits of inputs from `preprocess` or `pad`, by running averages.

    Args:
        spec: The model.
        weights: Of the flow.
        head_params: See `head`.
        statistics: Running averages of those that `training_logits` returns.
        x: Inputs.
    """
    return pooled_and_logits(spec, weights, head_params, statistics, x)[1]


def pooled_and_logits(
    spec: ClassifierSpec, weights: Any, head_params: Any, statistics: Tree, x: Float[Array, "b ..."]
) -> tuple[Float[Array, "b c"], Float[Array, "b k"]]:
    """What the head's linear layer sees, and its logits; arguments as in `logits`."""
    h = features(spec, weights, x) if spec.is_bijective else _batchnorm_features(spec, weights, x, statistics=statistics)[0]
    pooled = _pooled(head_params, statistics["head"], h)
    return pooled, _linear(head_params["linear"], pooled)


def training_logits(
    spec: ClassifierSpec,
    weights: Any,
    head_params: Any,
    x: Float[Array, "b ..."],
    *,
    axis_name: str | None = None,
    unroll: bool = False,
    rematerialize: bool = False,
) -> tuple[Float[Array, "b k"], dict[str, Any]]:
    """Logits by the statistics of the batch, and those statistics: of the ``head``, and of every stage with BatchNorm.

    Args:
        spec: The model.
        weights: Of the flow.
        head_params: See `head`.
        x: Inputs.
        axis_name: See `batch_statistics`.
        unroll: See `model.bijection`.
        rematerialize: See `model.bijection`; not for BatchNorm in the branches.
    """
    if spec.is_bijective:
        h, statistics = features(spec, weights, x, unroll=unroll, rematerialize=rematerialize), {}
    else:
        h, statistics = _batchnorm_features(spec, weights, x, axis_name=axis_name, unroll=unroll)
    own = batch_statistics(h, axis_name=axis_name)
    return head(head_params, own, h), {**statistics, "head": own}


def batchnorm_blocks(
    branch: branches.BranchSpec,
    blocks: Tree,
    x: Float[Array, "b ..."],
    *,
    statistics: Tree | None = None,
    axis_name: str | None = None,
    unroll: bool = False,
) -> tuple[Float[Array, "b ..."], Tree]:
    """The residual blocks of one stage with BatchNorm in front of every layer of their branch.

    Args:
        branch: The branch.
        blocks: Its weights and ``{"batchnorm": {layer: {"scale", "bias"}}}``, stacked over blocks.
        x: Inputs.
        statistics: By layer, stacked over blocks, to normalise by; those of the batch by default.
        axis_name: See `batch_statistics`.
        unroll: Write blocks out instead of scanning over them.

    Returns:
        The output and the statistics that were used.
    """

    def step(x, block):
        (norms, weights), given = block
        used = {}

        def normalize(layer, h):
            used[layer] = batch_statistics(h, axis_name=axis_name) if given is None else given[layer]
            return batch_norm(norms[layer], used[layer], h)

        return x + branches.apply_branch(branch, weights, x, before_layer=normalize), used

    weights = {name: layer for name, layer in blocks.items() if name != "batchnorm"}
    return lax.scan(step, x, ((blocks["batchnorm"], weights), statistics), unroll=unroll)


def _batchnorm_features(spec, weights, x, *, statistics=None, axis_name=None, unroll=False):
    used = {}
    for name, stage, branch in zip(model.stage_names(spec.flow), spec.flow.stages, spec.flow.branches, strict=True):
        x = model.into_stage(stage, branch, x)
        given = None if statistics is None else statistics[name]["blocks"]
        settings = {"statistics": given, "axis_name": axis_name, "unroll": unroll}
        x, own = batchnorm_blocks(branch, weights[name]["blocks"], x, **settings)
        used[name] = {"blocks": own}
    return x, used


def cross_entropy(logits: Float[Array, "b k"], labels: Int[Array, " b"], *, label_smoothing: float = 0.0) -> Float[Array, " b"]:
    r"""``-sum_k q_k log p_k`` in nats with ``q = (1 - s) onehot + s / K`` (Szegedy et al. 2016, sec. 7).

    Args:
        logits: ``K`` an example.
        labels: Classes, in ``[0, K)``.
        label_smoothing: ``s`` in [0, 1); 0 is the plain cross-entropy.

    Raises:
        ValueError: If ``label_smoothing`` is out of range.
    """
    check_label_smoothing(label_smoothing)
    log_p = jax.nn.log_softmax(logits)
    of_label = jnp.take_along_axis(log_p, labels[:, None], axis=1)[:, 0]
    return -(1 - label_smoothing) * of_label - label_smoothing * jnp.mean(log_p, axis=1)


def check_label_smoothing(label_smoothing: float) -> None:
    """Raises ``ValueError`` unless ``label_smoothing`` is in [0, 1)."""
    if not 0 <= label_smoothing < 1:
        raise ValueError(f"label_smoothing must lie in [0, 1), got {label_smoothing}: 0 is none, .1 is usual")


def _by_channel(values: tuple[float, ...] | Float[Array, " c"], x: Array) -> Float[Array, "..."]:
    """Gives one value a channel, or one for all, as many axes as ``x``."""
    return jnp.asarray(values, x.dtype).reshape((1,) * (x.ndim - 1) + (-1,))
