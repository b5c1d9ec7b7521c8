"""Arguments of `fit`, checked before anything is computed: a mistake is a ``ValueError`` that names the argument."""

import os
from collections.abc import Mapping
from typing import Annotated, Any, Literal

import jax

from iresnet_jax.checked_dataclasses import Count, Positive, Range, checked
from iresnet_jax.maths.keys import single_key
from iresnet_jax.models.architecture import StageSpec

KINDS: dict[str, Any] = {
    "minutes": Positive,
    "steps": Count,
    "objective": Literal["density", "classification", "hybrid"],
    "architecture": tuple[StageSpec, ...],
    "validation_fraction": Annotated[float, Range("(0, 1)")],
}


def checked_options(**options: Any) -> dict[str, Any]:
    """Options of `fit` as plain numbers, tuples and dictionaries.

    Raises:
        ValueError: If one of them is of another kind than `KINDS` says, or both minutes and steps are given.
    """
    settings, workdir = options.pop("settings", None) or {}, options.pop("workdir", None)
    if not isinstance(settings, Mapping) or not all(isinstance(name, str) for name in settings):
        raise ValueError(f'settings must be a dictionary such as {{"optimizer.learning_rate": 1e-3}}, got {settings!r}')
    if not isinstance(workdir, str | os.PathLike | None):
        raise ValueError(f"workdir must be the path of a folder, got {workdir!r}")
    if of_data := [name for name in settings if name.startswith("data.")]:
        raise ValueError(f"{of_data[0]} is no setting of fit, which is given its data: use its arguments")
    if "training.total_steps" in settings:
        raise ValueError("the number of updates is no setting of fit, as other settings follow from it: give it as steps=...")
    chosen = {name: value for name, value in options.items() if value is not None or name == "validation_fraction"}
    found = dict.fromkeys(options) | {name: checked(KINDS[name], value, name) for name, value in chosen.items()}
    for stage in found.get("architecture") or ():
        if stage.branch is not None:
            raise ValueError(
                f"fit takes branches by the name of their kind: call kinds.register({stage.branch_name!r}, ...) of "
                f"iresnet_jax.branches and give StageSpec(kind={stage.branch_name!r}) in place of branch=..."
            )
    if found.get("minutes") is not None and found.get("steps") is not None:
        raise ValueError(f"give minutes or steps, not both: got {found['minutes']} and {found['steps']}")
    return {**found, "settings": dict(settings), "workdir": workdir}


def seed_of(key: Any) -> int:
    """The seed of a run for a key, 0 without one."""
    return 0 if key is None else int(jax.random.bits(single_key(key), dtype="uint32"))
