"""A classifier as a value: the features of an invertible network and a head, and the way from
features back to images.

    levels --scale to [0, 1], normalise, pad with channels of zeros--> F --> features --head-->
    logits

(Behrmann et al. 2019, sec. 3 and 5.1). Only the head loses information: ``F`` takes images to
features injectively, and its inverse takes features to padded arrays, whose padding channels say
how far they are from those of any image.

Without a constraint ``F`` is an ordinary residual network to compare with, and no inverse is
promised.
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Key, Num

from iresnet_jax.arguments import check_unmasked
from iresnet_jax.bijections import reshape
from iresnet_jax.bijections.dequantize import check_levels, known_levels
from iresnet_jax.maths.fixed_point import FixedPointInfo
from iresnet_jax.maths.lipschitz_bounds import BiLipschitz
from iresnet_jax.maths.platforms import fast_compile
from iresnet_jax.models import initial
from iresnet_jax.models.architecture import FlowSpec, StageSpec
from iresnet_jax.models.contractions import Tree
from iresnet_jax.models.flow import FlowWeights
from iresnet_jax.models.head import (
    apply_head,
    batch_statistics,
    by_channel,
    initial_head,
    statistics_of,
)
from iresnet_jax.models.model import DecodeInfo, History, How, Model
from iresnet_jax.models.preprocessing import Examples, as_batch
from iresnet_jax.pytrees import pytree

Images = Num[Array, "... h w c"] | Num[np.ndarray, "... h w c"]


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
        head: "pooled" or "linear", see `iresnet_jax.models.head`.
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
        if not min(self.std) > 0:  # else its bounds were none
            raise ValueError(f"std must be positive, got {self.std}")

    @property
    def context_dim(self) -> int:
        """Length of a context vector: 0, as classifiers have none."""
        return 0

    def context_numbers(self, context: Any) -> Any:
        """Contexts as they are, for the flow to refuse."""
        return context

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
        """
        channels = self.feature_shape[-1]
        of_features = {"head": {"mean": jnp.zeros(channels), "var": jnp.ones(channels)}}
        head = initial_head(key, self.feature_shape, self.num_classes, self.head)
        return {"head": head, "statistics": of_features if "norm" in head else {}}

    def fitted(self, z: Float[Array, "b d"], labels: Any = None) -> dict[str, Any]:
        """What of `initial_arrays` is fitted to features: the statistics of the "head"."""
        del labels
        features = reshape.unflatten(z, self.feature_shape)
        return {"statistics": {"head": batch_statistics(features)}} if self.head == "pooled" else {}

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
        head: Parameters of the head, see `head.apply_head`.
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
        check_levels(images, num_levels, spec.image_shape)
        return initial.initial(spec, key, images).certified()

    def encode(self, x: Images, key: Any = None, *, context: Any = None) -> Float[Array, "... d"]:
        """Features of images, as vectors; a classifier takes no key and no context."""
        del key
        examples = self._examples(x, context)
        return examples.restore(_features(self, self.preprocess(examples.x)))

    def logits(
        self, images: Images, key: Any = None, *, context: Any = None
    ) -> Float[Array, "... k"]:
        """Logits of images, by running averages; a classifier takes no key and no context."""
        del key
        examples = self._examples(images, context)
        return examples.restore(_logits(self, self.preprocess(examples.x)))

    # ------------------------------------------------------------------------------------ its parts

    def _examples(self, x: Any, context: Any = None) -> Examples:
        if context is not None:
            raise ValueError("a classifier has no context: leave it out")
        batch = as_batch(x, self.spec.image_shape)
        check_levels(batch.x, self.spec.num_levels, self.spec.image_shape)
        return batch

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

    def features_of_input(self, x: Float[Array, "b ..."]) -> Float[Array, "b ..."]:
        """Features of an input of the network, such as `preprocess` gives."""
        return reshape.unflatten(
            self.flow_of(self.spec.flow, self.weights).forward(x), self.spec.feature_shape
        )

    def logits_of_input(self, x: Float[Array, "b ..."]) -> Float[Array, "b k"]:
        """Logits of an input of the network."""
        return apply_head(self.head, self.statistics, self.features_of_input(x))


# One program each, as those of a density are.
_logits = fast_compile(lambda model, x: model.logits_of_input(x))
_features = fast_compile(lambda model, x: model.flow().forward(x))


def training_logits(
    model: Classifier, x: Float[Array, "b ..."], *, axis_name: str | None = None, num_parts: int = 1
) -> tuple[Float[Array, "b k"], dict[str, Any]]:
    """Logits of inputs of the network by the statistics of their batch, and those statistics.

    Args:
        model: The classifier, whose own statistics are not used.
        x: The inputs.
        axis_name: Mapped axis of devices, see `head.statistics_of`.
        num_parts: Equal parts of the batch whose features are computed one after the other, and
            again in the backward pass, so that no more than the arrays of one are in memory at a
            time.
    """
    if num_parts == 1:
        features = model.features_of_input(x)
    else:
        parts = jax.lax.map(
            jax.checkpoint(model.features_of_input), x.reshape(num_parts, -1, *x.shape[1:])
        )
        features = parts.reshape(-1, *parts.shape[2:])
    own = statistics_of(model.head, features, axis_name=axis_name)
    return apply_head(model.head, own, features), own
