"""The architecture of a flow of ours in PyTorch: with normflows' blocks, or with a naive series as the paper has it.

Nothing here imports JAX, so that the memory of a process is PyTorch's own. An architecture is the plain data that
`_peers_cases.architecture` makes of a `FlowSpec`. Arrays are (b, c, h, w) where ours are (b, h, w, c); squeezes and flattening
put channels in the order of ours, so that weights of ours give the same function.
"""

import math

import normflows as nf  # pyright: ignore[reportMissingImports]
import torch  # pyright: ignore[reportMissingImports]
from _normflows import POISSON, block
from normflows.nets import lipschitz  # pyright: ignore[reportMissingImports]
from torch import nn  # pyright: ignore[reportMissingImports]
from torch.nn import functional as F  # pyright: ignore[reportMissingImports]

LIPSWISH_BOUND, CLIPSWISH_BOUND = 1.1, 1.004


class LipSwish(nn.Module):
    """``x sigmoid(b x) / 1.1`` with ``b = softplus(beta)``; with ``both_signs`` that of ``x`` and ``-x``, as channels."""

    def __init__(self, both_signs):
        super().__init__()
        self.beta, self.both_signs = nn.Parameter(torch.tensor(0.5)), both_signs

    def forward(self, x):
        gate = torch.sigmoid(F.softplus(self.beta) * x)
        if not self.both_signs:
            return x * gate / LIPSWISH_BOUND
        return torch.cat([x * gate, x * (gate - 1)], 1) / (LIPSWISH_BOUND * CLIPSWISH_BOUND)


ACTIVATIONS = {
    "elu": nn.ELU,
    "lipswish": lambda: LipSwish(both_signs=False),
    "clipswish": lambda: LipSwish(both_signs=True),
}


class PositionalBias(nn.Module):
    """A bias for every pixel."""

    def __init__(self, shape):
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(shape))

    def forward(self, x):
        return x + self.bias


class SpectralLayer(nn.Module):
    """A convolution or product with ``W min(1, c / sigma)``.

    Power iteration estimates ``sigma`` at every training step with the convolution and its transpose, at the size of the
    layer's images (Behrmann et al. 2019, eq. 2, and Gouk et al. 2018).
    """

    def __init__(self, layer, bias, coeff, num_steps):
        super().__init__()
        *taps, cin, cout = layer["kernel_shape"]
        *space, _ = layer["in_shape"]
        self.padding = taps[0] // 2 if taps else None
        self.weight = nn.Parameter(torch.randn(cout, cin, *taps) / math.sqrt(cin * math.prod(taps)))
        self.bias = nn.Parameter(torch.zeros(cout)) if bias else None
        self.coeff, self.num_steps = coeff, num_steps
        self.v: torch.Tensor
        self.register_buffer("v", F.normalize(torch.randn(1, cin, *space).flatten(1)).view(1, cin, *space))

    def product(self, weight, x, bias=None):
        """``W x`` and the bias."""
        return F.linear(x, weight, bias) if self.padding is None else F.conv2d(x, weight, bias, padding=self.padding)

    def transposed(self, weight, u):
        """``W^T u``."""
        return u @ weight if self.padding is None else F.conv_transpose2d(u, weight, padding=self.padding)

    def forward(self, x):
        with torch.no_grad():
            v = self.v
            for _ in range(self.num_steps if self.training else 0):
                u = self.product(self.weight, v)
                v = self.transposed(self.weight, u / u.norm())
                v = v / v.norm()
            self.v.copy_(v)
            v = v.clone()
            u = self.product(self.weight, v)
            u = u / u.norm()
        sigma = (u * self.product(self.weight, v)).sum()
        return self.product(self.weight * torch.clamp(self.coeff / sigma, max=1), x, self.bias)


def normflows_layer(layer, bias, coeff, num_steps):
    """A layer of bounded norm as normflows has it."""
    *taps, cin, cout = layer["kernel_shape"]
    settings = {"bias": bias, "coeff": coeff, "n_iterations": num_steps}
    if not taps:
        return lipschitz.InducedNormLinear(cin, cout, **settings)
    return lipschitz.InducedNormConv2d(cin, cout, taps[0], 1, taps[0] // 2, **settings)


def fixed_layer(layer, bias, coeff, num_steps):
    """An ordinary layer, for weights that satisfy the constraint."""
    del coeff, num_steps
    *taps, cin, cout = layer["kernel_shape"]
    return nn.Conv2d(cin, cout, taps[0], padding=taps[0] // 2, bias=bias) if taps else nn.Linear(cin, cout, bias=bias)


LAYERS = {"naive": SpectralLayer, "normflows": normflows_layer, "fixed": fixed_layer}


def branch(stage, kind, coeff=1.0, num_steps=1):
    """A residual branch; ``kind`` is one of `LAYERS`."""
    parts = []
    for layer in stage["layers"]:
        if layer["activated"]:
            parts.append(ACTIVATIONS[stage["activation"]]())
        *space, _ = layer["in_shape"]
        positional = stage["positional_bias"] and bool(space)
        parts.append(LAYERS[kind](layer, not positional, coeff, num_steps))
        if positional:
            parts.append(PositionalBias((layer["kernel_shape"][-1], *space)))
    return nn.Sequential(*parts)


class Squeeze(nf.flows.Flow):
    """Space to depth by 2; the channels of a pixel list those of a patch row by row, each with all its channels."""

    def inverse(self, z):
        b, c, h, w = z.shape
        z = z.view(b, c, h // 2, 2, w // 2, 2).permute(0, 3, 5, 1, 2, 4)
        return z.reshape(b, 4 * c, h // 2, w // 2), 0

    def forward(self, z):
        b, c, h, w = z.shape
        z = z.view(b, 2, 2, c // 4, h, w).permute(0, 3, 4, 1, 5, 2)
        return z.reshape(b, c // 4, 2 * h, 2 * w), 0


class Flatten(nf.flows.Flow):
    """Vectors of images, channels fastest."""

    def __init__(self, side, channels):
        super().__init__()
        self.shape = (side, side, channels)

    def inverse(self, z):
        return z.permute(0, 2, 3, 1).flatten(1), 0

    def forward(self, z):
        return z.view(-1, *self.shape).permute(0, 3, 1, 2).contiguous(), 0


class ActNorm(nf.flows.Flow):
    """``(x + bias) exp(log_scale)`` for each channel, from the first batch (Kingma and Dhariwal 2018)."""

    def __init__(self, shape):
        super().__init__()
        self.bias, self.log_scale = (nn.Parameter(torch.zeros(shape)) for _ in range(2))
        self.fitted = False

    def inverse(self, z):
        if not self.fitted:
            axes = [0, *range(2, z.ndim)]
            self.bias.data = -z.mean(axes).view(self.bias.shape).detach()
            self.log_scale.data = -z.std(axes).log().view(self.bias.shape).detach()
            self.fitted = True
        return (z + self.bias) * self.log_scale.exp(), self.log_scale.sum() * math.prod(z.shape[2:])

    def forward(self, z):
        return z * (-self.log_scale).exp() - self.bias, -self.log_scale.sum() * math.prod(z.shape[2:])


class NaiveResidual(nf.flows.Flow):
    """``x + g(x)`` with the series of Behrmann et al. 2019, Algorithm 2, differentiated as it stands."""

    def __init__(self, net, num_terms):
        super().__init__()
        self.net, self.num_terms = net, num_terms

    def inverse(self, z):
        if not torch.is_grad_enabled():  # to fit the ActNorms
            return z + self.net(z), 0
        x = z if z.requires_grad else z.detach().requires_grad_()
        g = self.net(x)
        v = torch.randn_like(x)
        w, log_det = v, 0
        for k in range(1, self.num_terms + 1):
            (w,) = torch.autograd.grad(g, x, w, create_graph=True)  # w^T J
            log_det = log_det + (-1) ** (k + 1) * (w * v).flatten(1).sum(1) / k
        return x + g, log_det


class Prior(nf.distributions.BaseDistribution):
    """Independent normal or logistic distributions with learned means and scales."""

    def __init__(self, kind, shape):
        super().__init__()
        self.kind = kind
        self.mean, self.log_scale = (nn.Parameter(torch.zeros(shape)) for _ in range(2))

    def log_prob(self, z):
        x = (z - self.mean) * (-self.log_scale).exp()
        if self.kind == "gaussian":
            density = -0.5 * x.square() - 0.5 * math.log(2 * math.pi)
        else:
            density = -x - 2 * F.softplus(-x)
        return (density - self.log_scale).flatten(1).sum(1)


def entry(stage):
    """What stands in front of a stage's blocks."""
    return [Squeeze()] * stage["squeeze"] + ([] if stage["flattened"] is None else [Flatten(*stage["flattened"])])


def flow(architecture, kind, *, num_terms, num_steps):
    """A flow to train, as a `normflows.NormalizingFlow`.

    Args:
        architecture: Plain data, see `_peers_cases.architecture`.
        kind: "naive" or "normflows".
        num_terms: Terms of the series.
        num_steps: Power iterations a step.
    """
    flows = []
    for stage in architecture["stages"]:
        *space, channels = stage["layers"][0]["in_shape"]
        flows += entry(stage)
        of_channels = (channels, *(1 for _ in space))
        for _ in range(stage["num_blocks"]):
            net = branch(stage, kind, architecture["coeff"], num_steps)
            if kind == "normflows":
                flows += block(of_channels, net, n_power_series=num_terms)
            else:
                flows += [ActNorm(of_channels), NaiveResidual(net, num_terms)]
    *space, channels = architecture["stages"][-1]["layers"][0]["in_shape"]
    return nf.NormalizingFlow(Prior(architecture["prior"], (channels, *space)), flows[::-1])


def fixed_flow(architecture, weights):
    """The layers of a flow with weights of ours, in the order of the data's way; latents are vectors in the order of ours.

    Args:
        architecture: As for `flow`.
        weights: Arrays by path, such as "stage0/branch/conv0/kernel", stacked over blocks.
    """
    layers = []
    for number, stage in enumerate(architecture["stages"]):
        layers += entry(stage)
        for k in range(stage["num_blocks"]):
            own = {
                name.removeprefix(f"stage{number}/"): torch.tensor(array[k])
                for name, array in weights.items()
                if name.startswith(f"stage{number}/")
            }
            net = branch(stage, "fixed")
            _load_branch(net, stage, own)
            _, residual = block((1,), net, **POISSON)
            scale = ActNorm(own["actnorm/bias"].shape)
            scale.bias.data, scale.log_scale.data = own["actnorm/bias"], own["actnorm/log_scale"]
            if len(stage["layers"][0]["in_shape"]) == 3:
                scale.bias.data, scale.log_scale.data = (p.data.view(-1, 1, 1) for p in (scale.bias, scale.log_scale))
            scale.fitted = True
            layers += [scale, residual]
    if architecture["ends"] is not None:
        layers.append(Flatten(*architecture["ends"]))
    return [layer.eval() for layer in layers]


def _load_branch(net, stage, own):
    """Gives a branch its weights."""
    parts = iter(net)
    for layer in stage["layers"]:
        name = f"branch/{layer['name']}"
        if layer["activated"]:
            activation = next(parts)
            if isinstance(activation, LipSwish):
                activation.beta.data = own[f"{name}/beta"]
        linear, kernel, bias = next(parts), own[f"{name}/kernel"], own[f"{name}/bias"]
        linear.weight.data = (kernel.permute(3, 2, 0, 1) if kernel.ndim == 4 else kernel.T).contiguous()
        if linear.bias is None:
            next(parts).bias.data = bias.permute(2, 0, 1).contiguous()
        else:
            linear.bias.data = bias
