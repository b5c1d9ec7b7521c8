"""Networks of the code of Chen et al. (2019), github.com/rtqichen/residual-flows: ``train_img.py`` and ``train_toy.py``.

| there | here |
|---|---|
| ``chain.J.nnet.M.weight``, ``u``, ``v`` | ``kernel``, see `stages.applied_kernel` |
| ``chain.J.nnet.M.beta`` of "swish" | ``beta`` of "lipswish", with the same constants |
| ``chain.J.weight``, ``bias``: ``(x + bias) exp(weight)`` | ActNorm, with the same formula |
| ``chain.J.nnet.nnet.M``, ``chain.J.fc_module`` | dense layers and their ActNorm, on entries with channels last |

Networks of images have a chain for every scale, ``transforms.SCALE.chain``. ActNorm stands behind blocks there, and in front of
them here: each goes to the next block. The squeeze lists the pixels of each channel one after the other, and half of its
channels may leave. The prior is standard normal.
"""

import argparse
import itertools
from collections.abc import Sequence
from typing import Any

from iresnet_jax.bijections.transforms.logit import Identity, Logit
from iresnet_jax.conversion.arrays import Arrays
from iresnet_jax.conversion.stages import MAXMIN, Layer, Stages, applied_kernel
from iresnet_jax.conversion.training_command import Options
from iresnet_jax.models import priors
from iresnet_jax.models.architecture import FlowSpec
from iresnet_jax.models.density_spec import DensitySpec

_NORMS = (False, "norms other than the Euclidean one bound no Lipschitz constant here")
_BATCHNORM = (False, "there is no moving average of means here")
_SERIES = "n-power-series n-dist n-samples"  # of the log-determinant, which is an estimate there
TRAIN_IMG = Options(
    read={
        "data": "cifar10",
        "imagesize": 32,
        "nbits": 8,
        "coeff": 0.98,
        "vnorms": "2222",
        "act": "swish",
        "idim": 512,
        "nblocks": "16-16-16",
        "kernels": "3-1-3",
        "factor-out": False,
        "squeeze-first": False,
        "actnorm": True,
        "logit-transform": True,
        "fc-end": True,
        "fc-idim": 128,
        "preact": True,
        "first-resblock": True,
    },
    refused={
        "block": ("resblock", "coupling layers are no residual blocks"),
        "learn-p": _NORMS,
        "fc-actnorm": (False, "ActNorm of images has one scale a channel here"),
        "batchnorm": _BATCHNORM,
        "dropout": (0.0, "branches have no dropout here"),
        "fc": (False, "dense blocks stand at the end here, behind all squeezes"),
        "add-noise": (True, "levels without noise have no density"),
        "quadratic": (False, "there are no linear layers between blocks here"),
        "padding": (0, "channels of noise are no data here"),
        "task": ("density", "its classifier looks at every scale"),
    },
    ignored=f"{_SERIES} n-exact-terms var-reduc-lr neumann-grad mem-eff n-lipschitz-iters sn-tol dataroot padding-dist cdim "
    "optimizer scheduler nepochs batchsize lr wd warmup-iters annealing-iters save val-batchsize seed ema-val update-freq "
    "scale-dim rcrop-pad-mode resume begin-epoch nworkers print-freq vis-freq",
)
TRAIN_TOY = Options(
    read={"coeff": 0.9, "vnorms": "222222", "dims": "128-128-128-128", "act": "swish", "nblocks": 100, "actnorm": False},
    refused={
        "arch": ("iresnet", "coupling layers are no residual blocks"),
        "learn-p": _NORMS,
        "batchnorm": _BATCHNORM,
    },
    ignored=f"{_SERIES} data n-lipschitz-iters atol rtol mixed brute-force exact-trace niters batch_size test_batch_size lr "
    "weight-decay annealing-iters save viz_freq val_freq log_freq gpu seed",
)
# The norm at the last step, what the estimator of the log-determinant keeps, and marks of what was initialised.
UNUSED = ("scale", "initialized", "spatial_dims", "geom_p", "lamb", "last_n_samples", "last_firmom", "last_secmom")

_ACTIVATIONS = {
    **{name: name for name in ("relu", "elu", "softplus", "tanh", "identity")},
    "swish": "lipswish",
    "maxmin": MAXMIN,
}
_SIZES = {"celebahq": 256, "celeba_5bit": 64, "imagenet32": 32, "imagenet64": 64}  # whatever --imagesize says
_NUM_DENSE_BLOCKS = 4


def read_images(arrays: Arrays, options: argparse.Namespace) -> tuple[DensitySpec, dict[str, Any]]:
    """What `saved.model_of` takes, from the arrays of a checkpoint and the options of `TRAIN_IMG`.

    Raises:
        ValueError: If the options describe what is no model here.
    """
    side = _SIZES[options.data] if options.data in _SIZES else options.imagesize
    shape = (side, side, 1 if options.data == "mnist" else 3)
    stages = Stages(shape, actnorm=options.actnorm)
    if options.squeeze_first:
        stages.squeeze(channel_major=True)
        side //= 2
    numbers, sizes = _numbers(options.nblocks), _numbers(options.kernels)
    hidden, hidden_dense = ((width,) * (len(sizes) - 1) for width in (options.idim, options.fc_idim))
    last = min(len(numbers), side.bit_length() - 2) - 1  # a scale has images of 4 x 4 at least, and others are left out
    if last < 0:
        raise ValueError(f"train_img.py needs images of at least 4 x 4 pixels, got {side} x {side}: check --imagesize")
    for scale, num_blocks in enumerate(numbers[: last + 1]):
        chain = _Chain(arrays, f"transforms.{scale}.chain", stages, options)
        if scale == 0 and options.logit_transform:
            chain.skip()
        begins = scale == 0 and options.first_resblock
        if begins:
            chain.actnorm()
        for k in range(num_blocks):
            # The last scale begins like any other, even where it is the first.
            chain.block(hidden, sizes, preactivation=options.preact and not (begins and k == 0 and scale < last))
            chain.actnorm()
        if scale < last:
            stages.squeeze(channel_major=True)
            if options.factor_out:
                stages.factor_out()
        elif options.fc_end:
            for _ in range(_NUM_DENSE_BLOCKS):
                chain.block(hidden_dense, preactivation=options.preact, part="nnet.nnet")
                chain.actnorm("fc_module.")
    levels = {"celeba_5bit": 32, "celebahq": 2**options.nbits}.get(options.data, 256)
    alpha = 1e-6 if options.data == "mnist" else 0.05
    transform = Logit(alpha) if options.logit_transform else Identity()
    return _density(stages, shape, options.coeff, transform=transform, num_levels=levels)


def read_toy(arrays: Arrays, options: argparse.Namespace) -> tuple[DensitySpec, dict[str, Any]]:
    """What `saved.model_of` takes, from the arrays of a checkpoint and the options of `TRAIN_TOY`.

    Raises:
        ValueError: If the options describe what is no model here.
    """
    stages = Stages((2,), actnorm=options.actnorm)
    chain = _Chain(arrays, "chain", stages, options)
    chain.actnorm()
    for _ in range(options.nblocks):
        chain.block(_numbers(options.dims), preactivation=True)
        chain.actnorm()
    return _density(stages, (2,), options.coeff)


def _density(stages: Stages, shape: tuple[int, ...], coeff: float, **rest: Any) -> tuple[DensitySpec, dict[str, Any]]:
    specs, params, _ = stages.finish()
    spec = DensitySpec(FlowSpec(shape, specs, coeff), **rest)
    return spec, {"params": params, "prior": priors.standard("gaussian", spec.flow.num_dims), "network": {}}


class _Chain:
    """Reads the layers of a chain into stages, one after the other."""

    def __init__(self, arrays: Arrays, name: str, stages: Stages, options: argparse.Namespace):
        if set(options.vnorms) != {"2"}:
            raise ValueError(f"--vnorms {options.vnorms} is not read, {_NORMS[1]}: only 2 for every layer is")
        if options.act not in _ACTIVATIONS:
            raise ValueError(f"--act {options.act} is not read, there is none here: those read are {', '.join(_ACTIVATIONS)}")
        self._arrays, self._stages, self._options = arrays, stages, options
        self._activation = _ACTIVATIONS[options.act]
        self._names = (f"{name}.{place}" for place in itertools.count())

    def skip(self) -> None:
        """A layer without arrays."""
        next(self._names)

    def actnorm(self, part: str = "") -> None:
        """An ActNorm, if the network has them."""
        if self._options.actnorm:
            name, stages = next(self._names), self._stages
            stages.actnorm(*(self._arrays.take(f"{name}.{part}{kind}", stages.num_channels) for kind in ("bias", "weight")))

    def block(
        self, hidden: Sequence[int], kernel_sizes: Sequence[int] = (), *, preactivation: bool, part: str = "nnet"
    ) -> None:
        """A block of convolutions, or of dense layers on all entries if there are no sizes of kernels."""
        arrays, name = self._arrays, f"{next(self._names)}.{part}"
        outside = self._stages.num_channels if kernel_sizes else self._stages.num_entries
        layers = []
        for i, (cin, cout) in enumerate(itertools.pairwise((outside, *hidden, outside))):
            place, beta = 2 * i + preactivation, None
            if self._activation == "lipswish" and place > 0:
                beta = float(arrays.take(f"{name}.{place - 1}.beta", 1)[0])
            layer, taps = f"{name}.{place}", (kernel_sizes[i],) * 2 if kernel_sizes else ()
            u, v = arrays.take_vectors(f"{layer}.u", f"{layer}.v", (cout, cin))
            kernel = applied_kernel(arrays.take(f"{layer}.weight", cout, cin, *taps), u, v, coeff=self._options.coeff)
            layers.append(Layer(kernel, arrays.take(f"{layer}.bias", cout), beta))
        self._stages.block(layers, self._activation, preactivation=preactivation)


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(number) for number in text.split("-"))
