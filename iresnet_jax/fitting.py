"""`fit`: a model of an array, with settings chosen from the array and the machine."""

import dataclasses
import math
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any, NamedTuple

import jax
import numpy as np

from iresnet_jax.arguments import Count, Positive, Range, checked
from iresnet_jax.data.arrays import data_of
from iresnet_jax.data.dataset import DataSet
from iresnet_jax.fit_settings import (
    STEPS_IN_ROUND,
    Candidate,
    candidates,
    choose_settings,
    with_settings,
)
from iresnet_jax.maths.keys import typed_key
from iresnet_jax.maths.platforms import cache_programs, prepare_backend, start_backend
from iresnet_jax.models.architecture import StageSpec
from iresnet_jax.models.model import STOPPED, Attempt, History
from iresnet_jax.runs.config import Config
from iresnet_jax.runs.job import Job, build_flow_spec, finished
from iresnet_jax.starts import KERNELS, MOST_ROWS, Start, Starts, with_likelier_columns
from iresnet_jax.training.callbacks import (
    Callback,
    Lines,
    Progress,
    Stop,
    TimeLimit,
    Validate,
    is_clearly_better,
)
from iresnet_jax.training.run import BlowUpError
from iresnet_jax.training.signals import SIGNALS, StopRequests, heard_in_memory
from iresnet_jax.training.train import train

FIRST_SHARE = 0.2
COMPILING_S = 8.0  # seconds in which a training is compiled; with less left none starts
ROWS_A_SECOND = 200  # of the cross-validation of starts, by the time limit
FEW_COMPILATIONS = 6  # with less time than so many only the likeliest start is trained
# Settings with which the user has chosen the start.
_FIXED = {"model.prior", "model.prior_components", "preprocessing.transform"}
WORTHWHILE = 1.5  # least time left for a longer run, in units of the last run's time
IMPROVING = 0.8  # share of its steps at which a run is best, above which a longer one is worthwhile
OVERFITTED = 0.5  # share below which a milder candidate is worthwhile
# Factors on the updates of a run whose validation still improved at its end. For conditional
# densities of 10,000 examples, 2000 updates are best of 1000 to 4000 (slcp of benchmarks/sbibm.py).
LONGER, LONGER_GIVEN_CONTEXTS = 4, 2
# Standard errors by which a model must be better than its start or the likeliest candidate (Breiman
# et al. 1984).
CLEAR = 1.0
FEW_UPDATES = 500  # with fewer, a run that time has ended is hardly trained
# A larger fall of the validation loss over the last tenth of a run means too little training.
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
    callbacks: Sequence[Callback] = (),
    progress: bool = True,
) -> Any:
    """Trains a model of an array: the density of ``x``, the classes of ``x``, or the density of
    ``x`` given a context.

    Settings are chosen from the shape, the number and the kind of the examples. Training is as in
    ``train.py``: a tenth of the examples validate, the parameters are averaged, training ends early
    once validation no longer improves, and the result is the best model on validation, certified.
    Integer images are levels. Among the columns of vectors, whole numbers, rounded ones, booleans
    and categories have masses, see `iresnet_jax.bijections.marginals`; others are continuous. A
    density of vectors starts as the likeliest of some simple ones, see `iresnet_jax.starts`, and
    models of vectors are the best of several candidates, see `best_of`. A warning
    reports a time limit that was too short to train the model. Needs ``pip install
    'iresnet_jax[train]'``.

    In a notebook and at Python's prompt, Ctrl-C ends training and gives the best model so far; a
    second one raises ``KeyboardInterrupt``. In a script the first Ctrl-C raises it. With
    ``Checkpoints`` among the callbacks Ctrl-C and SIGTERM save the step first, and the same call
    goes on from it.

    Args:
        x: Vectors ``(n, d)``, images ``(n, h, w, c)``, or a pandas data frame of numbers, booleans
            and categories.
        labels: Classes, integers from 0 on, one per example.
        context: Context vectors ``(n, k)`` or a data frame: the model is then ``p(x | context)``.
        key: Source of all randomness; by default always the same key. For several models, loop over
            keys.
        minutes: Longest time for training, compilation included; 3 by default. Training ends
            earlier once validation no longer improves.
        steps: Number of updates instead of a time, in one run, which is reproducible to the bit on
            one machine.
        objective: "density", "classification" or "hybrid" (both in one); by default "density"
            without labels, and with labels "classification" of images and "hybrid" of vectors.
        architecture: Stages of the flow.
        validation_fraction: Share of the examples that validates.
        validation: Examples that validate instead of a share of ``x``: an array like ``x``, or with
            labels or contexts ``(x, labels, context)``. At most 4096 of them count.
        bounds: Ends ``(low, high)`` of columns by name or number, None for no end, for a density of
            vectors: samples stay between the ends. Other columns are unbounded, except booleans and
            categories.
        settings: Other settings of a config file by their names, such as
            ``{"optimizer.learning_rate": 1e-3}``.
        callbacks: Objects that act between the steps of each training, see `Callback`. With
            ``Checkpoints(folder)`` the same call goes on after an interruption.
        progress: Whether lines of progress are written to stderr.

    Returns:
        The model, with what training saw in its ``history``: the curves of the best run, all
        attempts, and why they ended.

    Raises:
        ValueError: If arrays or settings do not fit together, or a value is missing or out of its
            bounds; the message names it.
        RuntimeError: If the training of every candidate blows up.

    Example:
        >>> model = fit(x, minutes=3)  # doctest: +SKIP
        >>> samples, info = model.sample(jax.random.key(1), 16)  # doctest: +SKIP
    """
    began = time.monotonic()
    start_backend()
    cache_programs()
    minutes = None if minutes is None else checked(Positive, minutes, "minutes")
    steps = None if steps is None else checked(Count, steps, "steps")
    if minutes is not None and steps is not None:
        raise ValueError(f"give minutes or steps, not both: got {minutes} and {steps}")
    validation_fraction = checked(
        Annotated[float, Range("(0, 1)")], validation_fraction, "validation_fraction"
    )
    given = {
        "data.validation_fraction": validation_fraction,
        **_given_settings(settings, architecture),
    }
    seed = 0 if key is None else int(jax.random.bits(typed_key(key), dtype="uint32"))
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

    starts = None
    if (
        config.objective == "density"
        and data.kinds
        and not data.contexts
        and not _FIXED & set(given)
    ):
        limit_s = 60 * config.training.minutes or math.inf
        starts = Starts(data, int(min(ROWS_A_SECOND * limit_s, MOST_ROWS)))
    elif (data.contexts or data.labels) and data.kinds and not _FIXED & set(given):
        data = with_likelier_columns(data)
    names = starts.names if starts else []
    to_train = [name for name in names if name != KERNELS][: 2 if steps is None else 1]
    table = candidates(config, data, given, to_train)
    # A number of steps means a single training.
    table = table if steps is None else table[:1]
    # With checkpoints, SIGTERM is handled, too.
    heard = SIGNALS if any(each.resumes for each in callbacks) else heard_in_memory()
    with StopRequests("training ends after this step", heard) as stop:
        if steps is None and table:
            model = best_of(table, config, data, given, say, began, stop, callbacks, starts)
        else:
            config = with_settings(config, {**(table[0].settings if table else {}), **given})
            lengths = {"steps": steps, "minutes": config.training.minutes or None}
            start = starts.fit(to_train[0]) if starts else None
            model = train_candidate(config, data, say, stop, callbacks, start, **lengths)
    if shortfall := hardly_trained(model.history):
        warnings.warn(shortfall, stacklevel=2)
    return model


def _given_settings(settings: Any, architecture: Any) -> dict[str, Any]:
    """Settings that the user has chosen, by name; a group is split into its fields."""
    settings = {} if settings is None else settings
    if not isinstance(settings, Mapping) or not all(isinstance(name, str) for name in settings):
        raise ValueError(
            f'settings must be a dictionary such as {{"optimizer.learning_rate": '
            f"1e-3}}, got {settings!r}"
        )
    fields: dict[str, Any] = {}
    for name, value in settings.items():
        if isinstance(value, Mapping):
            fields |= {f"{name}.{key}": each for key, each in value.items()}
        else:
            fields[name] = value
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
    stages = fields.pop("model.stages", architecture)
    for stage in stages or ():
        if isinstance(stage, StageSpec) and stage.branch is not None:
            raise ValueError(
                "fit takes branches by the name of their kind: call "
                f"kinds.register({stage.branch_name!r}, ...) of iresnet_jax.branches and give "
                f"StageSpec(kind={stage.branch_name!r}) in place of branch=..."
            )
    of_stages = {} if stages is None else {"model.stages": list(stages)}
    return {**of_stages, **fields}


def hardly_trained(history: History) -> str:
    """A sentence for a model whose training was ended by time too early; empty for others.

    Too early means fewer than `FEW_UPDATES` updates in its longest run, the best of them late, or a
    validation loss that
    fell by more than `STEEP`, in nats or bits/dim, over the last tenth of the updates.
    """
    if "time" not in history.ended or (history.attempts and not history.train):  # a start was kept
        return ""
    advice = "the model is hardly trained: give it more minutes or a smaller architecture"
    num_updates = max(
        [*history.train.get("step", []), *(attempt.num_steps for attempt in history.attempts)],
        default=0,
    )
    if num_updates < FEW_UPDATES and history.step > OVERFITTED * num_updates:
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
        is_cut_short: Whether the time limit for updates ended it, which makes its loss
            inconclusive.
        model: Its best model, certified, with its history.
    """

    attempt: Attempt
    is_cut_short: bool
    model: Any = None

    @classmethod
    def of(cls, what: str, model: Any, steps_s: float) -> "Run":
        """The run of a candidate from its model; ``steps_s`` limited the time of its updates."""
        history = model.history
        attempt = Attempt(what, history.loss, history.step, history.num_steps, history.seconds)
        is_over = history.ended == "time was over"
        return cls(attempt, is_over and history.seconds > 0.9 * steps_s, model)

    @property
    def losses(self) -> np.ndarray | None:
        """Losses of the model on the held-out examples; None if they are not known."""
        return None if self.model is None else self.model.history.losses


# By candidate and most updates (0 for no limit but time); None for a run that blew up.
Runs = Mapping[tuple[Candidate, int], Run | None]


def best_of(
    table: Sequence[Candidate],
    config: Config,
    data: DataSet,
    given: Mapping[str, Any],
    say: Say,
    began: float,
    stop: StopRequests,
    callbacks: Sequence[Callback] = (),
    starts: Starts | None = None,
) -> Any:
    """The best model of several candidates by successive halving, with all attempts in its history.

    The first round gives `STEPS_IN_ROUND` updates to each candidate, all of them at most a fifth of
    the time. Then the best candidate that learned goes on alone, as `next_run` decides: longer and
    from its start, as a learning rate has to fall to the end of a run, or with more noise. Each run
    also validates its start, which competes with its later states. Nothing starts that is not
    expected to end in time. The likeliest start stays, fitted to all rows, unless a trained model
    is clearly better on held-out ones.

    Args:
        table: The candidates; the first one is the likeliest, or the plain one without starts.
        config: Settings of all runs.
        data: The data.
        given: Settings that the user has given, which no candidate changes.
        say: Takes a line of progress.
        began: Start of the limited time, which includes the choice of starts.
        stop: Notes a signal.
        callbacks: Further callbacks of each training.
        starts: Starts that the candidates name.
    """
    limit_s = 60 * config.training.minutes
    longer = LONGER_GIVEN_CONTEXTS if data.contexts else LONGER
    runs: dict[tuple[Candidate, int], Run | None] = {}

    def left_s():
        return limit_s - (time.monotonic() - began)

    first = STEPS_IN_ROUND
    if left_s() < FEW_COMPILATIONS * COMPILING_S:
        table, first = table[:1], 0  # until time is over
    upcoming = [(each, first) for each in table]
    ended = "no time was left to train"
    while upcoming and (left_s() > COMPILING_S or not (starts or any(runs.values()))):
        # 1. Train the next one.
        candidate, num_steps = upcoming.pop(0)
        say(f"{candidate}: {f'up to {num_steps} steps' if num_steps else 'until time is over'}")
        steps_s = FIRST_SHARE / len(table) * limit_s if num_steps == STEPS_IN_ROUND else math.inf
        one_began = time.monotonic()
        try:
            model = train_candidate(
                with_settings(config, {**candidate.settings, **given}),
                data,
                say,
                stop,
                [each.of(f"{candidate} {num_steps}") for each in callbacks],
                starts.fit(candidate.start) if starts else None,
                steps=num_steps or None,
                minutes=max(left_s(), 1.0) / 60,
                steps_s=steps_s,
            )
        except BlowUpError as error:
            if not starts and not upcoming and not any(runs.values()):
                raise
            runs[candidate, num_steps] = None
            say(f"{candidate}: given up, {error}")
        else:
            runs[candidate, num_steps] = Run.of(str(candidate), model, steps_s)
            # Counts the time of this training from before it was resumed.
            began -= max(model.history.seconds - (time.monotonic() - one_began), 0.0)

        # 2. Choose what follows.
        ended = "time was over"
        if stop.received:
            ended, upcoming = STOPPED, []
        elif not upcoming and any(runs.values()):
            following = next_run(runs, table[0], left_s(), longer)
            ended, upcoming = (
                (following, []) if isinstance(following, str) else (ended, [following])
            )
    attempts = tuple(run.attempt for run in runs.values() if run is not None)
    if runs and not attempts:
        ended = "every training blew up"
        warnings.warn(f"{ended}: the model is its start", stacklevel=3)
    if starts:
        name, own = starts.names[0], starts.losses(config.training.eval_examples, config.seed)
        clear = 0.0 if name == KERNELS else CLEAR  # nothing is trained from a kernel density
        if not attempts or not is_clearly_better(_leader(runs)[1].losses, own, clear):
            loss = float(own.mean())
            say(f"the start was kept: {name}, validation {loss:.4f}; {ended}")
            attempts = (Attempt(name, loss, 0, 0, 0.0), *attempts)
            history = History({}, {}, 0, loss, own, attempts=attempts, ended=ended)
            model = starts.fit(name, with_validation=True).model(data)
            return finished(config, model).with_(history=history)
    best = _leader(runs)[1]
    among = f", the best of {len(attempts)} runs" if len(attempts) > 1 else ""
    say(
        f"{best.attempt.what}: validation {best.attempt.loss:.4f} at step "
        f"{best.attempt.best_step}{among}; {ended}"
    )
    model = best.model
    return model.with_(history=dataclasses.replace(model.history, attempts=attempts, ended=ended))


def next_run(
    runs: Runs, plain: Candidate, left_s: float, longer: int = LONGER
) -> tuple[Candidate, int] | str:
    """The next run, as a candidate and its most updates, or the reason why there is none.

    Args:
        runs: Runs so far, at least one with a model.
        plain: The candidate that trains for the remaining time if first runs were cut short, as a
            good start, such as a mixture, leads after few updates.
        left_s: Seconds that are left.
        longer: Factor on the updates of a run whose validation still improved at its end.
    """
    if (plain, 0) not in runs and any(
        run is not None and run.is_cut_short for run in runs.values()
    ):
        return plain, 0
    candidate, best = _leader(runs)
    # If training only made the best start worse, another candidate that still improves may overtake
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


def _leader(runs: Runs) -> tuple[Candidate, Run]:
    """The best candidate; among equals the last, which is milder."""
    done = [
        (candidate, run) for (candidate, _), run in reversed(list(runs.items())) if run is not None
    ]
    return min(done, key=lambda item: item[1].attempt.loss)


def train_candidate(
    config: Config,
    data: DataSet,
    say: Say,
    stop: StopRequests,
    callbacks: Sequence[Callback],
    start: Start | None = None,
    *,
    steps: int | None,
    minutes: float | None,
    steps_s: float = math.inf,
) -> Any:
    """One training, whose start competes with its later states.

    Args:
        config: All settings; the program is compiled for their length.
        data: The data.
        say: Takes a line of progress.
        stop: Notes a signal.
        callbacks: Further callbacks.
        start: Preprocessing and prior to begin with; by default those of the settings.
        steps: Most updates; None for no limit but time.
        minutes: Longest time.
        steps_s: Longest time of updates, compilation excluded.

    Raises:
        BlowUpError: If training blows up before it is better than its start.
    """
    began = time.monotonic()
    prepare_backend(config.training.matmul_precision)
    spec, prior = None, None
    if start is not None:
        flow = build_flow_spec(config.model, data.event_shape)
        spec, prior = start.spec(flow, data.columns), start.prior
    job = Job.of(config, data, spec)
    watching = [
        Validate(at_start=True, clear=CLEAR),
        TimeLimit(minutes, steps_s=steps_s, began=began),
        Stop(stop, raises=any(each.resumes for each in callbacks)),
        Progress(say),
        *callbacks,
    ]
    arguments = job.arguments | {"steps": steps, "minutes": minutes}
    with warnings.catch_warnings():
        # The history says so.
        warnings.filterwarnings("ignore", ".*The model is the best one of the validations")
        model = train(
            job.free(prior=prior), job.objective, job.examples, callbacks=watching, **arguments
        )
    return job.finish(model)
