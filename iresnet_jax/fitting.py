"""`fit`: a model of an array, with settings chosen from the array and the machine; the same code as ``train.py``."""

import concurrent.futures
import dataclasses
import math
import os
import signal
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax

from iresnet_jax.data.arrays import data_of
from iresnet_jax.data.batches import device_batches
from iresnet_jax.data.dataset import DataSet
from iresnet_jax.fit_arguments import checked_options, seed_of
from iresnet_jax.fit_settings import (
    FIRST_SHARE,
    FIRST_STEPS,
    Candidate,
    candidates,
    choose_settings,
    length,
    plain_candidate,
    with_settings,
)
from iresnet_jax.models.architecture import StageSpec
from iresnet_jax.models.history import Attempt, History
from iresnet_jax.runs import run_folder, trained_run
from iresnet_jax.runs.allocator import num_cores
from iresnet_jax.runs.config import Config
from iresnet_jax.runs.loop import check_batch_size, train
from iresnet_jax.runs.machine import cache_programs, ignore_missing_tpu, prepare_backend, start_backend
from iresnet_jax.runs.metrics import Lines, read_metrics
from iresnet_jax.runs.model_from_config import identity_context, model_spec
from iresnet_jax.runs.objective_from_config import build_objective
from iresnet_jax.runs.signals import Stopped, StopRequests, heard_in_memory, is_interactive
from iresnet_jax.training import parallel
from iresnet_jax.training.constraint import certified_model
from iresnet_jax.training.trainer import LONGEST, Best, BlowUpError, Trainer, TrainingConfig

WORTHWHILE = 1.5  # times the time of the last run, which a longer one must have
IMPROVING = 0.8  # share of its steps at which a run is best, above which a longer one is worthwhile
OVERFITTED = 0.5  # share below which a milder candidate is

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
    """Trains a model of an array: the density of ``x``, the classes of ``x``, or the density of ``x`` given a context.

    Settings are chosen from the shape, the number and the kind of the examples. The loop is that of ``train.py``: a tenth of
    the examples validate, the parameters are averaged, training ends early once validation no longer improves, and the model is
    the best one on validation, certified. Floats are continuous; integer images are levels; integers, booleans and categories
    among the columns of vectors, and floats on a grid, are dequantised within the range that was seen. Models of vectors are
    the best of several candidates: priors before training, which may be a mixture fitted to the data, sizes, noise on the
    examples, and lengths of the run.
    Needs ``pip install 'iresnet_jax[train]'``.

    In a notebook and at Python's prompt, Ctrl-C ends training and gives the best model so far; a second one raises
    ``KeyboardInterrupt``. In a script the first one does. SIGTERM ends the process as without training. With ``workdir``, both
    save the step first, and the same call resumes from it.

    Args:
        x: Vectors ``(n, d)``, images ``(n, h, w, c)``, or a pandas data frame of numbers, booleans and categories.
        labels: Classes, integers from 0 on, one per example.
        context: Context vectors ``(n, k)``: the model is then ``p(x | context)``.
        key: Source of all randomness; that of seed 0 by default. Several models take a loop over keys.
        minutes: Longest time for training, compilation included; 3 by default. Training ends earlier once validation no longer
            improves.
        steps: Number of updates instead of a time, in one run that can be repeated, to the last bit on one machine.
        objective: "density", "classification" or "hybrid" (both in one); by default "density" without labels, and with labels
            "classification" of images and "hybrid" of vectors.
        architecture: Stages of the flow.
        validation_fraction: Share of the examples that validates.
        validation: Examples that validate instead of a share of ``x``: an array like ``x``, or with labels or contexts
            ``(x, labels, context)``. At most 4096 of them count.
        bounds: Ends ``(low, high)`` of columns by name or number, for a density of vectors: samples stay between them. Other
            continuous columns are unbounded. Discrete columns keep to the range that was seen, or to a wider one given here.
        settings: Other settings of a config file by their names, such as ``{"optimizer.learning_rate": 1e-3}``.
        workdir: Folder for checkpoints and metrics, from which the same call resumes after an interruption; by default the
            model is trained in memory.
        progress: Whether lines of progress are written to stderr.

    Returns:
        The model, with what training saw in its ``history``: the curves of the best run, all attempts, and why they ended.

    Raises:
        ValueError: If arrays or settings do not fit together, or an entry of ``x`` has no density; the message names it.
        RuntimeError: If training blows up, that of every candidate.

    Example:
        >>> model = fit(x, minutes=3)  # doctest: +SKIP
        >>> samples, info = model.sample(jax.random.key(1), 16)  # doctest: +SKIP
    """
    began = time.monotonic()
    ignore_missing_tpu()
    start_backend()
    cache_programs()
    options = checked_options(
        objective=objective,
        minutes=minutes,
        steps=steps,
        architecture=architecture,
        validation_fraction=validation_fraction,
        settings=settings,
        workdir=workdir,
    )
    fraction, stages = options["validation_fraction"], options["architecture"]
    data = data_of(
        x,
        labels,
        context,
        validation=validation,
        validation_fraction=fraction,
        bounds=bounds,
        is_density=labels is None or objective == "density",
    )
    if of_data := [name for name in options["settings"] if name.startswith("data.")]:
        raise ValueError(f"{of_data[0]} is no setting of fit, which is given its data: use its arguments")
    given = {"data.validation_fraction": fraction, **options["settings"]}
    if "training.total_steps" in given:
        raise ValueError("the number of updates is no setting of fit, as other settings follow from it: give it as steps=...")
    if stages is not None:
        given = {"model.stages": [dataclasses.asdict(stage) for stage in stages], **given}
    chosen = {name: options[name] for name in ("objective", "minutes", "steps")}
    config = with_settings(choose_settings(data, **chosen, seed=seed_of(key)), given)
    say = Lines() if progress else lambda line: None
    num, held_out = (len(data.examples[split]) for split in ("train", "validation"))
    say(f"fit: {num} examples of shape {data.event_shape} to train on, {held_out} to validate; {config.objective}")
    for note in data.notes:
        say(note)
    is_race = workdir is None and steps is None
    if is_race and (contenders := candidates(config, data, given)):
        with _stop_requests() as stop:
            return _Race(config, data, given, say, stop, began).best(contenders)
    # A folder is of one run, and so many steps are those of one, whose programs do not depend on the data's modes.
    plain = plain_candidate(config, data, given)
    config = with_settings(config, {**(plain.settings if plain else {}), **given})
    if not (config.training.minutes or config.training.total_steps):
        raise ValueError("a fit that is no race needs an end: give minutes=... or steps=...")
    if workdir is not None:
        return _fit_on_disk(config, data, Path(workdir).expanduser(), say)
    with _stop_requests() as stop:
        return _fit_in_memory(config, data, say, stop).model()


def _stop_requests() -> StopRequests:
    return StopRequests("training ends after this step", heard_in_memory())


class Outcome(NamedTuple):
    """What a run leaves: how it went, and its model, certified when it is asked for."""

    attempt: Attempt
    model: Callable[[], Any]


class _Race:
    """Short runs of candidates, then longer ones of the best of them for as long as validation improves and time is left.

    Where there is no time for first runs of `FIRST_STEPS` updates, the last candidate has what they leave.

    Args:
        config: Settings of all runs.
        data: The data.
        given: Settings that the user has given, which no candidate changes.
        say: Takes a line of progress.
        stop: Notes a signal, at which the race ends.
        began: When the time started that is limited: mixtures of many columns take long to fit.
    """

    def __init__(
        self,
        config: Config,
        data: DataSet,
        given: Mapping[str, Any],
        say: Say,
        stop: StopRequests,
        began: float,
    ):
        self._config, self._data, self._given, self._say, self._stop = config, data, given, say, stop
        self._began, self._limit_s = began, 60 * config.training.minutes or math.inf
        self._runs: list[tuple[Candidate, Outcome]] = []
        self._tried: set[tuple[Candidate, int]] = set()  # with the updates that they were allowed
        self._blow_up: BlowUpError | None = None  # of the last run that failed
        self._is_cut_short = False  # whether time ended a first run, which then says little
        self._is_over = False  # which ends all runs that are still trained
        self._ahead: dict[Candidate, concurrent.futures.Future[Outcome]] = {}  # the run that was started before its turn

    def best(self, contenders: Sequence[Candidate]) -> Any:
        """The model that is best on validation, with all attempts in its history."""
        # One after the other on several devices, where programs that are run at once may wait for each other for ever.
        at_once = min(num_cores(), len(contenders)) if jax.device_count() == 1 else 1
        with concurrent.futures.ThreadPoolExecutor(at_once) as pool:
            try:
                ended = self._run_all(contenders, pool if at_once > 1 else None)
            finally:
                self._is_over = True
                pool.shutdown(wait=False, cancel_futures=True)
        leader = self._leader[1]
        best, attempts = leader.attempt, tuple(trained.attempt for _, trained in self._runs)
        among = f", the best of {len(attempts)} runs" if len(attempts) > 1 else ""
        self._say(f"{best.what}: validation {best.loss:.4f} at step {best.best_step}{among}; {ended}")
        model = leader.model()
        return model.with_(history=dataclasses.replace(model.history, attempts=attempts, ended=ended))

    def _run_all(self, contenders: Sequence[Candidate], pool: concurrent.futures.Executor | None) -> str:
        """All runs, the first ones at once where there is a pool of threads; why they ended."""
        if pool is None:
            for candidate in contenders:
                self._run(candidate, FIRST_STEPS)
        else:
            self._run_first(contenders, pool)
        if self._is_cut_short:  # a good start is ahead after few updates: the plain one has to learn for longer
            self._run(contenders[-1], LONGEST)
        if not self._runs and self._blow_up is not None:
            raise self._blow_up
        while True:
            candidate, best = self._leader[0], self._leader[1].attempt
            more, is_improving = self._longer(candidate, best), best.best_step > IMPROVING * best.num_steps
            if self._stop.received or not self._is_time_left:
                return "it was stopped" if self._stop.received else "time was over"
            if is_improving and more is None:
                return "too little time was left for a longer run"
            if is_improving and more and (candidate, more) not in self._tried:
                self._run(candidate, more)
            elif milder := self._milder(candidate, best):
                self._run(milder, FIRST_STEPS)
            else:
                return "validation no longer improved"

    @property
    def _leader(self) -> tuple[Candidate, Outcome]:
        return min(self._runs, key=lambda run: run[1].attempt.loss)

    @property
    def _left_s(self) -> float:
        return self._limit_s - (time.monotonic() - self._began)

    @property
    def _is_time_left(self) -> bool:
        return time.monotonic() - self._began < 0.9 * self._limit_s

    def _longer(self, candidate: Candidate, last: Attempt) -> int | None:
        """Updates of a longer run of a candidate, or as many as there is time for; None if there is too little."""
        if self._left_s < WORTHWHILE * last.seconds:
            return None
        is_last = self._left_s < candidate.longer * (1 + WORTHWHILE) * last.seconds
        return LONGEST if is_last else candidate.longer * last.num_steps

    def _milder(self, candidate: Candidate, last: Attempt) -> Candidate | None:
        """The candidate to try next where one that overfits leads; None if it does not overfit, or there is no other."""
        if last.best_step >= OVERFITTED * last.num_steps:
            return None
        return next((milder for milder in candidate.milder() if (milder, FIRST_STEPS) not in self._tried), None)

    def _run_first(self, contenders: Sequence[Candidate], pool: concurrent.futures.Executor) -> None:
        """The first runs, as many at once as there are threads: the steps of each keep no more than one core busy.

        Once one has ended, the run that would follow it, were it to lead, starts on the free core, if its program is compiled.
        It counts only if that one does lead.
        """

        def first(candidate):
            return candidate, self._run(candidate, FIRST_STEPS, f"{candidate}: ")

        def ahead(milder, leader):
            return self._train(milder, FIRST_STEPS, f"{milder}: ", lambda: not self._is_next(leader))

        runs = [pool.submit(parallel.in_this_precision(first), candidate) for candidate in contenders]
        followed = None
        for done in concurrent.futures.as_completed(runs):
            candidate, last = done.result()
            if followed is None and not all(run.done() for run in runs) and last and self._is_next(candidate):
                milder = self._milder(candidate, last)
                if milder and milder.program == candidate.program:
                    followed, self._ahead[milder] = candidate, pool.submit(parallel.in_this_precision(ahead), milder, candidate)
        self._runs.sort(key=lambda trained: contenders.index(trained[0]))
        if followed and not self._is_next(followed):
            self._say(f"{self._ahead.popitem()[0]}: ended, as it is not the next run")

    def _is_next(self, leader: Candidate) -> bool:
        """Whether this candidate leads, and what follows it is the next run."""
        return self._leader[0] == leader and not self._is_cut_short and not self._stop.received

    def _run(self, candidate: Candidate, num_steps: int, prefix: str = "") -> Attempt | None:
        """Trains a candidate, unless there is a model and time is over or a signal was received; one may blow up alone."""
        if self._is_over or (self._runs and (self._stop.received or not self._is_time_left)):
            return None
        ahead = self._ahead.pop(candidate, None)
        try:
            trained = self._train(candidate, num_steps, prefix) if ahead is None else ahead.result()
        except BlowUpError as error:
            self._blow_up = error
            self._say(f"{candidate}: given up, {error}")
            return None
        except BaseException:
            self._is_over = True
            raise
        finally:
            self._tried.add((candidate, num_steps))
        self._runs.append((candidate, trained))
        if trained.attempt.num_steps < num_steps and trained.attempt.seconds > 0.9 * self._most_seconds(num_steps):
            self._is_cut_short = True
        return trained.attempt

    def _most_seconds(self, num_steps: int) -> float:
        """Longest time of a run's updates."""
        return FIRST_SHARE * self._limit_s if num_steps == FIRST_STEPS else math.inf

    def _train(
        self, candidate: Candidate, num_steps: int, prefix: str, is_given_up: Callable[[], bool] = lambda: False
    ) -> Outcome:
        """A run. A prefix of its lines tells it from those that are trained beside it."""
        compiled = {tried.program for tried, _ in tuple(self._tried)}
        length_of_run = f"up to {num_steps} steps" if num_steps < LONGEST else "until time is over"
        self._say(f"{candidate}: {'' if candidate.program in compiled else 'compiling, then '}{length_of_run}")
        return _fit_in_memory(
            self._config_of(candidate, num_steps),
            self._data,
            lambda line: self._say(prefix + line),
            self._stop,
            str(candidate),
            self._most_seconds(num_steps),
            lambda: self._is_over or is_given_up(),
        )

    def _config_of(self, candidate: Candidate, num_steps: int) -> Config:
        limit = {"training.minutes": max(self._left_s, 1.0) / 60 if math.isfinite(self._limit_s) else 0.0}
        return with_settings(self._config, {**candidate.settings, **length(num_steps), **self._given, **limit})


def _fit_in_memory(
    config: Config,
    data: DataSet,
    say: Say,
    stop: StopRequests,
    what: str = "",
    seconds: float = math.inf,
    is_given_up: Callable[[], bool] = lambda: False,
) -> Outcome:
    """One training run in memory, which ends once a signal is noted or it is given up.

    A run may be limited to some seconds of updates, whatever compiling takes.
    """
    prepare_backend(config.training.matmul_precision)
    check_batch_size(config.training, data)
    spec = model_spec(config, data)
    objective = build_objective(config, data, spec)
    found: list[Best] = []

    def keep(loss: float | None) -> None:
        if loss is not None and (not found or loss < found[-1].loss):
            found.append(Best.of(trainer.state, loss))

    trainer = Trainer(objective, config.training, seconds_of_steps=seconds, validated=keep, say=say)
    trainer.validate()  # the start may be the best: a mixture is fitted before training
    batches = device_batches(objective.examples, seed=config.seed, batch_size=config.training.batch_size)
    try:
        for _ in trainer.steps(batches):
            if stop.received is not None or is_given_up():
                break
    except BlowUpError as error:
        if what or not found[-1].step:  # other candidates may do better, or there is nothing to keep
            raise
        say(f"{error}: the best model so far")
    if stop.received:
        say(f"stopped by {stop.received.name} after step {trainer.step} of {trainer.horizon}: the best model so far")
    seconds = trainer.elapsed_s - sum(record.get("compile_seconds", 0.0) for record in trainer.records)
    best, records = found[-1], trainer.records

    def model() -> Any:
        params, batch_stats = jax.device_put((best.ema, best.batch_stats))
        certified = certified_model(spec, params, batch_stats, config.evaluation.solver(), given=identity_context(config))
        return certified.with_(history=History.from_records(records, best.step))

    return Outcome(Attempt(what, best.loss, best.step, trainer.step, seconds), model)


def _fit_on_disk(config: Config, data: DataSet, folder: Path, say: Say) -> Any:
    """The best model of a run in a folder, with its history."""
    if (folder / run_folder.CONFIG_FILE).exists():
        # The length first: other settings, such as the warm-up, follow from it.
        ours, theirs = (_length(each.training) for each in (config, run_folder.read_config(folder)))
        if ours != theirs:
            raise ValueError(f"{folder} holds a fit with {theirs}, got {ours}: give the same, or another workdir")
    try:
        train(config, folder, data=data, say=say)
    except Stopped as error:
        if error.received == signal.SIGTERM:
            signal.raise_signal(signal.SIGTERM)  # ends the process, unless its owner handles it
        if error.received == signal.SIGTERM or not is_interactive():
            raise
        say(f"{str(error).split(':')[0]}: the best model so far")
    run = trained_run.load(folder)
    return run.model.with_(history=History.from_records(read_metrics(folder), run.step))


def _length(settings: TrainingConfig) -> str:
    """The argument of `fit` that says when training ends."""
    return f"minutes={settings.minutes:g}" if settings.minutes else f"steps={settings.total_steps}"
