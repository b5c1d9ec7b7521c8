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
from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Key, Num

from iresnet_jax.bijections import reshape
from iresnet_jax.bijections.bijection import Bijection
from iresnet_jax.bijections.chain import Rematerialize
from iresnet_jax.bijections.dequantize import check_levels, known_levels
from iresnet_jax.bijections.residual import Solver
from iresnet_jax.checked_dataclasses import Count, check_unmasked, checked
from iresnet_jax.maths.fixed_point import FixedPointInfo
from iresnet_jax.maths.keys import single_key
from iresnet_jax.maths.lipschitz_bounds import BiLipschitz
from iresnet_jax.maths.platforms import fast_compile
from iresnet_jax.models import initial
from iresnet_jax.models.architecture import FlowSpec, StageSpec
from iresnet_jax.models.contractions import Tree
from iresnet_jax.models.flow import FlowWeights
from iresnet_jax.models.head import HEADS, apply_head, by_channel, initial_head, statistics_of
from iresnet_jax.models.history import History
from iresnet_jax.models.leading_axes import as_batch
from iresnet_jax.models.model import Model

Images = Num[Array, "... h w c"] | Num[np.ndarray, "... h w c"]


@dataclass(frozen=True)
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
        if self.head not in HEADS:
            raise ValueError(f"head must be one of {', '.join(HEADS)}, got {self.head!r}")
        if self.num_classes < 2:
            raise ValueError(
                f"num_classes must be at least 2, got {self.num_classes}: labels must "
                "be of several classes"
            )
        if self.pad_channels < 0:
            raise ValueError(
                f"pad_channels must not be negative, got {self.pad_channels}; 0 is no padding"
            )
        height, width, channels = self.image_shape
        padded = (height, width, channels + self.pad_channels)
        if tuple(self.flow.event_shape) != padded:
            raise ValueError(
                f"the flow of this classifier starts from padded images {padded}, not "
                f"{self.flow.event_shape}"
            )
        if any(stage.factor_out for stage in self.flow.stages):
            raise ValueError("a classifier looks at all features: no stage may factor_out channels")
        for name, values in (("mean", self.mean), ("std", self.std)):
            if len(values) not in (1, channels):
                raise ValueError(
                    f"{name} must have 1 or {channels} entries for {channels} "
                    f"channels, got {tuple(values)}"
                )
        if self.num_levels < 2:
            raise ValueError(f"num_levels must be at least 2, got {self.num_levels}: 256 for bytes")
        if not (np.all(np.isfinite((*self.mean, *self.std))) and min(self.std) > 0):
            raise ValueError(
                "mean must be finite and std positive and finite, got "
                f"{tuple(self.mean)} and {tuple(self.std)}"
            )

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

    def bilipschitz(self) -> BiLipschitz:
        """Bounds of the Lipschitz constants of `pad` and of its inverse."""
        return BiLipschitz.of(1 / min(self.std), max(self.std))


class Reconstruction(NamedTuple):
    """Images that belong to features.

    Attributes:
        images: Images with pixels on the scale of [0, 1], which they may leave.
        padding_residual: Euclidean norm of the padding channels, in the units of the network's
            input: 0 for the features of an image, and the distance from those of all images
            otherwise.
        info: How the inverse ended; its error bound is in the units of the network's input.
    """

    images: Float[Array, "... h w c"]
    padding_residual: Float[Array, "..."]
    info: FixedPointInfo


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["weights", "head", "statistics"],
    meta_fields=["spec", "solver", "unroll", "rematerialize", "history"],
)
@dataclass(frozen=True, eq=False)
class Classifier(Model):
    """A classifier with its weights, and how to run it. A pytree: ``jit``, ``vmap`` and ``grad``
    take it as an argument.

    Methods take images of integer levels, as the data set has them. `logits`, `features` and
    `reconstruct` take one example, a batch or any leading axes, which their results have too; other
    methods take batches.

    Attributes:
        spec: All that defines the model but its weights.
        weights: Weights of the flow, as `freeze`, `constrain` or `unconstrained` of `contractions`
            give them.
        head: Parameters of the head, see `head.apply_head`.
        statistics: Running averages of the BatchNorm in the "head"; empty if it is linear.
        solver: Inverse of the blocks.
        unroll: Whether blocks are unrolled instead of scanned.
        rematerialize: What the backward pass recomputes, see `iresnet_jax.bijections.chain.repeat`.
        history: What the training of a fitted model saw.
    """

    arrays: ClassVar[tuple[str, ...]] = ("head", "statistics")

    spec: ClassifierSpec
    weights: FlowWeights | Tree = field(repr=False)
    head: Tree = field(repr=False)
    statistics: Tree = field(repr=False)
    solver: Solver = Solver()
    unroll: bool = False
    rematerialize: Rematerialize = "nothing"
    history: History | None = field(default=None, repr=False)

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

        Raises:
            ValueError: If images and stages do not fit together.
        """
        check_unmasked(images, "images")
        if np.ndim(images) != 4 or not len(images):
            raise ValueError(f"images must be a batch (n, h, w, c), got shape {np.shape(images)}")
        height, width, channels = np.shape(images)[1:]
        stages = checked(tuple[StageSpec, ...], stages, "stages")
        num_classes, num_levels = (
            checked(Count, num_classes, "num_classes"),
            checked(Count, num_levels, "num_levels"),
        )
        mean, std = (
            tuple(np.atleast_1d(np.asarray(values, float)).tolist()) for values in (mean, std)
        )
        flow = FlowSpec((height, width, channels + pad_channels), tuple(stages), coeff, budget)
        spec = ClassifierSpec(
            flow,
            (height, width, channels),
            num_classes,
            num_levels,
            pad_channels,
            mean,
            std,
            head=head,
        )
        key_weights, key_head = jax.random.split(single_key(key))
        model = cls(spec, {}, **spec.initial_arrays(key_head))
        weights, z = initial.initial_weights(
            flow, key_weights, model.preprocess(initial.some(images))
        )
        return model.with_(
            weights=weights,
            statistics=statistics_of(model.head, reshape.unflatten(z, spec.feature_shape)),
        )

    def logits(self, images: Images) -> Float[Array, "... k"]:
        """Logits of images, by running averages."""
        examples = as_batch(images, self.spec.image_shape)
        return examples.restore(_logits(self, self.preprocess(examples.x)))

    def features(self, images: Images) -> Float[Array, "..."]:
        """``F(x)`` as an array with channels last, of `ClassifierSpec.feature_shape`."""
        examples = as_batch(images, self.spec.image_shape)
        return examples.restore(_features(self, self.preprocess(examples.x)))

    def reconstruct(self, features: Float[Array, "..."]) -> Reconstruction:
        """The images that features belong to (Behrmann et al. 2019, fig. 3 and 6); `certify.decode`
        guarantees their error.

        Without a constraint the iteration may not converge, or to another image;
        `Reconstruction.info` promises nothing then.
        """
        examples = as_batch(features, self.spec.feature_shape)
        return examples.restore(
            _reconstruct(self._for_programs(), self.promoted(reshape.flatten(examples.x)))
        )

    # ------------------------------------------------------------------------------------ its parts

    def preprocess(self, images: Images) -> Float[Array, "b h w d"]:
        """The network's input for images: scaled to [0, 1], normalised, padded; levels out of
        range become NaN.
        """
        levels = self.spec.num_levels
        check_levels(images, levels, self.spec.image_shape)
        return self.spec.pad(known_levels(jnp.asarray(images), levels) / (levels - 1))

    def flow(self) -> Bijection:
        """The invertible network alone, from its input to features as vectors."""
        return self._flow_of(self.spec.flow, self._for_programs().weights)

    def features_of_input(self, x: Float[Array, "b ..."]) -> Float[Array, "b ..."]:
        """Features of an input of the network, such as `preprocess` gives."""
        return reshape.unflatten(
            self._flow_of(self.spec.flow, self.weights).forward(x), self.spec.feature_shape
        )

    def logits_of_input(self, x: Float[Array, "b ..."]) -> Float[Array, "b k"]:
        """Logits of an input of the network."""
        return apply_head(self.head, self.statistics, self.features_of_input(x))


# One program each, as those of a density are.
_logits = fast_compile(lambda model, x: model.logits_of_input(x))
_features = fast_compile(lambda model, x: model.features_of_input(x))


@fast_compile
def _reconstruct(model: Classifier, features: Float[Array, "b d"]) -> Reconstruction:
    x, info = model.flow().inverse(features)
    return Reconstruction(
        model.spec.unpad(x), reshape.padding_residual(x, model.spec.pad_channels), info
    )


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
