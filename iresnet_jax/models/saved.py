"""Models read from their files, see `model`: every array must be what the model that the header
describes has.
"""

import contextlib
import json
import os
import warnings
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from typing import Any, get_args

import jax
import jax.numpy as jnp
import numpy as np

from iresnet_jax.bijections.marginals import Marginals
from iresnet_jax.models import priors
from iresnet_jax.models.architecture import FlowSpec, NoiseSpec, StageSpec
from iresnet_jax.models.classifier import Classifier, ClassifierSpec
from iresnet_jax.models.columns import Column
from iresnet_jax.models.contexts import ContextScale, ContextScores
from iresnet_jax.models.contractions import of_stored
from iresnet_jax.models.density import Density
from iresnet_jax.models.density_spec import DensitySpec, Transform
from iresnet_jax.models.model import FILE_NAME, FORMAT, HEADER, MODELS, array_name
from iresnet_jax.pytrees import from_tagged, tagged
from iresnet_jax.storage import path_of

Model = Density | Classifier
Spec = DensitySpec | ClassifierSpec
_CLASSES = {
    each.__name__: each
    for each in (
        *(DensitySpec, ClassifierSpec, FlowSpec, StageSpec, NoiseSpec, *get_args(Transform)),
        *(Marginals, Column, ContextScale, ContextScores),
    )
}


def read(
    path: str | os.PathLike[str], *, branches: Mapping[str, Any] | None = None, prior: Any = None
) -> tuple[Model, dict[str, Any]]:
    """Reads a model that `Model.save` wrote, and ``about`` of `Model.save`.

    A file knows parts of one's own by their names alone, and imports nothing.

    Args:
        path: The file, or a folder that holds ``model.npz``.
        branches: Branches of one's own by their names, see `StageSpec.branch`.
        prior: A prior of one's own with the structure of the one that was saved; its numbers do not
            count.
    """
    with _opened(path) as (archive, header):
        spec = spec_of(_with_branches(header["spec"], branches or {}))
        own_prior = {}
        if isinstance(spec, DensitySpec) and spec.prior_family == priors.OWN:
            if prior is None:
                raise ValueError(f"the prior of {path} is one's own: give one like it, as prior=")
            own_prior = {"prior": priors.trainable(prior)}

        def empty():
            params = spec.flow.initial_params(key := jax.random.key(0))
            return {"params": params, **spec.initial_arrays(key), **own_prior}

        with jax.enable_x64(False):  # noqa: FBT003 (JAX's own signature); what is expected is float32, wherever it is read
            expected = jax.eval_shape(empty)
        arrays = {name: archive[name] for name in archive.files if name != HEADER}
    shapes = {array_name(key): leaf.shape for key, leaf in jax.tree.leaves_with_path(expected)}
    for name in {**shapes, **arrays}:
        found = arrays[name].shape if name in arrays else None
        if found != shapes.get(name):
            raise ValueError(
                f"{path} is damaged or of another version: the shape of {name} in it is {found}, "
                f"and its model needs {shapes.get(name)}"
            )
    if jnp.result_type(float) != np.float64 and any(
        array.dtype == np.float64 for array in arrays.values()
    ):
        warnings.warn(
            f"{path} is in float64, and JAX computes in float32: its weights are rounded; set "
            "JAX_ENABLE_X64=1 to keep them",
            stacklevel=3,
        )
    found = jax.tree.map_with_path(lambda key, _: arrays[array_name(key)], expected)
    return model_of(spec, jax.device_put(found)), header["about"]


def read_about(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Reads ``about`` of `Model.save`, which starts no device."""
    with _opened(path) as (_, header):
        return header["about"]


def _with_branches(plain: Mapping[str, Any], branches: Mapping[str, Any]) -> dict[str, Any]:
    """The plain data of a spec with branches of one's own in place of their names."""

    def with_branch(stage):
        name = stage.get("branch")
        if name is None:
            return stage
        if name not in branches:
            raise ValueError(
                f"the file has a branch {name!r} of one's own: give what makes it, as "
                f"branches={{{name!r}: ...}}"
            )
        return {**stage, "branch": branches[name]}

    stages = [with_branch(stage) for stage in plain["flow"]["stages"]]
    return {**plain, "flow": {**plain["flow"], "stages": stages}}


def spec_of(plain: Mapping[str, Any]) -> Spec:
    """A model without its weights, from plain data, also of versions before."""
    cells = plain.get("cells") or {}
    if cells.get("type") == "Cells":
        plain = {**plain, "cells": tagged(_of_cells(cells))}
    elif cells and plain["transform"].get("type") == "Bounded":
        # The transform has the ends of such lines, on which no number owns a half-line.
        endless = {"least": [-np.inf] * len(cells["flat"]), "most": [np.inf] * len(cells["flat"])}
        plain = {**plain, "cells": {**cells, **endless}}
    return from_tagged(plain, _CLASSES)


def _of_cells(plain: Mapping[str, Any]) -> Marginals:
    """The columns of a model that was saved with cells, which are lines: values that own the
    numbers half-way to their neighbours, and atoms that own more of the line.
    """
    columns = []
    tables = zip(*(plain[name] for name in ("knots", "gaps", "atoms", "widths")), strict=True)
    for knots, gaps, atoms, widths in tables:
        num = int(np.sum(np.greater(gaps, 0)))
        known = np.array([*knots[:num], knots[num - 1] + gaps[num - 1]] if num else [])
        is_whole = np.all(np.rint(known) == known)
        v, w = (
            np.array([pair for pair in zip(atoms, widths, strict=True) if pair[1] > 0])
            .reshape(-1, 2)
            .T
        )
        half = gaps[0] / 2 if num == 1 else 0.0
        column: dict[str, Any] = {"flat": 1}
        if num == 1:
            unit = 0 if is_whole else np.log(2 * half)
            column |= {"spacing": 2 * half, "origin": known[0], "unit": unit}
        if num > 1:  # the outermost gaps go on
            more, first, last = np.arange(1, 33), known[1] - known[0], known[-1] - known[-2]
            known = np.concatenate([known[0] - first * more[::-1], known, known[-1] + last * more])
            edges = np.convolve(known, [0.5, 0.5], "valid")
            edges = np.array([known[0] - first / 2, *edges, known[-1] + last / 2])
            wider = np.sum(np.where(v == known[:, None], w, 0), axis=1)
            on_line = edges + np.append(0, np.cumsum(wider))
            units = np.zeros(len(known)) if is_whole else np.log(np.diff(edges))
            column |= {"values": known, "units": units, "has_levels": 2}
            column |= {"lower": [on_line[:-1]], "upper": [on_line[1:]]}
        elif len(v):
            low = v - half + np.append(0, np.cumsum(w)[:-1])
            high = low + 2 * half + w
            column["at"] = np.stack([v - half, v + half], axis=1).ravel()
            column["to"] = np.stack([low, high], axis=1).ravel()
            column["slopes"] = np.ones(2 * len(v))
            if not half:
                column |= {"values": v, "units": 0 * v, "lower": [low], "upper": [high]}
        columns.append(column)
    return Marginals.of(columns)


@contextlib.contextmanager
def _opened(path: str | os.PathLike[str]) -> Iterator[tuple[Any, dict[str, Any]]]:
    """The file of a model and its header."""
    path = path_of(path)
    path = path / FILE_NAME if path.is_dir() else path
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as archive:
            header = json.loads(archive[HEADER].tobytes())
            if header.get("format") != FORMAT:
                raise ValueError(f"{path} has the format {header.get('format')}, not {FORMAT}")
            yield archive, header
    except (EOFError, KeyError, TypeError, zipfile.BadZipFile, zlib.error) as error:
        raise ValueError(f"{path} holds no model that was saved, or is damaged: {error}") from error


def model_of(spec: Spec, arrays: Mapping[str, Any]) -> Model:
    """A model of weights as they are.

    Args:
        spec: All that defines the model but its weights.
        arrays: ``params`` as `contractions.of_stored` takes them, and the rest of the fields of the
            model's class by name.
    """
    rest = {name: value for name, value in arrays.items() if name != "params"}
    return MODELS[type(spec)](
        spec, of_stored(spec.flow, arrays["params"], constrained=spec.constrained), **rest
    )
