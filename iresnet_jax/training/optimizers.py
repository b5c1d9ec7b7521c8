"""Learning-rate schedules and optimisers from optax, weight decay of kernels, and the moving average of parameters.

Convention: ``step`` counts finished updates; the first update uses the learning rate of step 0.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

STACKED = "blocks"  # dictionary key under which arrays of identical blocks are stacked along their first axis
OPTIMIZERS = ("adam", "adamw", "adamax", "muon", "sgd")
ADAM_RMS = 0.2  # root mean square of an Adam update divided by the learning rate (Liu et al., 2025, Section 2.2)
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
    r"""Builds a learning-rate schedule that warms up linearly to its peak, then decays.

    .. math:: \eta(t) = \eta \cdot \min(t / t_w, 1) \cdot d(t)

    The decay ``d`` is 1 ("constant"); half a cosine from 1 at the end of the warm-up ``t_w`` to ``final_fraction`` at
    ``total_steps`` ("cosine"); or ``decay_factor`` to the power of the number of boundaries reached ("step"). The learning rate
    is the peak exactly at step ``t_w``, and never above it.

    Args:
        schedule: "constant", "cosine" or "step".
        learning_rate: Peak, positive and finite.
        total_steps: Updates in the whole run, at least 1; later the schedule stays at its last value.
        warmup_steps: Updates ``t_w`` until the peak, in [0, total_steps]; 0 starts at the peak.
        final_fraction: Fraction of the peak where "cosine" ends, in [0, 1].
        boundaries: Fractions of ``total_steps`` where "step" decays, in (0, 1), increasing and not within the warm-up.
        decay_factor: Factor of "step" at each boundary, in (0, 1].

    Returns:
        The learning rate as a function of the step.

    Raises:
        ValueError: If an argument is outside its range.

    Example:
        >>> eta = make_schedule(schedule="step", learning_rate=0.1, total_steps=100, boundaries=(0.3, 0.6))
        >>> [round(float(eta(step)), 6) for step in (0, 29, 30, 60)]
        [0.1, 0.1, 0.01, 0.001]
    """
    _check_choice("schedule", schedule, SCHEDULES)
    _check_learning_rate(learning_rate)
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
    decay_steps = [round(boundary * total_steps) - warmup_steps for boundary in boundaries]
    if schedule == "step" and min(decay_steps, default=0) < 0:
        raise ValueError(
            f"boundaries must not lie in the warm-up, the first {warmup_steps} of {total_steps} steps, "
            f"got {tuple(boundaries)}: shorten the warm-up or decay later"
        )
    if schedule == "cosine":
        decay = optax.cosine_decay_schedule(learning_rate, max(total_steps - warmup_steps, 1), alpha=final_fraction)
    elif schedule == "step":
        decay = optax.piecewise_constant_schedule(learning_rate, dict.fromkeys(decay_steps, decay_factor))
    else:
        decay = optax.constant_schedule(learning_rate)
    if not warmup_steps:
        return decay
    return optax.join_schedules([optax.linear_schedule(0.0, learning_rate, warmup_steps), decay], [warmup_steps])


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

    The gradient of the loss is clipped first. Weight decay then adds ``weight_decay * w`` for kernels, see `decay_mask`. In
    "adamw" and "muon" it is decoupled, ``w <- w - lr * weight_decay * w`` (Loshchilov and Hutter, 2019,
    Alg. 2). In "sgd", "adam" and "adamax" it is the gradient of an L2 penalty, which passes through the momentum and the
    preconditioner (Kingma and Ba, 2015, Alg. 1 and 2).

    "muon" (Jordan et al., 2024) replaces the averaged gradient of each kernel by the nearest matrix with equal singular values:
    steepest descent in the operator norm, which this library constrains. The update is scaled to the root mean square of an
    Adam update (Liu et al., 2025, Eq. 4), so learning rates carry over. Other parameters than kernels
    move by AdamW without decay, or by NAdam if ``nesterov``.

    Args:
        name: "adam", "adamw", "adamax", "muon" or "sgd".
        learning_rate: Positive number or a schedule.
        weight_decay: Factor of the decay, at least 0; 0 switches it off.
        momentum: Decay of the averaged gradient in "sgd" and "muon", in [0, 1); .95 is usual with "muon".
        nesterov: Whether "sgd" and "muon" look ahead along the momentum.
        b1: Decay of the first moment of the Adam family, in [0, 1).
        b2: Decay of the second moment (the maximum, in "adamax"), in [0, 1).
        clip_norm: Largest L2 norm of the whole gradient, at least 0; 0 does not clip.

    Returns:
        An optax transformation whose ``update`` needs the parameters. Its ``init`` raises ``ValueError`` if ``weight_decay`` is
        positive and no parameter is called ``kernel``.

    Raises:
        ValueError: If an argument is outside its range.

    Example:
        >>> optimizer = make_optimizer(name="adamax", learning_rate=0.003)
        >>> opt_state = optimizer.init({"kernel": jnp.ones((2, 2))})
    """
    _check_choice("name", name, OPTIMIZERS)
    for label, value in (("momentum", momentum), ("b1", b1), ("b2", b2)):
        if not 0 <= value < 1:
            raise ValueError(f"{label} must lie in [0, 1), got {value}: an average over all steps never forgets")
    for label, value in (("weight_decay", weight_decay), ("clip_norm", clip_norm)):
        if not 0 <= value < math.inf:
            raise ValueError(f"{label} must be finite and not negative, got {value}: 0 switches it off")
    if not callable(learning_rate):
        _check_learning_rate(learning_rate)

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
    """Marks the parameters that weight decay acts on, which are called ``kernel``.

    A penalty towards zero would distort the others: biases, ActNorm, priors and slopes of activations.

    Returns:
        A pytree of booleans like ``params``.
    """
    return jax.tree_util.tree_map_with_path(lambda path, _: _is_kernel(path), params)


def kernels_as_matrices(params: Any) -> Any:
    """Returns the axes by which "muon" reads each kernel as a matrix: columns are output channels, rows are inputs of one.

    Returns:
        A pytree like ``params`` with the axes of rows and columns of each kernel, and None for other parameters. The leading
        axis of stacked blocks belongs to neither.
    """

    def axes(path: Any, leaf: Any) -> optax.contrib.MuonDimensionNumbers | None:
        first = int(jax.tree_util.DictKey(STACKED) in path)
        if not _is_kernel(path) or leaf.ndim < first + 2:
            return None
        return optax.contrib.MuonDimensionNumbers(tuple(range(first, leaf.ndim - 1)), leaf.ndim - 1)

    return jax.tree_util.tree_map_with_path(axes, params)


def ema_update(ema: Any, params: Any, step: Any, decay: float) -> Any:
    r"""Updates an exponential average of the parameters.

    .. math:: e \leftarrow r e + (1 - r) p, \quad r = \min(\text{decay}, (1 + t) / (10 + t))

    The smaller decay of the first updates makes the average forget its initial value, as ``tf.train.ExponentialMovingAverage``
    does.

    Args:
        ema: Average so far, at first the initial parameters.
        params: Parameters after the update, structured like ``ema``.
        step: Finished updates ``t`` before this one.
        decay: Largest decay, in [0, 1); 0.999 remembers about the last thousand updates.

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


def _is_kernel(path: Any) -> bool:
    return jax.tree_util.keystr(path[-1:], simple=True) == "kernel"


def _non_empty_decay_mask(params: Any) -> Any:
    mask = decay_mask(params)
    if not any(jax.tree.leaves(mask)):
        raise ValueError("weight_decay would act on nothing, as no parameter is called 'kernel': set it to 0")
    return mask


def _check_learning_rate(learning_rate: float) -> None:
    if not 0 < learning_rate < math.inf:
        raise ValueError(f"learning_rate must be positive and finite, got {learning_rate}: 1e-3 is usual with the Adam family")


def _check_choice(label: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"{label} must be one of {', '.join(allowed)}, got {value!r}")
