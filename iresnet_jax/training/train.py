"""`train`: the only training loop. What differs between its uses is a loss, data, and callbacks."""

import contextlib
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import jax
import numpy as np
import optax

from iresnet_jax.arguments import (
    Count,
    CountOrNone,
    Decay,
    Positive,
    check_unmasked,
    checked,
    finite_numbers,
)
from iresnet_jax.maths import platforms
from iresnet_jax.maths.keys import typed_key
from iresnet_jax.models.free import Free
from iresnet_jax.models.model import Model
from iresnet_jax.training import parallel
from iresnet_jax.training.callbacks import (
    Call,
    Callback,
    Log,
    Patience,
    Progress,
    Stop,
    TimeLimit,
    Validate,
)
from iresnet_jax.training.optimizers import OptimizerConfig, make_optimizer, make_schedule
from iresnet_jax.training.parallel import device_batches
from iresnet_jax.training.run import (
    LONGEST,
    VALIDATIONS,
    BlowUpError,
    LossFunction,
    Objective,
    Run,
)
from iresnet_jax.training.step import Fixed, Step, first_state

M = TypeVar("M", bound=Model)

STEPS = 1000  # updates, if neither these nor minutes are given
# Updates that the schedule of a training of so many minutes is made for, and is stretched from;
# many, as a warm-up is some hundred.
STEPS_IN_TIME = 10_000
LEARNING_RATE = 5e-3  # of the default optimizer


def train(
    model: M | Free,
    loss: LossFunction | Objective,
    data: Any = None,
    *,
    key: Any,
    steps: int | None = None,
    minutes: float | int | None = None,
    batch_size: int = 128,
    optimizer: optax.GradientTransformation | None = None,
    schedule: optax.Schedule | None = None,
    schedule_steps: int | None = None,
    ema_decay: float | int = 0.999,
    num_parts: int = 1,
    unroll: bool | None = None,
    rematerialize: Any = None,
    validation: Any = None,
    patience: int = 10,
    callback: Callable[[int, Any, Mapping[str, float]], Any] | None = None,
    callbacks: Sequence[Callback] = (),
    every: int | None = None,
    log_every: int | None = None,
    matmul_precision: str = "float32",
    progress: bool = True,
) -> M:
    """Minimises a loss of a model whose blocks are contractions in every step, and certified to be
    so at the end.

    Norms are those of warm power iteration, gradients are averaged over all devices, and a moving
    average of the parameters is what validates and is returned.

    In a notebook and at Python's prompt, Ctrl-C ends training and gives the best model so far. With
    `Checkpoints` among the callbacks, Ctrl-C and SIGTERM save the step that was reached, and the
    same call goes on from it, to the same bits.

    Args:
        model: The model to start from, such as one of ``Density.init`` or ``load``, or its `Free`.
        loss: ``(model, batch, key) -> loss``, a mean over the batch, or ``(loss, metrics)`` with a
            dictionary of further means; one with a name of the log, such as "loss", is not logged.
            With several devices each sees its share of the batch, with a key of its own, and
            gradients are averaged.
        data: Examples: an array or any pytree of arrays with as many rows, of which batches have
            random ones. None trains without data: the loss is given None, and draws what it needs
            by its key.
        key: Source of all randomness, batches and the keys of losses; or the seed, an integer.
        steps: Number of updates; 1000 by default, without limit if minutes are given.
        minutes: Limit on the time, compilation included; a compilation, a step or a validation
            that has begun then still ends.
        batch_size: Examples of a step over all devices; at most as many as there are.
        optimizer: An optimizer of optax with its learning rate. By default Muon at 5e-3 after a
            warm-up, with a cosine to the end and gradients clipped at norm 1.
        schedule: Learning rate by step, which an optimizer at a learning rate of 1 is multiplied
            by, and which is stretched over the updates that there is time for.
        schedule_steps: Updates that the schedule is made for; by default those of the training, and
            10,000 if there is a limit on time alone.
        ema_decay: Decay of the moving average of the parameters, which forgets its start sooner; 0
            takes the last parameters.
        num_parts: Parts of each device's share of a batch, computed one after the other to save
            memory.
        unroll: Whether blocks are unrolled in training; by default those of images on CPUs.
        rematerialize: What the backward pass recomputes, see `chain.Repeat`; by default
            elementwise operations of exact log-determinants.
        validation: Examples like ``data``, on which the loss is measured with the same random
            numbers every time: training ends early without improvement, and the best model is
            returned. Without, it is the last.
        patience: Validations without an improvement after which training ends; 0 never ends it
            early.
        callback: ``(step, model, metrics)``, called at every validation, or as often without one,
            with the model of averaged parameters and the latest measurements. Training ends if it
            returns True.
        callbacks: Objects that act between steps, see `Callback`, such as ``Checkpoints(folder)``.
            One of the type of a default takes its place.
        every: Steps between validations; by default a twentieth of all, which is the most if there
            is a limit on time.
        log_every: Steps between lines of the log; by default 50 or ``every``.
        matmul_precision: Precision of matrix products on accelerators.
        progress: Whether lines of progress are written to stderr.

    Returns:
        The model with its `History`, certified to be within its budget.

    Raises:
        RuntimeError: If the loss becomes NaN or infinite before a model was validated.

    Example:
        >>> def loss(model, batch, key):
        ...     return -model.log_prob(batch, key).mean()
        >>> trained = train(model, loss, x, steps=2000, key=jax.random.key(1))  # doctest: +SKIP
    """
    platforms.start_backend()
    platforms.cache_programs()
    # 1. The door: the only checks of a training.
    seed = key if isinstance(key, int) else int(jax.random.bits(typed_key(key), dtype="uint32"))
    steps = None if steps is None else checked(Count, steps, "steps")
    minutes = None if minutes is None else checked(Positive, minutes, "minutes")
    num_parts = checked(Count, num_parts, "num_parts")
    if isinstance(loss, Objective):
        objective = loss
    else:
        data, validation = _checked_rows(data, "data"), _checked_rows(validation, "validation")
        objective = Objective.of(loss, validation, seed, has_data=data is not None)
        # the largest batch of equal shares
        batch_size = batch_size if data is None else min(batch_size, parallel.num_rows(data))
        shares = parallel.all_devices() * num_parts
        batch_size = max(batch_size // shares, 1) * shares
    check_batch_size(batch_size, num_parts, data)

    # 2. The step, and the first state, which is equal in all processes.
    free = model if isinstance(model, Free) else Free.of(model)
    most = steps or (STEPS if minutes is None else LONGEST)
    length = STEPS_IN_TIME if most == LONGEST else most
    if optimizer is None:
        default = OptimizerConfig(
            "muon", LEARNING_RATE, warmup_steps=length // 20, momentum=0.95, nesterov=True
        )
        optimizer, schedule = make_optimizer(default), make_schedule(default, length)
    step = Step(
        objective.loss,
        optimizer,
        schedule,
        schedule_steps or length,
        checked(Decay, ema_decay, "ema_decay"),
        num_parts,
    )
    if every is None:  # by the clock if time is the only limit
        every = max(most // VALIDATIONS, 1) if most < LONGEST else LONGEST
    run = Run(
        free,
        objective,
        parallel.parallelize(step),
        parallel.broadcast(first_state(free, optimizer, length)),
        # placed once: what is elsewhere is copied to the devices in every step
        parallel.on_local_devices(Fixed.of(seed, free, unroll=unroll, rematerialize=rematerialize)),
        most,
        length,
        checked(Count, every, "every"),
        log_every or min(every, STEPS // VALIDATIONS),
        batch_size,
        data,
    )

    # 3. Who watches: defaults, and what was given in their place.
    defaults = [
        *(TimeLimit(minutes), Log(), Validate()),
        Patience(checked(CountOrNone, patience, "patience")),
        Stop(raises=any(each.resumes for each in callbacks)),
        *([] if callback is None else [Call(callback)]),
        *([Progress()] if progress else []),
    ]
    defaults = [d for d in defaults if not any(isinstance(own, type(d)) for own in callbacks)]
    watching = sorted([*callbacks, *defaults], key=lambda each: each.order)

    # 4. One batch after the other.
    with platforms.products_in(matmul_precision), contextlib.ExitStack() as stack:
        for each in reversed(watching):
            stack.enter_context(each.during(run))
        batches = device_batches(data, seed=seed, batch_size=batch_size, first_step=run.step)
        try:
            while run.ended is None and run.step < run.horizon:
                run.take(next(batches))
                for each in watching:
                    each.after_step(run)
            # the last steps, if a callback ended it between two lines of the log
            run.means()
        except BlowUpError as error:
            if run.best is None or not run.best.step:
                raise
            run.end(f"blow-up: {error}")
            warnings.warn(
                f"{error}. The model is the best one of the validations before", stacklevel=2
            )
        return run.result()


def check_batch_size(batch_size: int, num_parts: int, data: Any, devices: int = 0) -> None:
    """Raises ``ValueError`` unless a batch splits over devices and into parts, and is no larger
    than the training data.
    """
    devices = devices or parallel.all_devices()
    if batch_size % (devices * num_parts):
        raise ValueError(
            f"batch_size must be a multiple of {devices} devices times {num_parts} parts, got "
            f"{batch_size}"
        )
    if data is not None and batch_size > (num := parallel.num_rows(data)):
        raise ValueError(
            f"batch_size must be at most {num}, the training examples, got {batch_size}"
        )


def _checked_rows(x: Any, name: str) -> Any:
    """Arrays of NumPy with equally many rows of finite numbers, which the types of JAX can hold."""
    for leaf in jax.tree.leaves(x):
        check_unmasked(leaf, name)
    x = jax.tree.map(np.asarray, x)
    shapes = [leaf.shape for leaf in jax.tree.leaves(x)]
    if x is not None and (() in shapes or len({shape[0] for shape in shapes}) != 1):
        raise ValueError(
            f"arrays of {name} must have one row an example, and equally many rows, got shapes "
            f"{shapes}"
        )
    for leaf in jax.tree.leaves(x):
        finite_numbers(leaf, name, jax.dtypes.canonicalize_dtype(leaf.dtype))
    return x
