"""The folder of a run: its settings and its model, written once when training starts, and the lock
of the process that trains in it.

``config.json`` holds the settings; ``model.json`` the architecture, grey levels, histogram and
classes, and the fingerprint of the data they came from. A resume reads the model from there and
computes nothing from data files again.
"""

import contextlib
import dataclasses
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from iresnet_jax.atomic_files import locked, replacing
from iresnet_jax.bijections.bounded import Bounded
from iresnet_jax.bijections.standardize import Identity
from iresnet_jax.data.dataset import DataSet
from iresnet_jax.models.saved import Spec, spec_of
from iresnet_jax.pytrees import first_difference, tagged
from iresnet_jax.runs.config import Config, parse, to_plain

FORMAT = 1  # version of both files
CONFIG_FILE, MODEL_FILE = "config.json", "model.json"
# Settings that change how a step is computed, not its result: a run may go on with other values,
# for example on other devices.
WAYS_TO_COMPUTE = ("num_parts", "rematerialize", "blocks")


def check_belongs_to(workdir: Path, config: Config) -> None:
    """Raises ``ValueError`` if the folder holds a run with another config; the message names the
    first difference that matters.
    """
    if workdir.exists() and not workdir.is_dir():
        raise ValueError(f"{workdir} is a file: choose another --workdir")
    if not has_run(workdir):
        return
    theirs = read_config(workdir)
    ways = {name: getattr(theirs.training, name) for name in WAYS_TO_COMPUTE}
    ours = dataclasses.replace(config, training=dataclasses.replace(config.training, **ways))
    if difference := first_difference(to_plain(ours), to_plain(theirs), "config"):
        raise ValueError(
            f"{workdir} holds a run with another config: {difference}; choose another "
            "--workdir or delete it"
        )


def read_config(workdir: Path) -> Config:
    """The settings of a run."""
    if not workdir.is_dir():
        raise ValueError(f"there is no workdir {workdir}: give the --workdir of a training run")
    if not has_run(workdir):
        raise ValueError(
            f"{workdir} has no {CONFIG_FILE}, so it is not the workdir of a training run"
        )
    return _read(workdir / CONFIG_FILE, parse)


def read_model(workdir: Path) -> tuple[Spec, str]:
    """The model of a run without its weights, and the fingerprint of its data."""
    return _read(
        workdir / MODEL_FILE,
        lambda plain: (spec_of(plain["model"]), str(plain["data"]["fingerprint"])),
    )


def model_of_run(workdir: Path, data: DataSet) -> Spec | None:
    """The model that the run in this folder began with; None for a folder without a run."""
    if not has_run(workdir):
        return None
    spec, fingerprint = read_model(workdir)
    if fingerprint != data.fingerprint:
        raise ValueError(
            f"{workdir} was trained on other data: {data.name} has the fingerprint "
            f"{data.fingerprint[:12]} now and had {fingerprint[:12]} when training began; bring "
            "those data back, or choose another --workdir"
        )
    transform = getattr(spec, "transform", None)
    if data.ends != (
        dataclasses.replace(transform, then=Identity()) if isinstance(transform, Bounded) else None
    ):
        raise ValueError(
            f"{workdir} holds a run with other bounds of columns: give the same, or "
            "choose another workdir"
        )
    if data.columns != getattr(spec, "columns", None):
        raise ValueError(
            f"{workdir} holds a run with other columns or categories: give the same, "
            "or choose another workdir"
        )
    return spec


@contextlib.contextmanager
def claimed(
    workdir: Path, config: Config, spec: Spec, data: DataSet
) -> Iterator[Callable[[], None]]:
    """Within ``with``, no other process trains in the folder, which holds settings and model; the
    lock ends with its process.

    Yields the function of `atomic_files.locked`.
    """
    workdir.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as stack:
        try:
            check = stack.enter_context(locked(workdir / "training", timeout_s=0.0))
        except TimeoutError:
            message = (
                f"another process is training in {workdir}: wait until it has ended, or "
                "choose another --workdir"
            )
            raise ValueError(message) from None
        if has_run(workdir):
            check_belongs_to(workdir, config)  # a run may have begun since the last check
        else:
            model = {
                "model": tagged(spec),
                "data": {"name": data.name, "fingerprint": data.fingerprint},
            }
            # The model is written first: only a folder with a config holds a run, and a model
            # without a config is the rest of a failed start.
            for name, plain in ((MODEL_FILE, model), (CONFIG_FILE, to_plain(config))):
                with replacing(workdir / name) as incoming:
                    incoming.write_text(
                        json.dumps({"format": FORMAT, **plain}, indent=2) + "\n", encoding="utf-8"
                    )
        yield check


def has_run(workdir: Path) -> bool:
    """Whether a run has begun in this folder."""
    return (workdir / CONFIG_FILE).exists()


def _read(path: Path, understand: Callable[[dict[str, Any]], Any]) -> Any:
    """Reads the JSON object in a file of the present version and returns ``understand`` of it."""
    try:
        plain = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(plain, dict):
            raise ValueError("it holds no JSON object")
        if plain.pop("format", None) == FORMAT:
            return understand(plain)
    except FileNotFoundError:
        raise ValueError(f"{path} is missing: restore it, or choose another --workdir") from None
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{path} cannot be read ({error}): restore it, or choose another --workdir"
        ) from None
    raise ValueError(
        f"{path} was written by another version of iresnet_jax: train again, or use that version"
    )
