"""The architecture of a multi-scale residual flow as data: stages of equal blocks, each in its
place.
"""

import dataclasses
import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Key

from iresnet_jax.arguments import Count, Range, checked
from iresnet_jax.bijections import reshape
from iresnet_jax.bijections.actnorm import ActNorm
from iresnet_jax.bijections.bijection import Bijection
from iresnet_jax.branches import kinds
from iresnet_jax.branches.branch import BranchSpec
from iresnet_jax.branches.own import name_of

PREFIX = "noise_"  # of the names of the stages of the flow of noise


@dataclass(frozen=True)
class StageSpec:
    """Residual blocks of one shape, and what happens to the array before and after them.

    Attributes:
        num_blocks: Number of blocks, each an ActNorm and a residual branch.
        hidden: Widths of the hidden layers of a branch.
        kernel_sizes: Sizes of its convolutions, one more than hidden widths; None for dense layers,
            which take flattened arrays.
        activation: "elu", "softplus", "softplus4", "tanh", "relu", "lipswish", "clipswish",
            "maxmin", "identity", or a name that was registered, see `maths.activations`.
        preactivation: Whether a branch begins with the activation.
        squeeze: Space-to-depth factor in front of the blocks; 1 for none.
        factor_out: Whether half of the channels leave as latents after the blocks.
        padding: Padding of convolutions, "SAME" (zeros) or "CIRCULAR".
        positional_bias: Whether a convolution has a bias for every pixel instead of one per
            channel.
        channel_order: Order of the channels in front of the blocks, after the squeeze: channel
            ``i`` is the one that was ``channel_order[i]``. It decides which half leaves as latents.
            None keeps their order.
        actnorm: Whether an ActNorm stands in front of every branch. Without it the flow keeps the
            symmetries of its branches.
        kind: Kind of the branches: "feedforward", the paper's; "sandwich", whose bound of the
            Lipschitz constant is smaller for the same weights; "potential", whose blocks never
            stretch; or a name that was registered.
        branch: Branches of one's own instead: a function ``key -> module``, see
            `iresnet_jax.branches.own`, whose modules get arrays of the stage's shape; or a class of
            `BranchSpec`, or an instance. Models with the same function share compiled programs.
    """

    num_blocks: Count
    hidden: tuple[Count, ...] = ()
    kernel_sizes: tuple[Count, ...] | None = None
    activation: str = "elu"
    preactivation: bool = False
    squeeze: Count = 1
    factor_out: bool = False
    padding: str = "SAME"
    positional_bias: bool = False
    channel_order: tuple[int, ...] | None = None
    actnorm: bool = True
    kind: str = "feedforward"
    branch: Any = field(default=None, metadata={"name": name_of})

    def __post_init__(self):
        for name in ("num_blocks", "squeeze"):
            object.__setattr__(self, name, checked(Count, getattr(self, name), name))
        for name in ("hidden", "kernel_sizes", "channel_order"):
            if getattr(self, name) is not None:  # a list could not be hashed
                object.__setattr__(self, name, tuple(getattr(self, name)))
        for size in (*self.hidden, *(self.kernel_sizes or ())):
            checked(Count, size, "an entry of hidden and kernel_sizes")
        kinds.get(self.kind)

    @property
    def branch_name(self) -> str:
        """Name of what the branches are, a kind or one's own."""
        return self.kind if self.branch is None else name_of(self.branch)


class PlacedStage(NamedTuple):
    """A stage in its place in a flow.

    Attributes:
        name: Key among the flow's weights, "stage0" and so on.
        spec: Blocks and what happens around them.
        in_shape: Shape of one example as the stage before hands it on.
        branch: Residual branch of its blocks, whose ``in_shape`` is the squeezed or flattened one.
        reshapes: The squeeze, the order of channels and the flattening in front of the blocks,
            where there are any.
        scale: Factor in front of every block without ActNorm.
    """

    name: str
    spec: StageSpec
    in_shape: tuple[int, ...]
    branch: BranchSpec
    reshapes: tuple[Bijection, ...]
    scale: float = 1.0

    @classmethod
    def of(
        cls, name: str, spec: StageSpec, in_shape: tuple[int, ...], context_dim: int, scale: float
    ) -> "PlacedStage":
        """The stage for examples of a shape and contexts of a length."""
        reshapes, shape = [], in_shape
        if (factor := spec.squeeze) > 1:
            if len(shape) != 3 or shape[0] % factor or shape[1] % factor:
                raise ValueError(
                    f"{name} cannot squeeze {shape} by {factor}: it takes images with "
                    f"sides divisible by {factor}"
                )
            shape = (shape[0] // factor, shape[1] // factor, shape[2] * factor**2)
            reshapes.append(reshape.squeeze_bijection(factor))
        if spec.channel_order is not None:
            if sorted(spec.channel_order) != list(range(shape[-1])):
                raise ValueError(
                    f"channel_order of {name} must name each of its {shape[-1]} channels once, "
                    f"got {spec.channel_order}"
                )
            reshapes.append(reshape.order_bijection(spec.channel_order))
        branch = kinds.branch_of(spec, shape, context_dim)
        if len(branch.in_shape) != len(shape):
            reshapes.append(reshape.flatten_bijection(shape))
        if spec.factor_out and branch.in_shape[-1] % 2:
            raise ValueError(
                f"{name} factors out half of its channels but has "
                f"{branch.in_shape[-1]}: squeeze before it"
            )
        return cls(name, spec, in_shape, branch, tuple(reshapes), scale)

    @property
    def out_shape(self) -> tuple[int, ...]:
        """Shape of one example as the stage hands it on, without latents that leave."""
        *space, channels = self.branch.in_shape
        return (*space, channels // 2 if self.spec.factor_out else channels)

    def actnorm(self, params: ActNorm) -> ActNorm:
        """The parameters of the blocks' ActNorm; in a stage without one those of the fixed
        `scale`.
        """
        if self.spec.actnorm:
            return params
        fixed = np.float32(math.log(self.scale))  # the same number in float64
        return ActNorm(jnp.zeros_like(params.bias), jnp.full_like(params.log_scale, fixed))


@dataclass(frozen=True)
class NoiseSpec:
    """Noise of variational dequantisation, see `iresnet_jax.models.noise`."""

    # residual blocks of the flow of noise, convolutions of 3 x 3 pixels for images
    num_blocks: Count = 4
    hidden: tuple[Count, ...] = (32,)  # widths of their hidden layers
    # widths of the network on the levels around a pixel, which the blocks depend on
    network: tuple[Count, ...] = (64, 32)
    window: Count = 5  # width and height of its window of pixels


@dataclass(frozen=True)
class FlowSpec:
    """The architecture of a flow.

    Attributes:
        event_shape: Shape of one example, ``(h, w, c)`` or ``(d,)``.
        stages: Stages from the data to the latents; none make a flow that flattens examples.
        coeff: Largest operator norm, in (0, 1).
        budget: "layer" limits the norm of every layer to ``coeff``, "block" the product of the
            norms of every block.
        context_dim: Length of an example's context vector, on which every branch then depends; 0
            for none.
        scale: Fixed factor in front of every block, of a flow without ActNorm, see `bilipschitz`.
        noise: Flow of the noise of dequantisation, whose weights stand beside this one's; None for
            uniform noise.
    """

    event_shape: tuple[int, ...]
    stages: tuple[StageSpec, ...]
    coeff: float = 0.9
    budget: str = "layer"
    context_dim: int = 0
    scale: float = 1.0
    noise: NoiseSpec | None = None

    def __post_init__(self):
        shape = (checked(Count, n, f"event_shape[{i}]") for i, n in enumerate(self.event_shape))
        object.__setattr__(self, "event_shape", tuple(shape))
        object.__setattr__(self, "stages", tuple(self.stages))  # a list could not be hashed
        checked(Annotated[float, Range("(0, 1)")], self.coeff, "coeff")
        if self.budget not in ("layer", "block"):
            raise ValueError(f"budget must be layer or block, got {self.budget!r}")
        self.all_stages  # noqa: B018 (checks every shape)

    def __getstate__(self) -> dict[str, Any]:
        """The fields: a pickle has no functions, which cached layouts hold."""
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}

    @classmethod
    def bilipschitz(
        cls,
        event_shape: tuple[int, ...],
        stages: Sequence[StageSpec],
        *,
        mu: float,
        nu: float,
        context_dim: int = 0,
    ) -> "FlowSpec":
        r"""A flow with ``mu |x - x'| <= |F(x) - F(x')| <= nu |x - x'|`` by construction, whatever
        it learns.

        A block of ``s x`` with ``Lip(g) <= c`` stretches by ``s (1 - c)`` to ``s (1 + c)``. The
        ``n`` blocks of

        ``c = tanh(log(nu / mu) / (2 n))``,    ``s^n = sqrt(mu nu) (1 - c^2)^(-n / 2)``

        together stretch by ``mu`` to ``nu``. One block has ``c = (nu - mu)/(nu + mu)`` and ``s =
        (mu + nu)/2``, which is a layer of BiLipNet (Wang et al. 2024, sec. 4) with any branch.
        Constants are taken closer by some roundings, so that the certificate's are within them.
        Stages get no ActNorm and must not factor out; the other arguments are those of `FlowSpec`.
        """
        if any(stage.factor_out for stage in stages):
            raise ValueError(
                "mu and nu are constants of the whole flow: no stage may factor_out channels"
            )
        num = sum(stage.num_blocks for stage in stages)
        width = math.log(nu / mu) / (2 * num)
        # for roundings: 1 / (1 - c) is (1 + exp(2 width)) / 2
        width -= 4e-6 * (1 + math.exp(2 * width))
        if not width > 0:
            raise ValueError(
                f"mu must be below nu by more than roundings, got {mu} and {nu} for {num} blocks"
            )
        coeff = math.tanh(width)
        log_scale = (math.log(mu) + math.log(nu)) / 2 + num * math.log(math.cosh(width))
        without = tuple(dataclasses.replace(stage, actnorm=False) for stage in stages)
        return cls(
            tuple(event_shape), without, coeff, "block", context_dim, math.exp(log_scale / num)
        )

    @property
    def num_dims(self) -> int:
        """Dimensions of the data and of the latent vector."""
        return math.prod(self.event_shape)

    @property
    def num_blocks(self) -> int:
        """Residual blocks of all stages."""
        return sum(stage.num_blocks for stage in self.stages)

    @functools.cached_property
    def layout(self) -> tuple[PlacedStage, ...]:
        """The stages in their places: the one walk over the architecture that everything else
        follows.
        """
        placed, shape = [], tuple(self.event_shape)
        for i, stage in enumerate(self.stages):
            placed.append(PlacedStage.of(f"stage{i}", stage, shape, self.context_dim, self.scale))
            shape = placed[-1].out_shape
        return tuple(placed)

    @functools.cached_property
    def noise_flow(self) -> "FlowSpec | None":
        """The flow of the noise, with the budget of this one; its contexts are the network's
        outputs.
        """
        if self.noise is None:
            return None
        sizes = (3,) * (len(self.noise.hidden) + 1) if len(self.event_shape) == 3 else None
        stage = StageSpec(self.noise.num_blocks, self.noise.hidden, sizes, "clipswish")
        return FlowSpec(self.event_shape, (stage,), self.coeff, self.budget, self.noise.network[-1])

    @functools.cached_property
    def all_stages(self) -> tuple[PlacedStage, ...]:
        """All stages that have weights: those of `layout`, and those of the noise."""
        of_noise = () if self.noise_flow is None else self.noise_flow.layout
        return (*self.layout, *(stage._replace(name=PREFIX + stage.name) for stage in of_noise))

    def initial_params(
        self, key: Key[Array, ""], *, sharpness: float = 0.0, last_scale: float = 1.0
    ) -> dict[str, Any]:
        """Random parameters of all stages, each array stacked over the blocks of one, as
        `contractions.constrain` takes them; ActNorm is the identity, noise is uniform.

        Arguments are those of `BranchSpec.initial_weights`.
        """
        settings = {"sharpness": sharpness, "last_scale": last_scale}
        params, of_noise = {}, {"sharpness": 0.0, "last_scale": 0.0}
        for stage, own in zip(
            self.all_stages, jax.random.split(key, len(self.all_stages)), strict=True
        ):
            how = of_noise if stage.name.startswith(PREFIX) else settings
            initial = functools.partial(stage.branch.initial_weights, **how)
            weights = jax.vmap(initial)(jax.random.split(own, stage.spec.num_blocks))
            zeros = jnp.zeros((stage.spec.num_blocks, stage.branch.in_shape[-1]))
            actnorm = {"bias": zeros, "log_scale": zeros}
            params[stage.name] = {"blocks": {**weights, "actnorm": actnorm}}
        return params

    def initial_iterates(self, key: Key[Array, ""]) -> dict[str, Any]:
        """Random starts of the power iterations of all layers, as `contractions.constrain` takes
        them.
        """
        found = {}
        for stage, own in zip(
            self.all_stages, jax.random.split(key, len(self.all_stages)), strict=True
        ):
            keys = jax.random.split(own, stage.spec.num_blocks)
            if iterates := jax.vmap(stage.branch.initial_iterates)(keys):
                found[stage.name] = {"blocks": iterates}
        return found


def check_names(spec: FlowSpec) -> None:
    """Raises ``ValueError`` if branches of one's own that are not the same have the same name,
    by which a file knows them.
    """
    known: dict[str, Any] = {}
    for stage in spec.stages:
        if (
            stage.branch is not None
            and known.setdefault(stage.branch_name, stage.branch) != stage.branch
        ):
            raise ValueError(
                f"two branches of the model are called {stage.branch_name!r}: a file "
                "knows them by their names"
            )
