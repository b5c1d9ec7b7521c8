"""The command that trained a network in another code, as its user typed it: a script and its options.

An option is read if the network's function depends on it, refused if the library has no such part, and ignored if it is about
training alone. An option that the script does not have is an error.
"""

import argparse
import shlex
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple, NoReturn


class Options(NamedTuple):
    """The options of a training script, names without dashes in front.

    Attributes:
        read: Options that define the network with the script's defaults; numbers, words, True or False, or several numbers.
        ignored: Names of options that do not change the function, each with one value.
        refused: Options of which the default alone is read: the default, and why another value is not.
        switches: Names of options without a value that define the network.
        ignored_switches: Names of options without a value that do not.
    """

    read: Mapping[str, Any]
    ignored: str
    refused: Mapping[str, tuple[Any, str]] = MappingProxyType({})
    switches: str = ""
    ignored_switches: str = ""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ValueError(f"{self.prog}: {message}")


def parse(command: str, scripts: Mapping[str, Options]) -> tuple[str, argparse.Namespace]:
    """The script of a command and its options that are read.

    Args:
        command: Such as ``"python train_img.py --data mnist --imagesize 28"``.
        scripts: Options of the known scripts, by the names of their files.

    Raises:
        ValueError: If the command names no known script, or has an option that the script does not have or that is refused.
    """
    words = shlex.split(command)
    starts = [i for i, word in enumerate(words) if Path(word).name in scripts]
    if not starts:
        raise ValueError(
            f"architecture must be the command that trained the network, with its script, one of {', '.join(scripts)}, and its "
            f"options; got {command!r}"
        )
    script = Path(words[starts[0]]).name
    options = scripts[script]
    given = _parser(script, options).parse_args(words[starts[0] + 1 :])
    for name, (default, reason) in options.refused.items():
        if (value := getattr(given, name.replace("-", "_"))) != default:
            raise ValueError(f"{script} --{name} {value} is not read, {reason}: only --{name} {default} is")
    return script, given


def _parser(script: str, options: Options) -> _Parser:
    """A parser as the script has it: its defaults, and names that may be shortened."""
    parser = _Parser(prog=script, add_help=False)
    for name, default in {**options.read, **{name: default for name, (default, _) in options.refused.items()}}.items():
        if isinstance(default, tuple):
            parser.add_argument(f"--{name}", type=int, nargs="+", default=default)
        else:
            parser.add_argument(f"--{name}", type=_truth if isinstance(default, bool) else type(default), default=default)
    for name in options.ignored.split():
        parser.add_argument(f"--{name}")
    for name in [*options.switches.split(), *options.ignored_switches.split()]:
        parser.add_argument(f"-{name}", f"--{name}", action="store_true", dest=name)
    return parser


def _truth(word: str) -> bool:
    if word not in ("True", "False"):
        raise argparse.ArgumentTypeError(f"it is True or False, got {word}")
    return word == "True"
