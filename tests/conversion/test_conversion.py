"""Networks of the authors' codes: both are written again here, in NumPy, with channels first and the names of their arrays."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from iresnet_jax.conversion import convert

# The same sums in another order, in float64; log-determinants add up as many as there are dimensions.
ROUNDING, LOGDET = 1e-12, 1e-12


class Dual(NamedTuple):
    """Values ``(b, c, h, w)`` or ``(b, d)``, and their derivatives by each of the ``d`` entries of an example, in front."""

    value: np.ndarray
    tangents: np.ndarray

    @classmethod
    def start(cls, x):
        unit = np.eye(x[0].size).reshape(-1, 1, *x.shape[1:])
        return cls(x, np.broadcast_to(unit, (len(unit), *x.shape)))

    def moved(self, move):
        """A map of the axes of an example that only moves entries."""
        return Dual(move(self.value), move(self.tangents))

    def linear(self, weight, bias):
        return Dual(apply(weight, self.value) + bias.reshape(-1, *(1,) * (self.value.ndim - 2)), apply(weight, self.tangents))

    def elementwise(self, value, slope):
        return Dual(value, slope * self.tangents)

    def __add__(self, other):
        return Dual(self.value + other.value, self.tangents + other.tangents)

    @property
    def flat(self):
        return self.moved(lambda a: a.reshape(*a.shape[: -(self.value.ndim - 1)], -1))

    @property
    def logdet(self):
        return np.linalg.slogdet(np.moveaxis(self.tangents, 0, 1))[1]


def apply(weight, x):
    """A dense layer, or a convolution padded with zeros, of the last axes."""
    if weight.ndim == 2:
        return x @ weight.T
    pad = weight.shape[-1] // 2
    height, width = x.shape[-2:]
    padded = np.pad(x, (*((0, 0),) * (x.ndim - 2), (pad, pad), (pad, pad)))
    windows = (padded[..., i : i + height, j : j + width] for i, j in np.ndindex(weight.shape[2:]))
    taps = (weight[:, :, i, j] for i, j in np.ndindex(weight.shape[2:]))
    return sum(np.einsum("oc,...chw->...ohw", tap, window) for tap, window in zip(taps, windows, strict=True))


def activate(name, z, beta=None):
    x = z.value
    if name == "sorting":  # all maxima of pairs of channels, then all minima
        first, second = z.moved(lambda a: a[..., ::2, :, :]), z.moved(lambda a: a[..., 1::2, :, :])
        larger = first.value > second.value
        parts = [[np.where(mask, a, b) for mask in (larger, ~larger)] for a, b in zip(first, second, strict=True)]
        return Dual(*(np.concatenate(part, axis=-3) for part in parts))
    if name == "swish":
        b = np.log1p(np.exp(beta))
        s = 1 / (1 + np.exp(-b * x))
        return z.elementwise(x * s / 1.1, (s + b * x * s * (1 - s)) / 1.1)
    if name == "elu":
        return z.elementwise(np.where(x > 0, x, np.expm1(x)), np.exp(np.minimum(x, 0)))
    return z.elementwise(np.tanh(x), 1 - np.tanh(x) ** 2)


def space_to_depth(a, *, channel_major):
    *lead, c, h, w = a.shape
    n = len(lead)
    patches = a.reshape(*lead, c, h // 2, 2, w // 2, 2)
    order = (n, n + 2, n + 4) if channel_major else (n + 2, n + 4, n)
    return patches.transpose(*range(n), *order, n + 1, n + 3).reshape(*lead, 4 * c, h // 2, w // 2)


class Drawn(dict):
    """The arrays of a network, each drawn when it is asked for."""

    rng = property(lambda self: self.__dict__.setdefault("_rng", np.random.default_rng(0)))

    def __call__(self, name, *shape, scale=0.3, shift=0.0):
        if name not in self:
            self[name] = shift + scale * self.rng.normal(size=shape)
        return self[name]

    def kernel(self, layer, shape, side, coeff, names, margin=0.0):
        """The kernel that is applied: divided by a norm that power iteration has not quite found."""
        (weight_name, u_name, v_name), (cout, cin) = names, shape[:2]
        weight = self(f"{layer}.{weight_name}", *shape)
        inside = (cin,) if weight.ndim == 2 else (cin, *((side, side) if shape[-1] > 1 else (1, 1)))
        if f"{layer}.{v_name}" not in self:
            unit = np.eye(np.prod(inside)).reshape(-1, *inside)
            matrix = apply(weight, unit).reshape(len(unit), -1)
            v = self.rng.normal(size=len(unit))
            for _ in range(20):
                v = matrix @ (v @ matrix)
                v /= np.linalg.norm(v)
            v += 0.1 * self.rng.normal(size=len(v)) / np.sqrt(len(v))
            v /= np.linalg.norm(v)
            u = v @ matrix
            self[f"{layer}.{u_name}"], self[f"{layer}.{v_name}"] = u / np.linalg.norm(u), v
        u, v = self[f"{layer}.{u_name}"], self[f"{layer}.{v_name}"]
        sigma = u @ apply(weight, v.reshape(1, *inside)).ravel()
        return weight / (max(1.0, sigma / coeff) + margin)


class Network(NamedTuple):
    """What a network of theirs gives for some data.

    Attributes:
        command: The command that trained it.
        arrays: Its arrays.
        x: Data as the network takes them, channels first.
        latents: Latents, or features of a classifier.
        logdet: Of the whole network, from data to latents; None of a classifier.
        head: Log-density of the prior, or logits.
    """

    command: str
    arrays: dict
    x: np.ndarray
    latents: np.ndarray
    logdet: np.ndarray | None
    head: np.ndarray


def i_resnet(*, blocks, strides, widths, side, coeff, act, multi_scale=False, pad=0, num_classes=None):
    arrays = Drawn()
    x = np.random.default_rng(1).uniform(-0.5, 0.5, (2, 3, side, side))
    patch = functools.partial(space_to_depth, channel_major=False)
    z, parts, k = Dual.start(x), [], 0
    if num_classes is None:
        z = z.moved(patch)
    else:
        z = Dual(np.pad(x, ((0, 0), (0, pad), (0, 0), (0, 0))), np.zeros((0, 2, 3 + pad, side, side)))
    for scale, (num_blocks, stride, width) in enumerate(zip(blocks, strides, widths, strict=True)):
        for i in range(num_blocks):
            squeezes = stride == 2 and i == 0
            before, z = z.value.shape[-1], z.moved(patch) if squeezes else z
            channels, size = z.value.shape[1:3]
            name = f"stack.{scale}.stack.{i}" if multi_scale else f"stack.{k}"
            s, t = arrays(f"{name}.actnorm._log_scale", channels), arrays(f"{name}.actnorm._shift", channels)
            s, t = s[:, None, None], t[:, None, None]
            z = z.elementwise(z.value * np.exp(s) + t, np.exp(s))
            h = z
            for j, (taps, cin, cout) in enumerate([(3, channels, width), (1, width, width), (3, width, channels)]):
                h = activate(act, h) if j + k > 0 else h
                layer = f"{name}.bottleneck_block.{2 * j + (k > 0)}"
                measured = size if multi_scale or not squeezes else before  # their first block of a scale measures too early
                names, margin = ("weight_orig", "weight_u", "weight_v"), 1e-5 if taps > 1 else 0.0
                weight = arrays.kernel(layer, (cout, cin, taps, taps), measured, coeff, names, margin)
                arrays(f"{layer}.weight_sigma", 1)
                h = h.linear(weight, arrays(f"{layer}.bias", cout))
            z, k = z + h, k + 1
        if multi_scale and scale < len(blocks) - 1:
            half = z.value.shape[1] // 2
            parts.append(z.moved(lambda a, half=half: a[..., :half, :, :]).flat)
            z = z.moved(lambda a, half=half: a[..., half:, :, :])
    channels = z.value.shape[1]
    num_dims = sum(part.value.shape[1] for part in parts) + z.value[0].size
    mean, log_std = arrays("prior_mu", num_dims), arrays("prior_logstd", num_dims)
    weight, bias = arrays("bn1.weight", channels, shift=1.0), arrays("bn1.bias", channels)
    running = arrays("bn1.running_mean", channels), arrays("bn1.running_var", channels, scale=0.1, shift=1.0)
    arrays["bn1.num_batches_tracked"] = np.array(7)
    kernel, offset = arrays("logits.weight", num_classes or 10, channels), arrays("logits.bias", num_classes or 10)
    numbers = [
        f"--{name} {' '.join(map(str, values))}"
        for name, values in (("nBlocks", blocks), ("nStrides", strides), ("nChannels", widths))
    ]
    command = f"python ./CIFAR_main.py {' '.join(numbers)} --coeff {coeff} --nonlin {act} --lr 0.003 -log_verbose"
    if num_classes is not None:
        h = (z.value - running[0][:, None, None]) / np.sqrt(running[1] + 1e-5)[:, None, None]
        h = np.maximum(h * weight[:, None, None] + bias[:, None, None], 0).mean(axis=(2, 3))
        return Network(f"{command} --init_ds 1 --inj_pad {pad}", arrays, x, z.value, None, h @ kernel.T + offset)
    parts = [*parts, z.flat]
    latents, tangents = (np.concatenate(part, axis=-1) for part in zip(*parts, strict=True))
    prior = -0.5 * ((latents - mean) * np.exp(-log_std)) ** 2 - log_std - 0.5 * np.log(2 * np.pi)
    command = f"{command} -densityEstimation{' -multiScale' * multi_scale}"
    return Network(command, arrays, x, latents, Dual(latents, tangents).logdet, prior.sum(axis=1))


def residual_block(arrays, name, z, act, coeff, widths, taps, *, preactivation):
    """``x + g(x)`` with the names and constants of the code of residual flows."""
    side, h = z.value.shape[-1], z
    for j, (cin, cout) in enumerate(zip(widths, widths[1:], strict=False)):
        place = 2 * j + preactivation
        if place:
            beta = arrays(f"{name}.{place - 1}.beta", 1, shift=0.5) if act == "swish" else None
            h = activate(act, h, beta)
        shape = (cout, cin, *((taps[j],) * 2 if taps else ()))
        weight = arrays.kernel(f"{name}.{place}", shape, side, coeff, ("weight", "u", "v"))
        arrays(f"{name}.{place}.scale")
        h = h.linear(weight, arrays(f"{name}.{place}.bias", cout))
    for unused in ("geom_p", "lamb", "last_n_samples", "last_firmom", "last_secmom"):
        arrays(f"{name.split('.nnet')[0]}.{unused}")
    return z + h


def behind(arrays, name, z):
    """The ActNorm of that code, which stands behind a block."""
    space = (1,) * (z.value.ndim - 2)
    scale, bias = (arrays(f"{name}.{part}", z.value.shape[1]).reshape(-1, *space) for part in ("weight", "bias"))
    arrays[f"{name}.initialized"] = np.array(1)
    return z.elementwise((z.value + bias) * np.exp(scale), np.exp(scale))


def residual_flow(*, side, blocks, act, squeeze_first=False, factor_out=False, dense=None, width=4, coeff=0.9):
    arrays = Drawn()
    x = np.random.default_rng(1).uniform(0.1, 0.9, (2, 1, side, side))
    move = functools.partial(space_to_depth, channel_major=True)
    z = Dual.start(x)
    z = z.moved(move) if squeeze_first else z
    s = 1e-6 + (1 - 2e-6) * z.value
    z, parts = z.elementwise(np.log(s) - np.log(1 - s), (1 - 2e-6) / (s * (1 - s))), []
    for scale, num_blocks in enumerate(blocks):
        place, is_last = int(scale == 0), scale == len(blocks) - 1
        if scale == 0:
            z, place = behind(arrays, f"transforms.0.chain.{place}", z), place + 1
        for k in range(num_blocks):
            channels, first = z.value.shape[1], scale == k == 0 and not is_last
            widths = (channels, width, width, channels)
            name = f"transforms.{scale}.chain.{place}"
            z = residual_block(arrays, f"{name}.nnet", z, act, coeff, widths, (3, 1, 3), preactivation=not first)
            z, place = behind(arrays, f"transforms.{scale}.chain.{place + 1}", z), place + 2
        if not is_last:
            z = z.moved(move)
            if factor_out:
                half = z.value.shape[1] // 2
                parts.append(z.moved(lambda a, half=half: a[..., half:, :, :]).flat)
                z = z.moved(lambda a, half=half: a[..., :half, :, :])
    z = z.flat
    for _ in range(4 if dense else 0):
        widths, name = (z.value.shape[1], dense, dense, z.value.shape[1]), f"transforms.{scale}.chain.{place}"
        z = residual_block(arrays, f"{name}.nnet.nnet", z, act, coeff, widths, (), preactivation=True)
        z, place = behind(arrays, f"transforms.{scale}.chain.{place + 1}.fc_module", z), place + 2
    latents, tangents = (np.concatenate(part, axis=-1) for part in zip(*parts, z, strict=True))
    prior = (-0.5 * latents**2 - 0.5 * np.log(2 * np.pi)).sum(axis=1)
    command = (
        f"python train_img.py --data mnist --imagesize {side} --actnorm True --wd 0 --nblocks {'-'.join(map(str, blocks))} "
        f"--act {act} --idim {width} --coeff {coeff} --squeeze-first {squeeze_first} --factor-out {factor_out} "
        f"--fc-end {bool(dense)} --fc-idim {dense or 9}"
    )
    return Network(command, arrays, x, latents, Dual(latents, tangents).logdet, prior)


def toy():
    arrays, x = Drawn(), np.random.default_rng(1).normal(size=(3, 2))
    z = behind(arrays, "chain.0", Dual.start(x))
    for k in range(2):
        z = residual_block(arrays, f"chain.{2 * k + 1}.nnet", z, "swish", 0.9, (2, 5, 4, 2), (), preactivation=True)
        z = behind(arrays, f"chain.{2 * k + 2}", z)
    prior = (-0.5 * z.value**2 - 0.5 * np.log(2 * np.pi)).sum(axis=1)
    command = "train_toy.py --data rings --nblocks 2 --dims 5-4 --actnorm True --vnorms 222"
    return Network(command, arrays, x, z.value, z.logdet, prior)


NETWORKS = {
    "i-ResNet, density": functools.partial(
        i_resnet, blocks=(2, 1), strides=(1, 2), widths=(4, 3), side=4, coeff=0.8, act="elu", multi_scale=True
    ),
    "i-ResNet, classifier": functools.partial(
        i_resnet, blocks=(2, 1), strides=(1, 2), widths=(4, 6), side=4, coeff=0.7, act="sorting", pad=1, num_classes=7
    ),
    "residual flow, dense end": functools.partial(residual_flow, side=8, blocks=(1, 2), act="swish", dense=3),
    "residual flow, factored": functools.partial(
        residual_flow, side=16, blocks=(1, 1), act="elu", squeeze_first=True, factor_out=True
    ),
    "toy": toy,
}
network = functools.cache(lambda name: NETWORKS[name]())


@functools.cache
def converted(name):
    """The model in float64."""
    found = network(name)
    with jax.enable_x64(True):
        return convert({f"module.{key}": array for key, array in found.arrays.items()}, found.command)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("name", [name for name in NETWORKS if "classifier" not in name])
def test_latents_and_log_determinants_are_those_of_the_other_code(name):
    theirs, ours = network(name), converted(name).continuous
    x = np.moveaxis(theirs.x, 1, -1) if theirs.x.ndim == 4 else theirs.x
    x = x + 0.5 if "i-ResNet" in name else x  # from where the network starts to pixels
    found, latents = ours.terms(x, jax.random.key(0), jax.random.key(0)), ours.encode(x)
    np.testing.assert_allclose(np.sort(latents), np.sort(theirs.latents), rtol=0, atol=ROUNDING)
    np.testing.assert_allclose(found.log_prior, theirs.head, rtol=ROUNDING)  # of an i-ResNet, each latent has its own
    np.testing.assert_allclose(found.log_det + found.log_det_transform, theirs.logdet, rtol=LOGDET, atol=LOGDET)


@pytest.mark.usefixtures("x64")
def test_features_and_logits_are_those_of_the_other_code():
    theirs, ours = network("i-ResNet, classifier"), converted("i-ResNet, classifier")
    x = jnp.asarray(np.pad(np.moveaxis(theirs.x, 1, -1), ((0, 0), (0, 0), (0, 0), (0, 1))))
    np.testing.assert_allclose(ours.features_of_input(x), np.moveaxis(theirs.latents, 1, -1), rtol=0, atol=ROUNDING)
    np.testing.assert_allclose(ours.logits_of_input(x), theirs.head, rtol=0, atol=ROUNDING)
    white = ours.preprocess(np.full((1, 4, 4, 3), 255))[0, 0, 0]
    np.testing.assert_allclose(white, [(1 - 0.4914) / 0.2023, (1 - 0.4822) / 0.1994, (1 - 0.4465) / 0.2010, 0], rtol=1e-12)
