"""Residual flows in PyTorch, of the layers of normflows: with its blocks, or with a naive series as
the paper has it.

Nothing here imports JAX, so that the memory of a process is PyTorch's own. An architecture is the
plain data that `_peers_flows.architecture` makes of a `FlowSpec`. Arrays are (b, c, h, w) where
ours are (b, h, w, c); squeezes and flattening put channels in the order of ours, so that weights of
ours give the same function.
"""

import functools

import normflows as nf  # pyright: ignore[reportMissingImports]
import torch  # pyright: ignore[reportMissingImports]
from normflows.nets import lipschitz  # pyright: ignore[reportMissingImports]
from torch import nn  # pyright: ignore[reportMissingImports]
from torch.nn import functional as F  # pyright: ignore[reportMissingImports]

# the settings of Residual Flows (Chen et al. 2019)
POISSON = {"n_dist": "poisson", "lamb": 2.0, "n_exact_terms": 2}
CONVERGED = 200  # power iterations before an evaluation
LIPSWISH_BOUND, CLIPSWISH_BOUND = 1.1, 1.004
ROWS_AT_ONCE = 100  # of a Jacobian


def block(shape, net, **settings):
    """ActNorm with parameters of a shape such as ``(c, 1, 1)``, and a residual block of normflows
    around a branch.

    They are in the order of the data's way. Settings are those of the estimator of the
    log-determinant, such as `POISSON`.
    """
    return [nf.flows.ActNorm(shape), nf.flows.Residual(net, reduce_memory=True, **settings)]


def take_step(model, optimizer, x, *, clip_norm, power_iterations, num_dims=1):
    """One step of maximum likelihood, in nats over ``num_dims``, as normflows' examples have it;
    returns the loss.

    The norms of layers are kept up with afterwards, by power iterations.
    """
    loss = model.forward_kld(x) / num_dims
    descend(model, optimizer, loss, clip_norm)
    nf.utils.update_lipschitz(model, power_iterations)
    return loss


def descend(model, optimizer, loss, clip_norm):
    """Updates the parameters by the clipped gradient of a loss, if that is finite."""
    optimizer.zero_grad()
    loss.backward()
    # they go on after NaN
    if torch.isfinite(torch.nn.utils.clip_grad_norm_(model.parameters(), clip_norm)):
        optimizer.step()


def count_parameters(model):
    """Numbers in all parameters."""
    return sum(parameter.numel() for parameter in model.parameters())


def exact_log_prob(model, x):
    """Log-densities by the Jacobian of every residual block, in the precision of the parameters:
    a double array ``(b,)``.
    """
    model.eval()
    z, total = torch.as_tensor(x, dtype=next(model.q0.parameters()).dtype), 0.0
    for layer in reversed(model.flows):
        if isinstance(layer, nf.flows.Residual):
            z, log_det = through_block(layer.iresblock.nnet, z)
        else:
            z, log_det = layer.inverse(z)
        z, total = z.detach(), total + torch.as_tensor(log_det).detach()
    return (model.q0.log_prob(z) + total).detach().double().numpy()


def through_block(net, z):
    """``z + net(z)``, and the log-determinant by its whole Jacobian."""
    z = z.detach().requires_grad_()
    g, unit = net(z), torch.eye(z[0].numel(), dtype=z.dtype)
    of_batch = functools.partial(
        torch.autograd.grad, g.flatten(1).sum(0), z, is_grads_batched=True, retain_graph=True
    )
    # (row, example, ...)
    rows = torch.cat([of_batch(some)[0] for some in unit.split(ROWS_AT_ONCE)])
    return (z + g).detach(), torch.linalg.slogdet(
        unit + rows.flatten(2).transpose(0, 1)
    ).logabsdet.detach()


class LipSwish(nn.Module):
    """``x sigmoid(b x) / 1.1`` with ``b = softplus(beta)``; with ``both_signs`` that of ``x``
    and ``-x``, as channels.
    """

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


def branch(stage, make_layer):
    """A residual branch; ``make_layer(taps, channels_in, channels_out, bias=...)`` makes its
    layers.
    """
    parts = []
    for layer in stage["layers"]:
        if layer["activation"]:
            parts.append(ACTIVATIONS[layer["activation"]]())
        *space, _ = layer["in_shape"]
        *taps, cin, cout = layer["kernel_shape"]
        positional = stage["positional_bias"] and bool(space)
        parts.append(make_layer(taps, cin, cout, bias=not positional))
        if positional:
            parts.append(PositionalBias((cout, *space)))
    return nn.Sequential(*parts)


def bounded_layer(taps, cin, cout, **settings):
    """A layer whose norm normflows bounds."""
    if not taps:
        return lipschitz.InducedNormLinear(cin, cout, **settings)
    return lipschitz.InducedNormConv2d(cin, cout, taps[0], 1, taps[0] // 2, **settings)


def plain_layer(taps, cin, cout, bias):
    """An ordinary layer, for weights that satisfy the constraint."""
    return (
        nn.Conv2d(cin, cout, taps[0], padding=taps[0] // 2, bias=bias)
        if taps
        else nn.Linear(cin, cout, bias=bias)
    )


class Squeeze(nf.flows.Flow):
    """Space to depth by 2; the channels of a pixel list those of a patch row by row, each with
    all its channels.
    """

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


class NaiveResidual(nf.flows.Flow):
    """``x + g(x)`` with the series of Behrmann et al. 2019, Algorithm 2, differentiated as it
    stands.
    """

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


def entry(stage):
    """What stands in front of a stage's blocks."""
    return [Squeeze()] * stage["squeeze"] + (
        [] if stage["flattened"] is None else [Flatten(*stage["flattened"])]
    )


def flow(architecture, kind, *, num_terms, num_steps):
    """A "naive" or "normflows" flow to train, with a Gaussian of learned means and scales.

    It has so many terms of its series and power iterations a step.
    """
    flows = []
    for stage in architecture["stages"]:
        make_layer = functools.partial(bounded_layer, coeff=stage["coeff"], n_iterations=num_steps)
        *space, channels = stage["layers"][0]["in_shape"]
        flows += entry(stage)
        for _ in range(stage["num_blocks"]):
            net = branch(stage, make_layer)
            scale, residual = block((channels, *(1 for _ in space)), net, n_power_series=num_terms)
            flows += [scale, residual if kind == "normflows" else NaiveResidual(net, num_terms)]
    *space, channels = architecture["stages"][-1]["layers"][0]["in_shape"]
    return nf.NormalizingFlow(nf.distributions.DiagGaussian((channels, *space)), flows[::-1])


def fixed_flow(architecture, weights):
    """The layers of a flow with weights of ours, in the order of the data's way; latents are
    vectors in the order of ours.

    Weights are arrays by stage and name, such as "conv0/kernel" and "actnorm/bias", stacked over
    blocks.
    """
    layers = []
    for number, stage in enumerate(architecture["stages"]):
        layers += entry(stage)
        *space, channels = stage["layers"][0]["in_shape"]
        for k in range(stage["num_blocks"]):
            own = {
                name: torch.tensor(array[k]) for name, array in weights[f"stage{number}"].items()
            }
            net = branch(stage, plain_layer)
            _load(net, stage, own)
            scale, residual = block((channels, *(1 for _ in space)), net, **POISSON)
            shift, log_scale = (
                own[f"actnorm/{name}"].view(1, -1, *(1 for _ in space))
                for name in ("bias", "log_scale")
            )
            scale.t.data, scale.s.data, scale.data_dep_init_done = (
                -shift,
                -log_scale,
                torch.tensor(1.0),
            )
            layers += [scale, residual]
    if architecture["ends"] is not None:
        layers.append(Flatten(*architecture["ends"]))
    return [layer.eval() for layer in layers]


def _load(net, stage, own):
    """Gives a branch its weights."""
    parts = iter(net)
    for layer in stage["layers"]:
        name = layer["name"]
        if layer["activation"] and isinstance(activation := next(parts), LipSwish):
            activation.beta.data = own[f"{name}/beta"]
        linear, kernel, bias = next(parts), own[f"{name}/kernel"], own[f"{name}/bias"]
        linear.weight.data = (
            kernel.permute(3, 2, 0, 1) if kernel.ndim == 4 else kernel.T
        ).contiguous()
        if linear.bias is None:
            next(parts).bias.data = bias.permute(2, 0, 1).contiguous()
        else:
            linear.bias.data = bias
