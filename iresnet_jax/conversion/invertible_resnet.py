"""Networks of the code of Behrmann et al. (2019), github.com/jhjacobsen/invertible-resnet, which ``CIFAR_main.py`` trains.

| there | here |
|---|---|
| ``stack.K.actnorm._log_scale``, ``_shift``: ``x exp(s) + t`` | ActNorm ``(x + t exp(-s)) exp(s)`` |
| ``stack.K.bottleneck_block.J.weight_orig``, ``weight_u``, ``weight_v`` | ``kernel``, see `stages.applied_kernel` |
| ``prior_mu``, ``prior_logstd``, channels first | prior "gaussian", channels last |
| ``bn1``, ``logits`` | head of a classifier |

Scales of a multi-scale network are ``stack.SCALE.stack.K``. The squeeze has the order of ours. After a scale the first half of
the channels leaves, here the second one, so halves change places in front of a scale.

Every checkpoint has a prior and a head: the one that its task does not use was never trained and is left out.
"""

import argparse
import math
from typing import Any

import jax.numpy as jnp
import numpy as np

from iresnet_jax.bijections.transforms.logit import Center
from iresnet_jax.conversion.arrays import Arrays
from iresnet_jax.conversion.stages import MAXMIN, Layer, Stages, applied_kernel
from iresnet_jax.conversion.training_command import Options
from iresnet_jax.models.architecture import FlowSpec
from iresnet_jax.models.classifier import ClassifierSpec
from iresnet_jax.models.density_spec import DensitySpec

CIFAR_MAIN = Options(
    read={
        "nBlocks": (4, 4, 4),
        "nStrides": (1, 2, 2),
        "nChannels": (16, 64, 256),
        "coeff": 0.9,
        "init_ds": 2,
        "inj_pad": 0,
        "nonlin": "elu",
        "dataset": "cifar10",
    },
    switches="densityEstimation multiScale noActnorm",
    ignored="optimizer lr numTraceSamples numSeriesTerms powerIterSpectralNorm weight_decay drop_rate batch init_batch "
    "warmup_epochs epochs resume save_dir vis_port vis_server log_every",
    ignored_switches="fixedPrior evaluate interpolate drop_two nesterov norm analysisTraceEst log_verbose deterministic",
)
UNUSED = ("weight_sigma", "num_batches_tracked")  # the norm in the step before, and a counter

_ACTIVATIONS = {"relu": "relu", "elu": "elu", "softplus": "softplus", "sorting": MAXMIN}
_MOMENTS = {  # mean and standard deviation of pixels in [0, 1], by which images are normalised
    "cifar10": ((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)),
    "cifar100": ((0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761)),
}
_SIDE, _CHANNELS = 32, 3  # of all images in that code
_KERNEL_SIZES = (3, 1, 3)
_MARGIN = 1e-5  # what the divisor of a kernel larger than 1 x 1 is increased by
_PRIOR = {"mean": "prior_mu", "log_std": "prior_logstd"}
_NORM = {"scale": "bn1.weight", "bias": "bn1.bias"}
_STATISTICS = {"mean": "bn1.running_mean", "var": "bn1.running_var"}
_LINEAR = {"kernel": "logits.weight", "bias": "logits.bias"}


def read(arrays: Arrays, options: argparse.Namespace) -> tuple[DensitySpec | ClassifierSpec, dict[str, Any]]:
    """What `saved.model_of` takes, from the arrays of a checkpoint and the options of `CIFAR_MAIN`.

    Raises:
        ValueError: If the options describe what is no model here.
    """
    _check(options)
    side = _side(arrays, options)
    shape = (side, side, _CHANNELS + options.inj_pad)
    stages = Stages(shape, actnorm=not options.noActnorm)
    if options.init_ds == 2:
        stages.squeeze(channel_major=False)
    num_read, last = 0, len(options.nBlocks) - 1
    for scale, (num_blocks, stride, width) in enumerate(zip(options.nBlocks, options.nStrides, options.nChannels, strict=True)):
        if stride == 2:
            stages.squeeze(channel_major=False)
        if options.multiScale and scale < last:
            stages.order(np.roll(np.arange(stages.num_channels), stages.num_channels // 2))
        for k in range(num_blocks):
            name = f"stack.{scale}.stack.{k}" if options.multiScale else f"stack.{num_read}"
            _read_block(arrays, name, stages, options, width, preactivation=num_read > 0)
            num_read += 1
        if options.multiScale and scale < last:
            stages.factor_out()
    specs, params, latents = stages.finish()
    flow = FlowSpec(shape, specs, options.coeff)
    if options.densityEstimation:
        prior = {ours: _ours(arrays.take(theirs, flow.num_dims)[latents]) for ours, theirs in _PRIOR.items()}
        arrays.ignore(*_NORM.values(), *_STATISTICS.values(), *_LINEAR.values())
        return DensitySpec(flow, transform=Center(), num_levels=256), {"params": params, "prior": prior, "network": {}}
    num_classes, width = arrays.shape(_LINEAR["kernel"], (2, stages.num_channels))
    norm, statistics = (
        {ours: _ours(arrays.take(theirs, width)) for ours, theirs in names.items()} for names in (_NORM, _STATISTICS)
    )
    kernel, bias = arrays.take(_LINEAR["kernel"], num_classes, width), arrays.take(_LINEAR["bias"], num_classes)
    head = {"norm": norm, "linear": {"kernel": _ours(kernel.T), "bias": _ours(bias)}}
    arrays.ignore(*_PRIOR.values())
    mean, std = _MOMENTS[options.dataset]
    spec = ClassifierSpec(flow, (side, side, _CHANNELS), num_classes, pad_channels=options.inj_pad, mean=mean, std=std)
    return spec, {"params": params, "head": head, "statistics": {"head": statistics}}


def _read_block(
    arrays: Arrays, name: str, stages: Stages, options: argparse.Namespace, width: int, *, preactivation: bool
) -> None:
    channels = stages.num_channels
    if not options.noActnorm:
        shift, log_scale = (arrays.take(f"{name}.actnorm.{part}", channels) for part in ("_shift", "_log_scale"))
        stages.actnorm(shift * np.exp(-log_scale), log_scale)
    layers, widths = [], (channels, width, width, channels)
    for i, size in enumerate(_KERNEL_SIZES):
        layer, (cin, cout) = f"{name}.bottleneck_block.{2 * i + preactivation}", widths[i : i + 2]
        kernel = arrays.take(f"{layer}.weight_orig", cout, cin, size, size)
        u, v = arrays.take_vectors(f"{layer}.weight_u", f"{layer}.weight_v", (cout, cin))
        kernel = applied_kernel(kernel, u, v, coeff=options.coeff, margin=_MARGIN if size > 1 else 0.0)
        layers.append(Layer(kernel, arrays.take(f"{layer}.bias", cout)))
    stages.block(layers, _ACTIVATIONS[options.nonlin], preactivation=preactivation)


def _check(options: argparse.Namespace) -> None:
    """Raises ``ValueError`` for options that are sound one by one and describe no model here."""
    data = options.dataset
    refusals = (
        (
            not len(options.nBlocks) == len(options.nStrides) == len(options.nChannels),
            "--nBlocks, --nStrides and --nChannels need as many numbers each",
        ),
        (options.init_ds not in (1, 2) or not {*options.nStrides} <= {1, 2}, "--init_ds and --nStrides are 1 or 2"),
        (
            options.nonlin not in _ACTIVATIONS,
            f"--nonlin {options.nonlin} is not read: it is one of {', '.join(_ACTIVATIONS)}",
        ),
        (
            options.multiScale and not options.densityEstimation,
            "-multiScale is read of densities: a classifier here looks at all features",
        ),
        (
            options.inj_pad and options.densityEstimation,
            "--inj_pad is read of classifiers: padded images have no density",
        ),
        (
            options.inj_pad and options.init_ds == 2,
            "--inj_pad is read with --init_ds 1: padding here stands in front of every squeeze",
        ),
        (
            not options.densityEstimation and data not in _MOMENTS,
            f"--dataset {data} is not read of classifiers: that code has no mean of its pixels; {', '.join(_MOMENTS)} are",
        ),
    )
    for is_wrong, sentence in refusals:
        if is_wrong:
            raise ValueError(f"CIFAR_main.py {sentence}")


def _side(arrays: Arrays, options: argparse.Namespace) -> int:
    """Side of an image, from the singular vector of the first layer, which that code measures where its input is squeezed.

    Without scales of their own, blocks that squeeze measure it in front of their squeeze.
    """
    squeezes = (options.init_ds == 2) + (options.multiScale and options.nStrides[0] == 2)
    channels = (_CHANNELS + options.inj_pad) * 4 ** ((options.init_ds == 2) + (options.nStrides[0] == 2))
    first = f"stack.0.{'stack.0.' if options.multiScale else ''}bottleneck_block.0.weight_v"
    (size,) = arrays.shape(first, (channels * (_SIDE // 2**squeezes) ** 2,))
    return math.isqrt(size // channels) * 2**squeezes


def _ours(array: np.ndarray) -> Any:
    return jnp.asarray(array, float)
