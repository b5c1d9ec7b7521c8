"""Command lines that answer a mistake in one sentence."""

import logging
import re
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from absl import flags
from ml_collections import ConfigDict, config_flags

from iresnet_jax.runs.config import Config, parse, unknown_field_message
from iresnet_jax.runs.signals import Stopped

DEFAULT_CONFIG = "configs/digits_density.py"
MISTAKE = 2  # exit status
_FAILURES = (ArithmeticError, AttributeError, ImportError, LookupError, SyntaxError, TypeError)  # of a config file or override
_LONGEST = 600  # characters of a message; compilers append whole programs to theirs


class TrainFlags(NamedTuple):
    """Flags of `train.py`.

    Attributes:
        config: Settings with their overrides.
        workdir: Folder of the run.
        debug: Whether a failure shows its traceback.
        coordinator_address: ``host:port`` of process 0 in a run of several processes, see `hosts.initialize`.
        num_processes: Number of processes.
        process_id: Number of this process, from 0.
    """

    config: Config
    workdir: Path
    debug: bool
    coordinator_address: str | None
    num_processes: int | None
    process_id: int | None


def explain_failures(command: Callable[[], int], *, debug: bool = False) -> int:
    """Runs a command and returns its exit status; failures and warnings are shown as one sentence each on stderr.

    ``ValueError``, ``RuntimeError`` and ``OSError`` are failures that a user can mend and give status 2. `Stopped` gives the
    status of a death by its signal, such as 143. Other exceptions are bugs and pass through, as failures do with ``debug``.
    """
    with warnings.catch_warnings():
        warnings.showwarning = lambda message, *_, **__: print(f"warning: {message}", file=sys.stderr)
        try:
            return command()
        except Stopped as stopped:
            print(stopped, file=sys.stderr)
            return stopped.status
        except (ValueError, RuntimeError, OSError) as error:
            if debug:
                raise
            print(f"error: {one_sentence(error)}", file=sys.stderr)
            return MISTAKE


def asks_for_debug(argv: Sequence[str]) -> bool:
    """Whether ``--debug`` is set, in any form that absl reads, even if the rest of the command line is wrong."""
    forms = [argument for argument in argv if re.fullmatch(r"--?(no)?debug(=.*)?", argument)]
    return bool(forms) and not re.fullmatch(r"--?nodebug|--?debug=(false|f|0|n|no)", forms[-1], re.IGNORECASE)


def one_sentence(error: Exception) -> str:
    """Message of an exception on one line."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= _LONGEST else text[:_LONGEST] + " ... (--debug shows all)"


def quiet_backends() -> None:
    """Silences what JAX says, below warnings, about accelerators that this machine does not have."""
    logging.getLogger("jax").setLevel(logging.WARNING)


def parse_train_flags(argv: Sequence[str], *, default_config: str) -> TrainFlags:
    """Reads ``--config``, its overrides ``--config.FIELD=VALUE``, and the other flags of `TrainFlags`.

    Args:
        argv: The command line, program name first.
        default_config: Config file if none is given.

    Raises:
        ValueError: If a flag or a field is unknown, or a value does not fit.
        OSError: If the config file cannot be read.
    """
    program, *arguments = argv
    arguments = _joined(arguments)
    if not any(re.fullmatch(r"--?config(=.*)?", argument) for argument in arguments):
        arguments = [f"--config={default_config}", *arguments]
    for file in (match[1] for argument in arguments if (match := re.fullmatch(r"--?config=([^:]*).*", argument))):
        _check_file(Path(file))
    try:
        values, rest = _parse([program, *arguments])
    except _FAILURES as error:  # raised deep inside, which does not name the override
        raise ValueError(_explain_override(program, arguments) or one_sentence(error)) from None
    except flags.Error as error:  # its message holds the traceback of the config file
        message = str(error).replace("\\n", "\n")
        if "get_config() takes 0 positional arguments" in message:
            raise ValueError("the config file has no variants: leave out the colon and what follows it") from None
        raised = re.findall(r"^ValueError: (.+?)\s*$", message, re.MULTILINE)
        raise ValueError(raised[-1] if raised else one_sentence(error)) from None
    if rest:
        raise ValueError(f"unexpected argument {rest[0]!r}: settings are given as --config.FIELD=VALUE")
    path = config_flags.get_config_filename(values["config"])
    if not isinstance(values["config"].value, ConfigDict):
        raise ValueError(f"get_config() of {path} must return a ConfigDict, got {values['config'].value!r}")
    workdir = values["workdir"].value or Path("runs") / Path(path.split(":")[0]).stem
    debug, *processes = (values[name].value for name in TrainFlags._fields[2:])
    return TrainFlags(parse(values["config"].value), Path(workdir), bool(debug), *processes)


def _check_file(path: Path) -> None:
    """Raises ``ValueError`` unless this is a text file."""
    if not path.is_file():
        raise ValueError(f"there is no config file {path}: those that come with the library are in configs/")
    try:
        path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise ValueError(f"the config file {path} is not UTF-8: save it as UTF-8") from None


def _joined(arguments: list[str]) -> list[str]:
    """``--config FILE`` as ``--config=FILE``."""
    joined: list[str] = []
    for argument in arguments:
        if joined and joined[-1] in ("--config", "-config"):
            joined[-1] += "=" + argument
        else:
            joined.append(argument)
    return joined


def _parse(argv: list[str]) -> tuple[flags.FlagValues, list[str]]:
    """Returns all flags and the arguments left over; flags are defined anew, so this can run many times in one process."""
    values = flags.FlagValues()
    config_flags.DEFINE_config_file("config", None, "Settings of the run.", flag_values=values, sys_argv=argv)
    flags.DEFINE_string("workdir", None, "Folder of the run.", flag_values=values)
    flags.DEFINE_bool("debug", default=False, help="Show the traceback of a failure.", flag_values=values)
    flags.DEFINE_string("coordinator_address", None, "HOST:PORT of process 0.", flag_values=values)
    flags.DEFINE_integer("num_processes", None, "Number of processes.", flag_values=values)
    flags.DEFINE_integer("process_id", None, "Number of this process, from 0.", flag_values=values)
    _, *rest = values(argv)
    config = values["config"].value
    if isinstance(config, config_flags.config_flags._ErrorConfig):  # an invalid config raises when it is first used
        config.lock  # noqa: B018
    return values, rest


def _explain_override(program: str, arguments: list[str]) -> str | None:
    """Returns a sentence about the first override that fails by itself."""
    overrides = [argument for argument in arguments if re.match(r"--?(no)?config\.", argument)]
    others = [argument for argument in arguments if argument not in overrides]
    try:
        config: Any = _parse([program, *others])[0]["config"].value
    except _FAILURES as error:  # its message holds its traceback
        return "the config file itself fails: " + " ".join(str(error).replace("\\n", "\n").strip().splitlines()[-2:])
    for override in overrides:
        try:
            _parse([program, *others, override])
        except _FAILURES:
            path = re.sub(r"^--?(no)?config\.", "", override).split("=")[0]
            return unknown_field_message(config, path)
    return None
