"""Models of this library from networks that the authors' PyTorch codes trained.

The command that trained a network defines its architecture. Names of arrays, in which `stack.K` is
`stack.SCALE.stack.K` if there are several scales:

| invertible-resnet (Behrmann et al. 2019): ``CIFAR_main.py`` | here |
|---|---|
| ``stack.K.actnorm._log_scale``, ``_shift``: ``x exp(s) + t`` | ActNorm ``(x + t exp(-s)) exp(s)`` |
| ``stack.K.bottleneck_block.J.weight_orig``, ``weight_u``, ``weight_v`` | ``kernel``, see `Arrays.take_layer` |
| ``prior_mu``, ``prior_logstd``, channels first | prior "gaussian", channels last |
| ``bn1``, ``logits`` | head of a classifier |

After a scale the first half of the channels leaves, and here the second half, so the halves change
places in front of a scale. Every checkpoint has a prior and a head: the part that its task does not
use was never trained and is left out.

| residual-flows (Chen et al. 2019): ``train_img.py``, and ``train_toy.py`` with one ``chain`` | here |
|---|---|
| ``transforms.SCALE.chain.J.nnet.M.weight``, ``u``, ``v`` | ``kernel``, see `Arrays.take_layer` |
| ``transforms.SCALE.chain.J.nnet.M.beta`` of "swish" | ``beta`` of "lipswish", with the same constants |
| ``transforms.SCALE.chain.J.weight``, ``bias``: ``(x + bias) exp(weight)`` | ActNorm, with the same formula |
| ``transforms.SCALE.chain.J.nnet.nnet.M``, ``chain.J.fc_module`` | dense layers and their ActNorm, on entries, channels last |

ActNorm stands behind blocks there, and in front of blocks here: each ActNorm moves to the next
block. The squeeze lists the pixels of each channel one after the other, and half of its channels
may leave. The prior is standard normal.
"""  # noqa: E501

import argparse
import ast
import itertools
import os
import shlex
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from iresnet_jax.arguments import Parser
from iresnet_jax.bijections.logit import Logit
from iresnet_jax.bijections.standardize import Center
from iresnet_jax.conversion_stages import Arrays, Stages
from iresnet_jax.models.architecture import FlowSpec
from iresnet_jax.models.classifier import Classifier, ClassifierSpec
from iresnet_jax.models.density import Density
from iresnet_jax.models.density_spec import DensitySpec
from iresnet_jax.models.priors import Gaussian
from iresnet_jax.models.saved import model_of


def convert(
    weights: str | os.PathLike[str] | Mapping[str, Any], architecture: str
) -> Density | Classifier:
    """Converts a network of another code to a model with guaranteed bounds of its norms.

    Kernels equal the ones that the code applies after training: divided by the norms of its last
    power iteration if these are above the coefficient. The true norms may be above it, see
    ``model.certificate()``; ``model.freeze()`` scales the kernels into the budget.

    Args:
        weights: The ``state_dict``, as a ``.npz`` file or as arrays by name.
        architecture: The command that trained the network, its script and options, such as
            ``"train_img.py --data mnist --imagesize 28 --actnorm True"``.

    Raises:
        ValueError: If the file or the command cannot be read, or an array is missing, left over or
            of another shape; the message names it.

    Example:
        >>> command = "train_toy.py --nblocks 50 --actnorm True"
        >>> model = convert("weights.npz", command)  # doctest: +SKIP
        >>> print(model.certificate())  # doctest: +SKIP
    """
    script, options = parse(architecture)
    arrays = Arrays(weights)
    spec, parts = script.reader(arrays, options)
    arrays.check(architecture)
    return model_of(spec, jax.tree.map(lambda array: jnp.asarray(array, float), parts))


# The command --------------------------------------------------------------------------------------


class Script(NamedTuple):
    """A training script: the reader of its networks, and its options without leading dashes.

    Attributes:
        reader: ``(arrays, options) ->`` arguments of `saved.model_of`.
        read: Options that define the network, with the script's defaults; a default of False or
            True may be a switch.
        fixed: Options that must have their default: with other values the script trains networks
            that this library does not have.
        ignored: Names of options that do not change the function.
    """

    reader: Callable[[Arrays, argparse.Namespace], tuple[Any, dict[str, Any]]]
    read: Mapping[str, Any]
    fixed: Mapping[str, Any]
    ignored: str


def parse(command: str) -> tuple[Script, argparse.Namespace]:
    """The script of a command and the options that are read; names may be shortened, as in the
    script.
    """
    words = shlex.split(command)
    place = next((i for i, word in enumerate(words) if Path(word).name in SCRIPTS), None)
    if place is None:
        raise ValueError(
            "architecture must be the command that trained the network, with its script, one of "
            f"{', '.join(SCRIPTS)}, and its options; got {command!r}"
        )
    name = Path(words[place]).name
    script, parser = SCRIPTS[name], Parser(prog=name, add_help=False)
    for option, default in {**script.read, **script.fixed}.items():
        how: dict[str, Any] = {"type": type(default)}
        if isinstance(default, tuple):
            how = {"type": int, "nargs": "+"}
        elif isinstance(default, bool):
            how = {"type": ast.literal_eval, "nargs": "?", "const": True}
        choices = (default,) if option in script.fixed else None
        parser.add_argument(f"-{option}", f"--{option}", default=default, choices=choices, **how)
    for option in script.ignored.split():
        parser.add_argument(f"-{option}", f"--{option}", nargs="?")
    return script, parser.parse_args(words[place + 1 :])


# invertible-resnet --------------------------------------------------------------------------------

SIDE = 32  # of images
# Mean and standard deviation of pixels in [0, 1], with which classifiers normalise images.
MOMENTS = {
    "cifar10": ((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)),
    "cifar100": ((0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761)),
}


def read_i_resnet(
    arrays: Arrays, options: argparse.Namespace
) -> tuple[DensitySpec | ClassifierSpec, dict[str, Any]]:
    """Arguments of `saved.model_of` for a network of ``CIFAR_main.py``."""
    is_density = options.densityEstimation
    if (options.multiScale and not is_density) or (
        options.inj_pad and (is_density or options.init_ds == 2)
    ):
        raise ValueError(
            "CIFAR_main.py -multiScale is read with -densityEstimation, and --inj_pad of "
            "classifiers with --init_ds 1: there are no such others here"
        )
    side, channels = SIDE, 3 + options.inj_pad
    stages = Stages((side, side, channels), actnorm=True)
    if options.init_ds == 2:
        stages.squeeze(channel_major=False)
    num_read, last = 0, len(options.nBlocks) - 1
    for scale, (num_blocks, stride, width) in enumerate(
        zip(options.nBlocks, options.nStrides, options.nChannels, strict=True)
    ):
        if stride == 2:
            stages.squeeze(channel_major=False)
        is_split = options.multiScale and scale < last
        if is_split:
            stages.order(np.roll(np.arange(stages.num_channels), stages.num_channels // 2))
        for k in range(num_blocks):
            name = f"stack.{scale}.stack.{k}" if options.multiScale else f"stack.{num_read}"
            _read_bottleneck(arrays, name, stages, options, width, preactivation=num_read > 0)
            num_read += 1
        if is_split:
            stages.factor_out()
    specs, params, latents = stages.finish()
    flow = FlowSpec((side, side, channels), specs, options.coeff)
    if is_density:
        arrays.ignore("bn1.", "logits.")
        mean, log_std = (
            arrays.take(name, flow.num_dims)[latents] for name in ("prior_mu", "prior_logstd")
        )
        spec = DensitySpec(flow, transform=Center(), num_levels=256)
        return spec, {"params": params, "prior": Gaussian(mean, log_std), "network": {}}
    arrays.ignore("prior_")
    width = stages.num_channels
    num_classes = arrays.size("logits.weight") // width
    scale, bias, running_mean, running_var = (
        arrays.take(f"bn1.{name}", width)
        for name in ("weight", "bias", "running_mean", "running_var")
    )
    linear = {
        "kernel": arrays.take("logits.weight", num_classes, width).T,
        "bias": arrays.take("logits.bias", num_classes),
    }
    head = {"norm": {"scale": scale, "bias": bias}, "linear": linear}
    statistics = {"head": {"mean": running_mean, "var": running_var}}
    mean, std = MOMENTS[options.dataset]
    spec = ClassifierSpec(
        flow, (side, side, 3), num_classes, pad_channels=options.inj_pad, mean=mean, std=std
    )
    return spec, {"params": params, "head": head, "statistics": statistics}


def _read_bottleneck(
    arrays: Arrays,
    name: str,
    stages: Stages,
    options: argparse.Namespace,
    width: int,
    *,
    preactivation: bool,
) -> None:
    channels = stages.num_channels
    shift, log_scale = (
        arrays.take(f"{name}.actnorm.{part}", channels) for part in ("_shift", "_log_scale")
    )
    stages.actnorm(shift * np.exp(-log_scale), log_scale)
    layers, widths = [], (channels, width, width, channels)
    for i, size in enumerate((3, 1, 3)):
        layers.append(
            arrays.take_layer(
                f"{name}.bottleneck_block.{2 * i + preactivation}",
                (widths[i + 1], widths[i], size, size),
                names=("weight_orig", "weight_u", "weight_v"),
                coeff=options.coeff,
                # That code adds 1e-5 to the divisor of kernels larger than 1 x 1.
                margin=1e-5 if size > 1 else 0.0,
            )
        )
    stages.block(layers, options.nonlin, preactivation=preactivation)


# residual-flows -----------------------------------------------------------------------------------


def read_images(arrays: Arrays, options: argparse.Namespace) -> tuple[DensitySpec, dict[str, Any]]:
    """Arguments of `saved.model_of` for a network of ``train_img.py``."""
    # These data sets ignore --imagesize.
    sizes = {"celebahq": 256, "celeba_5bit": 64, "imagenet32": 32, "imagenet64": 64}
    side = sizes[options.data] if options.data in sizes else options.imagesize
    shape = (side, side, 1 if options.data == "mnist" else 3)
    stages = Stages(shape, actnorm=options.actnorm)
    if options.squeeze_first:
        stages.squeeze(channel_major=True)
        side //= 2
    numbers = _numbers(options.nblocks)
    # A scale has images of at least 4 x 4 pixels; smaller scales are left out.
    last = min(len(numbers), side.bit_length() - 2) - 1
    for scale, num_blocks in enumerate(numbers[: last + 1]):
        chain = _Chain(arrays, f"transforms.{scale}.chain", stages, options)
        if scale == 0:
            chain.skip()  # the logit
            chain.actnorm()
        for k in range(num_blocks):
            # The last scale begins like any other, even where it is the first.
            chain.block(
                (options.idim,) * 2, (3, 1, 3), preactivation=scale > 0 or k > 0 or scale == last
            )
            chain.actnorm()
        if scale < last:
            stages.squeeze(channel_major=True)
            if options.factor_out:
                stages.factor_out()
        elif options.fc_end:
            for _ in range(4):
                chain.block((options.fc_idim,) * 2, preactivation=True, part="nnet.nnet")
                chain.actnorm("fc_module.")
    levels = {"celeba_5bit": 32, "celebahq": 2**options.nbits}.get(options.data, 256)
    transform = Logit(1e-6 if options.data == "mnist" else 0.05)
    return _density(stages, shape, options.coeff, transform=transform, num_levels=levels)


def read_toy(arrays: Arrays, options: argparse.Namespace) -> tuple[DensitySpec, dict[str, Any]]:
    """Arguments of `saved.model_of` for a network of ``train_toy.py``."""
    stages = Stages((2,), actnorm=options.actnorm)
    chain = _Chain(arrays, "chain", stages, options)
    chain.actnorm()
    for _ in range(options.nblocks):
        chain.block(_numbers(options.dims), preactivation=True)
        chain.actnorm()
    return _density(stages, (2,), options.coeff)


def _density(
    stages: Stages, shape: tuple[int, ...], coeff: float, **rest: Any
) -> tuple[DensitySpec, dict[str, Any]]:
    specs, params, _ = stages.finish()
    spec = DensitySpec(FlowSpec(shape, specs, coeff), **rest)
    return spec, {"params": params, "prior": Gaussian.standard(spec.flow.num_dims), "network": {}}


_ACTIVATIONS = {"swish": "lipswish"} | {
    name: name for name in ("relu", "elu", "softplus", "tanh", "identity")
}


class _Chain:
    """Reads the layers of a chain into stages, one after the other."""

    def __init__(self, arrays: Arrays, name: str, stages: Stages, options: argparse.Namespace):
        if set(options.vnorms) != {"2"}:
            raise ValueError(
                f"--vnorms {options.vnorms} is not read: only 2 for every layer is, "
                "the Euclidean norm"
            )
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
            stages.actnorm(
                *(
                    self._arrays.take(f"{name}.{part}{kind}", stages.num_channels)
                    for kind in ("bias", "weight")
                )
            )

    def block(
        self,
        hidden: Sequence[int],
        kernel_sizes: Sequence[int] = (),
        *,
        preactivation: bool,
        part: str = "nnet",
    ) -> None:
        """A block of convolutions, or of dense layers on all entries if there are no sizes of
        kernels.
        """
        arrays, name = self._arrays, f"{next(self._names)}.{part}"
        outside = self._stages.num_channels if kernel_sizes else self._stages.num_entries
        layers = []
        for i, (cin, cout) in enumerate(itertools.pairwise((outside, *hidden, outside))):
            place, beta = 2 * i + preactivation, None
            if self._activation == "lipswish" and place > 0:
                beta = float(arrays.take(f"{name}.{place - 1}.beta", 1)[0])
            taps = (kernel_sizes[i],) * 2 if kernel_sizes else ()
            layer = arrays.take_layer(
                f"{name}.{place}",
                (cout, cin, *taps),
                names=("weight", "u", "v"),
                coeff=self._options.coeff,
            )
            layers.append(layer._replace(beta=beta))
        self._stages.block(layers, self._activation, preactivation=preactivation)


def _numbers(text: str) -> tuple[int, ...]:
    """The numbers of an option such as 16-16-16."""
    return tuple(map(int, text.split("-")))


# The options of all scripts -----------------------------------------------------------------------

SCRIPTS = {
    "CIFAR_main.py": Script(
        read_i_resnet,
        read={
            "nBlocks": (4, 4, 4),
            "nStrides": (1, 2, 2),
            "nChannels": (16, 64, 256),
            "coeff": 0.9,
            "init_ds": 2,
            "inj_pad": 0,
            "nonlin": "elu",
            "dataset": "cifar10",
            "densityEstimation": False,
            "multiScale": False,
        },
        fixed={"noActnorm": False},
        ignored="optimizer lr numTraceSamples numSeriesTerms powerIterSpectralNorm weight_decay "
        "drop_rate batch init_batch warmup_epochs epochs resume save_dir vis_port vis_server "
        "log_every fixedPrior evaluate interpolate drop_two nesterov norm analysisTraceEst "
        "log_verbose deterministic",
    ),
    "train_img.py": Script(
        read_images,
        read={
            "data": "cifar10",
            "imagesize": 32,
            "nbits": 8,
            "coeff": 0.98,
            "vnorms": "2222",
            "act": "swish",
            "idim": 512,
            "nblocks": "16-16-16",
            "factor-out": False,
            "squeeze-first": False,
            "actnorm": True,
            "fc-end": True,
            "fc-idim": 128,
        },
        fixed={
            "block": "resblock",
            "learn-p": False,
            "fc-actnorm": False,
            "batchnorm": False,
            "dropout": 0.0,
            "fc": False,
            "add-noise": True,
            "quadratic": False,
            "padding": 0,
            "task": "density",
            "kernels": "3-1-3",
            "preact": True,
            "logit-transform": True,
            "first-resblock": True,
        },
        ignored="n-power-series n-dist n-samples n-exact-terms var-reduc-lr neumann-grad mem-eff "
        "n-lipschitz-iters sn-tol dataroot padding-dist cdim optimizer scheduler nepochs "
        "batchsize lr wd warmup-iters annealing-iters save val-batchsize seed ema-val update-freq "
        "scale-dim rcrop-pad-mode resume begin-epoch nworkers print-freq vis-freq",
    ),
    "train_toy.py": Script(
        read_toy,
        read={
            "coeff": 0.9,
            "vnorms": "222222",
            "dims": "128-128-128-128",
            "act": "swish",
            "nblocks": 100,
            "actnorm": False,
        },
        fixed={"arch": "iresnet", "learn-p": False, "batchnorm": False},
        ignored="n-power-series n-dist n-samples data n-lipschitz-iters atol rtol mixed "
        "brute-force exact-trace niters batch_size test_batch_size lr weight-decay "
        "annealing-iters save viz_freq val_freq log_freq gpu seed",
    ),
}
