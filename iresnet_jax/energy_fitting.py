"""`fit_energy`: from an unnormalised density to a model of it, without data.

An energy that is trained by its reverse divergence alone loses modes that no sample of the model finds. Sequential Monte Carlo
finds them while they are connected, so a model is trained by the likelihood of its particles, as `fit` trains it of data; and
particles cost little, beside the inverses that reverse divergences need.
"""

import dataclasses
import math
import time
from collections.abc import Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Key

from iresnet_jax.bijections.transforms.standardize import Standardize, Whiten
from iresnet_jax.checked_dataclasses import Count, Positive, checked
from iresnet_jax.fit_settings import EXACT_DIMS, MIXTURE_DIMS
from iresnet_jax.loss_training import train
from iresnet_jax.maths import annealing
from iresnet_jax.maths.energies import LogDensity, check_finite, log_density_of
from iresnet_jax.maths.keys import single_key
from iresnet_jax.maths.logdet.exact import ExactLogdet
from iresnet_jax.maths.logdet.krylov import KrylovLogdet
from iresnet_jax.models import mixtures
from iresnet_jax.models.architecture import StageSpec
from iresnet_jax.models.density import Density
from iresnet_jax.models.marginals import Marginals
from iresnet_jax.runs.metrics import Lines
from iresnet_jax.training.initialization import fitted_mixture

MINUTES = 3.0
NUM_PARTICLES = 20_000
NUM_VALIDATION = 2_000  # particles that choose the prior and the best model
ANNEALING_SHARE = 0.25  # of the time, at most
MOVES_AT_ONCE = 50  # trajectories between two looks at the clock
MOST_MOVES = 2_000  # trajectories at the end of annealing
PRIOR_PARTICLES = 10_000  # that priors are fitted to
MIXTURE_PARTICLES = 5_000  # that mixtures are fitted to, until one is chosen
PRIOR_SHARE = 0.15  # of the time, after which no larger mixture is tried
COMPONENTS = (1, 2, 3, 4, 6, 8, 11, 16, 23, 32, 45, 64)  # of a mixture, tried until the likelihood falls twice
PER_MARGINAL = 8  # components of an entry
STAGES = (StageSpec(20, (128,), activation="clipswish"),)
BATCH_SIZE = 256
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

    Particles are annealed from ``N(0, scale^2)`` to the target, see `iresnet_jax.maths.annealing`, and a residual flow is
    trained by their likelihood. Its prior is the likelier of two before training: a mixture of normal distributions, or
    independent entries that are mixtures each, see `Marginals`. `evaluate_energy` says how good the result is.

    Args:
        log_density: ``(n, num_dims) -> (n,)``, the logarithm of the density up to a constant, minus the energy: finite and
            differentiable everywhere, in JAX.
        num_dims: Dimensions.
        key: Source of all randomness.
        scale: Standard deviation of the normal distribution in which annealing starts: it should reach all modes.
        minutes: Time, compilation included, which annealing may exceed: only what follows it looks at the clock.
        steps: Updates of the flow instead of a time; trajectories are then few.
        num_particles: Particles, at least 1000.
        stages: Stages of the flow.
        progress: Whether lines of progress are written to stderr.

    Returns:
        The model, certified, with its `History`; its step is 0 if training made held-out particles less likely.

    Raises:
        ValueError: If the log-density has the wrong shape, or is NaN or infinite where annealing starts or ends.

    Example:
        >>> model = fit_energy(log_density, 2, scale=3.0, key=jax.random.key(0))  # doctest: +SKIP
        >>> print(evaluate_energy(model, log_density, jax.random.key(1)))  # doctest: +SKIP
    """
    began = time.monotonic()
    minutes = checked(Positive, minutes, "minutes")
    key_particles, key_init, key_train = jax.random.split(single_key(key), 3)

    say = Lines() if progress else lambda line: None
    x = particles(
        log_density, num_dims, key=key_particles, scale=scale, minutes=minutes if steps is None else 0, num=num_particles
    )
    say(f"{len(x)} particles of the target")
    num_held_out = min(NUM_VALIDATION, len(x) // 10)
    held_out, x = x[:num_held_out], x[num_held_out:]
    until = math.inf if steps is not None else time.monotonic() + PRIOR_SHARE * 60 * minutes
    model = _start(key_init, x, held_out, stages, until)
    say(f"the particles' log-likelihood before training is {_mean_log_prob(model, held_out):.4f}")
    left = None if steps is not None else max(minutes - (time.monotonic() - began) / 60, 0.01)

    def loss(model, batch, key):
        return -model.log_prob(batch, key).mean()

    trained = train(
        model,
        loss,
        x,
        validation=held_out,
        key=key_train,
        minutes=left,
        steps=steps,
        batch_size=BATCH_SIZE,
        patience=0,
        progress=progress,
    )
    if _mean_log_prob(trained, held_out) >= _mean_log_prob(model, held_out):
        return trained
    assert trained.history is not None
    return model.with_(history=dataclasses.replace(trained.history, step=0))


def particles(
    log_density: LogDensity,
    num_dims: int,
    *,
    key: Key[Array, ""],
    scale: float | int = 1.0,
    minutes: float | int = MINUTES,
    num: int = NUM_PARTICLES,
) -> Float[np.ndarray, "n d"]:
    """The particles that `fit_energy` is trained on, in random order; arguments and errors are its own.

    Annealing takes the time that it takes. Trajectories go on for a share of the minutes.
    """
    began = time.monotonic()
    num_dims, num = checked(Count, num_dims, "num_dims"), checked(Count, num, "num_particles")
    scale = checked(Positive, scale, "scale")
    if num < 1000:
        raise ValueError(f"num_particles must be at least 1000, got {num}: a tenth of them validates")
    log_density_of(log_density, jnp.zeros((2, num_dims)))  # its shape
    key_anneal, key_move, key_order = jax.random.split(single_key(key), 3)
    found = annealing.annealed(log_density, key_anneal, num, num_dims, scale=float(scale))
    x = _moved_until(log_density, key_move, found, began + ANNEALING_SHARE * 60 * minutes)
    check_finite(log_density(x), "particles")
    return np.asarray(jax.random.permutation(key_order, x))


def _moved_until(log_density: LogDensity, key: Key[Array, ""], found: annealing.Particles, until: float) -> Array:
    """The particles after as many more trajectories as fit."""
    move = jax.jit(lambda key, x, size: annealing.moved(log_density, key, x, size, num_moves=MOVES_AT_ONCE)[:2])
    x, size = found.x, jnp.float32(found.step_size)
    for turn in range(MOST_MOVES // MOVES_AT_ONCE):
        if time.monotonic() >= until:
            break
        x, size = jax.block_until_ready(move(jax.random.fold_in(key, turn), x, size))
    return x


def _start(
    key: Key[Array, ""], x: Float[np.ndarray, "n d"], held_out: Float[np.ndarray, "m d"], stages: Any, until: float
) -> Density:
    """A flow that does little yet, with the prior under which held-out particles are likelier.

    Priors are compared without the flow, and fitted once more to its latents.
    """
    num_dims, x = x.shape[1], x[:PRIOR_PARTICLES]
    standard = Standardize.fit(x)
    z, held_out_z, log_det = _transformed(standard, x, held_out)
    spread = float(jnp.mean(Marginals.fit(z, PER_MARGINAL).log_prob(held_out_z))) + log_det
    options = {
        "stages": tuple(stages),
        "estimator": ExactLogdet() if num_dims <= EXACT_DIMS else KrylovLogdet(num_steps=6),
        "last_scale": LAST_SCALE,
    }
    if num_dims <= MIXTURE_DIMS:
        whiten = Whiten.fit(x)
        z, held_out_z, log_det = _transformed(whiten, x, held_out)
        components, mixed = _likeliest_components(z[:MIXTURE_PARTICLES], held_out_z, until)
        if mixed + log_det > spread:
            model = Density.init(key, x, prior="mixture", num_components=components, transform=whiten, **options)
            return model.with_(prior=fitted_mixture(np.asarray(model.encode(x)), components))
    model = Density.init(key, x, prior=Marginals.standard(num_dims, PER_MARGINAL), transform=standard, **options)
    return model.with_(prior=Marginals.fit(np.asarray(model.encode(x)), PER_MARGINAL))


def _transformed(transform: Standardize | Whiten, x: Any, held_out: Any) -> tuple[np.ndarray, Array, float]:
    bijection = transform.bijection()
    z, log_det, _ = bijection.forward_and_logdet(jnp.asarray(held_out), jax.random.key(0))
    return np.asarray(bijection.forward(jnp.asarray(x))), z, float(log_det[0])


def _likeliest_components(z: Float[np.ndarray, "n d"], held_out: Float[Array, "m d"], until: float) -> tuple[int, float]:
    """Number of components of the mixture under which held-out vectors are likeliest, and their mean log-density."""
    best, highest, fallen = 1, -math.inf, 0
    for num in _allowed(len(z), z.shape[1]):
        mixture = fitted_mixture(z, num)
        value = float(jnp.mean(mixtures.log_prob(mixture, held_out)))
        best, highest, fallen = (num, value, 0) if value > highest else (best, highest, fallen + 1)
        if fallen == 2 or time.monotonic() > until:
            break
    return best, highest


def _allowed(num: int, num_dims: int) -> Iterable[int]:
    return [count for count in COMPONENTS if count == 1 or 5 * count * (num_dims + 1) <= num]


def _mean_log_prob(model: Density, x: Float[np.ndarray, "n d"]) -> float:
    return float(jnp.mean(model.log_prob(x, jax.random.key(0))))
