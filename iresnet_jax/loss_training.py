"""`train`: a model by any loss, in the training step of ``train.py`` and `fit`."""

import dataclasses
import functools
import math
import warnings
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array

from iresnet_jax.checked_dataclasses import (
    Count,
    CountOrNone,
    Decay,
    Positive,
    check_unmasked,
    checked,
    finite_numbers,
)
from iresnet_jax.data.batches import device_batches
from iresnet_jax.maths import platforms
from iresnet_jax.maths.keys import single_key
from iresnet_jax.maths.logdet_exact import ExactLogdet
from iresnet_jax.models.density import Density
from iresnet_jax.models.history import STOPPED, History
from iresnet_jax.models.model import Model
from iresnet_jax.runs.machine import cache_programs, start_backend
from iresnet_jax.runs.metrics import Lines
from iresnet_jax.runs.signals import StopRequests, heard_in_memory
from iresnet_jax.training import parallel
from iresnet_jax.training.constraint import Unconstrained, training_constraint, validated_model
from iresnet_jax.training.optimizers import OptimizerConfig, make_optimizer, make_schedule
from iresnet_jax.training.parallel import AXIS
from iresnet_jax.training.step import (
    Loss,
    Objective,
    StepKeys,
    TrainingStep,
    TrainState,
    UpdateRule,
    ValidationResult,
    abstract_batch,
)
from iresnet_jax.training.trainer import (
    LONGEST,
    VALIDATIONS,
    Best,
    BlowUpError,
    Trainer,
    TrainingConfig,
)

M = TypeVar("M", bound=Model)
LossFunction = Callable[[Any, Any, Array], Any]  # (model, batch, key) -> loss, or loss and metrics
# (step, model, metrics) -> whether training ends
Callback = Callable[[int, Any, Mapping[str, float]], Any]

BATCH_SIZE = 128
LEARNING_RATE = 5e-3  # of the default optimizer
STEPS = 1000  # updates, if neither these nor minutes are given
VALIDATED_AT_ONCE = 1024  # examples
RESERVED = {  # of the log
    *("loss", "grad_norm", "learning_rate", "max_sigma", "max_lipschitz", "step", "split"),
    *("wall_time_s", "seconds_per_step", "compile_seconds"),
}


def train(
    model: M,
    loss: LossFunction,
    x: Any = None,
    *,
    key: Any,
    steps: int | None = None,
    minutes: float | int | None = None,
    batch_size: int = BATCH_SIZE,
    optimizer: optax.GradientTransformation | None = None,
    ema_decay: float | int = 0.999,
    validation: Any = None,
    patience: int = 10,
    callback: Callback | None = None,
    every: int | None = None,
    progress: bool = True,
) -> M:
    """Minimises a loss of a model whose blocks are contractions in every step, and certified to be
    so at the end.

    The step is that of ``train.py`` and `fit`: norms by warm power iteration, gradients averaged
    over all devices, a moving average of the parameters, which is what validates and is returned.

    In a notebook and at Python's prompt, Ctrl-C ends training and gives the best model so far.

    Args:
        model: The model to start from, such as one of ``Density.init``, or one that was loaded.
        loss: ``(model, batch, key) -> loss``, a mean over the batch, or ``(loss, metrics)`` with a
            dictionary of further means. With several devices each sees its share of the batch, with
            a key of its own, and gradients are averaged.
        x: Examples: an array or any pytree of arrays with as many rows, of which batches have
            random ones. None trains without data: the loss is given None, and draws what it needs
            by its key.
        key: Source of all randomness: batches and the keys of losses.
        steps: Number of updates; 1000 by default, without limit if minutes are given.
        minutes: Longest time, compilation included.
        batch_size: Examples of a step over all devices; at most as many as there are.
        optimizer: An optimizer of optax with its learning rate. By default Muon at 5e-3 after a
            warm-up, with a cosine to the end and gradients clipped at norm 1.
        ema_decay: Decay of the moving average of the parameters, which forgets its start sooner; 0
            takes the last parameters.
        validation: Examples like ``x``, on which the loss is measured with the same random numbers
            every time: training ends early without improvement, and the best model is returned.
            Without, it is the last.
        patience: Validations without an improvement after which training ends; 0 never ends it
            early.
        callback: ``(step, model, metrics)``, called at every validation, or as often without one,
            with the model of averaged parameters and the latest measurements. Training ends if it
            returns True.
        every: Steps between validations; by default a twentieth of all.
        progress: Whether lines of progress are written to stderr.

    Returns:
        The model with its `History`, certified to be within its budget.

    Raises:
        ValueError: If arguments do not fit together, the loss is not one number, or it does not
            depend on the model.
        RuntimeError: If the loss becomes NaN or infinite.

    Example:
        >>> def loss(model, batch, key):
        ...     return -model.log_prob(batch, key).mean()
        >>> trained = train(model, loss, x, steps=2000, key=jax.random.key(1))  # doctest: +SKIP
    """
    start_backend()
    cache_programs()
    seed = int(jax.random.bits(single_key(key), dtype="uint32"))
    x, validation = _checked_rows(x, "x"), _checked_rows(validation, "validation")
    if steps is None and minutes is None:
        steps = STEPS
    # 0 are as many as there is time for
    most_steps = 0 if steps is None else checked(Count, steps, "steps")
    default_every = max(most_steps // VALIDATIONS, 1) if most_steps else LONGEST  # or by the clock
    between = default_every if every is None else checked(Count, every, "every")
    batch_size, devices = checked(Count, batch_size, "batch_size"), parallel.all_devices()
    settings = TrainingConfig(
        total_steps=most_steps,
        minutes=0.0 if minutes is None else checked(Positive, minutes, "minutes"),
        patience=0 if validation is None else checked(CountOrNone, patience, "patience"),
        batch_size=max((batch_size if x is None else min(batch_size, num_rows(x))) // devices, 1)
        * devices,
        eval_every_steps=between,
        log_every_steps=min(between, STEPS // VALIDATIONS),
    )
    length = settings.schedule_steps
    default = OptimizerConfig(
        "muon", LEARNING_RATE, warmup_steps=length // 20, momentum=0.95, nesterov=True
    )
    rule = UpdateRule(
        make_optimizer(default) if optimizer is None else optimizer,
        make_schedule(default, length) if optimizer is None else None,
        length,
        checked(Decay, ema_decay, "ema_decay"),
    )
    say = Lines() if progress else lambda line: None
    with (
        StopRequests("training ends after this step", heard_in_memory()) as stop,
        jax.default_matmul_precision("float32"),
    ):
        free = Unconstrained.of(model)
        _check_loss(loss, model, x, settings.batch_size)
        objective = Objective(
            name="loss",
            training_step=_training_step(free, loss, rule, has_data=x is not None),
            make_validation=None
            if validation is None
            else lambda: _make_validation(free, loss, validation, seed),
            selection=lambda means: means["loss"],
            examples=x,
            initial_variables=lambda: {"params": free.params, "spectral": free.iterates},
            seed=seed,
        )
        best: Best | None = None
        is_called_off = False
        latest: dict[str, float] = {}  # measurements, those of validation with a prefix

        def log(split: str, metrics: Mapping[str, float]) -> None:
            prefix = "validation_" if split == "validation" else ""
            latest.update({f"{prefix}{name}": value for name, value in metrics.items()})
            if (
                split == "train"
                and metrics["grad_norm"] == 0
                and trainer.step <= settings.log_every_steps
            ):
                raise ValueError(
                    "the gradient of the loss is 0: the loss has to depend on the "
                    "model that it is given"
                )

        def validated(held_out_loss: float | None) -> None:
            nonlocal best, is_called_off
            if held_out_loss is not None and (best is None or held_out_loss < best.loss):
                best = Best.of(trainer.state, held_out_loss)
            if callback is not None:
                is_called_off = bool(
                    callback(trainer.step, _averaged_model(free, trainer.state), dict(latest))
                )

        trainer = Trainer(objective, settings, log=log, validated=validated, say=say)
        blown_up = ""
        try:
            for _ in trainer.steps(device_batches(x, seed=seed, batch_size=settings.batch_size)):
                if is_called_off or stop.received is not None:
                    break
        except BlowUpError as error:
            if best is None:
                raise
            blown_up = str(error)
            warnings.warn(
                f"{error}. The model is the best one of the validations before", stacklevel=2
            )
        if stop.received:
            say(f"stopped by {stop.received.name} after step {trainer.step}: the best model so far")
        if best is None:
            trainer.check()
        kept = best or Best.of(trainer.state, math.inf)
        trained = free.with_(params=jax.device_put(kept.ema)).certified()
        history = History.from_records(trainer.records, kept.step)
        ended = STOPPED if stop.received else blown_up or trainer.ended
        return trained.with_(history=dataclasses.replace(history, ended=ended))


def _make_validation(
    free: Unconstrained, loss: LossFunction, examples: Any, seed: int
) -> Callable[[TrainState], ValidationResult]:
    """The mean loss of held-out examples under the averaged parameters, by the same random
    numbers every time.
    """
    key, compiled, num = (
        jax.random.key(seed),
        jax.jit(functools.partial(_loss_and_metrics, loss)),
        num_rows(examples),
    )

    def validate(state: TrainState) -> ValidationResult:
        model, totals = _averaged_model(free, state), {}
        for start in range(0, num, VALIDATED_AT_ONCE):
            batch = jax.tree.map(
                lambda rows, start=start: jnp.asarray(rows[start : start + VALIDATED_AT_ONCE]),
                examples,
            )
            _, means = compiled(model, batch, jax.random.fold_in(key, start))
            for name, mean in means.items():
                totals[name] = totals.get(name, 0.0) + float(mean) * num_rows(batch) / num
        return ValidationResult(totals)

    return validate


def _averaged_model(free: Unconstrained, state: TrainState) -> Any:
    """The model of the averaged parameters, norms iterated to their tolerance."""
    return validated_model(
        free.template, free.settings, *parallel.on_first_device((state.ema, state.spectral))
    )


def _training_step(
    free: Unconstrained, loss: LossFunction, rule: UpdateRule, *, has_data: bool
) -> TrainingStep:
    """The step of `train`, with the model as training runs it."""

    def of_batch(model: Any, batch: Any, keys: StepKeys) -> Loss:
        if isinstance(model, Density):
            model = model.with_(estimator=model.estimator.fix_length(keys.shared))
        batch = batch if has_data else None
        value, metrics = _loss_and_metrics(
            loss, model, batch, jax.random.fold_in(keys.shared, jax.lax.axis_index(AXIS))
        )
        return Loss(value, metrics)

    template, spec = free.template, free.template.spec
    # Blocks of vectors are scanned on CPUs, too, which compiles sooner.
    unroll = template.unroll or (len(spec.flow.event_shape) == 3 and platforms.platform() == "cpu")
    model = template.with_(unroll=unroll)
    if (
        not unroll
        and isinstance(getattr(model, "estimator", None), ExactLogdet)
        and model.rematerialize == "nothing"
    ):
        model = model.with_(rematerialize="elementwise")
    return TrainingStep(model, of_batch, training_constraint(free.settings, spec), rule)


def _loss_and_metrics(
    loss: LossFunction, model: Any, batch: Any, key: Array
) -> tuple[Array, dict[str, Any]]:
    found = loss(model, batch, key)
    value, metrics = found if isinstance(found, tuple) else (found, {})
    return value, {"loss": value, **metrics}


def _check_loss(loss: LossFunction, model: Any, x: Any, batch_size: int) -> None:
    """Raises ``ValueError`` unless the loss is a number, and its metrics a dictionary of
    numbers.
    """
    batch = None if x is None else abstract_batch(x, batch_size)
    found: Any = jax.eval_shape(
        lambda model, batch, key: loss(model, batch, key), model, batch, jax.random.key(0)
    )
    pair: Any = found if isinstance(found, tuple) and len(found) == 2 else (found, {})
    value, metrics = pair
    if getattr(value, "shape", None) != () or not jnp.issubdtype(value.dtype, jnp.floating):
        got = (
            f"{value.dtype} of shape {value.shape}"
            if hasattr(value, "shape")
            else f"a {type(value).__name__}"
        )
        raise ValueError(
            f"the loss must be one number, or one and a dictionary of metrics, got {got}: take the "
            "mean over the batch"
        )
    if not isinstance(metrics, Mapping) or any(
        getattr(metric, "shape", None) != () for metric in metrics.values()
    ):
        raise ValueError(f"metrics of the loss must be a dictionary of numbers, got {metrics}")
    if clash := sorted(RESERVED & set(metrics)):
        raise ValueError(
            f"a metric of the loss cannot be called {clash[0]!r}, a name of the log's "
            "own: rename it"
        )


def _checked_rows(x: Any, name: str) -> Any:
    """Arrays of NumPy with equally many rows.

    Raises:
        ValueError: If they differ in their number of rows, have none, or hold NaN or infinite
            numbers.
    """
    if x is None:
        return None
    for leaf in jax.tree.leaves(x):
        check_unmasked(leaf, name)
    x = jax.tree.map(np.asarray, x)
    shapes = [leaf.shape for leaf in jax.tree.leaves(x)]
    if not shapes or () in shapes or len({shape[0] for shape in shapes}) != 1 or not shapes[0][0]:
        raise ValueError(
            f"arrays of {name} must have one row an example, and equally many rows, "
            f"got shapes {shapes}"
        )
    for leaf in jax.tree.leaves(x):
        if leaf.dtype.kind in "biuf":
            finite_numbers(leaf, name, jax.dtypes.canonicalize_dtype(leaf.dtype))
    return x


def num_rows(x: Any) -> int:
    """Examples in a pytree of arrays."""
    return len(jax.tree.leaves(x)[0])
