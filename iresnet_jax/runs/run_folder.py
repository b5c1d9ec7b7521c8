"""The folder of a run: its settings and its model, written once when training starts, and the lock
of whoever trains in it.

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
from iresnet_jax.checked_dataclasses import checked, first_difference, tagged, to_plain
from iresnet_jax.data.dataset import DataSet
from iresnet_jax.models.saved import Spec
from iresnet_jax.runs.config import Config, parse

FORMAT = 1  # version of both files
CONFIG_FILE, MODEL_FILE = "config.json", "model.json"
# Settings that change how a step is computed and not what: a run may go on with others, as on other
# devices.
WAYS_TO_COMPUTE = ("num_parts", "rematerialize", "blocks")


def check_belongs_to(workdir: Path, config: Config) -> None:
    """Raises ``ValueError`` if the folder holds a run with another config; names the first
    difference that counts.
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
    """The settings of a run.

    Raises:
        ValueError: If there are none, they are damaged or written by another version.
    """
    if not workdir.is_dir():
        raise ValueError(f"there is no workdir {workdir}: give the --workdir of a training run")
    if not has_run(workdir):
        raise ValueError(
            f"{workdir} has no {CONFIG_FILE}, so it is not the workdir of a training run"
        )
    return _read(workdir / CONFIG_FILE, parse)


def read_model(workdir: Path) -> tuple[Spec, str]:
    """The model of a run without its weights, and the fingerprint of its data.

    Raises:
        ValueError: If there is none, it is damaged or written by another version.
    """
    return _read(
        workdir / MODEL_FILE,
        lambda plain: (checked(Spec, plain["model"], "model"), str(plain["data"]["fingerprint"])),
    )


def model_of_run(workdir: Path, data: DataSet) -> Spec | None:
    """The model that the run in this folder began with; None of a folder without a run.

    Raises:
        ValueError: If the run began with other data, or with columns of other names or ranges.
    """
    if not has_run(workdir):
        return None
    spec, fingerprint = read_model(workdir)
    if fingerprint != data.fingerprint:
        raise ValueError(
            f"{workdir} was trained on other data: {data.name} has the fingerprint "
            f"{data.fingerprint[:12]} now and had "
            f"{fingerprint[:12]} when training began; bring those data back, or choose another "
            "--workdir"
        )
    transform = getattr(spec, "transform", None)
    if data.ends != (
        dataclasses.replace(transform, then=Identity()) if isinstance(transform, Bounded) else None
    ):
        raise ValueError(
            f"{workdir} holds a fit with other bounds of columns: give the same, or "
            "choose another workdir"
        )
    if data.columns != getattr(spec, "columns", None):
        raise ValueError(
            f"{workdir} holds a fit with other columns or categories: give the same, "
            "or choose another workdir"
        )
    return spec


@contextlib.contextmanager
def claimed(
    workdir: Path, config: Config, spec: Spec, data: DataSet
) -> Iterator[Callable[[], None]]:
    """Within ``with``, no other process trains in the folder, which holds settings and model; the
    lock dies with its process.

    Yields what `atomic_files.locked` does.

    Raises:
        ValueError: If another process trains there.
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
            check_belongs_to(workdir, config)  # it may have begun since the last look
        else:
            model = {
                "model": tagged(spec),
                "data": {"name": data.name, "fingerprint": data.fingerprint},
            }
            # The model first: a folder with a config is one of a run, and a model alone was left by
            # a start that failed.
            for name, plain in ((MODEL_FILE, model), (CONFIG_FILE, to_plain(config))):
                with replacing(workdir / name) as incoming:
                    incoming.write_text(
                        json.dumps({"format": FORMAT, **plain}, indent=2) + "\n", encoding="utf-8"
                    )
        yield check


def has_run(workdir: Path) -> bool:
    """Whether a run began in this folder."""
    return (workdir / CONFIG_FILE).exists()


def _read(path: Path, understand: Callable[[dict[str, Any]], Any]) -> Any:
    """Reads the JSON object in a file of the present version and gives what ``understand`` makes
    of it.
    """
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
