"""Command lines that answer a mistake in one sentence, and config files with their overrides."""

import argparse
import ast
import logging
import re
import runpy
import sys
import warnings
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from iresnet_jax.storage import path_of
from iresnet_jax.training.signals import Stopped

if TYPE_CHECKING:
    from iresnet_jax.runs.config import Config

DEFAULT_CONFIG = "configs/digits_density.py"
MISTAKE = 2  # exit status
_LONGEST = 600  # characters of a message; compilers' messages contain whole programs


class Parser(argparse.ArgumentParser):
    """A parser of command lines that raises ``ValueError`` with a sentence instead of printing
    its usage.
    """

    def error(self, message: str) -> NoReturn:
        """Says what was wrong and where to look."""
        raise ValueError(f"{message}; see {self.prog} --help")


def explain_failures(command: Callable[[], int], *, debug: bool = False) -> int:
    """Runs a command and returns its exit status; failures and warnings are shown as one sentence
    each on stderr.

    ``ValueError``, ``RuntimeError`` and ``OSError`` are failures that a user can fix and give
    status 2. `Stopped` gives the status of a process that its signal ends, such as 143. Other
    exceptions are bugs and pass through; with ``debug``, failures pass through, too.
    """
    with warnings.catch_warnings():
        warnings.showwarning = lambda message, *_, **__: print(
            f"warning: {message}", file=sys.stderr
        )
        try:
            return command()
        except Stopped as stopped:
            print(stopped, file=sys.stderr)
            return stopped.status
        except (ModuleNotFoundError, ValueError, RuntimeError, OSError) as error:
            missing = error.name or "" if isinstance(error, ModuleNotFoundError) else ""
            if debug or missing.startswith("iresnet_jax"):
                raise
            print(f"error: {one_sentence(error)}", file=sys.stderr)
            return MISTAKE


def one_sentence(error: Exception) -> str:
    """Message of an exception on one line."""
    text = " ".join(str(error).split()) or type(error).__name__
    if isinstance(error, ModuleNotFoundError):
        text = f"there is no package {error.name}: pip install 'iresnet_jax[train]'"
    if "RESOURCE_EXHAUSTED" in text:
        text = (
            "the device is out of memory: lower training.batch_size or evaluation.batch_size or "
            f"--num, or raise training.num_parts ({text})"
        )
    return text if len(text) <= _LONGEST else text[:_LONGEST] + " ... (--debug shows all)"


def quiet_backends() -> None:
    """Silences JAX's messages below warnings about accelerators that this machine does not have."""
    logging.getLogger("jax").setLevel(logging.WARNING)


def parse_train_flags(argv: Sequence[str]) -> argparse.Namespace:
    """Reads the flags of `train.py`, which are described there, and the overrides
    ``--config.FIELD=VALUE``.

    Args:
        argv: The command line, program name first.

    Returns:
        The flags by name: a `Config`, the workdir as a path, ``debug``, and the arguments of
            `hosts.initialize`.
    """
    program, *arguments = argv
    overrides = [argument for argument in arguments if re.match(r"--?(no)?config\.", argument)]
    parser = Parser(prog=program, add_help=False, allow_abbrev=False)
    parser.add_argument("--config", default=DEFAULT_CONFIG)
    parser.add_argument("--workdir")
    parser.add_argument("--debug", action="store_true")
    parser.add_argument("--coordinator_address")
    parser.add_argument("--num_processes", type=int)
    parser.add_argument("--process_id", type=int)
    given = parser.parse_args([argument for argument in arguments if argument not in overrides])
    file, _, variant = given.config.partition(":")
    given.workdir = path_of(
        given.workdir or Path("runs") / "_".join(filter(None, (Path(file).stem, variant)))
    )
    given.config = read_config(given.config, overrides)
    return given


def read_config(file: str, overrides: Iterable[str] = ()) -> "Config":
    """The settings of a config file, with overrides.

    Args:
        file: The file; a variant follows after a colon, as in ``configs/toy_2d.py:moons``.
        overrides: Changes such as ``--config.model.stages[0].num_blocks=8``; ``--config.FIELD`` is
            true, ``--noconfig.FIELD`` false.
    """
    # Imported late: --help and mistakes are answered without it.
    from iresnet_jax.runs.config import parse, set_field, to_plain

    path, _, variant = file.partition(":")
    try:
        get_config = runpy.run_path(path)["get_config"]
        settings = to_plain(get_config(*([variant] if variant else [])))
    except Exception as error:  # a config file may raise anything
        raise ValueError(
            f"the config file {path} fails: {type(error).__name__}: {error}"
        ) from error
    for override in overrides:
        name, has_value, text = override.lstrip("-").partition("=")
        root, _, name = name.partition(".")
        set_field(settings, name, _read(text) if has_value else root == "config")
    return parse(settings)


def _read(text: str) -> Any:
    """A number, a tuple or whatever else Python reads; other texts are strings."""
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text
