"""A run after training: its model, its settings and its data, from the folder of a run or of a
model alone.

The parameters are the moving average of the checkpoint that was best on validation, and the weights
are frozen: scaled by guaranteed bounds of their norms, so that every block is a certified
contraction, however it was trained (`contractions.freeze`).
"""

import functools
import math
import operator
import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from iresnet_jax.atomic_files import path_of
from iresnet_jax.data.arrays import FITTED_ARRAY
from iresnet_jax.data.dataset import DataSet
from iresnet_jax.maths.machine import prepare_backend
from iresnet_jax.models import preprocessing, saved
from iresnet_jax.models.classifier import Classifier, ClassifierSpec
from iresnet_jax.models.columns import listed
from iresnet_jax.models.density import Density
from iresnet_jax.models.density_spec import DensitySpec
from iresnet_jax.models.initial import abstract
from iresnet_jax.models.model import FILE_NAME
from iresnet_jax.runs import run_folder
from iresnet_jax.runs.config import Config, parse, to_plain
from iresnet_jax.runs.job import finished
from iresnet_jax.runs.model_from_config import load_data
from iresnet_jax.training.checkpoints import Store
from iresnet_jax.training.optimizers import make_optimizer
from iresnet_jax.training.step import abstract_state


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
        if self.config.data.name == FITTED_ARRAY:
            raise ValueError(
                f"{self.folder} does not hold the array that its model was fitted to: save the "
                "array with numpy.save and add --data npy:FILE"
            )
        return load_data(self.config.data, self._num_classes)

    def with_data(self, name: str) -> "Run":
        """The same run on other data, by a name that `iresnet_jax.data.load` knows."""
        return replace(self, config=replace(self.config, data=replace(self.config.data, name=name)))

    def test_examples(self) -> np.ndarray:
        """All test examples; for a toy, as many new examples as the settings ask for."""
        return self.data.held_out("test", self._num_test, self.config.seed)

    def test_contexts(self) -> np.ndarray | None:
        """The contexts of `test_examples`; None if the model takes none."""
        return self.data.held_out_contexts("test", self._num_test)

    @property
    def _num_classes(self) -> int | None:
        spec = self.model.spec
        if isinstance(spec, DensitySpec) and self.config.data.condition_on_labels:
            return spec.context_dim
        return spec.num_classes

    @property
    def _num_test(self) -> int | None:
        return self.config.evaluation.num_examples if self.data.is_endless else None

    def with_data_checked(self) -> "Run":
        """The same run, with a note if its data have changed since training."""
        spec, found = self.model.spec, self.data
        names, given = (
            [column.name for column in getattr(each, "columns", None) or ()]
            for each in (spec, found)
        )
        if names and given and names != given:
            raise ValueError(
                f"the model takes columns {listed(names)}, in this order, and {found.name} has "
                f"{listed(given)}"
            )
        if found.fingerprint == self.fingerprint:
            return self
        for column, own in zip(
            getattr(spec, "columns", None) or (), found.columns or (), strict=False
        ):
            known = tuple(column.categories or ())
            are_numbers = any(not isinstance(category, str) for category in known)
            if own.categories is None and are_numbers and known != tuple(range(len(known))):
                raise ValueError(
                    f"the model takes column {column.name} as places among {known}, from 0, and "
                    f"{found.name} has numbers: give places, as npy:FILE"
                )
        if isinstance(spec, DensitySpec) and spec.context_dim != found.context_dim:
            lengths = f"{spec.context_dim}, and {found.name} has them of {found.context_dim}"
            raise ValueError(
                f"the model takes contexts of length {lengths}: bring its data back, "
                "or give --data with contexts"
            )
        shape = spec.image_shape if isinstance(spec, ClassifierSpec) else spec.flow.event_shape
        fits = tuple(shape) == found.event_shape and _may_be(found.num_levels, spec.num_levels)
        # Folders of classes are numbered in order: if one is missing, later classes have other
        # numbers.
        classes_fit = operator.eq if found.name.startswith("folder:") else _may_be
        if not fits or (
            spec.num_classes is not None and not classes_fit(found.num_classes, spec.num_classes)
        ):
            taken = f"{tuple(shape)}, {spec.num_levels} levels and {spec.num_classes} classes"
            got = f"{found.event_shape}, {found.num_levels} and {found.num_classes}"
            raise ValueError(
                f"the model takes examples of shape {taken}, and {found.name} has "
                f"{got} now: bring its data back"
            )
        if isinstance(self.model, Density) and "test" in found.examples:
            try:
                preprocessing.check_ranges(self.model.spec, found.examples["test"])
            except ValueError as error:
                raise ValueError(
                    f"test examples of {found.name} are none that the model can give: {error}"
                ) from None
        if not self.fingerprint:
            return self._with_note(
                f"The model says nothing of its training data; these are {found.name}."
            )
        note = (
            "These are other data than the model was trained on, or other parts of them: "
            f"{found.name} has the fingerprint {found.fingerprint[:12]} now and had "
            f"{self.fingerprint[:12]} then. Give examples that training has not seen."
        )
        if self._validated_on_the_test():
            fractions = self.config.data.validation_fraction, self.config.data.test_fraction
            use = "many of them were trained on"
            if fractions[1] <= fractions[0]:
                use = "the checkpoint was chosen on them"
            note = (
                f"Training has seen the test examples of {found.name}: {use}. Give --data of "
                "others."
            )
        return self._with_note(note)

    def _with_note(self, note: str) -> "Run":
        found = replace(self, notes=(*self.notes, note))
        vars(found)["data"] = self.data  # the data have been read
        return found

    def _validated_on_the_test(self) -> bool:
        """Whether training set aside no test examples from these data, as in `iresnet_jax.fit`.

        Test and validation examples then begin one common order, see `dataset.fraction_masks`.
        """
        undivided = replace(self.config.data, test_fraction=0.0)
        return (
            not self.data.is_endless
            and load_data(undivided, self._num_classes).fingerprint == self.fingerprint
        )


def _may_be(shown: int | None, taken: int | None) -> bool:
    """Whether a model that takes ``taken`` levels or classes can take data with ``shown``."""
    return shown == taken or (shown is not None and taken is not None and shown < taken)


def load(folder: str | os.PathLike[str]) -> Run:
    """Loads the best checkpoint of a run, or the latest, with a note in `Run.notes`, if there is no
    best.

    A folder with ``model.npz`` and no checkpoints works, too. On an accelerator this also sets the
    precision of matrix products in this process, see `machine.prepare_backend`.

    Args:
        folder: Folder of the run, filled by `job.train`, or of a model.

    Raises:
        ValueError: If the folder is not one of these, or a file in it is damaged or from another
            version.
        RuntimeError: If it has no checkpoint yet, or none that can be read.

    Example:
        >>> run = load("runs/digits_density")  # doctest: +SKIP
        >>> samples, info = run.model.sample(jax.random.key(0), 64)  # doctest: +SKIP
    """
    folder = path_of(folder)
    if _is_model_alone(folder):
        model, about = saved.read(folder / FILE_NAME)
        config, fingerprint, step = _parsed(folder / FILE_NAME, about)
        prepare_backend(config.training.matmul_precision)
        return Run(
            folder, model.with_(solver=config.evaluation.solver()), config, fingerprint, step
        )
    config = run_folder.read_config(folder)
    prepare_backend(config.training.matmul_precision)
    spec, fingerprint = run_folder.read_model(folder)
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
    folder = path_of(folder)
    if not _is_model_alone(folder):
        return run_folder.read_config(folder)
    path = folder / FILE_NAME
    return _parsed(path, saved.read_about(path))[0]


def _is_model_alone(folder: Path) -> bool:
    return (folder / FILE_NAME).exists() and not (folder / "checkpoints").exists()


def save(run: Run, path: str | os.PathLike[str] | None = None) -> Path:
    """Writes the model of a run to one file, with the settings and the data that it was trained
    with.

    Args:
        path: File to write; by default ``model.npz`` in the folder of the run.
    """
    about = {
        "format": run_folder.FORMAT,
        "config": to_plain(run.config),
        "fingerprint": run.fingerprint,
        "step": run.step,
    }
    return run.model.save(run.folder / FILE_NAME if path is None else path, about)


def _parsed(path: Path, about: dict[str, Any]) -> tuple[Config, str, int]:
    """Settings, fingerprint of the data and step that `save` wrote beside a model."""
    if about.get("format") != run_folder.FORMAT:
        raise ValueError(
            f"{path} says nothing of a training in this version: iresnet_jax.load "
            "reads the model alone"
        )
    try:
        return parse(about["config"]), str(about["fingerprint"]), int(about["step"])
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is damaged ({error}): restore it from a copy") from None
