r"""From an unnormalised density to a model of it without data, `fit_energy`, and how close a model
is to one, `evaluate_energy`.

**Fitting.** Training by the reverse divergence alone loses modes that no sample of the model finds.
Sequential Monte Carlo finds modes while they are connected, so the model is first trained by the
likelihood of its particles, as `fit` trains on data. Training by the sum of both divergences
follows: the likelihood keeps the modes, and the energy knows more about a point than particles do.
If the scales of a target differ much, the second training makes the model worse, as on the funnel
of benchmarks/energies.py. Held-out particles and samples of the model choose between the two.

**Evaluation.** Samples ``x_i`` of the model ``q`` have the weights ``w_i = exp(log_density(x_i)) /
q(x_i)``, whose mean is an unbiased estimate of the normalising constant ``Z``. That needs exact
log-determinants: a random one of variance ``v``, however unbiased, makes ``log Z`` too large by ``v
/ 2``. Weights only see the places of the model's samples. If the model has lost a mode entirely,
effective sample size and tail still look good. Samples of the target, if there are any, reveal the
loss: their weights are larger than the weights of all samples of the model.
"""

import dataclasses
import math
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from blackjax.diagnostics import psis_weights
from blackjax.mcmc import hmc
from blackjax.smc import ess, resampling, solver, tempered
from jax.scipy.stats import norm
from jaxtyping import Array, Float, Key, Shaped
from scipy.special import log_softmax

from iresnet_jax import losses
from iresnet_jax.bijections.standardize import Standardize, Whiten
from iresnet_jax.fit_settings import EXACT_DIMS
from iresnet_jax.losses import LogDensity, log_density_of
from iresnet_jax.maths.keys import typed_key
from iresnet_jax.maths.logdet_exact import ExactLogdet
from iresnet_jax.maths.logdet_krylov import KrylovLogdet
from iresnet_jax.models.architecture import StageSpec
from iresnet_jax.models.density import Density
from iresnet_jax.models.mixtures import EntryMixtures, GaussianMixture
from iresnet_jax.models.model import STOPPED
from iresnet_jax.models.priors import family_of
from iresnet_jax.starts import MIXTURE_DIMS, WHITENED_DIMS
from iresnet_jax.training.run import BlowUpError
from iresnet_jax.training.train import train

NUM_PARTICLES = 20_000
NUM_SNAPSHOTS = 8  # snapshots of all particles, ten trajectories apart
# Numbers of components of a mixture, tried until the likelihood falls twice.
COMPONENTS = (1, 2, 3, 4, 6, 8, 11, 16, 23, 32, 45, 64)
PER_MARGINAL = 8  # components per entry
STAGES = (StageSpec(20, (128,), activation="clipswish"),)
BATCH_SIZE = 256


def fit_energy(
    log_density: LogDensity,
    num_dims: int,
    *,
    key: Key[Array, ""],
    scale: float | int = 1.0,
    minutes: float | int = 3.0,
    steps: int | None = None,
    num_particles: int = NUM_PARTICLES,
    stages: Sequence[StageSpec] = STAGES,
    progress: bool = True,
) -> Density:
    """Fits a density to an unnormalised one, whose modes may be far from each other.

    Particles are annealed from ``N(0, scale^2)`` to the target, see `anneal`. A residual flow is
    trained by their likelihood, and then by both divergences, see
    `iresnet_jax.losses.symmetric_kl`. Its prior is the likeliest before training, on whitened or
    standardised particles: a mixture of normal distributions, or an independent mixture for each
    entry, see `EntryMixtures`. `evaluate_energy` judges the result.

    Args:
        log_density: ``(n, num_dims) -> (n,)``, the logarithm of the density up to a constant, which
            is minus the energy: finite and differentiable everywhere, in JAX.
        num_dims: Dimensions.
        key: Source of all randomness.
        scale: Standard deviation of the normal distribution in which annealing starts: it should
            reach all modes.
        minutes: Time, compilation included. Only training obeys it: annealing may exceed it. If
            less than half a minute is left for training, training is by likelihood alone.
        steps: Updates of the flow instead of a time, half of them by each loss.
        num_particles: Particles, some thousand: a tenth of them, at most 2000, validates.
        stages: Stages of the flow.
        progress: Whether lines of progress are written to stderr.

    Returns:
        The model, certified, with the `History` of the training that led to it; its step is 0 if
        training brought no improvement.

    Example:
        >>> model = fit_energy(log_density, 2, scale=3.0, key=jax.random.key(0))  # doctest: +SKIP
        >>> print(evaluate_energy(model, log_density, jax.random.key(1)))  # doctest: +SKIP
    """
    end_s = time.monotonic() + 60 * minutes if steps is None else math.inf
    key_particles, key_init, key_likelihood, key_energy, key_choice = jax.random.split(
        typed_key(key), 5
    )
    x = particles(log_density, num_dims, key=key_particles, scale=scale, num=num_particles)
    num_held_out = min(2000, x.shape[1] // 10)
    # The last snapshot comes first.
    held_out, x = x[-1, :num_held_out], x[::-1, num_held_out:].reshape(-1, num_dims)

    best = _start(key_init, x, held_out, stages)
    divergence_of = losses.symmetric_kl(log_density, len(held_out))
    least, _ = divergence_of(best, held_out, key_choice)
    adam = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(1e-3))
    both = losses.symmetric_kl(log_density, BATCH_SIZE // 2)
    turns: list[dict[str, Any]] = [
        {"loss": _negative_log_likelihood, "key": key_likelihood, "batch_size": BATCH_SIZE},
        {"loss": both, "key": key_energy, "batch_size": BATCH_SIZE // 2, "optimizer": adam},
    ]
    if end_s - time.monotonic() < 30:
        turns.pop()
    for i, turn in enumerate(turns):
        left_s = (end_s - time.monotonic()) / (len(turns) - i)
        if steps is None:
            turn["minutes"] = max(left_s / 60, 0.01)
        else:
            turn["steps"] = max(steps // 2, 1)
        try:
            trained = train(
                best, data=x, validation=held_out, patience=0, progress=progress, **turn
            )
        except BlowUpError as error:
            if i == 0:
                raise
            warnings.warn(
                f"the model was trained by likelihood only: by the energy, {error}", stacklevel=2
            )
            break
        history = trained.history
        divergence, _ = divergence_of(trained, held_out, key_choice)
        assert history is not None
        if divergence < least:
            best, least = trained, divergence
        elif best.history is None:
            best = best.with_(history=dataclasses.replace(history, step=0))
        if history.ended == STOPPED:
            break
    return best


def _negative_log_likelihood(model: Density, batch: Array, key: Key[Array, ""]) -> Array:
    return -model.log_prob(batch, key).mean()


def particles(
    log_density: LogDensity,
    num_dims: int,
    *,
    key: Key[Array, ""],
    scale: float | int = 1.0,
    num: int = NUM_PARTICLES,
) -> Float[np.ndarray, "s n d"]:
    """Snapshots of the particles for the training in `fit_energy`, the final one last; arguments
    and errors as there.

    A particle has the same place in all snapshots, so that some particles can be held out from all
    of them.
    """
    key_anneal, key_move, key_order = jax.random.split(typed_key(key), 3)
    found, step = anneal(log_density, key_anneal, num, num_dims, scale=scale)
    snapshots = []
    for key in jax.random.split(key_move, NUM_SNAPSHOTS):
        found = step(key, found)
        snapshots.append(np.asarray(found.x))
    log_density_of(log_density, found.x, "particles")
    return np.stack(snapshots)[:, np.asarray(jax.random.permutation(key_order, num))]


class Particles(NamedTuple):
    """Samples of ``N(0, scale^2)^(1 - t) p^t``, equally weighted and dependent.

    Attributes:
        x: The samples.
        t: Place on the path, from 0 to 1.
        step_size: Step of trajectories, in standard deviations of the particles.
    """

    x: Float[Array, "n d"]
    t: Float[Array, ""]
    step_size: Float[Array, ""]


def anneal(
    log_density: LogDensity, key: Key[Array, ""], num: int, num_dims: int, *, scale: float = 1.0
) -> tuple[Particles, Callable[[Array, Particles], Particles]]:
    """Particles of a density ``p``, by sequential Monte Carlo from a normal distribution (Del
    Moral, Doucet and Jasra 2006).

    Each step advances ``t`` so far that half of the particles stay effective, resamples the
    particles by their weights, and moves them by Hamiltonian Monte Carlo. So separated modes keep
    the shares that they had while they were connected.

    Returns:
        The particles at ``t = 1``, and the function that moves them further.
    """

    def start(x):
        return jnp.sum(norm.logpdf(x, 0, scale))

    def ratio(x):
        value = log_density_of(log_density, x[None])[0] - start(x)
        return jnp.where(jnp.isfinite(value), value, -1e30)

    @jax.jit
    def step(key, particles):
        x, t, step_size = particles
        change = ess.ess_solver(jax.vmap(ratio), x, 0.5, 1 - t, solver.dichotomy)
        weights = jax.nn.softmax(change * jax.vmap(ratio)(x))
        t = jnp.where(change >= 1 - t, 1.0, t + change)
        options = {
            "step_size": step_size[None],
            "inverse_mass_matrix": (weights @ jnp.square(x - (weights @ x)[None]))[None],
        }

        def resample(key, weights, num):  # each place once if weights are equal
            drawn = resampling.systematic(key, weights, num)
            return jnp.where(change > 0, drawn, jnp.arange(num))

        kernel = tempered.build_kernel(start, ratio, trajectory, hmc.init, resample)
        state = tempered.TemperedSMCState(x, weights, t)
        # Ten trajectories at t follow a resampling, after which all weights are equal.
        state, info = kernel(key, state, 10, t, options)
        acceptance = jnp.mean(info.update_info.acceptance_rate)
        step_size = jnp.clip(step_size * jnp.exp(2 * (acceptance - 0.75)), 1e-4, 2.0)
        return Particles(state.particles, t, step_size)

    hamiltonian = hmc.build_kernel()

    def trajectory(key, state, log_density, step_size, inverse_mass_matrix):
        key_size, key_move = jax.random.split(key)
        # Random step sizes serve targets of several scales.
        step_size = step_size * jnp.exp(-jax.random.exponential(key_size))
        return hamiltonian(key_move, state, log_density, step_size, inverse_mass_matrix, 8)

    key_start, key = jax.random.split(key)
    x = scale * jax.random.normal(key_start, (num, num_dims))
    log_density_of(log_density, x, f"draws from N(0, {scale:g}^2), in which annealing starts")
    found, num_steps = Particles(x, jnp.zeros((), x.dtype), jnp.full((), 0.3, x.dtype)), 0
    while found.t < 1:
        found, num_steps = step(jax.random.fold_in(key, num_steps), found), num_steps + 1
        if num_steps == 1000:
            raise RuntimeError(
                f"annealing is at t = {float(found.t):.3g} after {num_steps} steps: choose another "
                f"scale than {scale:g}"
            )
    return found, step


def _start(
    key: Key[Array, ""],
    x: Float[np.ndarray, "n d"],
    held_out: Float[np.ndarray, "m d"],
    stages: Any,
) -> Density:
    """An initial flow near the identity, with the prior under which held-out particles are
    likeliest.

    Priors are compared without the flow.
    """
    num_dims, x = x.shape[1], x[:10_000]
    starts = []  # (mean log-density of held-out particles, transform, prior)
    for transform in (Standardize.fit(x), *([Whiten.fit(x)] if num_dims <= WHITENED_DIMS else [])):
        z = np.asarray(transform.forward(jnp.asarray(x)))
        held_out_z, log_dets, _ = transform.forward_and_logdet(jnp.asarray(held_out))
        priors: list[Any] = [EntryMixtures.fit(z, PER_MARGINAL)]
        if num_dims <= MIXTURE_DIMS and isinstance(transform, Whiten):
            priors.append(_likeliest_mixture(z[:5000], held_out_z))
        for prior in priors:
            log_prob = float(_mean_log_prob(prior, held_out_z) + log_dets[0])
            starts.append((log_prob, transform, prior))
    _, transform, prior = max(starts, key=lambda start: start[0])
    return Density.init(
        key,
        x,
        stages=stages,
        estimator=ExactLogdet() if num_dims <= EXACT_DIMS else KrylovLogdet(num_steps=6),
        prior=family_of(prior),
        num_components=prior.num_components,
        transform=transform,
        last_scale=0.01,  # the prior alone may be close
    )


def _likeliest_mixture(
    z: Float[np.ndarray, "n d"], held_out: Float[Array, "m d"]
) -> GaussianMixture:
    """The mixture under which held-out vectors are likeliest; larger mixtures are tried until the
    likelihood has fallen twice.
    """
    best, highest, fallen = None, -math.inf, 0
    for num in COMPONENTS:
        if fallen == 2 or (num > 1 and 5 * num * (z.shape[1] + 1) > len(z)):
            break
        mixture = GaussianMixture.fit(z, num)
        value = float(_mean_log_prob(mixture, held_out))
        if value > highest:
            best, highest, fallen = mixture, value, 0
        else:
            fallen += 1
    assert best is not None
    return best


@jax.jit
def _mean_log_prob(prior: Any, z: Float[Array, "m d"]) -> Float[Array, ""]:
    return jnp.mean(prior.log_prob(z))


# --- evaluation -----------------------------------------------------------------------------------


class Weights(NamedTuple):
    """Summary of importance weights, by `weigh`.

    Attributes:
        ess: Effective sample size, ``(sum w)^2 / (n sum w^2)``, a share in (0, 1].
        log_z: Logarithm of the mean weight.
        stderr: Standard error of ``log_z``.
        pareto_k: Shape of the generalised Pareto distribution of the largest weights: moments of
            order ``1 / k`` and above are infinite.
        threshold: Largest ``pareto_k`` at which the mean weight is meaningful, ``min(1 - 1 / log10
            n, .7)``.
    """

    ess: float
    log_z: float
    stderr: float
    pareto_k: float
    threshold: float


@dataclass(frozen=True)
class EnergyEvaluation:
    """A model beside an unnormalised density.

    Attributes:
        ess: Effective sample size of the importance weights, a share in (0, 1]; NaN if the weights
            say nothing about ``log Z``.
        log_z: Logarithm of the normalising constant, by the mean weight; NaN likewise.
        stderr: Standard error of ``log_z``; NaN likewise.
        pareto_k: Shape of the weights' tail, see `Weights`.
        lower: Expected ``log_density - log q`` under the model, which is at most ``log Z``.
        upper: Expected ``log_density - log q`` under the target, at least ``log Z``; None without
            samples of the target.
        lost: Share of the target's samples whose weights exceed the largest weight of the model's
            samples; None without samples of the target.
        verdict: Judgement of the weights, in one or two sentences.
        log_weights: Logarithms of all weights.
    """

    ess: float
    log_z: float
    stderr: float
    pareto_k: float
    lower: float
    upper: float | None
    lost: float | None
    verdict: str
    log_weights: Float[np.ndarray, " n"]

    def __str__(self) -> str:
        if not math.isnan(self.log_z):
            return (
                f"log Z {self.log_z:.4f} ± {self.stderr:.4f}, effective sample size "
                f"{self.ess:.1%}\n{self.verdict}"
            )
        upper = ""
        if self.upper is not None:
            upper = f" and at most {self.upper:.4f}, the same over samples of the target"
        return (
            f"{self.verdict}\nlog Z is at least {self.lower:.4f}, the mean logarithm of the "
            f"weights{upper}."
        )


def evaluate_energy(
    model: Density,
    log_density: LogDensity,
    key: Key[Array, ""],
    num: int = 10_000,
    *,
    samples: Shaped[Array, "m ..."] | Shaped[np.ndarray, "m ..."] | None = None,
) -> EnergyEvaluation:
    """Effective sample size and normalising constant of an unnormalised density by importance
    weights of a model.

    Args:
        model: The model, whose samples are weighed; its log-determinants are computed exactly.
        log_density: ``(b, ...) -> (b,)``, up to a constant.
        key: Source of the samples.
        num: Number of samples.
        samples: Samples of the target, if available, for example from a long Markov chain: they
            show lost modes.

    Example:
        >>> found = evaluate_energy(model, log_density, jax.random.key(0))  # doctest: +SKIP
        >>> print(found)  # doctest: +SKIP
        log Z 0.8032 ± 0.0009, effective sample size 99.2%
        The tail of the weights is light enough for their mean (Pareto k is 0.08, at most 0.70).
    """
    model, size = model.with_(estimator=ExactLogdet()), min(num, 1000)
    keys = jax.random.split(typed_key(key), -(-num // size))
    drawn = [model.sample_and_log_prob(part, size) for part in keys]
    values = [log_density_of(log_density, each.x, "samples of the model") for each in drawn]
    log_probs = np.concatenate([each.log_prob for each in drawn])
    log_weights = (np.concatenate(values).astype(float) - log_probs)[:num]
    weights, upper, lost = weigh(log_weights), None, None
    is_useful, verdict = weights.pareto_k <= weights.threshold, _verdict(weights, num)
    if samples is not None:
        samples = np.asarray(samples)
        values = log_density_of(log_density, samples, "samples of the target")
        parts = np.array_split(samples, -(-len(samples) // size))
        log_probs = np.concatenate([model.log_prob(part, key) for part in parts])
        of_target = np.asarray(values, np.float64) - log_probs
        upper, lost = float(of_target.mean()), float(np.mean(of_target > log_weights.max()))
        # Where the model does not see a share s of the target, log Z is too small by -log(1 - s),
        # which is at least s.
        if lost * len(of_target) >= 3 and lost > 2 * weights.stderr:
            is_useful = False
            verdict = (
                f"The model has lost modes: {lost:.1%} of the target's samples have larger weights "
                f"than all {num} samples of the model, whose mean leaves out what lies there. "
                "Train against samples that reach all modes."
            )
    converged = np.concatenate([each.info.converged for each in drawn])
    if failed := int(np.sum(~converged[:num])):
        verdict += (
            f" The inverse did not converge for {failed} of {num} samples, whose weights "
            "belong to other points."
        )
    ess, log_z, stderr = weights[:3] if is_useful else (math.nan,) * 3
    lower = float(log_weights.mean())
    return EnergyEvaluation(
        ess, log_z, stderr, weights.pareto_k, lower, upper, lost, verdict, log_weights
    )


def _verdict(weights: Weights, num: int) -> str:
    """A sentence on the tail of the weights."""
    tail = f"Pareto k is {weights.pareto_k:.2f}"
    if not weights.pareto_k <= weights.threshold:
        return (
            f"The weights have a heavy tail ({tail}, above {weights.threshold:.2f}): their mean "
            "says nothing about log Z; train longer, or against samples that reach where the "
            "target has mass and the model has not."
        )
    if weights.pareto_k > 0.5:
        return (
            f"The weights have an infinite variance, as they do from k = .5 on ({tail}): log Z is "
            f"too low more often than too high, by more than its error says. Draw more than {num} "
            "samples, or train longer."
        )
    if weights.ess < 0.01:
        return (
            f"The tail of the weights is light enough ({tail}), but {weights.ess:.2%} of {num} "
            "samples are few: draw more."
        )
    return (
        f"The tail of the weights is light enough for their mean ({tail}, at most "
        f"{weights.threshold:.2f})."
    )


def weigh(log_weights: Float[np.ndarray, " n"]) -> Weights:
    """Effective sample size, normalising constant and tail of weights, by Pareto-smoothed
    importance sampling.

    The largest weights are replaced by quantiles of the generalised Pareto distribution that is
    fitted to them (Vehtari et al. 2024); the standard error comes from the delta method. A weight
    that is not finite makes the shape NaN.

    Args:
        log_weights: Logarithms of the weights of independent samples.
    """
    num = len(log_weights)
    with jax.enable_x64():
        # The shares add up to 1.
        shares, shape = map(np.asarray, _smoothed(np.asarray(log_weights, np.float64)))
    # Weights that are equal up to rounding have no tail to fit.
    if np.isnan(shape) and np.ptp(log_weights) < 1:
        shares, shape = log_softmax(log_weights.astype(np.float64)), 0.0
    middle = np.argsort(log_weights)[num // 2]  # this weight is not smoothed
    ess = 1 / (num * np.square(np.exp(shares)).sum())
    return Weights(
        ess=float(ess),
        log_z=float(log_weights[middle] - shares[middle] - math.log(num)),
        stderr=math.sqrt(max(1 / ess - 1, 0.0) / (num - 1)),
        pareto_k=float(shape),
        threshold=min(1 - 1 / math.log10(num), 0.7),
    )


_smoothed = jax.jit(psis_weights)
