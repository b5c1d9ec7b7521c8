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
from iresnet_jax.data.objectives import (
    classification_objective,
    density_objective,
    density_spec,
    fresh_model,
    unchanged,
)
from iresnet_jax.fit_settings import (
    STEPS_IN_ROUND,
    Candidate,
    Settings,
    candidates,
    checked_settings,
    choose_settings,
)
from iresnet_jax.maths.keys import typed_key
from iresnet_jax.maths.logdet_exact import ExactLogdet
from iresnet_jax.maths.logdet_series import RouletteLogdet
from iresnet_jax.maths.platforms import cache_programs, prepare_backend
from iresnet_jax.models.architecture import FlowSpec, StageSpec
from iresnet_jax.models.classifier import ClassifierSpec
from iresnet_jax.models.model import STOPPED, Attempt, History, How
from iresnet_jax.starts import (
    KERNELS,
    MOST_ROWS,
    WHITENED_DIMS,
    Start,
    Starts,
    with_likelier_columns,
)
from iresnet_jax.training.callbacks import (
    Callback,
    Lines,
    Progress,
    Stop,
    TimeLimit,
    Validate,
    is_clearly_better,
)
from iresnet_jax.training.objectives import HybridConfig
from iresnet_jax.training.optimizers import OptimizerConfig, make_optimizer, make_schedule
from iresnet_jax.training.run import LONGEST, VALIDATIONS, BlowUpError
from iresnet_jax.training.signals import SIGNALS, StopRequests, heard_in_memory
from iresnet_jax.training.train import STEPS, STEPS_IN_TIME, train

MINUTES = 3.0  # longest time by default
FIRST_SHARE = 0.2
COMPILING_S = 8.0  # seconds in which a training is compiled; with less left none starts
ROWS_A_SECOND = 200  # of the cross-validation of starts, by the time limit
FEW_COMPILATIONS = 6  # with less time than so many only the likeliest start is trained
VALIDATING, EVALUATED_AT_ONCE, INITIALISING = 4096, 256, 1024  # examples at most
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


class Shared(NamedTuple):
    """What all trainings of a call of `fit` have in common.

    Attributes:
        data: The data.
        seed: Source of randomness.
        planned: Updates that the user has asked for; None for a time, over which a schedule of
            `STEPS_IN_TIME` updates is stretched.
        say: Takes a line of progress.
        stop: Notes a signal.
        callbacks: Further callbacks.
    """

    data: DataSet
    seed: int
    planned: int | None
    say: Say
    stop: StopRequests
    callbacks: Sequence[Callback]

    def of(self, name: str) -> "Shared":
        """The same for one of several trainings."""
        return self._replace(callbacks=[each.of(name) for each in self.callbacks])


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
    callbacks: Sequence[Callback] = (),
    progress: bool = True,
    **settings: Any,
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
        minutes: Limit on the time, compilation included; 3 by default. A compilation, a step or a
            validation that has begun then still ends. Training ends earlier once validation no
            longer improves.
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
        callbacks: Objects that act between the steps of each training, see `Callback`. With
            ``Checkpoints(folder)`` the same call goes on after an interruption.
        progress: Whether lines of progress are written to stderr.
        settings: Others of `fit_settings.Settings`, which no candidate changes, such as
            ``learning_rate=1e-3``, ``coeff=.9`` or ``batch_size=256``.

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
    prepare_backend("float32")
    cache_programs()
    minutes = None if minutes is None else checked(Positive, minutes, "minutes")
    steps = None if steps is None else checked(Count, steps, "steps")
    if minutes is not None and steps is not None:
        raise ValueError(f"give minutes or steps, not both: got {minutes} and {steps}")
    validation_fraction = checked(
        Annotated[float, Range("(0, 1)")], validation_fraction, "validation_fraction"
    )
    given = checked_settings(settings)
    if architecture is not None:
        given["stages"] = tuple(architecture)
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
    chosen = choose_settings(data, objective).with_(**given)
    say = Lines() if progress else lambda line: None
    num, held_out = (len(data.examples[split]) for split in ("train", "validation"))
    say(
        f"fit: {num} examples of shape {data.event_shape} to train on, {held_out} to validate; "
        f"{chosen.objective}"
    )
    for note in data.notes:
        say(note)

    limit_s = math.inf if steps else 60 * (minutes or MINUTES)
    is_start_given = "prior" in given or "transform" in given
    starts = None
    if data.kinds and not is_start_given:
        if chosen.objective == "density" and not data.contexts:
            starts = Starts(data, int(min(ROWS_A_SECOND * limit_s, MOST_ROWS)))
        elif data.contexts or data.labels:
            data = with_likelier_columns(data)
    to_train = starts.to_train[: 2 if steps is None else 1] if starts else []
    table = candidates(chosen, data, given, to_train)
    # With checkpoints, SIGTERM is handled, too.
    heard = SIGNALS if any(each.resumes for each in callbacks) else heard_in_memory()
    with StopRequests("training ends after this step", heard) as stop:
        shared = Shared(data, seed, steps, say, stop, callbacks)
        if steps is None and table:
            model = best_of(shared, table, chosen, given, limit_s, began, starts)
        else:  # a number of steps means a single training
            own = chosen.with_(**{**table[0].settings, **given}) if table else chosen
            start = starts.fit(to_train[0]) if starts else None
            minutes = None if steps else limit_s / 60
            model = train_candidate(shared, own, start, steps=steps, minutes=minutes)
    if shortfall := hardly_trained(model.history):
        warnings.warn(shortfall, stacklevel=2)
    return model


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
        is_cut_short: Whether time ended it, which makes its loss inconclusive.
        model: Its best model, certified, with its history.
    """

    attempt: Attempt
    is_cut_short: bool
    model: Any = None

    @classmethod
    def of(cls, what: str, model: Any) -> "Run":
        """The run of a candidate from its model."""
        history = model.history
        attempt = Attempt(what, history.loss, history.step, history.num_steps, history.seconds)
        return cls(attempt, history.ended == "time was over", model)

    @property
    def losses(self) -> np.ndarray | None:
        """Losses of the model on the held-out examples; None if they are not known."""
        return None if self.model is None else self.model.history.losses


# By candidate and most updates (0 for no limit but time); None for a run that blew up.
Runs = Mapping[tuple[Candidate, int], Run | None]


def best_of(
    shared: Shared,
    table: Sequence[Candidate],
    settings: Settings,
    given: Mapping[str, Any],
    limit_s: float,
    began: float,
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
        shared: What is the same for all.
        table: The candidates, the likeliest first, and with starts the one to train for long last.
        settings: Settings of all runs.
        given: Settings that the user has given, which no candidate changes.
        limit_s: Limit of the time in seconds.
        began: Start of this time, which includes the choice of starts.
        starts: Starts that the candidates name.
    """
    data, say = shared.data, shared.say
    longer = LONGER_GIVEN_CONTEXTS if data.contexts else LONGER
    runs: dict[tuple[Candidate, int], Run | None] = {}
    own = starts.losses(VALIDATING, shared.seed) if starts else None

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
                shared.of(f"{candidate} {num_steps}"),
                settings.with_(**{**candidate.settings, **given}),
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
            runs[candidate, num_steps] = Run.of(str(candidate), model)
            # Counts the time of this training from before it was resumed.
            began -= max(model.history.seconds - (time.monotonic() - one_began), 0.0)

        # 2. Choose what follows.
        ended = "time was over"
        if shared.stop.received:
            ended, upcoming = STOPPED, []
        elif any(runs.values()) and (not upcoming or _were_cut_short(runs)):
            following = next_run(runs, table[-1] if starts else table[0], left_s(), longer)
            ended, upcoming = (
                (following, []) if isinstance(following, str) else (ended, [following])
            )
    attempts = tuple(run.attempt for run in runs.values() if run is not None)
    if runs and not attempts:
        ended = "every training blew up"
        warnings.warn(f"{ended}: the model is its start", stacklevel=3)
    if starts and own is not None:
        name = starts.names[0]
        clear = 0.0 if name == KERNELS else CLEAR  # nothing is trained from a kernel density
        if not attempts or not is_clearly_better(_leader(runs)[1].losses, own, clear):
            loss = float(own.mean())
            say(f"the start was kept: {name}, validation {loss:.4f}; {ended}")
            attempts = (Attempt(name, loss, 0, 0, 0.0), *attempts)
            history = History({}, {}, 0, loss, own, attempts=attempts, ended=ended)
            model = starts.fit(name, with_validation=True).model(data)
            return model.with_(history=history)
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
        plain: The candidate that trains for the remaining time if a first run was cut short, as a
            good start, such as a mixture, leads after few updates only.
        left_s: Seconds that are left.
        longer: Factor on the updates of a run whose validation still improved at its end.
    """
    if (plain, 0) not in runs and _were_cut_short(runs):
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


def _were_cut_short(runs: Runs) -> bool:
    """Whether time ended a run."""
    return any(run is not None and run.is_cut_short for run in runs.values())


def _leader(runs: Runs) -> tuple[Candidate, Run]:
    """The best candidate; among equals the last, which is milder."""
    done = [
        (candidate, run) for (candidate, _), run in reversed(list(runs.items())) if run is not None
    ]
    return min(done, key=lambda item: item[1].attempt.loss)


def train_candidate(
    shared: Shared,
    settings: Settings,
    start: Start | None = None,
    *,
    steps: int | None = None,
    minutes: float | None = None,
    steps_s: float = math.inf,
) -> Any:
    """One training, whose start competes with its later states.

    Args:
        shared: Data, callbacks, and what else all trainings have in common.
        settings: The settings.
        start: Preprocessing and prior to begin with; by default those of the settings.
        steps: Most updates; None for no limit but time.
        minutes: Longest time.
        steps_s: Longest time of updates, compilation excluded.

    Raises:
        BlowUpError: If training blows up before it is better than its start.
    """
    began, data, planned = time.monotonic(), shared.data, shared.planned
    length = planned or STEPS_IN_TIME
    spec, objective, examples = _training_of(shared, settings, start)
    free = fresh_model(
        data,
        spec,
        seed=shared.seed,
        num=min(INITIALISING, len(data.examples["train"])),
        transformations=settings.transformations,
        prior=None if start is None else start.prior,
        last_scale=settings.last_scale,
        sharpness=settings.sharpness,
    )
    is_classifier = isinstance(spec, ClassifierSpec)
    free = free.with_(how=How(None if is_classifier else settings.logdet.build()))
    optimizer = OptimizerConfig(
        "muon",
        settings.learning_rate,
        warmup_steps=length // 20,
        momentum=0.95,
        nesterov=True,
        weight_decay=settings.weight_decay,
    )
    watching = [
        Validate(at_start=True, clear=CLEAR),
        TimeLimit(minutes, steps_s=steps_s, began=began),
        Stop(shared.stop, raises=any(each.resumes for each in shared.callbacks)),
        Progress(shared.say),
        *shared.callbacks,
    ]
    with warnings.catch_warnings():
        # The history says so.
        warnings.filterwarnings("ignore", ".*The model is the best one of the validations")
        model = train(
            free,
            objective,
            examples,
            key=shared.seed,
            steps=steps,
            minutes=minutes,
            batch_size=settings.batch_size,
            optimizer=make_optimizer(optimizer),
            schedule=make_schedule(optimizer, length),
            schedule_steps=length,
            # The average covers a tenth of a short run, and at most some hundred steps.
            ema_decay=0.99 if (planned or LONGEST) >= STEPS else 0.9,
            patience=settings.patience,
            every=max((planned or LONGEST) // VALIDATIONS, 1),
            log_every=10,
            callbacks=watching,
        )
    if not is_classifier:
        model = model.with_(estimator=ExactLogdet())
    changes = settings.transformations
    return model.given(unchanged(changes)) if changes else model


def _training_of(shared: Shared, settings: Settings, start: Start | None) -> tuple[Any, ...]:
    """A spec, its objective, and the examples that batches are taken from."""
    data = shared.data
    flow = FlowSpec(tuple(data.event_shape), settings.stages, settings.coeff)
    examples = data.examples["train"]
    common: Any = {"num": VALIDATING, "batch_size": EVALUATED_AT_ONCE}
    if settings.objective == "classification":
        height, width, channels = data.event_shape
        image_shape = height, width, channels
        spec = ClassifierSpec(flow, image_shape, data.num_classes or 0, data.num_levels or 0)
        objective = classification_objective(
            data, label_smoothing=settings.label_smoothing, **common
        )
        return spec, objective, (examples, data.labels["train"])
    is_hybrid = settings.objective == "hybrid"
    if start is not None:
        spec = start.spec(flow, data.columns)
    else:
        spec = density_spec(
            data,
            flow,
            prior=settings.prior,
            num_components=settings.num_components,
            transform=settings.transform,
            context_hidden=settings.context_hidden,
            transformations=settings.transformations,
            has_classes=is_hybrid,
        )
    is_exact = len(data.event_shape) == 1 and data.event_shape[0] <= WHITENED_DIMS
    objective = density_objective(
        data,
        spec,
        logdet=settings.logdet,
        estimator=ExactLogdet() if is_exact else RouletteLogdet(num_exact_terms=20),
        seed=shared.seed,
        noise=settings.noise,
        transformations=settings.transformations,
        hybrid=HybridConfig(settings.likelihood_weight) if is_hybrid else None,
        label_smoothing=settings.label_smoothing,
        **common,
    )
    given = data.labels["train"] if is_hybrid else data.contexts.get("train")
    return spec, objective, (examples, given)
