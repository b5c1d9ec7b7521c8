"""A run in its folder: what is written when training starts, and what is read after it.

``config.json`` holds the settings; ``model.json`` the architecture, grey levels, histogram and
classes, and the fingerprint of the data they came from. A resume reads the model from there and
computes nothing from data files again.

After training, the parameters are the moving average of the checkpoint that was best on validation,
and the weights are frozen: scaled by guaranteed bounds of their norms, so that every block is a
certified contraction, however it was trained (`contractions.freeze`).
"""

import contextlib
import functools
import json
import math
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from iresnet_jax.data.dataset import Arrays, DataSet
from iresnet_jax.data.objectives import unchanged
from iresnet_jax.maths.logdet_exact import ExactLogdet
from iresnet_jax.maths.platforms import prepare_backend
from iresnet_jax.models import saved
from iresnet_jax.models.classifier import Classifier, ClassifierSpec
from iresnet_jax.models.columns import listed
from iresnet_jax.models.density import Density
from iresnet_jax.models.density_spec import DensitySpec
from iresnet_jax.models.free import abstract
from iresnet_jax.models.model import FILE_NAME
from iresnet_jax.models.saved import Spec, spec_of
from iresnet_jax.pytrees import first_difference, tagged
from iresnet_jax.runs.config import Config, parse, to_plain
from iresnet_jax.storage import path_of, replacing
from iresnet_jax.training.checkpoints import Store, alone
from iresnet_jax.training.optimizers import make_optimizer
from iresnet_jax.training.step import abstract_state

FORMAT = 1  # version of the files
CONFIG_FILE, MODEL_FILE = "config.json", "model.json"
# Settings that change how a step is computed, not its result: a run may go on with other values,
# for example on other devices.
WAYS_TO_COMPUTE = ("num_parts", "rematerialize", "blocks")


# --- while it trains ------------------------------------------------------------------------------


def read_model(folder: Path) -> tuple[Spec, str]:
    """The model of a run without its weights, and the fingerprint of its data."""
    return _read(
        folder / MODEL_FILE,
        lambda plain: (spec_of(plain["model"]), str(plain["data"]["fingerprint"])),
    )


def begun(folder: Path, config: Config, data: DataSet) -> Spec | None:
    """The model of the run that has begun in this folder, or None; raises ``ValueError`` if it is
    one with another config, naming the first difference that matters, or on other data.
    """
    if not (folder / CONFIG_FILE).exists():
        return None
    theirs = read_config(folder)
    ways = {name: getattr(theirs.training, name) for name in WAYS_TO_COMPUTE}
    ours = replace(config, training=replace(config.training, **ways))
    if difference := first_difference(to_plain(ours), to_plain(theirs), "config"):
        raise ValueError(
            f"{folder} holds a run with another config: {difference}; to go on from its weights "
            f"with other settings or for longer, give another --workdir and "
            f"--config.training.initial_model={folder}"
        )
    spec, fingerprint = read_model(folder)
    if fingerprint != data.fingerprint:
        raise ValueError(
            f"{folder} was trained on other data: {data.name} has the fingerprint "
            f"{data.fingerprint[:12]} now and had {fingerprint[:12]} when training began; bring "
            "those data back, or choose another --workdir"
        )
    return spec


@contextlib.contextmanager
def claimed(
    folder: Path, config: Config, spec: Spec, data: DataSet
) -> Iterator[Callable[[], None]]:
    """`checkpoints.alone` in the folder, which holds settings and model."""
    with alone(folder) as check:
        if begun(folder, config, data) is None:  # it may have begun since the last check
            about = {"name": data.name, "fingerprint": data.fingerprint}
            model = {"model": tagged(spec), "data": about}
            # The model is written first: only a folder with a config holds a run, and a model
            # without a config is the rest of a failed start.
            for name, plain in ((MODEL_FILE, model), (CONFIG_FILE, to_plain(config))):
                with replacing(folder / name) as incoming:
                    text = json.dumps({"format": FORMAT, **plain}, indent=2) + "\n"
                    incoming.write_text(text, encoding="utf-8")
        yield check


def _read(path: Path, understand: Callable[[dict[str, Any]], Any]) -> Any:
    """``understand`` of the JSON object in a file of the present version."""
    try:
        plain = json.loads(path.read_text(encoding="utf-8"))
        reason = f"its format is {plain.get('format')}, not {FORMAT}"
        if plain.pop("format", None) == FORMAT:
            return understand(plain)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        reason = str(error)
    raise ValueError(
        f"{path} is damaged or was written by another version ({reason}): restore it, or choose "
        "another --workdir"
    )


# --- after training -------------------------------------------------------------------------------


def finished(config: Config, model: Any) -> Any:
    """The kept form of a trained model, which takes no transformations as contexts."""
    changes = config.augmentation.transformations
    model = model.with_(solver=config.evaluation.solver())
    if not isinstance(model.spec, ClassifierSpec):
        model = model.with_(estimator=ExactLogdet())
    return model.given(unchanged(changes)) if changes else model


@dataclass(frozen=True)
class Run:
    """A trained model with its settings and data.

    Attributes:
        folder: Folder of the run, or of the model.
        model: The model, with frozen weights.
        config: Settings that it was trained with.
        fingerprint: Fingerprint of the data that it was trained on; empty for a converted model.
        step: Number of updates that led to the parameters.
        notes: Sentences that a reader of any result must know, such as a replaced checkpoint.
    """

    folder: Path
    model: Density | Classifier
    config: Config
    fingerprint: str
    step: int
    notes: tuple[str, ...] = ()

    @functools.cached_property
    def data(self) -> DataSet:
        """The data that the settings name, in their present state; samples and certificates need no
        data.
        """
        spec = self.model.spec
        is_context = isinstance(spec, DensitySpec) and self.config.data.condition_on_labels
        return self.config.data.load(spec.context_dim if is_context else spec.num_classes)

    def with_data(self, name: str) -> "Run":
        """The same run on other data, by a name that `iresnet_jax.data.load` knows."""
        return replace(self, config=replace(self.config, data=replace(self.config.data, name=name)))

    def test_data(self, num: int | None = None) -> Arrays:
        """The first test examples, all by default; those of a toy are new, as many as the
        settings ask for.
        """
        most = self.config.evaluation.num_examples if self.data.is_endless else None
        return self.data.held_out("test", most, self.config.seed).take(slice(num))

    def with_data_checked(self) -> "Run":
        """The same run, with a note if its data have changed since training."""
        if misfit := self._misfit():
            raise ValueError(f"{misfit}: bring its data back, or give others as --data")
        found = self.data
        if found.fingerprint == self.fingerprint:
            return self
        if isinstance(self.model, Density) and "test" in found.examples:
            self.model.spec.checked(found.examples["test"])
        note = f"The model says nothing of its training data; these are {found.name}."
        if self.fingerprint:
            note = (
                "These are other data than the model was trained on, or other parts of them: "
                f"{found.name} has the fingerprint {found.fingerprint[:12]} now and had "
                f"{self.fingerprint[:12]} then. Give examples that training has not seen."
            )
        noted = replace(self, notes=(*self.notes, note))
        vars(noted)["data"] = found  # they have been read
        return noted

    def _misfit(self) -> str:
        """Why the model would mistake columns or classes of its data; empty if it would not."""
        spec, found = self.model.spec, self.data
        ours: Any = getattr(spec, "columns", None) or ()
        theirs: Any = found.columns or ()
        names, given = ([column.name for column in each] for each in (ours, theirs))
        if ours and theirs and names != given:
            return (
                f"the model takes columns {listed(names)}, in this order, and {found.name} has "
                f"{listed(given)}"
            )
        for column, own in zip(ours, theirs, strict=False):
            known = column.categories or ()
            codes = [each for each in known if not isinstance(each, str)]
            if own.categories is None and codes != list(range(len(codes))):
                return (
                    f"the model takes column {column.name} as places among {known}, from 0, and "
                    f"{found.name} has numbers"
                )
        # Folders of classes are numbered in order: if one is missing, later classes have other
        # numbers.
        num, taken = found.num_classes, spec.num_classes
        is_folder = found.name.startswith("folder:")
        if taken is None or num == taken or (num is not None and num < taken and not is_folder):
            return ""
        return f"the model has {taken} classes, and {found.name} has {num} now"


def load(folder: str | os.PathLike[str]) -> Run:
    """Loads the best checkpoint of a run, or the latest, with a note in `Run.notes`, if there is no
    best.

    A folder with ``model.npz`` and no checkpoints works, too. On an accelerator this also sets the
    precision of matrix products in this process, see `platforms.prepare_backend`.

    Args:
        folder: Folder of the run, filled by `job.train`, or of a model.

    Raises:
        OSError: If a file is missing.
        ValueError: If a file is damaged or from another version.
        RuntimeError: If there is no checkpoint yet, or none that can be read.

    Example:
        >>> run = load("runs/digits_density")  # doctest: +SKIP
        >>> samples, info = run.model.sample(jax.random.key(0), 64)  # doctest: +SKIP
    """
    folder, config = path_of(folder), read_config(folder)
    prepare_backend(config.training.matmul_precision)
    if _is_model_alone(folder):
        model, about = saved.read(folder / FILE_NAME)
        model = model.with_(solver=config.evaluation.solver())
        return Run(folder, model, config, about["fingerprint"], about["step"])
    spec, fingerprint = read_model(folder)
    state = abstract_state(spec, make_optimizer(config.optimizer))
    best = Store(folder).restore(state, best=True)
    if best is None:
        raise RuntimeError(
            f"{folder} has no checkpoints: its training has not reached the first validation, or "
            "they were removed"
        )
    notes = best.notes
    if math.isnan(best.metric):
        notes = (
            *notes,
            f"These are the parameters of step {best.step}: there is no checkpoint "
            "chosen on validation.",
        )
    model = finished(config, abstract(spec).certified(best.state.ema, best.state.batch_stats))
    return Run(folder, model, config, fingerprint, best.step, notes)


def read_config(folder: str | os.PathLike[str]) -> Config:
    """Reads the settings of a folder, with the errors of `load`; no device starts."""
    path = path_of(folder) / FILE_NAME
    if not _is_model_alone(path.parent):
        return _read(path.with_name(CONFIG_FILE), parse)
    try:
        return parse(saved.read_about(path)["config"])
    except KeyError:
        raise ValueError(
            f"{path} says nothing of a training: iresnet_jax.load reads the model alone"
        ) from None


def _is_model_alone(folder: Path) -> bool:
    return (folder / FILE_NAME).exists() and not (folder / "checkpoints").exists()


def save(run: Run, path: str | os.PathLike[str] | None = None) -> Path:
    """Writes the model of a run to one file, with the settings and the data that it was trained
    with.

    Args:
        path: File to write; by default ``model.npz`` in the folder of the run.
    """
    about = {
        "format": FORMAT,
        "config": to_plain(run.config),
        "fingerprint": run.fingerprint,
        "step": run.step,
    }
    return run.model.save(run.folder / FILE_NAME if path is None else path, about)
