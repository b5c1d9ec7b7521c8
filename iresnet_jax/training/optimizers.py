"""Learning-rate schedules, optimisers and the moving average of parameters, all as optax transformations.

Convention: ``step`` counts finished updates, so the first update uses the learning rate of step 0.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

from iresnet_jax.training.naming import STACKED, path_parts

OPTIMIZERS = ("adam", "adamw", "adamax", "muon", "sgd")
ADAM_RMS = 0.2  # of an entry of an update of Adam, in units of the learning rate (Liu et al., 2025, Section 2.2)
SCHEDULES = ("constant", "cosine", "step")


def make_schedule(
    *,
    schedule: str,
    learning_rate: float,
    total_steps: int,
    warmup_steps: int = 0,
    final_fraction: float = 0.0,
    boundaries: Sequence[float] = (),
    decay_factor: float = 0.1,
) -> optax.Schedule:
    r"""Builds a learning-rate schedule with a linear warm-up.

    .. math:: \eta(t) = \eta \cdot \min(t / t_w, 1) \cdot d(t)

    with ``d`` = 1 ("constant"), half a cosine from 1 at the end of the warm-up ``t_w`` to ``final_fraction``
    at ``total_steps`` ("cosine"), or ``decay_factor`` to the number of boundaries reached ("step"). The
    peak is reached exactly at step ``warmup_steps``, and never exceeded.

    Args:
        schedule: One of ``SCHEDULES``.
        learning_rate: The peak, > 0.
        total_steps: Updates in the whole run, >= 1; afterwards the schedule stays at its last value.
        warmup_steps: Updates until the peak, in [0, total_steps]; 0 starts at the peak.
        final_fraction: Where "cosine" ends, as a fraction of the peak, in [0, 1].
        boundaries: Where "step" decays, as increasing fractions of ``total_steps`` in (0, 1). They count
            from the start of the run, warm-up included.
        decay_factor: What "step" multiplies by at each boundary, in (0, 1].

    Returns:
        A function of the step, for ``make_optimizer``.

    Raises:
        ValueError: If an argument is outside its range.

    Example:
        >>> eta = make_schedule(schedule="step", learning_rate=0.1, total_steps=100, boundaries=(0.3, 0.6))
        >>> [round(float(eta(step)), 6) for step in (0, 29, 30, 60)]
        [0.1, 0.1, 0.01, 0.001]
    """
    _check_choice("schedule", schedule, SCHEDULES)
    if learning_rate <= 0:
        raise ValueError(f"learning_rate must be positive, got {learning_rate}: it is the peak of the schedule")
    if total_steps < 1:
        raise ValueError(f"total_steps must be at least 1, got {total_steps}: it is the length of the whole run")
    if not 0 <= warmup_steps <= total_steps:
        raise ValueError(
            f"warmup_steps must lie in [0, total_steps = {total_steps}], got {warmup_steps}: "
            "shorten the warm-up or train for longer"
        )
    if not 0 <= final_fraction <= 1:
        raise ValueError(f"final_fraction must lie in [0, 1], got {final_fraction}: it is a fraction of the peak learning rate")
    if not 0 < decay_factor <= 1:
        raise ValueError(f"decay_factor must lie in (0, 1], got {decay_factor}: 0.1 or 0.2 are usual")
    if list(boundaries) != sorted(set(boundaries)) or not all(0 < b < 1 for b in boundaries):
        raise ValueError(
            f"boundaries must be increasing fractions of total_steps in (0, 1), got {tuple(boundaries)}: "
            "divide step or epoch numbers by their total"
        )
    decay_steps = [round(boundary * total_steps) for boundary in boundaries]

    def decay(step: jax.Array) -> jax.Array | float:
        if schedule == "cosine":
            progress = jnp.clip((step - warmup_steps) / max(total_steps - warmup_steps, 1), 0.0, 1.0)
            return final_fraction + (1.0 - final_fraction) * 0.5 * (1.0 + jnp.cos(jnp.pi * progress))
        factor = 1.0
        for decay_step in decay_steps if schedule == "step" else ():
            factor = factor * jnp.where(step >= decay_step, decay_factor, 1.0)
        return factor

    def learning_rate_at(count: Any) -> jax.Array:
        step = jnp.asarray(count)
        warmup = jnp.where(step < warmup_steps, step / max(warmup_steps, 1), 1.0)
        return learning_rate * (warmup * decay(step))

    return learning_rate_at


def make_optimizer(
    *,
    name: str,
    learning_rate: float | optax.Schedule,
    weight_decay: float = 0.0,
    momentum: float = 0.9,
    nesterov: bool = False,
    b1: float = 0.9,
    b2: float = 0.999,
    clip_norm: float = 0.0,
) -> optax.GradientTransformation:
    r"""Builds an optimiser: clip, decay, precondition, scale by the learning rate.

    The gradient of the loss is clipped first; weight decay then adds ``weight_decay * w``, for kernels only
    (see ``decay_mask``). With "adamw" it is decoupled, ``w <- w - lr * weight_decay * w`` (Loshchilov and Hutter,
    2019, Alg. 2), and so it is with "muon"; with "sgd", "adam" and "adamax" it is the gradient of an L2 penalty, so it
    passes through the momentum and the preconditioner (Kingma and Ba, 2015, Alg. 1 and 2).

    "muon" (Jordan et al., 2024) takes, of the averaged gradient of each kernel, the nearest matrix with equal singular
    values: steepest descent in the operator norm, the norm that the constraint of this library is about. It is scaled to
    the root mean square of an Adam update (Liu et al., 2025, Eq. 4), so that learning rates carry over; all
    that is no kernel is left to AdamW without decay (to NAdam if nesterov).

    Args:
        name: One of ``OPTIMIZERS``.
        learning_rate: A number > 0 or a schedule.
        weight_decay: >= 0; 0 switches it off.
        momentum: Of "sgd" and "muon", in [0, 1); .95 is usual with "muon".
        nesterov: Of "sgd" and "muon": look ahead along the momentum.
        b1: Decay of the first moment of the Adam family, in [0, 1).
        b2: Decay of the second moment (the maximum, in "adamax"), in [0, 1).
        clip_norm: Largest global L2 norm of the gradient, >= 0; 0 switches clipping off.

    Returns:
        An optax transformation; its ``update`` needs the parameters.

    Raises:
        ValueError: If an argument is outside its range. ``init`` raises it where there is no kernel to decay.

    Example:
        >>> optimizer = make_optimizer(name="adamax", learning_rate=0.003)
        >>> opt_state = optimizer.init({"kernel": jnp.ones((2, 2))})
    """
    _check_choice("name", name, OPTIMIZERS)
    for label, value in (("momentum", momentum), ("b1", b1), ("b2", b2)):
        if not 0 <= value < 1:
            raise ValueError(f"{label} must lie in [0, 1), got {value}: an average over all steps never forgets")
    for label, value in (("weight_decay", weight_decay), ("clip_norm", clip_norm)):
        if value < 0:
            raise ValueError(f"{label} must not be negative, got {value}: 0 switches it off")

    parts = []
    if clip_norm:
        parts.append(optax.clip_by_global_norm(clip_norm))
    if name == "muon":
        muon = optax.contrib.muon(
            learning_rate,
            beta=momentum,
            nesterov=nesterov,
            weight_decay=weight_decay,
            weight_decay_mask=_non_empty_decay_mask if weight_decay else None,
            adam_b1=b1,
            adam_b2=b2,
            consistent_rms=ADAM_RMS,
            muon_weight_dimension_numbers=kernels_as_matrices,
        )
        return optax.chain(*parts, muon)
    decay = [optax.add_decayed_weights(weight_decay, mask=_non_empty_decay_mask)] if weight_decay else []
    if name == "sgd":
        precondition = [optax.trace(decay=momentum, nesterov=nesterov)] if momentum else []
    elif name == "adamax":
        precondition = [optax.scale_by_adamax(b1=b1, b2=b2)]
    else:
        precondition = [optax.scale_by_adam(b1=b1, b2=b2)]
    parts += [*precondition, *decay] if name == "adamw" else [*decay, *precondition]
    return optax.chain(*parts, optax.scale_by_learning_rate(learning_rate))


def decay_mask(params: Any) -> Any:
    """Marks the parameters that weight decay acts on: those called ``kernel``.

    Biases, ActNorm, priors and the slopes of activations set offsets and scales that a penalty towards zero
    would distort; they are left alone.

    Returns:
        A pytree of booleans like ``params``.
    """
    return jax.tree_util.tree_map_with_path(lambda path, _: path_parts(path)[-1:] == ("kernel",), params)


def kernels_as_matrices(params: Any) -> Any:
    """How "muon" reads each kernel as a matrix, from all that enters an output channel to the output channels.

    Returns:
        A pytree like ``params``: the axes of a kernel that are rows and columns, with those of stacked blocks apart;
        None for all that is no kernel.
    """

    def axes(path: Any, leaf: Any) -> optax.contrib.MuonDimensionNumbers | None:
        parts = path_parts(path)
        first = int(STACKED in parts)
        if parts[-1:] != ("kernel",) or leaf.ndim < first + 2:
            return None
        return optax.contrib.MuonDimensionNumbers(tuple(range(first, leaf.ndim - 1)), leaf.ndim - 1)

    return jax.tree_util.tree_map_with_path(axes, params)


def ema_update(ema: Any, params: Any, step: Any, decay: float) -> Any:
    r"""Moves an exponential average of the parameters one update on.

    .. math:: e \leftarrow r e + (1 - r) p, \quad r = \min(\text{decay}, (1 + t) / (10 + t))

    The ramp lets the average forget its initial value in the first updates, as in ``tf.train.ExponentialMovingAverage``.

    Args:
        ema: The average so far; start it at the initial parameters.
        params: The parameters after the update, structured like ``ema``.
        step: Finished updates before this one, ``t`` >= 0.
        decay: In [0, 1); 0.999 remembers about the last thousand updates.

    Returns:
        The new average, in the dtypes of ``ema``.

    Raises:
        ValueError: If ``decay`` is outside [0, 1).
    """
    if not 0 <= decay < 1:
        raise ValueError(f"decay must lie in [0, 1), got {decay}: at 1 the average would never move")
    step = jnp.asarray(step)
    rate = jnp.minimum(decay, (1.0 + step) / (10.0 + step))
    return jax.tree.map(lambda e, p: e + (1.0 - rate).astype(e.dtype) * (p - e), ema, params)


def _non_empty_decay_mask(params: Any) -> Any:
    mask = decay_mask(params)
    if not any(jax.tree.leaves(mask)):
        raise ValueError("weight_decay would act on nothing, as no parameter is called 'kernel': set it to 0")
    return mask


def _check_choice(label: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"{label} must be one of {', '.join(allowed)}, got {value!r}")
