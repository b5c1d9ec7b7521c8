"""Flows that are trained against an energy: `fit_energy` with its defaults, and those of flowjax
and normflows.

- "ours" is ``ir.fit_energy(log_density, num_dims, scale=...)``; its time includes annealing and
  compilation.
- "flowjax" is a `coupling_flow` with rational-quadratic splines, "realnvp" and "residual" are flows
  of normflows. They minimise the reverse divergence, as their documentation does, behind a fixed
  scaling by the target's ``scale``. Their clocks stand still while they are compiled.
- The same with "_particles" minimise the forward divergence on the particles that "ours" is trained
  on. Annealing counts as their time, so that the comparison is of flows.

Adam at 1e-3 with a cosine to the end, batches of 256, gradients clipped at norm 1; parameters at
the end.
"""

import functools
import math
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import _densities
import jax
import jax.numpy as jnp
import numpy as np
from _densities import CLIP_NORM, LEARNING_RATE, in_batches, spline_flow
from _energies import Target

import iresnet_jax as ir
from iresnet_jax.energies import particles

BATCH_SIZE, AT_ONCE = 256, 1000
FLOWJAX = {**_densities.FLOWJAX, "nn_width": 128}
REALNVP = {"layers": 16, "width": 128}
RESIDUAL = {"blocks": 16, "width": 128, "hidden_layers": 2, "lipschitz_const": 0.9}
SETTINGS = {
    "learning_rate": LEARNING_RATE,
    "clip_norm": CLIP_NORM,
    "batch_size": BATCH_SIZE,
    "flowjax": FLOWJAX,
    "realnvp": REALNVP,
    "residual": RESIDUAL,
}


class Trained(NamedTuple):
    """A flow after training.

    Attributes:
        draw: ``n -> (samples, their log-densities)``, with exact log-determinants.
        log_prob: Log-densities of samples.
        details: For the record.
        draw_by_one_probe: `draw` with log-determinants by one Hutchinson probe, of residual flows.
    """

    draw: Callable[[int], tuple[np.ndarray, np.ndarray]]
    log_prob: Callable[[np.ndarray], np.ndarray]
    details: dict[str, Any]
    draw_by_one_probe: Callable[[int], tuple[np.ndarray, np.ndarray]] | None = None


def ours(target: Target, seed: int, minutes: float) -> Trained:
    """`fit_energy` with its defaults."""
    key = jax.random.key(seed)
    model = ir.fit_energy(
        target.log_density,
        target.num_dims,
        scale=target.scale,
        minutes=minutes,
        key=key,
        progress=False,
    )
    draw = jax.jit(lambda model, key: model.sample_and_log_prob(key, AT_ONCE)[:2])
    log_prob = jax.jit(lambda model, x: model.log_prob(x))
    exact = model.with_(estimator=ir.ExactLogdet(), history=None)
    one_probe = exact.with_(
        estimator=ir.SeriesLogdet(num_terms=30, num_probes=1, exact_trace=False)
    )
    assert model.history is not None
    details = {
        "runs": [
            {"loss": run.what, "steps": run.num_steps, "divergence": run.loss}
            for run in model.history.attempts
        ],
        "prior": model.spec.prior_family,
        "components": model.spec.num_components,
    }
    sample = functools.partial(_in_parts, draw, seed)
    return Trained(
        functools.partial(sample, exact),
        lambda x: in_batches(lambda part: log_prob(exact, part), x),
        details,
        functools.partial(sample, one_probe),
    )


def flowjax(target: Target, seed: int, minutes: float, *, has_particles: bool = False) -> Trained:
    """The coupling flow of flowjax with rational-quadratic splines."""
    import equinox as eqx  # pyright: ignore[reportMissingImports]
    from flowjax.bijections import Affine  # pyright: ignore[reportMissingImports]
    from flowjax.distributions import Transformed  # pyright: ignore[reportMissingImports]

    x, seconds = _particles(target, seed, minutes) if has_particles else (None, 60 * minutes)
    params, unscaled, optimizer = spline_flow(target.num_dims, seed, FLOWJAX["nn_width"])
    scale = jnp.full(target.num_dims, target.scale)

    def flow_of(params):
        return Transformed(unscaled(params), Affine(jnp.zeros(target.num_dims), scale))

    @eqx.filter_jit
    def update(params, state, batch, key, rate):
        def loss(params):
            if batch is not None:
                return -flow_of(params).log_prob(batch).mean()
            drawn, log_prob = flow_of(params).sample_and_log_prob(key, (BATCH_SIZE,))
            return jnp.mean(log_prob - target.log_density(drawn))

        change, state = optimizer.update(eqx.filter_grad(loss)(params), state)
        return eqx.apply_updates(params, jax.tree.map(lambda leaf: -rate * leaf, change)), state

    state, batches, step = optimizer.init(params), _batches(x, seed), 0
    jax.block_until_ready(update(params, state, next(batches), jax.random.key(0), jnp.float32(0)))
    began = time.monotonic()
    while (used := time.monotonic() - began) < seconds:
        key, rate = (
            jax.random.fold_in(jax.random.key(seed), step),
            jnp.float32(_rate(used / seconds)),
        )
        params, state = jax.block_until_ready(update(params, state, next(batches), key, rate))
        step += 1
    draw = eqx.filter_jit(lambda params, key: flow_of(params).sample_and_log_prob(key, (AT_ONCE,)))
    log_prob = eqx.filter_jit(lambda params, x: flow_of(params).log_prob(x))
    return Trained(
        functools.partial(_in_parts, draw, seed, params),
        lambda x: in_batches(lambda part: log_prob(params, part), x),
        {"steps": step},
    )


def normflows(
    target: Target, seed: int, minutes: float, *, kind: str, has_particles: bool = False
) -> Trained:
    """RealNVP or the residual flow of normflows."""
    import normflows as nf  # pyright: ignore[reportMissingImports]
    import torch  # pyright: ignore[reportMissingImports]
    from _pytorch import CONVERGED, descend, exact_log_prob, through_block

    torch.manual_seed(seed)
    x, seconds = _particles(target, seed, minutes) if has_particles else (None, 60 * minutes)
    dims = target.num_dims
    if kind == "realnvp":
        flows = []
        for _ in range(REALNVP["layers"]):
            net = nf.nets.MLP(
                [dims // 2, REALNVP["width"], REALNVP["width"], 2 * (dims - dims // 2)],
                init_zeros=True,
            )
            flows += [
                nf.flows.AffineCouplingBlock(
                    net, split_mode="channel_inv" if dims % 2 else "channel"
                )
            ]
            flows += [nf.flows.Permute(dims, mode="shuffle" if dims > 2 else "swap")]
    else:
        widths = [dims, *RESIDUAL["hidden_layers"] * [RESIDUAL["width"]], dims]
        nets = [
            nf.nets.LipschitzMLP(
                widths, init_zeros=True, lipschitz_const=RESIDUAL["lipschitz_const"]
            )
            for _ in range(RESIDUAL["blocks"])
        ]
        # The way that training goes is the one without fixed points: to the data, or from them.
        flows = [nf.flows.Residual(net, reverse=has_particles, reduce_memory=False) for net in nets]
    model = nf.NormalizingFlow(nf.distributions.DiagGaussian(dims), flows)
    optimizer, batches, step = (
        torch.optim.Adam(model.parameters(), LEARNING_RATE),
        _batches(x, seed),
        0,
    )
    value_and_slope = jax.jit(_value_and_slope(target))

    class Energy(torch.autograd.Function):
        @staticmethod
        def forward(ctx, drawn):
            values, slope = value_and_slope(drawn.detach().numpy())
            ctx.save_for_backward(torch.tensor(np.asarray(slope)))
            return torch.tensor(np.asarray(values))

        @staticmethod
        def backward(ctx, given):
            return ctx.saved_tensors[0] * given[:, None]

    offset = dims * math.log(target.scale)
    model.log_prob(torch.zeros(2, dims))
    began = time.monotonic()
    while (used := time.monotonic() - began) < seconds:
        optimizer.param_groups[0]["lr"] = _rate(used / seconds)
        batch = next(batches)
        if batch is not None:
            loss = -model.log_prob(torch.tensor(batch / target.scale)).mean()
        else:
            z, of_samples = model.sample(BATCH_SIZE)
            energy: Any = Energy.apply(target.scale * z)
            loss = (of_samples - offset - energy).mean()
        descend(model, optimizer, loss, CLIP_NORM)
        if kind == "residual":
            nf.utils.update_lipschitz(model, 5)
        step += 1
    model.eval()
    if kind == "residual":
        nf.utils.update_lipschitz(model, CONVERGED)

    def exact(x):
        if kind == "realnvp":
            return model.log_prob(torch.tensor(x)).detach().numpy()
        return exact_log_prob(model, x) if has_particles else to_data(inverse(torch.tensor(x)))[1]

    def inverse(x):
        with torch.no_grad():
            return model.inverse(x)

    def to_data(z):
        """Through residual maps that go to the data, with the exact log-determinant of each."""
        log_prob = model.q0.log_prob(z)
        for layer in model.flows:
            z, log_det = through_block(layer.iresblock.nnet, z)
            log_prob = log_prob - log_det
        return z.detach().numpy(), log_prob.detach().numpy()

    def log_prob(x):
        return in_batches(exact, x / target.scale) - offset

    def draw(num):
        parts = []
        for _ in range(-(-num // AT_ONCE)):
            if kind == "residual" and not has_particles:
                x, found = to_data(model.q0.sample(AT_ONCE))
            else:
                with torch.no_grad():
                    x = model.sample(AT_ONCE)[0].numpy()
                found = exact(x)
            parts.append((target.scale * x, np.asarray(found, np.float64) - offset))
        x, found = (np.concatenate(part)[:num] for part in zip(*parts, strict=True))
        return x, found

    return Trained(draw, log_prob, {"steps": step})


def _value_and_slope(target: Target):
    def both(x):
        values, pull = jax.vjp(target.log_density, x)
        return values, pull(jnp.ones_like(values))[0]

    return both


def _particles(target: Target, seed: int, minutes: float) -> tuple[np.ndarray, float]:
    """The particles of `fit_energy`, and the seconds that are left."""
    began = time.monotonic()
    x = particles(target.log_density, target.num_dims, key=jax.random.key(seed), scale=target.scale)
    return x.reshape(-1, target.num_dims), max(60 * minutes - (time.monotonic() - began), 1.0)


def _batches(x: np.ndarray | None, seed: int):
    rng = np.random.default_rng(seed)
    while True:
        yield None if x is None else x[rng.integers(len(x), size=BATCH_SIZE)]


def _rate(share: float) -> float:
    return LEARNING_RATE * (1 + math.cos(math.pi * min(share, 1))) / 2


def _in_parts(draw: Callable, seed: int, params: Any, num: int) -> tuple[np.ndarray, np.ndarray]:
    keys = jax.random.split(jax.random.key(10_000 + seed), -(-num // AT_ONCE))
    found = [draw(params, key) for key in keys]
    x, log_prob = (np.concatenate([np.asarray(part[i]) for part in found])[:num] for i in (0, 1))
    return x.astype(np.float32), log_prob.astype(np.float64)


MODELS: dict[str, Callable[[Target, int, float], Trained]] = {
    "ours": ours,
    "flowjax": flowjax,
    "realnvp": functools.partial(normflows, kind="realnvp"),
    "residual": functools.partial(normflows, kind="residual"),
    "flowjax_particles": functools.partial(flowjax, has_particles=True),
    "realnvp_particles": functools.partial(normflows, kind="realnvp", has_particles=True),
    "residual_particles": functools.partial(normflows, kind="residual", has_particles=True),
}
