r"""A learned forward operator as a value, and the reconstruction of images from measurements by its inverse.

    F(x) close to A x,    reconstruction of y:  P(F^-1(y)),    |F^-1(y) - F^-1(y')| <= |y - y'| / (1 - L)

(Arndt et al. 2023). ``F`` takes images to images of the same shape: residual blocks without ActNorm, whose Lipschitz constants
``L_b`` satisfy ``prod_b (1 - L_b) = 1 - L``. ``L`` is the regularisation parameter: it bounds how ``F^-1`` amplifies noise,
for all data. ``P`` is the projection onto pixels in [0, 1], which increases no distance.
"""

import dataclasses
import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Key, Num

from iresnet_jax.bijections import reshape
from iresnet_jax.bijections.bijection import Bijection
from iresnet_jax.bijections.chain import Rematerialize, chain
from iresnet_jax.bijections.residual import Solver
from iresnet_jax.bijections.transforms.dequantize import check_levels, known_levels
from iresnet_jax.branches.branch import check_coeff
from iresnet_jax.checked_dataclasses import checked
from iresnet_jax.maths.inverse.fixed_point import FixedPointInfo
from iresnet_jax.maths.keys import single_key
from iresnet_jax.maths.lipschitz_bounds import BiLipschitz, model_bounds
from iresnet_jax.models import initial
from iresnet_jax.models.architecture import FlowSpec, StageSpec
from iresnet_jax.models.contractions import FlowWeights
from iresnet_jax.models.history import History
from iresnet_jax.models.model import Model

Measurements = Float[Array, "b h w c"] | Float[np.ndarray, "b h w c"]


@dataclass(frozen=True)
class ReconstructorSpec:
    """All that defines a reconstructor but its weights.

    Attributes:
        flow: Architecture of ``F`` on images ``(h, w, c)``, without channels that are factored out.
        num_levels: Grey levels of the images that it was trained on.
        constrained: Whether blocks are contractions and reconstructions are ``P(F^-1(y))``. False is an ordinary residual
            network from measurements to images, ``P(F(y))``, to compare with: nothing bounds how it amplifies noise.
    """

    flow: FlowSpec
    num_levels: int = 256
    constrained: bool = True

    def __post_init__(self):
        if len(self.flow.event_shape) != 3:
            raise ValueError(f"a reconstructor takes images (h, w, c), got examples of shape {self.flow.event_shape}")
        if any(stage.factor_out for stage in self.flow.stages):
            raise ValueError("a reconstructor takes images to images: no stage may factor_out channels")
        if self.flow.context_dim:
            raise ValueError("a reconstructor takes no contexts")

    @property
    def num_classes(self) -> None:
        """Nothing: a reconstructor knows of no classes."""

    @property
    def is_bijective(self) -> bool:
        """Whether reconstructions come from an inverse, which then exists."""
        return self.constrained

    def bilipschitz(self) -> BiLipschitz:
        """Bounds of the Lipschitz constants of the preprocessing, which there is none of."""
        return model_bounds([])

    @property
    def permutation(self) -> Bijection:
        """Images to vectors with the entries in the order of `flow`'s outputs: all squeezes, one after the other."""
        last = self.flow.layout[-1].branch.in_shape
        entries = [bijection for stage in self.flow.layout for bijection in stage.reshapes]
        return chain([*entries, *([reshape.flatten_bijection(last)] if len(last) > 1 else [])])


def block_coeff(coeff: float, num_blocks: int) -> float:
    """Lipschitz constant ``L_b = 1 - (1 - L)^(1/n)`` of each of ``n`` blocks that have the constant ``L`` together.

    Then ``Lip(F^-1) <= prod_b 1 / (1 - L_b) = 1 / (1 - L)``.
    """
    return -math.expm1(math.log1p(-coeff) / num_blocks)


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["weights"],
    meta_fields=["spec", "solver", "unroll", "rematerialize", "history"],
)
@dataclass(frozen=True)
class Reconstructor(Model):
    """A learned forward operator with its weights, and how to invert it. A pytree: ``jit``, ``vmap`` and ``grad`` take it.

    Images have pixels in [0, 1], see `preprocess`, and measurements have their shape.

    Attributes:
        spec: All that defines the model but its weights.
        weights: Weights of the flow, as `freeze`, `constrain` or `unconstrained` of `contractions` give them.
        solver: Inverse of the blocks.
        unroll: Whether blocks are unrolled instead of scanned.
        rematerialize: What the backward pass of `measure` recomputes, see `iresnet_jax.bijections.chain.repeat`.
        history: What the training of a fitted model saw.
    """

    spec: ReconstructorSpec
    weights: FlowWeights = field(repr=False)
    solver: Solver = Solver()
    unroll: bool = False
    rematerialize: Rematerialize = "nothing"
    history: History | None = field(default=None, repr=False)

    @classmethod
    def init(
        cls,
        key: Key[Array, ""],
        image_shape: tuple[int, int, int],
        *,
        stages: Sequence[StageSpec],
        coeff: float = 0.9,
        num_levels: int = 256,
    ) -> "Reconstructor":
        """A reconstructor with random weights, certified, and ready to train.

        Args:
            key: Source of the weights.
            image_shape: Height, width and channels of images and measurements.
            stages: Stages of the network, none of which factors out.
            coeff: ``L`` in (0, 1), the regularisation parameter.
            num_levels: Grey levels of images of integers.

        Raises:
            ValueError: If the shape and the stages do not fit together.
        """
        stages = checked(tuple[StageSpec, ...], stages, "stages")
        check_coeff(coeff)
        if not stages:
            raise ValueError("a reconstructor needs at least one stage, got none")
        of_block = block_coeff(coeff, sum(stage.num_blocks for stage in stages))
        without = tuple(dataclasses.replace(stage, actnorm=False) for stage in stages)
        spec = ReconstructorSpec(FlowSpec(tuple(image_shape), without, of_block, "block"), num_levels)
        weights, _ = initial.initial_weights(spec.flow, single_key(key), jnp.zeros((2, *image_shape)))
        return cls(spec, weights)

    def preprocess(self, images: Num[Array, "b h w c"] | Num[np.ndarray, "b h w c"]) -> Float[Array, "b h w c"]:
        """Images of integer levels with pixels in [0, 1]; levels out of range become NaN."""
        levels = self.spec.num_levels
        check_levels(images, levels, self.spec.flow.event_shape)
        return known_levels(jnp.asarray(images), levels) / (levels - 1)

    def measure(self, x: Measurements) -> Float[Array, "b h w c"]:
        """``F(x)``: what the learned operator measures of images."""
        self._check(x)
        return self.spec.permutation.inverse(self.flow().forward(self.promoted(x)))[0]

    def reconstruct(self, y: Measurements) -> tuple[Float[Array, "b h w c"], FixedPointInfo]:
        """``P(F^-1(y))``, and how the inverse ended.

        ``info.error_bound`` bounds the distance from the exact reconstruction, which the projection does not increase. An
        ordinary network, which inverts nothing, reports an error of 0.
        """
        x, info = self.invert(y)
        return jnp.clip(x, 0, 1), info

    def invert(self, y: Measurements) -> tuple[Float[Array, "b h w c"], FixedPointInfo]:
        """``F^-1(y)`` without the projection; ``F(y)`` of an ordinary network."""
        self._check(y)
        if not self.spec.constrained:
            x = self.measure(y)
            nothing = jnp.zeros(len(x), x.dtype)
            return x, FixedPointInfo(jnp.zeros(len(x), jnp.int32), nothing, nothing, nothing == 0)
        return self.flow().inverse(self.as_latents(y))

    def as_latents(self, y: Measurements) -> Float[Array, "b d"]:
        """Measurements as vectors in the order of `flow`'s outputs, as `certify.inverse` takes them."""
        return self.spec.permutation.forward(self.promoted(y))

    @property
    def noise_amplification(self) -> float:
        """Guaranteed bound of ``|reconstruct(y) - reconstruct(y')| / |y - y'|``: 1 / (1 - L), as certified.

        Raises:
            ValueError: If the weights have no bounds, see `freeze`.
        """
        certificate = self.certificate()
        return certificate.inverse if self.spec.constrained else certificate.forward

    def flow(self) -> Bijection:
        """``F`` from images to vectors."""
        return self._flow_of(self.spec.flow, self.weights)

    def _check(self, images: Measurements) -> None:
        if images.shape[1:] != tuple(self.spec.flow.event_shape):
            raise ValueError(f"images and measurements must have shape {self.spec.flow.event_shape}, got {images.shape[1:]}")
        if not jnp.issubdtype(images.dtype, jnp.floating):
            raise ValueError(f"images and measurements have pixels in [0, 1], got {images.dtype}: use model.preprocess(images)")
