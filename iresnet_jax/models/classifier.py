"""A classifier as a value: the features of an invertible network and a head, and the way from
features back to images; and the loss of its logits.

    levels --scale to [0, 1], normalise, pad with channels of zeros--> F --> features --head-->
    logits

(Behrmann et al. 2019, sec. 3 and 5.1). Only the head loses information: ``F`` takes images to
features injectively, and its inverse takes features to padded arrays, whose padding channels say
how far they are from those of any image.

Without a constraint ``F`` is an ordinary residual network to compare with, and no inverse is
promised.

The head "pooled" is BatchNorm, ReLU, average over all positions, linear. "linear" is products of
all features with unit vectors: the difference of two logits is ``|w_i - w_j|``-Lipschitz in the
features, at most by a factor of 2 (Singla et al. 2022).
"""

import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int, Key, Num

from iresnet_jax.arguments import Positive, check_unmasked, checked
from iresnet_jax.bijections import reshape
from iresnet_jax.bijections.actnorm import channel_moments
from iresnet_jax.bijections.dequantize import check_levels, known_levels
from iresnet_jax.maths.fixed_point import FixedPointInfo
from iresnet_jax.maths.lipschitz_bounds import BiLipschitz
from iresnet_jax.maths.platforms import fast_compile
from iresnet_jax.models.architecture import FlowSpec, StageSpec
from iresnet_jax.models.contractions import Tree
from iresnet_jax.models.flow import FlowWeights
from iresnet_jax.models.free import initial
from iresnet_jax.models.model import DecodeInfo, History, How, Model
from iresnet_jax.pytrees import pytree

BATCH_NORM_EPS = 1e-5

Images = Num[Array, "... h w c"] | Num[np.ndarray, "... h w c"]
Statistics = Mapping[str, Float[Array, " c"]]  # "mean" and "var" of every channel


@pytree()
class ClassifierSpec:
    """All that defines a classifier but its weights.

    Attributes:
        flow: Architecture of the network, on images with their padding channels.
        image_shape: Height, width and channels of an image.
        num_classes: Number of classes, at least 2.
        num_levels: Grey levels of a pixel.
        pad_channels: Channels of zeros after those of the image; they make the network wider.
        mean: Mean of pixels in [0, 1], one per channel or one for all; subtracted.
        std: Divisor of the difference, in the same form.
        constrained: Whether blocks are contractions. False is an ordinary residual network, of
            which no inverse is promised.
        head: "pooled" or "linear".
    """

    flow: FlowSpec
    image_shape: tuple[int, int, int]
    num_classes: int
    num_levels: int = 256
    pad_channels: int = 0
    mean: tuple[float, ...] = (0.5,)
    std: tuple[float, ...] = (0.5,)
    constrained: bool = True
    head: str = "pooled"

    def __post_init__(self):
        if any(stage.factor_out for stage in self.flow.stages):
            raise ValueError("a classifier looks at all features: no stage may factor_out channels")
        for each in self.std:  # else its bounds were none
            checked(Positive, each, "std")

    @property
    def context_dim(self) -> int:
        """Length of a context vector: 0, as classifiers have none."""
        return 0

    def context_numbers(self, context: Any) -> Any:
        """Contexts as they are, for the flow to refuse."""
        return context

    def numbers(self, images: Any) -> Any:
        """Images as they are."""
        return images

    def checked(self, images: Any) -> Any:
        """Images, if they are what the model takes."""
        check_levels(images, self.num_levels, self.image_shape)
        return images

    @property
    def example_shape(self) -> tuple[int, ...]:
        """Shape of one image."""
        return self.image_shape

    @property
    def feature_shape(self) -> tuple[int, ...]:
        """Shape of an image's features, ``(h, w, c)`` or, after dense blocks, ``(d,)``."""
        return self.flow.layout[-1].branch.in_shape

    def pad(self, images: Float[Array, "b h w c"]) -> Float[Array, "b h w d"]:
        """The network's input for images with pixels in [0, 1]."""
        x = (images - by_channel(self.mean, images)) / by_channel(self.std, images)
        return jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, self.pad_channels)])

    def unpad(self, x: Float[Array, "b h w d"]) -> Float[Array, "b h w c"]:
        """Images with pixels on the scale of [0, 1] for inputs of the network, whatever their
        padding channels hold.
        """
        images = x[..., : x.shape[-1] - self.pad_channels]
        return images * by_channel(self.std, images) + by_channel(self.mean, images)

    def initial_arrays(self, key: Key[Array, ""]) -> dict[str, Any]:
        """Fresh arrays of a `Classifier` beside its weights, by its fields: a random head,
        statistics of normal features.

        Logits of normalised features have a variance of about one half if the head is pooled.
        """
        channels = self.feature_shape[-1]
        num = {"pooled": channels, "linear": math.prod(self.feature_shape)}[self.head]
        kernel = jax.random.normal(key, (num, self.num_classes)) / jnp.sqrt(num)
        head = {"linear": {"kernel": kernel, "bias": jnp.zeros(self.num_classes)}}
        if self.head == "linear":
            return {"head": head, "statistics": {}}
        zeros, ones = jnp.zeros(channels), jnp.ones(channels)
        head = {"norm": {"scale": ones, "bias": zeros}, **head}
        return {"head": head, "statistics": {"head": {"mean": zeros, "var": ones}}}

    def statistics_of(
        self, features: Float[Array, "b ... c"], *, axis_name: str | None = None
    ) -> dict[str, Statistics]:
        """What `apply_head` needs of a batch beside the parameters: mean and (biased) variance of
        every channel over all positions and the batch, which may be spread over a mapped axis;
        nothing if the head is linear.
        """
        if self.head == "linear":
            return {}
        mean, var = channel_moments(features, axis_name)
        return {"head": {"mean": mean, "var": var}}

    def fitted(self, z: Float[Array, "b d"], labels: Any = None) -> dict[str, Any]:
        """What of `initial_arrays` is fitted to features: the statistics of the head."""
        del labels
        return {"statistics": self.statistics_of(reshape.unflatten(z, self.feature_shape))}

    def preprocess(self, images: Images, key: Any = None) -> Float[Array, "b h w d"]:
        """The network's input for images: scaled to [0, 1], normalised, padded; levels out of
        range become NaN.
        """
        del key
        return self.pad(self.scaled(images))

    def scaled(self, images: Images) -> Float[Array, "b h w c"]:
        """Images with pixels in [0, 1]; levels out of range become NaN."""
        check_levels(images, self.num_levels, self.image_shape)
        return known_levels(jnp.asarray(images), self.num_levels) / (self.num_levels - 1)

    def bilipschitz(self) -> BiLipschitz:
        """Bounds of the Lipschitz constants of `pad` and of its inverse."""
        return BiLipschitz.of(1 / min(self.std), max(self.std))


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["spec", "weights", "head", "statistics", "how"],
    meta_fields=[],
    drop_fields=["history"],
)
@dataclass(frozen=True, eq=False, repr=False)
class Classifier(Model, spec=ClassifierSpec):
    """A classifier with its weights, and how to run it. A pytree: ``jit``, ``vmap`` and ``grad``
    take it as an argument.

    Methods take images of integer levels, as the data set has them. `logits`, `encode` and
    `decode` take one example, a batch or any leading axes, which their results have too; other
    methods take batches.

    Attributes:
        spec: All that defines the model but its weights.
        weights: Weights of the flow, as `freeze`, `constrain` or `unconstrained` of `contractions`
            give them.
        head: Parameters of the head, see `apply_head`.
        statistics: Running averages of the BatchNorm in the "head"; empty if it is linear.
        how: How it runs: inverse of the blocks.
        history: What the training of a fitted model saw; programs and ``tree.map`` drop it.
    """

    arrays: ClassVar[tuple[str, ...]] = ("head", "statistics")

    spec: ClassifierSpec
    weights: FlowWeights | Tree
    head: Tree
    statistics: Tree
    how: How = How()
    history: History | None = None

    @classmethod
    def init(
        cls,
        key: Key[Array, ""],
        images: Any,
        num_classes: int,
        *,
        stages: Sequence[StageSpec],
        coeff: float = 0.9,
        budget: str = "layer",
        num_levels: int = 256,
        pad_channels: int = 0,
        mean: tuple[float, ...] = (0.5,),
        std: tuple[float, ...] = (0.5,),
        head: str = "pooled",
    ) -> "Classifier":
        """A classifier with random weights, ActNorm and the head's statistics fitted to images:
        certified, and ready to train.

        The statistics of the head stay those of these images under any loss of one's own.

        Args:
            key: Source of the weights.
            images: Images of integer levels ``(n, h, w, c)`` as the model will see them, some
                hundred or more.
            num_classes: Number of classes, at least 2.
            stages: Stages of the network, none of which factors out.
            coeff: See `FlowSpec`, also for ``budget``.
            num_levels: See `ClassifierSpec`, also for ``pad_channels``, ``mean``, ``std`` and
                ``head``.
        """
        check_unmasked(images, "images")
        images = np.asarray(images)
        height, width, channels = images.shape[1:]
        flow = FlowSpec((height, width, channels + pad_channels), tuple(stages), coeff, budget)
        mean, std = (
            tuple(np.atleast_1d(np.asarray(values, float)).tolist()) for values in (mean, std)
        )
        numbers = num_classes, num_levels, pad_channels
        spec = ClassifierSpec(flow, (height, width, channels), *numbers, mean, std, head=head)
        return initial(spec, key, spec.checked(images)).certified()

    def encode(self, x: Images, key: Any = None, *, context: Any = None) -> Float[Array, "... d"]:
        """Features of images, as vectors; a classifier takes no key and no context."""
        del key
        examples = self._examples(x, context)
        return examples.restore(_features(self, self.preprocess(examples.x), examples.context))

    def logits(
        self, images: Images, key: Any = None, *, context: Any = None
    ) -> Float[Array, "... k"]:
        """Logits of images, by running averages; a classifier takes no key and no context."""
        del key
        examples = self._examples(images, context)
        return examples.restore(_logits(self, self.preprocess(examples.x), examples.context))

    # ------------------------------------------------------------------------------------ its parts

    def preprocess(self, images: Images, key: Any = None) -> Float[Array, "b h w d"]:
        """The network's input for images: scaled to [0, 1], normalised, padded; levels out of
        range become NaN.
        """
        return self.spec.preprocess(images, key)

    def dequantize(self, images: Images, key: Any = None) -> Float[Array, "b h w c"]:
        """Images on the scale of [0, 1]."""
        del key
        return self.spec.scaled(images)

    def to_data(
        self, x: Float[Array, "b ..."], info: FixedPointInfo
    ) -> tuple[Float[Array, "b h w c"], DecodeInfo]:
        """Images on the scale of [0, 1], which they may leave, of inputs of the network that its
        inverse found, and `info` of that in their units.
        """
        images, padding = self.spec.unpad(x), self.spec.pad_channels
        whole = info._replace(error_bound=max(self.spec.std) * info.error_bound)
        residual = reshape.padding_residual(x, padding)
        return images, DecodeInfo(*whole[:4], x, info.error_bound, images, residual)

    def features_of_input(
        self, x: Float[Array, "b ..."], context: Any = None
    ) -> Float[Array, "b ..."]:
        """Features of an input of the network, such as `preprocess` gives."""
        features = self.flow_of(self.spec.flow, self.weights, context).forward(x)
        return reshape.unflatten(features, self.spec.feature_shape)

    def logits_of_input(self, x: Float[Array, "b ..."], context: Any = None) -> Float[Array, "b k"]:
        """Logits of an input of the network."""
        return apply_head(self.head, self.statistics, self.features_of_input(x, context))


# One program each, as those of a density are.
_logits = fast_compile(lambda model, x, context: model.logits_of_input(x, context))
_features = fast_compile(lambda model, x, context: model.flow(context).forward(x))


# --------------------------------------------------------------------------------- head and loss


def apply_head(
    params: Any, statistics: Mapping[str, Statistics], features: Float[Array, "b ... c"]
) -> Float[Array, "b k"]:
    """Logits of features.

    BatchNorm is ``scale (x - mean) / sqrt(var + eps) + bias`` by channel (Ioffe and Szegedy 2015).

    Args:
        params: ``{"norm": {"scale", "bias"}, "linear": {"kernel", "bias"}}``, of a linear head
            without "norm".
        statistics: `ClassifierSpec.statistics_of` the batch in training; running averages
            after it.
        features: Array with channels last.
    """
    linear = params["linear"]
    if "norm" not in params:
        return reshape.flatten(features) @ _unit_columns(params) + linear["bias"].reshape(1, -1)
    norm, own = params["norm"], statistics["head"]
    mean, var, scale, bias = (
        by_channel(a, features) for a in (own["mean"], own["var"], norm["scale"], norm["bias"])
    )
    h = jax.nn.relu((features - mean) * (scale * lax.rsqrt(var + BATCH_NORM_EPS)) + bias)
    pooled = jnp.mean(h, axis=tuple(range(1, h.ndim - 1)))
    return pooled @ linear["kernel"] + linear["bias"].reshape(1, -1)


def _unit_columns(params: Any) -> Float[Array, "d k"]:
    kernel = params["linear"]["kernel"]
    return kernel / jnp.linalg.norm(kernel, axis=0, keepdims=True)


def distances(params: Any) -> Float[Array, "k k"]:
    """``|w_i - w_j|`` of a linear head: Lipschitz constants of differences of logits in the
    features.
    """
    unit = _unit_columns(params)
    same = jnp.eye(unit.shape[1], dtype=bool)
    # a root of 0 has no slope
    squares = jnp.where(same, 1, jnp.maximum(2 - 2 * unit.T @ unit, jnp.finfo(unit.dtype).eps))
    return jnp.where(same, 0, jnp.sqrt(squares))


def cross_entropy(
    logits: Float[Array, "b k"], labels: Int[Array, " b"], *, label_smoothing: float = 0.0
) -> Float[Array, " b"]:
    """``-sum_k q_k log p_k`` in nats with ``q = (1 - s) onehot + s / K`` (Szegedy et al. 2016, sec.
    7); ``s`` is ``label_smoothing``.
    """
    log_p = jax.nn.log_softmax(logits)
    of_label = jnp.take_along_axis(log_p, labels[:, None], axis=1)[:, 0]
    return -(1 - label_smoothing) * of_label - label_smoothing * jnp.mean(log_p, axis=1)


def by_channel(values: tuple[float, ...] | Float[Array, " c"], x: Array) -> Float[Array, "..."]:
    """Gives one value a channel, or one for all, as many axes as ``x``."""
    return jnp.asarray(values, x.dtype).reshape((1,) * (x.ndim - 1) + (-1,))
