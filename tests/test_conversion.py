"""Networks of the authors' codes, written again here in NumPy, channels first."""

import functools
import itertools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import iresnet_jax as ir
from iresnet_jax import conversion
from iresnet_jax.__main__ import main
from iresnet_jax.bijections.chain import Chain
from iresnet_jax.conversion import convert
from iresnet_jax.models.contractions import unconstrained
from iresnet_jax.runs import trained_run

ROUNDING = 1e-12  # the same sums in another order, in float64


def logdet(forward, x):
    """Of each example's latents, by imaginary steps of 1e-30: exact to rounding."""
    steps = 1e-30j * np.eye(x[0].size).reshape(-1, *x.shape[1:])
    return np.array([np.linalg.slogdet(forward(one + steps).imag / 1e-30)[1] for one in x])


def apply(weight, x):
    """A dense layer, or a convolution padded with zeros, of the last axes."""
    if weight.ndim == 2:
        return x @ weight.T
    pad = weight.shape[-1] // 2
    height, width = x.shape[-2:]
    padded = np.pad(x, (*((0, 0),) * (x.ndim - 2), (pad, pad), (pad, pad)))
    windows = (padded[..., i : i + height, j : j + width] for i, j in np.ndindex(weight.shape[2:]))
    taps = (weight[:, :, i, j] for i, j in np.ndindex(weight.shape[2:]))
    return sum(
        np.einsum("oc,...chw->...ohw", tap, window)
        for tap, window in zip(taps, windows, strict=True)
    )


def activate(name, x, beta=None):
    if name == "swish":
        return x / (1 + np.exp(-np.log1p(np.exp(beta)) * x)) / 1.1
    return np.where(x.real > 0, x, np.expm1(x))  # "elu"


def squeeze(a, *, channel_major):
    num, c, h, w = a.shape
    patches = a.reshape(num, c, h // 2, 2, w // 2, 2)
    order = (1, 3, 5) if channel_major else (3, 5, 1)
    return patches.transpose(0, *order, 2, 4).reshape(num, 4 * c, h // 2, w // 2)


def flat(a):
    return a.reshape(len(a), -1)


def linear(weight, bias, x):
    return apply(weight, x) + bias.reshape(-1, *(1,) * (x.ndim - 2))


class Drawn(dict):
    """The arrays of a network, each drawn when it is asked for."""

    rng = property(lambda self: self.__dict__.setdefault("_rng", np.random.default_rng(0)))

    def __call__(self, name, *shape, scale=0.3, shift=0.0):
        if name not in self:
            self[name] = np.asarray(shift + scale * self.rng.normal(size=shape))
        return self[name]

    def kernel(self, layer, shape, side, coeff, names, margin=0.0):
        """The kernel that is applied: divided by a norm that is not quite found."""
        (weight_name, u_name, v_name), cin = names, shape[1]
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
    """What a network of theirs gives for data ``x``; `logdet` is of all from data to latents."""

    command: str
    arrays: dict
    x: np.ndarray
    latents: np.ndarray
    logdet: np.ndarray | None
    head: np.ndarray


def i_resnet(*, blocks, strides, widths, side, coeff, multi_scale=False, pad=0, num_classes=None):
    arrays, x = Drawn(), np.random.default_rng(1).uniform(-0.5, 0.5, (2, 3, side, side))

    def forward(x):
        """Latents of a density, features of a classifier."""
        z, parts, k = np.pad(x, ((0, 0), (0, pad), (0, 0), (0, 0))), [], 0
        z = squeeze(z, channel_major=False) if num_classes is None else z
        for scale, (num_blocks, stride, width) in enumerate(
            zip(blocks, strides, widths, strict=True)
        ):
            for i in range(num_blocks):
                squeezes = stride == 2 and i == 0
                before, z = z.shape[-1], squeeze(z, channel_major=False) if squeezes else z
                channels, size = z.shape[1:3]
                name = f"stack.{scale}.stack.{i}" if multi_scale else f"stack.{k}"
                s, t = (
                    arrays(f"{name}.actnorm._log_scale", channels),
                    arrays(f"{name}.actnorm._shift", channels),
                )
                z = z * np.exp(s)[:, None, None] + t[:, None, None]
                h = z
                for j, (taps, cin, cout) in enumerate(
                    [(3, channels, width), (1, width, width), (3, width, channels)]
                ):
                    h = activate("elu", h) if j + k > 0 else h
                    layer = f"{name}.bottleneck_block.{2 * j + (k > 0)}"
                    # Without scales, their first block of a scale measures in front of its squeeze.
                    measured = size if multi_scale or not squeezes else before
                    names, margin = (
                        ("weight_orig", "weight_u", "weight_v"),
                        1e-5 if taps > 1 else 0.0,
                    )
                    weight = arrays.kernel(
                        layer, (cout, cin, taps, taps), measured, coeff, names, margin
                    )
                    arrays(f"{layer}.weight_sigma", 1)
                    h = linear(weight, arrays(f"{layer}.bias", cout), h)
                z, k = z + h, k + 1
            if multi_scale and scale < len(blocks) - 1:
                leaves, z = np.split(z, 2, axis=1)
                parts.append(flat(leaves))
        return np.concatenate([*parts, flat(z)], axis=1) if num_classes is None else z

    latents = forward(x)
    channels, num_dims = latents.shape[1], latents[0].size
    mean, log_std = arrays("prior_mu", num_dims), arrays("prior_logstd", num_dims)
    weight, bias = arrays("bn1.weight", channels, shift=1.0), arrays("bn1.bias", channels)
    running = (
        arrays("bn1.running_mean", channels),
        arrays("bn1.running_var", channels, scale=0.1, shift=1.0),
    )
    arrays["bn1.num_batches_tracked"] = np.array(7)
    kernel, offset = (
        arrays("logits.weight", num_classes or 10, channels),
        arrays("logits.bias", num_classes or 10),
    )
    numbers = [
        f"--{name} {' '.join(map(str, values))}"
        for name, values in (("nBlocks", blocks), ("nStrides", strides), ("nChannels", widths))
    ]
    command = (
        f"python ./CIFAR_main.py {' '.join(numbers)} --coeff {coeff} --nonlin elu --lr 0.003 "
        "-log_verbose"
    )
    if num_classes is not None:
        h = (latents - running[0][:, None, None]) / np.sqrt(running[1] + 1e-5)[:, None, None]
        h = np.maximum(h * weight[:, None, None] + bias[:, None, None], 0).mean(axis=(2, 3))
        return Network(
            f"{command} --init_ds 1 --inj_pad {pad}",
            arrays,
            x,
            latents,
            None,
            h @ kernel.T + offset,
        )
    prior = -0.5 * ((latents - mean) * np.exp(-log_std)) ** 2 - log_std - 0.5 * np.log(2 * np.pi)
    command = f"{command} -densityEstimation{' -multiScale' * multi_scale}"
    return Network(command, arrays, x, latents, logdet(forward, x), prior.sum(axis=1))


def residual_block(arrays, name, z, act, coeff, widths, taps, *, preactivation):
    """``x + g(x)`` with the names and constants of the code of residual flows."""
    side, h = z.shape[-1], z
    for j, (cin, cout) in enumerate(itertools.pairwise(widths)):
        place = 2 * j + preactivation
        if place:
            h = activate(act, h, arrays(f"{name}.{place - 1}.beta", 1, shift=0.5))
        shape = (cout, cin, *((taps[j],) * 2 if taps else ()))
        weight = arrays.kernel(f"{name}.{place}", shape, side, coeff, ("weight", "u", "v"))
        arrays(f"{name}.{place}.scale")
        h = linear(weight, arrays(f"{name}.{place}.bias", cout), h)
    for unused in ("geom_p", "lamb", "last_n_samples", "last_firmom", "last_secmom"):
        arrays(f"{name.split('.nnet')[0]}.{unused}")
    return z + h


def behind(arrays, name, z):
    """The ActNorm of that code, which stands behind a block."""
    space = (1,) * (z.ndim - 2)
    scale, bias = (
        arrays(f"{name}.{part}", z.shape[1]).reshape(-1, *space) for part in ("weight", "bias")
    )
    arrays[f"{name}.initialized"] = np.array(1)
    return (z + bias) * np.exp(scale)


def residual_flow(
    *, side, blocks, squeeze_first=False, factor_out=False, dense=None, width=4, coeff=0.9
):
    arrays, x = Drawn(), np.random.default_rng(1).uniform(0.1, 0.9, (2, 1, side, side))

    def forward(x):
        z, parts = squeeze(x, channel_major=True) if squeeze_first else x, []
        s = 1e-6 + (1 - 2e-6) * z
        z = np.log(s) - np.log(1 - s)
        for scale, num_blocks in enumerate(blocks):
            place, is_last = int(scale == 0), scale == len(blocks) - 1
            if scale == 0:
                z, place = behind(arrays, f"transforms.0.chain.{place}", z), place + 1
            for k in range(num_blocks):
                channels, first = z.shape[1], scale == k == 0 and not is_last
                widths = (channels, width, width, channels)
                name = f"transforms.{scale}.chain.{place}"
                z = residual_block(
                    arrays,
                    f"{name}.nnet",
                    z,
                    "swish",
                    coeff,
                    widths,
                    (3, 1, 3),
                    preactivation=not first,
                )
                z, place = behind(arrays, f"transforms.{scale}.chain.{place + 1}", z), place + 2
            if not is_last:
                z = squeeze(z, channel_major=True)
                if factor_out:
                    z, leaves = np.split(z, 2, axis=1)
                    parts.append(flat(leaves))
        z = flat(z)
        for _ in range(4 if dense else 0):
            widths, name = (
                (z.shape[1], dense, dense, z.shape[1]),
                f"transforms.{scale}.chain.{place}",
            )
            z = residual_block(
                arrays, f"{name}.nnet.nnet", z, "swish", coeff, widths, (), preactivation=True
            )
            z, place = (
                behind(arrays, f"transforms.{scale}.chain.{place + 1}.fc_module", z),
                place + 2,
            )
        return np.concatenate([*parts, z], axis=1)

    latents = forward(x)
    prior = (-0.5 * latents**2 - 0.5 * np.log(2 * np.pi)).sum(axis=1)
    command = (
        f"python train_img.py --data mnist --imagesize {side} --actnorm True --wd 0 --nblocks "
        f"{'-'.join(map(str, blocks))} "
        f"--act swish --idim {width} --coeff {coeff} --squeeze-first {squeeze_first} --factor-out "
        f"{factor_out} "
        f"--fc-end {bool(dense)} --fc-idim {dense or 9}"
    )
    return Network(command, arrays, x, latents, logdet(forward, x), prior)


def toy():
    arrays, x = Drawn(), np.random.default_rng(1).normal(size=(3, 2))

    def forward(x):
        z = behind(arrays, "chain.0", x)
        for k in range(2):
            z = residual_block(
                arrays,
                f"chain.{2 * k + 1}.nnet",
                z,
                "swish",
                0.9,
                (2, 5, 4, 2),
                (),
                preactivation=True,
            )
            z = behind(arrays, f"chain.{2 * k + 2}", z)
        return z

    latents = forward(x)
    prior = (-0.5 * latents**2 - 0.5 * np.log(2 * np.pi)).sum(axis=1)
    command = "train_toy.py --data rings --nblocks 2 --dims 5-4 --actnorm True --vnorms 222"
    return Network(command, arrays, x, latents, logdet(forward, x), prior)


NETWORKS = {
    "i-ResNet, density": functools.partial(
        i_resnet, blocks=(2, 1), strides=(1, 2), widths=(4, 3), side=4, coeff=0.8, multi_scale=True
    ),
    "i-ResNet, classifier": functools.partial(
        i_resnet,
        blocks=(2, 1),
        strides=(1, 2),
        widths=(4, 6),
        side=4,
        coeff=0.7,
        pad=1,
        num_classes=7,
    ),
    "residual flow": functools.partial(
        residual_flow, side=16, blocks=(1, 2), squeeze_first=True, factor_out=True, dense=3
    ),
    "toy": toy,
}
network = functools.cache(lambda name: NETWORKS[name]())


def unbounded(spec, parts):
    """In the place of `saved.model_of`, as bounds of norms take long to compile."""
    rest = {name: part for name, part in parts.items() if name != "params"}
    kind = ir.Density if isinstance(spec, ir.DensitySpec) else ir.Classifier
    return kind(spec, unconstrained(spec.flow, parts["params"], {}).weights, **rest)


@functools.cache
def converted(name):
    """The model in float64, without bounds of its norms."""
    found = network(name)
    with jax.enable_x64(True), pytest.MonkeyPatch.context() as patch:
        patch.setattr(conversion, "model_of", unbounded)
        patch.setattr(conversion, "SIDE", 4)
        return convert(
            {f"module.{key}": array for key, array in found.arrays.items()}, found.command
        )


@jax.jit
def there(model, x):
    """Latents, log-determinant and log-density of the prior: one program for a network."""
    whole = Chain([model.spec.transform, model.flow()])
    z, logdet, _ = whole.forward_and_logdet(x, jax.random.key(0))
    return z, logdet, model.log_prior(z)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("name", [name for name in NETWORKS if "classifier" not in name])
def test_latents_and_log_determinants_are_those_of_the_other_code(name):
    theirs = network(name)
    x = np.moveaxis(theirs.x, 1, -1) if theirs.x.ndim == 4 else theirs.x
    x = x + 0.5 if "i-ResNet" in name else x  # from where the network starts to pixels
    latents, logdet, log_prior = there(converted(name), x)
    np.testing.assert_allclose(np.sort(latents), np.sort(theirs.latents), rtol=0, atol=ROUNDING)
    # in an i-ResNet each latent has its own
    np.testing.assert_allclose(log_prior, theirs.head, rtol=ROUNDING)
    np.testing.assert_allclose(logdet, theirs.logdet, rtol=ROUNDING, atol=ROUNDING)


@pytest.mark.usefixtures("x64")
def test_features_and_logits_are_those_of_the_other_code():
    theirs, ours = network("i-ResNet, classifier"), converted("i-ResNet, classifier")
    x = jnp.asarray(np.pad(np.moveaxis(theirs.x, 1, -1), ((0, 0), (0, 0), (0, 0), (0, 1))))
    np.testing.assert_allclose(
        ours.features_of_input(x), np.moveaxis(theirs.latents, 1, -1), rtol=0, atol=ROUNDING
    )
    np.testing.assert_allclose(ours.logits_of_input(x), theirs.head, rtol=0, atol=ROUNDING)
    white = ours.preprocess(np.full((1, 4, 4, 3), 255))[0, 0, 0]
    np.testing.assert_allclose(
        white, [(1 - 0.4914) / 0.2023, (1 - 0.4822) / 0.1994, (1 - 0.4465) / 0.2010, 0], rtol=1e-12
    )


@pytest.mark.slow
@pytest.mark.usefixtures("x64")
def test_the_command_writes_a_model_that_inverts(tmp_path):
    theirs = network("toy")
    np.savez(tmp_path / "w.npz", **theirs.arrays)
    output = str(tmp_path / "new" / "model.npz")
    arguments = ["--architecture", theirs.command, "--output", output, "--scale"]
    assert main(["convert", str(tmp_path / "w.npz"), *arguments]) == 0
    model = trained_run.load(tmp_path / "new").model  # as other commands do
    assert model.certificate().max_block <= 0.9**3
    x, info = model.decode(model.encode(theirs.x))
    np.testing.assert_allclose(x, theirs.x, rtol=0, atol=1e-5)  # the solver's tolerance is 1e-6
    assert info.converged.all()
