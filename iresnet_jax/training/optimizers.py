"""Learning-rate schedules and optimisers from optax, weight decay of kernels, and the moving
average of parameters.

Convention: ``step`` counts finished updates; the first update uses the learning rate of step 0.
"""

import functools
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import jax
import jax.numpy as jnp
import optax

from iresnet_jax.arguments import CountOrNone, Decay, NotNegative, Positive, Range

# root mean square of an Adam update divided by the learning rate (Liu et al., 2025, Section 2.2)
ADAM_RMS = 0.2
# dictionary key under which arrays of identical blocks are stacked along their first axis
STACKED = "blocks"


@dataclass(frozen=True)
class OptimizerConfig:
    """The update rule and its learning rate."""

    # "muon" is steepest descent in the operator norm; .95 is its usual momentum.
    name: Literal["adam", "adamw", "adamax", "muon", "sgd"] = "adam"
    learning_rate: Positive = 1e-3  # peak of the schedule
    # of the learning rate after the warm-up; "cosine" ends at 0
    schedule: Literal["constant", "cosine", "step"] = "cosine"
    warmup_steps: CountOrNone = 100  # steps of the linear warm-up from 0 to the peak
    # decays of "step", as fractions of training.total_steps
    boundaries: tuple[Annotated[float, Range("(0, 1)")], ...] = ()
    decay_factor: Annotated[float, Range("(0, 1]")] = 0.1  # factor of "step" at each boundary
    # of kernels only; decoupled from the gradient in "adamw" and "muon"
    weight_decay: NotNegative = 0.0
    momentum: Decay = 0.9  # of "sgd" and "muon"
    nesterov: bool = False  # of "sgd" and "muon"
    # decay of the first moment in the Adam family, and of "muon" for all but kernels
    b1: Decay = 0.9
    # decay of the second moment in the Adam family, and of "muon" for all but kernels
    b2: Decay = 0.99
    clip_norm: NotNegative = 1.0  # largest norm of the whole gradient; 0 does not clip


def make_schedule(settings: OptimizerConfig, total_steps: int) -> optax.Schedule:
    r"""Builds a learning-rate schedule that warms up linearly to its peak, then decays.

    .. math:: \eta(t) = \eta \cdot \min(t / t_w, 1) \cdot d(t)

    The decay ``d`` is 1 ("constant"); half a cosine from 1 at the end of the warm-up ``t_w`` to 0
    at ``total_steps`` ("cosine"); or ``decay_factor`` to the power of the number of boundaries
    reached ("step"), those within the warm-up included. Without such boundaries the learning rate
    is the peak exactly at step ``t_w``, and it is never above it.

    Args:
        settings: Peak, warm-up and decay. A warm-up longer than the run is cut to it.
        total_steps: Updates in the whole run; later the schedule stays at its last value.

    Returns:
        The learning rate as a function of the step.

    Example:
        >>> config = OptimizerConfig(schedule="step", warmup_steps=0, boundaries=(0.3, 0.6))
        >>> eta = make_schedule(config, total_steps=100)
        >>> [round(float(eta(step)), 6) for step in (0, 29, 30, 60)]
        [0.001, 0.001, 0.0001, 1e-05]
    """
    peak, warmup_steps = settings.learning_rate, min(settings.warmup_steps, total_steps)
    if settings.schedule == "cosine":
        decay = optax.cosine_decay_schedule(peak, max(total_steps - warmup_steps, 1))
    elif settings.schedule == "step":
        decay_steps = [round(each * total_steps) - warmup_steps for each in settings.boundaries]
        # some may round to one step
        factors = {step: settings.decay_factor ** decay_steps.count(step) for step in decay_steps}
        decay = optax.piecewise_constant_schedule(peak, factors)
    else:
        decay = optax.constant_schedule(peak)
    if not warmup_steps:
        return decay
    warmup = optax.linear_schedule(0.0, peak, warmup_steps)
    return optax.join_schedules([warmup, decay], [warmup_steps])


@functools.lru_cache(maxsize=64)
def make_optimizer(settings: OptimizerConfig) -> optax.GradientTransformation:
    r"""Builds an optimiser at a learning rate of 1, which `make_schedule` sets; one object for
    equal settings.

    The gradient of the loss is clipped first. Weight decay then adds ``weight_decay * w`` for
    kernels, see `decay_mask`. In "adamw" and "muon" it is decoupled, ``w <- w - lr * weight_decay *
    w`` (Loshchilov and Hutter, 2019, Alg. 2). In "sgd", "adam" and "adamax" it is the gradient of
    an L2 penalty, which passes through the momentum and the preconditioner (Kingma and Ba, 2015,
    Alg. 1 and 2).

    "muon" (Jordan et al., 2024) replaces the averaged gradient of each kernel by the nearest matrix
    with equal singular values: steepest descent in the operator norm, which this library
    constrains. The update is scaled to the root mean square of an Adam update (Liu et al., 2025,
    Eq. 4), so learning rates carry over. Other parameters than kernels move by AdamW without decay,
    or by NAdam if ``nesterov``.

    Returns:
        An optax transformation whose ``update`` needs the parameters.

    Example:
        >>> optimizer = make_optimizer(OptimizerConfig(name="adamax"))
        >>> opt_state = optimizer.init({"kernel": jnp.ones((2, 2))})
    """
    name, decay = settings.name, settings.weight_decay
    clip = [optax.clip_by_global_norm(settings.clip_norm)] if settings.clip_norm else []
    if name == "muon":
        muon = optax.contrib.muon(
            1.0,
            beta=settings.momentum,
            nesterov=settings.nesterov,
            weight_decay=decay,
            weight_decay_mask=decay_mask if decay else None,
            adam_b1=settings.b1,
            adam_b2=settings.b2,
            consistent_rms=ADAM_RMS,
            muon_weight_dimension_numbers=_kernels_as_matrices,
        )
        return optax.chain(*clip, muon)
    if name == "sgd":
        momentum = settings.momentum
        precondition = optax.trace(momentum, settings.nesterov) if momentum else optax.identity()
    else:
        scale = optax.scale_by_adamax if name == "adamax" else optax.scale_by_adam
        precondition = scale(settings.b1, settings.b2)
    penalty = [optax.add_decayed_weights(decay, mask=decay_mask)] if decay else []
    parts = [precondition, *penalty] if name == "adamw" else [*penalty, precondition]
    return optax.chain(*clip, *parts, optax.scale_by_learning_rate(1.0))


def decay_mask(params: Any) -> Any:
    """Marks the parameters that weight decay acts on, which are called ``kernel``, in a pytree of
    booleans like ``params``.

    A penalty towards zero would distort the others: biases, ActNorm, priors and slopes of
    activations.
    """
    mask = jax.tree.map_with_path(lambda path, _: _is_kernel(path), params)
    if not any(jax.tree.leaves(mask)):
        raise ValueError(
            "weight_decay would act on nothing, as no parameter is called 'kernel': set it to 0"
        )
    return mask


def _kernels_as_matrices(params: Any) -> Any:
    """The axes by which "muon" reads each kernel as a matrix: columns are output channels, rows are
    inputs of one.

    A pytree like ``params``, with None for other parameters. The leading axis of stacked blocks
    belongs to neither.
    """

    def axes(path: Any, leaf: Any) -> optax.contrib.MuonDimensionNumbers | None:
        first = int(jax.tree_util.DictKey(STACKED) in path)
        if not _is_kernel(path) or leaf.ndim < first + 2:
            return None
        return optax.contrib.MuonDimensionNumbers(tuple(range(first, leaf.ndim - 1)), leaf.ndim - 1)

    return jax.tree.map_with_path(axes, params)


def _is_kernel(path: Any) -> bool:
    return jax.tree_util.keystr(path[-1:], simple=True) == "kernel"


def ema_update(ema: Any, params: Any, step: Any, decay: float) -> Any:
    r"""The exponential average of the parameters after an update, in its own dtypes.

    .. math:: e \leftarrow r e + (1 - r) p, \quad r = \min(\text{decay}, (1 + t) / (10 + t))

    The smaller decay of the first updates makes the average forget its initial value.

    Args:
        ema: Average so far, at first the initial parameters.
        params: Parameters after the update.
        step: Finished updates ``t`` before this one.
        decay: Largest decay, in [0, 1); 0.999 remembers about the last thousand updates.
    """
    step = jnp.asarray(step)
    rate = jnp.minimum(decay, (1.0 + step) / (10.0 + step))
    return jax.tree.map(lambda e, p: e + (1.0 - rate).astype(e.dtype) * (p - e), ema, params)
