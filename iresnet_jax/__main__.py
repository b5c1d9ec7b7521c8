"""Everything but training: ``python -m iresnet_jax COMMAND --workdir DIR``; ``plan``,
``convert``.
"""

import argparse
import math
import sys
from collections.abc import Sequence
from typing import Any, NamedTuple

from iresnet_jax.maths import machine
from iresnet_jax.runs.command_line import Parser, explain_failures, quiet_backends
from iresnet_jax.storage import path_of
from iresnet_jax.training.signals import end_at_signals


def count(text: str, least: int = 1) -> int:
    """A number of examples, for argparse."""
    number = int(text)
    if not least <= number < 2**31:
        raise argparse.ArgumentTypeError(
            f"it must be at least {least} and below 2^31, got {number}"
        )
    return number


def radii(text: str) -> tuple[float, ...]:
    """Radii, for argparse."""
    found = tuple(float(number) for number in text.split(","))
    if not all(0 < number < math.inf for number in found):
        raise argparse.ArgumentTypeError(f"they must be positive, got {text}")
    return found


OPTIONS: dict[str, dict[str, Any]] = {
    "FILE": {"help": "state_dict of the network, as npz"},
    "architecture": {
        "required": True,
        "metavar": "COMMAND",
        "help": "the command that trained the network, in quotes: its script and options",
    },
    "scale": {
        "action": "store_true",
        "default": False,
        "help": "scale kernels by their certified norms into the budget",
    },
    "workdir": {
        "required": True,
        "metavar": "DIR",
        "help": "folder of the training run, or of a model",
    },
    "data": {"metavar": "NAME", "help": "data other than the training's, such as npy:FILE"},
    "num": {
        "type": count,
        "help": "how many examples, images of each side or samples (%(default)s)",
    },
    "certify": {
        "type": lambda text: count(text, least=0),
        "metavar": "N",
        "help": "how many, from the first, get a guaranteed error; 0 for none (what takes some "
        "seconds, at most 64)",
    },
    "temperature": {"type": float, "default": 1.0, "help": "factor on the prior's scale (1)"},
    "seed": {"type": int, "default": 0, "help": "of the latents (0)"},
    "samples": {
        "type": count,
        "default": 99,
        "help": "of the model for each example (%(default)s)",
    },
    "context": {
        "metavar": "NUMBERS",
        "help": "context, as --context=1.0,2.0,... or a .npy file with one per row",
    },
    "label": {"type": int, "help": "of which class, of a hybrid (any)"},
    "importance": {
        "type": count,
        "metavar": "K",
        "help": "also the importance-weighted bound of discrete data, with K draws of noise an "
        "example",
    },
    "radii": {
        "type": radii,
        "metavar": "NUMBERS",
        "help": "radii at which accuracy is verified and attacked, as .3,1.58: 2-norms of pixels "
        "on [0, 1], of a classifier",
    },
    "output": {
        "metavar": "PATH",
        "help": "where to write (%(default)s)",
    },
    "topology": {
        "required": True,
        "help": "v5e:4x8 and other TPU topologies; cuda:8 for eight GPUs",
    },
}


class Command(NamedTuple):
    """A command, which the function of its name in `iresnet_jax.commands` runs.

    Attributes:
        help: Its result, and the condition for exit status 1.
        options: Names in `OPTIONS`, some with a default; arguments without dashes are in capitals.
    """

    help: str
    options: str


COMMANDS = {
    "evaluate": Command(
        "Test likelihood, test error of a model with classes, and robustness of a classifier.",
        "workdir data importance radii",
    ),
    "sample": Command(
        "Samples, to samples.png and samples.npy; exit status 1 if the inverse did not converge "
        "for all of them.",
        "workdir num=64 temperature seed context label certify",
    ),
    "reconstruct": Command(
        "Test examples encoded and inverted, to reconstructions.png; exit status 1 if the inverse "
        "failed for any.",
        "workdir data num=512 certify",
    ),
    "certify": Command(
        "Certified Lipschitz bound of every layer and block; exit status 1 if a block is not "
        "certified a contraction.",
        "workdir",
    ),
    "calibrate": Command(
        "Calibration of a density given contexts: ranks of test examples among samples, and tests "
        "that they are uniform; exit status 1 if these refuse it.",
        "workdir data num=500 samples",
    ),
    "report": Command(
        "All results, to report.json and report.html.", "workdir data importance radii"
    ),
    "convert": Command(
        "A network of the authors' PyTorch codes as a model; exit status 1 if a block is not "
        "certified a contraction.",
        "FILE architecture scale output=model.npz",
    ),
    "plan": Command(
        "Whether a training step, by the options of train.py, fits a machine that is not here; "
        "exit status 1 if it does not.",
        "topology",
    ),
}


def make_parser() -> Parser:
    """The parser of `COMMANDS`."""
    parser = Parser(
        prog="python -m iresnet_jax", description="Everything before and after train.py."
    )
    parsers = parser.add_subparsers(
        dest="command", metavar="COMMAND", required=True, parser_class=Parser
    )
    for name, command in COMMANDS.items():
        options = parsers.add_parser(name, help=command.help, description=command.help)
        for option in command.options.split():
            flag, _, default = option.partition("=")
            settings = OPTIONS[flag] | (dict[str, Any](default=default) if default else {})
            options.add_argument(flag if flag.isupper() else f"--{flag}", **settings)
        options.add_argument("--debug", action="store_true", help="show the traceback of a failure")
    return parser


def run(argv: Sequence[str]) -> int:
    """Runs one command; returns its exit status."""
    parser = make_parser()
    arguments, arguments.flags = parser.parse_known_args(argv)
    if arguments.flags and arguments.command != "plan":
        parser.error(f"unrecognized arguments: {' '.join(arguments.flags)}")
    if "workdir" in arguments:
        arguments.workdir = path_of(arguments.workdir)

    from iresnet_jax import commands  # slow to import: --help and mistakes are answered without it
    from iresnet_jax.runs import trained_run

    machine.cache_programs()
    execute = getattr(commands, arguments.command)
    if "workdir" not in arguments:
        return 0 if execute(arguments) else 1
    machine.use_all_cores(trained_run.read_config(arguments.workdir))
    trained, data = trained_run.load(arguments.workdir), getattr(arguments, "data", None)
    return 0 if execute(trained.with_data(data) if data else trained, arguments) else 1


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and answers its mistakes in a sentence; returns its exit status."""
    argv = sys.argv[1:] if argv is None else argv
    quiet_backends()
    return explain_failures(lambda: run(argv), debug="--debug" in argv)


if __name__ == "__main__":
    end_at_signals("give the same command to start again")
    sys.exit(main())
