"""`fit`: a model of an array, with settings chosen from the array and the machine; the same code
as ``train.py``.
"""

import dataclasses
import math
import os
import signal
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import jax
import numpy as np

from iresnet_jax.atomic_files import path_of
from iresnet_jax.checked_dataclasses import Count, Positive, Range, checked
from iresnet_jax.data.arrays import data_of
from iresnet_jax.data.batches import device_batches
from iresnet_jax.data.dataset import DataSet
from iresnet_jax.fit_settings import (
    STEPS_IN_ROUND,
    Candidate,
    candidates,
    choose_settings,
    with_settings,
)
from iresnet_jax.maths.keys import single_key
from iresnet_jax.models.architecture import StageSpec
from iresnet_jax.models.history import STOPPED, Attempt, History
from iresnet_jax.runs import run_folder, trained_run
from iresnet_jax.runs.config import Config
from iresnet_jax.runs.loop import check_batch_size, train
from iresnet_jax.runs.machine import cache_programs, prepare_backend, start_backend
from iresnet_jax.runs.metrics import Lines, read_metrics
from iresnet_jax.runs.model_from_config import identity_context, model_spec
from iresnet_jax.runs.objective_from_config import build_objective
from iresnet_jax.runs.signals import Stopped, StopRequests, heard_in_memory
from iresnet_jax.training.constraint import certified_model
from iresnet_jax.training.trainer import Best, BlowUpError, Trainer, TrainingConfig

# of the time limit, which the updates of all runs of the first round have at most
FIRST_SHARE = 0.2
LAST_START = 0.9  # share of the time limit after which no run starts
WORTHWHILE = 1.5  # times the time of the last run, which a longer one must have
IMPROVING = 0.8  # share of its steps at which a run is best, above which a longer one is worthwhile
OVERFITTED = 0.5  # share below which a milder candidate is
# Factors on the updates of a run whose validation still improved at its end. For conditional
# densities of 10,000 examples, 2000 updates are best of 1000 to 4000 (slcp of benchmarks/sbibm.py).
LONGER, LONGER_GIVEN_CONTEXTS = 4, 2
# standard errors by which a model must be better than its start or the likeliest candidate (Breiman
# et al. 1984)
CLEAR = 1.0
FEW_UPDATES = 500  # below which a run that time has ended is hardly trained
# fall of the validation loss over the last tenth of a run above which it is not trained enough
STEEP = 0.05

Say = Callable[[str], None]  # takes a line of progress


def fit(
    x: Any,
    labels: Any = None,
    *,
    context: Any = None,
    key: Any = None,
    minutes: float | int | None = None,
    steps: int | None = None,
    objective: str | None = None,
    architecture: Sequence[StageSpec] | None = None,
    validation_fraction: float = 0.1,
    validation: Any = None,
    bounds: Any = None,
    settings: Mapping[str, Any] | None = None,
    workdir: str | os.PathLike[str] | None = None,
    progress: bool = True,
) -> Any:
    """Trains a model of an array: the density of ``x``, the classes of ``x``, or the density of
    ``x`` given a context.

    Settings are chosen from the shape, the number and the kind of the examples. The loop is that of
    ``train.py``: a tenth of the examples validate, the parameters are averaged, training ends early
    once validation no longer improves, and the model is the best one on validation, certified.
    Integer images are levels. Among the columns of vectors, whole numbers, rounded ones, booleans
    and categories are dequantised in cells, see `iresnet_jax.bijections.cells`; others are
    continuous. Models of vectors are the best of several candidates, see `best_of`. A warning tells
    of a time limit that was too short to train the model. Needs ``pip install
    'iresnet_jax[train]'``.

    In a notebook and at Python's prompt, Ctrl-C ends training and gives the best model so far; a
    second one raises ``KeyboardInterrupt``. In a script the first one does. SIGTERM ends the
    process as without training. With ``workdir``, both save the step first, and the same call
    resumes from it.

    Args:
        x: Vectors ``(n, d)``, images ``(n, h, w, c)``, or a pandas data frame of numbers, booleans
            and categories.
        labels: Classes, integers from 0 on, one per example.
        context: Context vectors ``(n, k)``: the model is then ``p(x | context)``.
        key: Source of all randomness; by default always the same one. Several models take a loop
            over keys.
        minutes: Longest time for training, compilation included; 3 by default. Training ends
            earlier once validation no longer improves.
        steps: Number of updates instead of a time, in one run that can be repeated, to the last bit
            on one machine.
        objective: "density", "classification" or "hybrid" (both in one); by default "density"
            without labels, and with labels "classification" of images and "hybrid" of vectors.
        architecture: Stages of the flow.
        validation_fraction: Share of the examples that validates.
        validation: Examples that validate instead of a share of ``x``: an array like ``x``, or with
            labels or contexts ``(x, labels, context)``. At most 4096 of them count.
        bounds: Ends ``(low, high)`` of columns by name or number, None where there is no end, for a
            density of vectors: samples stay between them. Other columns are unbounded, but for
            booleans and categories.
        settings: Other settings of a config file by their names, such as
            ``{"optimizer.learning_rate": 1e-3}``.
        workdir: Folder for checkpoints and metrics, from which the same call resumes after an
            interruption; by default the model is trained in memory.
        progress: Whether lines of progress are written to stderr.

    Returns:
        The model, with what training saw in its ``history``: the curves of the best run, all
        attempts, and why they ended.

    Raises:
        ValueError: If arrays or settings do not fit together, or a value is missing or out of its
            bounds; the message names it.
        RuntimeError: If training blows up, that of every candidate.

    Example:
        >>> model = fit(x, minutes=3)  # doctest: +SKIP
        >>> samples, info = model.sample(jax.random.key(1), 16)  # doctest: +SKIP
    """
    began = time.monotonic()
    start_backend()
    cache_programs()
    minutes, steps = (
        checked(Positive | None, minutes, "minutes"),
        checked(Count | None, steps, "steps"),
    )
    if minutes is not None and steps is not None:
        raise ValueError(f"give minutes or steps, not both: got {minutes} and {steps}")
    objective = checked(
        Literal["density", "classification", "hybrid"] | None, objective, "objective"
    )
    validation_fraction = checked(
        Annotated[float, Range("(0, 1)")], validation_fraction, "validation_fraction"
    )
    given = {
        "data.validation_fraction": validation_fraction,
        **_given_settings(settings, architecture),
    }
    folder = None if workdir is None else path_of(workdir)
    seed = 0 if key is None else int(jax.random.bits(single_key(key), dtype="uint32"))
    data = data_of(
        x,
        labels,
        context,
        validation=validation,
        validation_fraction=validation_fraction,
        bounds=bounds,
        is_density=labels is None or objective == "density",
    )
    config = with_settings(
        choose_settings(data, objective=objective, minutes=minutes, steps=steps, seed=seed), given
    )
    say = Lines() if progress else lambda line: None
    num, held_out = (len(data.examples[split]) for split in ("train", "validation"))
    say(
        f"fit: {num} examples of shape {data.event_shape} to train on, {held_out} to validate; "
        f"{config.objective}"
    )
    for note in data.notes:
        say(note)

    table = candidates(config, data, given)
    if folder is None and steps is None and (whole := list(table)):
        model = best_of(whole, config, data, given, say, began)
    else:  # a folder is of one run, and so many steps are those of one
        plain = next(table, None)
        config = with_settings(config, {**(plain.settings if plain else {}), **given})
        if folder is None:
            with StopRequests("training ends after this step", heard_in_memory()) as stop:
                model = _train(config, config.training, data, say, stop).model()
        else:
            model = _train_on_disk(config, data, folder, say)
    if shortfall := hardly_trained(model.history):
        warnings.warn(shortfall, stacklevel=2)
    return model


def _given_settings(settings: Any, architecture: Any) -> dict[str, Any]:
    """Settings that the user has chosen, by their names; those of a group one by one.

    Raises:
        ValueError: If they are no dictionary or no architecture, or hold what `fit` has arguments
            for.
    """
    settings = {} if settings is None else settings
    if not isinstance(settings, Mapping) or not all(isinstance(name, str) for name in settings):
        raise ValueError(
            f'settings must be a dictionary such as {{"optimizer.learning_rate": '
            f"1e-3}}, got {settings!r}"
        )
    fields: dict[str, Any] = {}
    for name, value in settings.items():
        fields |= (
            {f"{name}.{key}": each for key, each in value.items()}
            if isinstance(value, Mapping)
            else {name: value}
        )
    for name in fields:
        if name.startswith("data.") or name in (
            "objective",
            "training.total_steps",
            "training.minutes",
        ):
            raise ValueError(
                f"{name} is no setting of fit: use its arguments for the data, "
                "objective=, minutes= and steps="
            )
    if architecture is not None and "model.stages" in fields:
        raise ValueError(
            "give the stages as architecture= or as the setting model.stages, not as both"
        )
    stages = checked(
        tuple[StageSpec, ...] | None, fields.pop("model.stages", architecture), "architecture"
    )
    for stage in stages or ():
        if stage.branch is not None:
            raise ValueError(
                "fit takes branches by the name of their kind: call "
                f"kinds.register({stage.branch_name!r}, ...) of "
                f"iresnet_jax.branches and give StageSpec(kind={stage.branch_name!r}) in place of "
                "branch=..."
            )
    of_stages = (
        {} if stages is None else {"model.stages": [dataclasses.asdict(stage) for stage in stages]}
    )
    return {**of_stages, **fields}


def hardly_trained(history: History) -> str:
    """A sentence for a model whose training was ended by time too early; empty for others.

    That is after fewer than `FEW_UPDATES` updates in its longest run, or while the validation loss
    still fell by more than `STEEP`, in nats or bits/dim, over the last tenth of the updates.
    """
    if "time" not in history.ended:
        return ""
    advice = "the model is hardly trained: give it more minutes or a smaller architecture"
    num_updates = max(
        [*history.train.get("step", []), *(attempt.num_steps for attempt in history.attempts)],
        default=0,
    )
    if num_updates < FEW_UPDATES:
        return f"fit had time for {num_updates:.0f} updates, {advice}"
    loss = next(
        (
            history.validation[name]
            for name in ("bits_per_dim", "nll", "loss")
            if name in history.validation
        ),
        [],
    )
    steps = history.validation.get("step", [])
    before = [value for step, value in zip(steps, loss, strict=True) if step <= 0.9 * steps[-1]]
    if before and history.step == steps[-1] and before[-1] - loss[-1] > STEEP:
        return (
            f"validation still fell from {before[-1]:.2f} to {loss[-1]:.2f} in the last tenth "
            f"of the updates, {advice}"
        )
    return ""


class Run(NamedTuple):
    """A training run in memory that has ended.

    Attributes:
        attempt: How it went.
        is_cut_short: Whether a limit on the time of its updates ended it, so that it says little.
        model: ``() ->`` its best model, certified, with its history.
        losses: Losses of that model on the held-out examples; None if they are not known.
    """

    attempt: Attempt
    is_cut_short: bool
    model: Callable[[], Any]
    losses: np.ndarray | None = None


# By candidate and most updates, 0 for as many as there is time for; None for a run that blew up.
Runs = Mapping[tuple[Candidate, int], Run | None]


def best_of(
    table: Sequence[Candidate],
    config: Config,
    data: DataSet,
    given: Mapping[str, Any],
    say: Say,
    began: float,
) -> Any:
    """The best model of several candidates by successive halving, with all attempts in its history.

    The first round gives `STEPS_IN_ROUND` updates to each candidate, all of them at most a fifth of
    the time. Then the best one that learned goes on alone, as `next_run` says: for longer from its
    start, as a learning rate has to fall to the end of a run, or with more noise. Each run
    validates its start, too, which counts like any other state.

    Args:
        table: The candidates; the first one is the plain one.
        config: Settings of all runs.
        data: The data.
        given: Settings that the user has given, which no candidate changes.
        say: Takes a line of progress.
        began: When the time started that is limited: mixtures of many columns take long to fit.
    """
    limit_s, longer = (
        60 * config.training.minutes,
        LONGER_GIVEN_CONTEXTS if data.contexts else LONGER,
    )
    runs: dict[tuple[Candidate, int], Run | None] = {}
    # The plain one comes last: if there is no time, those that are fitted before training are
    # better.
    ended, upcoming = "", [(candidate, STEPS_IN_ROUND) for candidate in reversed(table)]
    with StopRequests("training ends after this step", heard_in_memory()) as stop:
        while upcoming:
            # 1. Train the next one.
            candidate, num_steps = upcoming.pop(0)
            length = f"up to {num_steps} steps" if num_steps else "until time is over"
            say(f"{candidate}: {length if candidate.is_trained else 'only validated'}")
            left_s = max(limit_s - (time.monotonic() - began), 1.0)
            seconds_of_steps = (
                FIRST_SHARE / len(table) * limit_s if num_steps == STEPS_IN_ROUND else math.inf
            )
            try:
                runs[candidate, num_steps] = _train(
                    with_settings(config, {**candidate.settings, **given}),
                    dataclasses.replace(
                        config.training, total_steps=num_steps, minutes=left_s / 60
                    ),
                    data,
                    say,
                    stop,
                    what=str(candidate),
                    seconds_of_steps=seconds_of_steps if candidate.is_trained else 0.0,
                )
            except BlowUpError as error:
                if not upcoming and not any(runs.values()):
                    raise
                runs[candidate, num_steps] = None
                say(f"{candidate}: given up, {error}")

            # 2. Choose what follows.
            left_s = limit_s - (time.monotonic() - began)
            if not any(runs.values()):
                continue
            if stop.received:
                ended, upcoming = STOPPED, []
            elif left_s < (1 - LAST_START) * limit_s:
                ended, upcoming = "time was over", []
            elif not upcoming:
                following = next_run(runs, table[0], left_s, longer)
                ended, upcoming = (
                    (following, []) if isinstance(following, str) else ("", [following])
                )
    best = chosen_run(runs, table[0] if table[-1].prior is None else table[-1])
    attempts = tuple(run.attempt for run in runs.values() if run is not None)
    among = f", the best of {len(attempts)} runs" if len(attempts) > 1 else ""
    say(
        f"{best.attempt.what}: validation {best.attempt.loss:.4f} at step "
        f"{best.attempt.best_step}{among}; {ended}"
    )
    model = best.model()
    return model.with_(history=dataclasses.replace(model.history, attempts=attempts, ended=ended))


def next_run(
    runs: Runs, plain: Candidate, left_s: float, longer: int = LONGER
) -> tuple[Candidate, int] | str:
    """The run that follows these, as a candidate and its most updates, or why there is none.

    Args:
        runs: Runs so far, of which one has a model.
        plain: The candidate that learns for the rest of the time where first runs were cut short: a
            good start, such as a mixture, is ahead after few updates.
        left_s: Seconds that are left.
        longer: Factor on the updates of a run whose validation still improved at its end.
    """
    if (plain, 0) not in runs and any(
        run is not None and run.is_cut_short for run in runs.values()
    ):
        return plain, 0
    candidate, best = _leader(runs, trained=True)
    # Where training made the best start only worse, another one that still improves may overtake
    # it.
    that_learned = {
        key: run for key, run in runs.items() if run is not None and run.attempt.best_step
    }
    learner, learned = (
        (candidate, best) if best.attempt.best_step else _leader(that_learned or runs)
    )
    _, _, best_step, num_steps, seconds = learned.attempt
    if best_step > IMPROVING * num_steps:
        if left_s < WORTHWHILE * seconds:
            return "too little time was left for a longer run"
        is_last = left_s < longer * (1 + WORTHWHILE) * seconds
        more = 0 if is_last else longer * num_steps
        if (learner, more) not in runs:
            return learner, more
    if best.attempt.best_step < OVERFITTED * best.attempt.num_steps:
        for milder in candidate.milder():
            if (milder, STEPS_IN_ROUND) not in runs:
                return milder, STEPS_IN_ROUND
    return "validation no longer improved"


def chosen_run(runs: Runs, likeliest: Candidate) -> Run:
    """The run with the least validation loss, if it is clearly better than those of one candidate,
    else the best of these.

    Args:
        runs: All runs, of which one has a model.
        likeliest: The candidate that a criterion on all examples to train on prefers: few held-out
            ones tell less.
    """
    best = _leader(runs)[1]
    of_likeliest = [
        run for (candidate, _), run in runs.items() if candidate == likeliest and run is not None
    ]
    expected = min(of_likeliest, key=lambda run: run.attempt.loss, default=best)
    return best if is_clearly_better(best.losses, expected.losses) else expected


def _leader(runs: Runs, *, trained: bool = False) -> tuple[Candidate, Run]:
    """The best candidate, or the best one that is trained if there is any; of equal ones the
    last, which is milder.
    """
    finished = [
        (candidate, run) for (candidate, _), run in reversed(list(runs.items())) if run is not None
    ]
    finished = [each for each in finished if trained and each[0].is_trained] or finished
    return min(finished, key=lambda item: item[1].attempt.loss)


def _train(
    config: Config,
    training: TrainingConfig,
    data: DataSet,
    say: Say,
    stop: StopRequests,
    *,
    what: str = "",
    seconds_of_steps: float = math.inf,
) -> Run:
    """One training run in memory, which ends once a signal is noted or training blows up.

    Args:
        config: All settings.
        training: Length of the run in place of ``config.training``, whose length the program is
            made for.
        data: The data.
        say: Takes a line of progress.
        stop: Notes a signal.
        what: Name of the candidate.
        seconds_of_steps: Longest time of updates, whatever compiling takes; 0 only validates the
            start.

    Raises:
        BlowUpError: If training blows up before it is better than its start.
    """
    prepare_backend(training.matmul_precision)
    check_batch_size(training, data)
    spec = model_spec(config, data)
    objective = build_objective(config, data, spec)
    best: Best | None = None
    at_start: np.ndarray | None = None
    losses: np.ndarray | None = None

    def keep(loss: float | None) -> None:
        nonlocal best, at_start, losses
        if loss is None:
            return
        if best is None:
            best, at_start, losses = Best.of(trainer.state, loss), trainer.losses, trainer.losses
        elif loss < best.loss and is_clearly_better(trainer.losses, at_start):
            best, losses = Best.of(trainer.state, loss), trainer.losses

    trainer = Trainer(
        objective, training, seconds_of_steps=seconds_of_steps, validated=keep, say=say
    )
    trainer.validate()  # the start may be the best: a mixture is fitted before training
    assert best is not None
    blown_up = ""
    try:
        batches = device_batches(
            objective.examples, seed=config.seed, batch_size=training.batch_size
        )
        for _ in trainer.steps(batches) if seconds_of_steps else ():
            if stop.received:
                say(
                    f"stopped by {stop.received.name} after step {trainer.step} of "
                    f"{trainer.horizon}: the best model so far"
                )
                break
    except BlowUpError as error:
        if not best.step:
            raise
        blown_up = str(error)
        say(f"{error}: the best model so far")
    kept, ended = best, STOPPED if stop.received else blown_up or trainer.ended
    seconds = trainer.elapsed_s - sum(
        record.get("compile_seconds", 0.0) for record in trainer.records
    )

    def model() -> Any:
        params, batch_stats = jax.device_put((kept.ema, kept.batch_stats))
        certified = certified_model(
            spec, params, batch_stats, config.evaluation.solver(), given=identity_context(config)
        )
        history = History.from_records(trainer.records, kept.step)
        return certified.with_(history=dataclasses.replace(history, ended=ended))

    is_cut_short = ended == "time was over" and seconds > 0.9 * seconds_of_steps
    return Run(
        Attempt(what, kept.loss, kept.step, trainer.step, seconds), is_cut_short, model, losses
    )


def is_clearly_better(losses: np.ndarray | None, others: np.ndarray | None) -> bool:
    """Whether examples lose less than with another model by `CLEAR` standard errors, or no single
    losses are known.

    The best of many validations by few examples is often that which has learnt the others by heart.
    One example tells nothing.
    """
    if losses is None or others is None:
        return True
    gains = others - losses
    return len(gains) > 1 and bool(gains.mean() > CLEAR * gains.std(ddof=1) / math.sqrt(len(gains)))


def _train_on_disk(config: Config, data: DataSet, folder: Path, say: Say) -> Any:
    """The best model of a run in a folder, with its history."""
    if (folder / run_folder.CONFIG_FILE).exists():
        # The length first: other settings, such as the warm-up, follow from it.
        trainings = (config.training, run_folder.read_config(folder).training)
        ours, theirs = (
            f"minutes={each.minutes:g}" if each.minutes else f"steps={each.total_steps}"
            for each in trainings
        )
        if ours != theirs:
            raise ValueError(
                f"{folder} holds a fit with {theirs}, got {ours}: give the same, or another workdir"
            )
    ended = ""
    try:
        state = train(config, folder, data=data, say=say)
        if int(state.step) < config.training.most_steps:
            ended = (
                "time was over"
                if int(state.step) >= int(state.horizon)
                else "validation no longer improved"
            )
    except Stopped as error:
        if error.received == signal.SIGTERM:
            signal.raise_signal(signal.SIGTERM)  # ends the process, unless its owner handles it
        if error.received not in heard_in_memory():
            raise
        say(f"{str(error).split(':')[0]}: the best model so far")
        ended = STOPPED
    run = trained_run.load(folder)
    history = History.from_records(read_metrics(folder), run.step)
    return run.model.with_(history=dataclasses.replace(history, ended=ended))
