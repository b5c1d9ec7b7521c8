"""`fit_energy`: from an unnormalised density to a model of it, without data.

An energy that is trained by its reverse divergence alone loses modes that no sample of the model finds. Sequential Monte Carlo
finds them while they are connected, so a model is trained by the likelihood of its particles first, as `fit` trains it of data.
The sum of both divergences follows: its likelihood keeps the modes, and the energy says more of a point than particles do.
Where the scales of a target differ much it makes the model worse, as on the funnel of benchmarks/energies.py. Held-out
particles and samples of the model choose.
"""

import dataclasses
import math
import time
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Key

from iresnet_jax import losses
from iresnet_jax.bijections.transforms.standardize import Standardize, Whiten
from iresnet_jax.checked_dataclasses import Count, Positive, checked
from iresnet_jax.fit_settings import EXACT_DIMS, MIXTURE_DIMS, WHITENED_DIMS
from iresnet_jax.loss_training import train
from iresnet_jax.maths import annealing
from iresnet_jax.maths.energies import LogDensity, check_finite, log_density_of
from iresnet_jax.maths.keys import single_key
from iresnet_jax.maths.logdet.exact import ExactLogdet
from iresnet_jax.maths.logdet.krylov import KrylovLogdet
from iresnet_jax.models import mixtures
from iresnet_jax.models.architecture import StageSpec
from iresnet_jax.models.density import Density
from iresnet_jax.models.history import Attempt
from iresnet_jax.models.marginals import Marginals
from iresnet_jax.runs.metrics import Lines
from iresnet_jax.training.initialization import fitted_mixture

MINUTES = 3.0
NUM_PARTICLES = 20_000
NUM_VALIDATION = 2_000  # particles that choose the prior and the best model
MOVING_SHARE = 0.15  # of the time that annealing leaves
MOVES_AT_ONCE = 10  # trajectories between two snapshots of the particles, and looks at the clock
MOST_SNAPSHOTS = 16  # of all particles, that training is on
PRIOR_PARTICLES = 10_000  # that priors are fitted to
MIXTURE_PARTICLES = 5_000  # that mixtures are fitted to, until one is chosen
PRIOR_SHARE = 0.1  # of the time, after which no larger mixture is tried
COMPONENTS = (1, 2, 3, 4, 6, 8, 11, 16, 23, 32, 45, 64)  # of a mixture, tried until the likelihood falls twice
PER_MARGINAL = 8  # components of an entry
STAGES = (StageSpec(20, (128,), activation="clipswish"),)
BATCH_SIZE = 256
LEAST_FOR_BOTH = 0.5  # minutes, below which there is no time to train by both divergences
LIKELIHOOD_SHARE = 0.5  # of the time or the steps of training; the rest is of both divergences
ENERGY_LEARNING_RATE = 1e-3  # of Adam, with both divergences
LAST_SCALE = 0.01  # of the branches: the prior alone may be close


def fit_energy(
    log_density: LogDensity,
    num_dims: int,
    *,
    key: Key[Array, ""],
    scale: float | int = 1.0,
    minutes: float | int = MINUTES,
    steps: int | None = None,
    num_particles: int = NUM_PARTICLES,
    stages: Sequence[StageSpec] = STAGES,
    progress: bool = True,
) -> Density:
    """A density that is close to an unnormalised one, with modes that are far from each other.

    Particles are annealed from ``N(0, scale^2)`` to the target, see `iresnet_jax.maths.annealing`. A residual flow is trained
    by their likelihood, and then by both divergences, see `iresnet_jax.losses.symmetric_kl`. Its prior is the likeliest before
    training: a mixture of normal distributions, or independent entries that are mixtures each, see `Marginals`, of whitened or
    of standardised particles. `evaluate_energy` says how good the result is.

    Args:
        log_density: ``(n, num_dims) -> (n,)``, the logarithm of the density up to a constant, minus the energy: finite and
            differentiable everywhere, in JAX.
        num_dims: Dimensions.
        key: Source of all randomness.
        scale: Standard deviation of the normal distribution in which annealing starts: it should reach all modes.
        minutes: Time, compilation included, which annealing may exceed: only what follows it looks at the clock. If less than
            half a minute is left for training, it is by likelihood alone.
        steps: Updates of the flow instead of a time, half of them by either loss; trajectories are then few.
        num_particles: Particles, at least 1000.
        stages: Stages of the flow.
        progress: Whether lines of progress are written to stderr.

    Returns:
        The model, certified, with its `History`, in whose attempts are the divergences that chose; its step is 0 if neither
        loss brought the model closer.

    Raises:
        ValueError: If the log-density has the wrong shape, or is NaN or infinite where annealing starts or ends.

    Example:
        >>> model = fit_energy(log_density, 2, scale=3.0, key=jax.random.key(0))  # doctest: +SKIP
        >>> print(evaluate_energy(model, log_density, jax.random.key(1)))  # doctest: +SKIP
    """
    began = time.monotonic()
    minutes, steps = checked(Positive, minutes, "minutes"), None if steps is None else checked(Count, steps, "steps")
    stages = checked(tuple[StageSpec, ...], stages, "stages")
    key_particles, key_init, key_likelihood, key_energy, key_choice = jax.random.split(single_key(key), 5)

    say = Lines() if progress else lambda line: None
    x = particles(
        log_density, num_dims, key=key_particles, scale=scale, minutes=minutes if steps is None else 0, num=num_particles
    )
    say(f"{len(x)} x {x.shape[1]} particles of the target")
    num_held_out = min(NUM_VALIDATION, x.shape[1] // 10)
    held_out, x = x[-1, :num_held_out], x[::-1, num_held_out:].reshape(-1, x.shape[2])  # the last ones first
    end = began + 60 * minutes
    model = _start(
        key_init, x, held_out, stages, math.inf if steps is not None else time.monotonic() + PRIOR_SHARE * 60 * minutes
    )

    def likelihood(model, batch, key):
        return -model.log_prob(batch, key).mean()

    both = losses.symmetric_kl(log_density, BATCH_SIZE // 2)
    adam = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(ENERGY_LEARNING_RATE))
    turns = [
        ("likelihood of particles", likelihood, None, key_likelihood, BATCH_SIZE, LIKELIHOOD_SHARE),
        ("both divergences", both, adam, key_energy, BATCH_SIZE // 2, 1.0),
    ]
    if steps is None and end - time.monotonic() < 60 * LEAST_FOR_BOTH:
        turns = [(*turns[0][:-1], 1.0)]
    best, least, attempts, ended = model, _divergence(model, log_density, held_out, key_choice), (), ""
    for what, loss, optimizer, key_train, batch_size, share in turns:
        began_turn = time.monotonic()
        trained = train(
            best,
            loss,
            x,
            validation=held_out,
            key=key_train,
            minutes=max((end - began_turn) * share / 60, 0.01) if steps is None else None,
            steps=None if steps is None else max(round(steps * LIKELIHOOD_SHARE), 1),
            optimizer=optimizer,
            batch_size=batch_size,
            patience=0,
            progress=progress,
        )
        found, history = _divergence(trained, log_density, held_out, key_choice), trained.history
        assert history is not None
        say(f"the divergences from and to the target add up to {found:.4f}, before this training to {least:.4f}")
        num_steps = int(max(history.train.get("step", []), default=history.step))
        attempts += (Attempt(what, found, history.step, num_steps, time.monotonic() - began_turn),)
        if found < least:
            best, least = trained, found
        elif best.history is None:
            best = best.with_(history=dataclasses.replace(history, step=0))
        if ended := history.ended:
            break
    assert best.history is not None
    return best.with_(history=dataclasses.replace(best.history, attempts=attempts, ended=ended))


def particles(
    log_density: LogDensity,
    num_dims: int,
    *,
    key: Key[Array, ""],
    scale: float | int = 1.0,
    minutes: float | int = MINUTES,
    num: int = NUM_PARTICLES,
) -> Float[np.ndarray, "s n d"]:
    """Snapshots of the particles that `fit_energy` is trained on, the last one last; arguments and errors are its own.

    Annealing takes the time that it takes. Trajectories go on for a share of what it leaves, with a snapshot now and then, in
    which particles have the same places, so that some particles can be held out from all snapshots.
    """
    began = time.monotonic()
    num_dims, num = checked(Count, num_dims, "num_dims"), checked(Count, num, "num_particles")
    scale = checked(Positive, scale, "scale")
    if num < 1000:
        raise ValueError(f"num_particles must be at least 1000, got {num}: a tenth of them validates")
    log_density_of(log_density, jnp.zeros((2, num_dims)))  # its shape
    key_anneal, key_move, key_order = jax.random.split(single_key(key), 3)
    found = annealing.annealed(log_density, key_anneal, num, num_dims, scale=float(scale))
    now = time.monotonic()
    snapshots = _moved_until(log_density, key_move, found, now + MOVING_SHARE * (began + 60 * minutes - now))
    check_finite(log_density(jnp.asarray(snapshots[-1])), "particles")
    return snapshots[:, np.asarray(jax.random.permutation(key_order, num))]


def _moved_until(
    log_density: LogDensity, key: Key[Array, ""], found: annealing.Particles, until: float
) -> Float[np.ndarray, "s n d"]:
    """Snapshots of the particles between as many more trajectories as fit; the one before any if none does."""
    move = jax.jit(lambda key, x, size: annealing.moved(log_density, key, x, size, num_moves=MOVES_AT_ONCE))
    x, size, snapshots = found.x, jnp.asarray(found.step_size, found.x.dtype), []
    for turn in range(MOST_SNAPSHOTS):
        if time.monotonic() >= until:
            break
        x, size = move(jax.random.fold_in(key, turn), x, size)
        snapshots.append(np.asarray(x))
    return np.stack(snapshots or [np.asarray(found.x)])


def _start(
    key: Key[Array, ""], x: Float[np.ndarray, "n d"], held_out: Float[np.ndarray, "m d"], stages: Any, until: float
) -> Density:
    """A flow that does little yet, with the prior under which held-out particles are likeliest.

    Priors are compared without the flow, and fitted once more to its latents.
    """
    num_dims, x = x.shape[1], x[:PRIOR_PARTICLES]
    options = {
        "stages": stages,
        "estimator": ExactLogdet() if num_dims <= EXACT_DIMS else KrylovLogdet(num_steps=6),
        "last_scale": LAST_SCALE,
    }
    starts = []  # (mean log-density, transform, components of a mixture or 0)
    for transform in (Standardize.fit(x), *([Whiten.fit(x)] if num_dims <= WHITENED_DIMS else [])):
        bijection = transform.bijection()
        z = np.asarray(bijection.forward(jnp.asarray(x)))
        held_out_z, log_dets, _ = bijection.forward_and_logdet(jnp.asarray(held_out), jax.random.key(0))
        log_det = float(log_dets[0])
        value = float(jnp.mean(Marginals.fit(z, PER_MARGINAL).log_prob(held_out_z)))
        starts.append((value + log_det, transform, 0))
        if num_dims <= MIXTURE_DIMS and isinstance(transform, Whiten):
            components, value = _likeliest_components(z[:MIXTURE_PARTICLES], held_out_z, until)
            starts.append((value + log_det, transform, components))
    _, transform, components = max(starts, key=lambda start: start[0])
    if components:
        model = Density.init(key, x, prior="mixture", num_components=components, transform=transform, **options)
        return model.with_(prior=fitted_mixture(np.asarray(model.encode(x)), components))
    model = Density.init(key, x, prior=Marginals.standard(num_dims, PER_MARGINAL), transform=transform, **options)
    return model.with_(prior=Marginals.fit(np.asarray(model.encode(x)), PER_MARGINAL))


def _likeliest_components(z: Float[np.ndarray, "n d"], held_out: Float[Array, "m d"], until: float) -> tuple[int, float]:
    """Number of components of the mixture under which held-out vectors are likeliest, and their mean log-density."""
    best, highest, fallen = 1, -math.inf, 0
    for num in (count for count in COMPONENTS if count == 1 or 5 * count * (z.shape[1] + 1) <= len(z)):
        mixture = fitted_mixture(z, num)
        value = float(jnp.mean(mixtures.log_prob(mixture, held_out)))
        best, highest, fallen = (num, value, 0) if value > highest else (best, highest, fallen + 1)
        if fallen == 2 or time.monotonic() > until:
            break
    return best, highest


def _divergence(model: Density, log_density: LogDensity, held_out: Float[np.ndarray, "n d"], key: Key[Array, ""]) -> float:
    """``KL(p | q) + KL(q | p)`` but for a constant of the target, by held-out particles and as many samples of the model."""
    of_target = jnp.mean(model.log_prob(held_out, key))
    x, log_prob, _, _ = model.sample_and_log_prob(key, len(held_out))
    return float(jnp.mean(log_prob - log_density_of(log_density, x)) - of_target)
