"""Everything but training: ``python -m iresnet_jax COMMAND --workdir DIR``; ``plan``, ``convert``.

A command prints its result and returns whether it succeeded: if not, the exit status is 1. The
first paragraph of its docstring is its help.
"""

import argparse
import dataclasses
import inspect
import sys
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jaxtyping import Float

from iresnet_jax import conversion
from iresnet_jax.arguments import Count, CountOrNone, Parser, Positive, checked
from iresnet_jax.data.arrays import FITTED_ARRAY
from iresnet_jax.evaluation import calibration, round_trips
from iresnet_jax.evaluation.plots import reconstructions, write_png, write_samples
from iresnet_jax.evaluation.report import on_test_data, write
from iresnet_jax.maths import platforms
from iresnet_jax.models.architecture import FlowSpec
from iresnet_jax.models.contexts import as_vectors
from iresnet_jax.models.density import Density
from iresnet_jax.runs import plan as plans
from iresnet_jax.runs import trained_run
from iresnet_jax.runs.config import Config, DataConfig, parse_train_flags
from iresnet_jax.runs.hosts import explain_failures
from iresnet_jax.runs.trained_run import Run
from iresnet_jax.storage import path_of
from iresnet_jax.training.signals import end_at_signals

# Rough time for guaranteed errors of inverses if no number of examples is given.
CERTIFY_S = 5.0


# --- commands -------------------------------------------------------------------------------------


def evaluate(run: Run, arguments: argparse.Namespace) -> bool:
    """Test likelihood, test error of a model with classes, and robustness of a classifier."""
    run = _with_settings(run, arguments).with_data_checked()
    _say(*run.notes, *on_test_data(run).values())
    return True


def sample(run: Run, arguments: argparse.Namespace) -> bool:
    """Samples, to samples.png and samples.npy; exit status 1 if the inverse did not converge for
    all of them.
    """
    model, size = run.model, run.config.evaluation.batch_size
    if not isinstance(model, Density):
        raise ValueError(
            f"{run.folder} holds no density, so there are no samples: that takes a "
            "density objective"
        )
    num, contexts = arguments.num, None
    if arguments.context is not None:
        contexts = read_contexts(arguments.context, model.spec.context_dim)
        num = max(num, len(contexts))
    values, convergence = round_trips.draw(
        model,
        num,
        size,
        temperature=arguments.temperature,
        seed=arguments.seed,
        labels=None if arguments.label is None else [arguments.label] * num,
        contexts=contexts,
        num_certified=_num_certified(arguments, model.spec.flow),
    )
    png, npy = write_samples(values, model.spec.num_levels, run.folder)
    _say(*run.notes, convergence, f"written: {png} and {npy}")
    return not convergence.failed


def read_contexts(text: str, context_dim: int) -> Float[np.ndarray, "n k"]:
    """The contexts that ``--context`` gives: numbers separated by commas, or a ``.npy`` file
    with one context per row.
    """
    if text.endswith(".npy"):
        found = np.load(text, allow_pickle=False)
    else:
        found = np.array([float(number) for number in text.split(",")])
    return np.atleast_2d(as_vectors(found.astype(np.float32), context_dim))


def reconstruct(run: Run, arguments: argparse.Namespace) -> bool:
    """Test examples encoded and inverted, to reconstructions.png; exit status 1 if the inverse
    failed for any.
    """
    run = run.with_data_checked()
    test, size = run.test_data(arguments.num), run.config.evaluation.batch_size
    num = _num_certified(arguments, run.model.spec.flow)
    originals, back, result = round_trips.reconstruct(
        run.model, test.x, size, run.config.seed, contexts=test.context, num_certified=num
    )
    _say(*run.notes, result)
    if figure := reconstructions(originals, back):
        _say(f"written: {write_png(figure, run.folder / 'reconstructions.png')}")
    return result.fraction_converged == 1


def _num_certified(arguments: argparse.Namespace, flow: FlowSpec) -> int | None:
    """Number of examples to certify: the requested number, or as many as take some seconds; None
    for none.
    """
    if arguments.certify is None:
        return round_trips.affordable(flow, CERTIFY_S)
    return arguments.certify or None


def certify(run: Run, _: argparse.Namespace) -> bool:
    """Certified Lipschitz bound of every layer and block; exit status 1 if a block is not certified
    a contraction.
    """
    certificate = run.model.certificate()
    of_noise = run.model.noise_certificate() if isinstance(run.model, Density) else None
    _say(*run.notes, certificate, *([f"flow of noise:\n{of_noise}"] if of_noise else ()))
    return certificate.certified and (of_noise is None or of_noise.certified)


def calibrate(run: Run, arguments: argparse.Namespace) -> bool:
    """Calibration of a density given contexts: ranks of test examples among samples, and tests that
    they are uniform; exit status 1 if these refuse it.
    """
    run = run.with_data_checked()
    found = calibration.calibrate_run(run, arguments.num, arguments.samples)
    _say(*run.notes, found)
    return found.is_calibrated


def report(run: Run, arguments: argparse.Namespace) -> bool:
    """All results, to report.json and report.html."""
    _say(write(_with_settings(run, arguments)), f"report: {run.folder / 'report.html'}")
    return True


def _with_settings(run: Run, arguments: argparse.Namespace) -> Run:
    """The run, with the requested importance-weighted bound and robustness in its evaluation."""
    changes = {"num_importance_draws": arguments.importance, "radii": arguments.radii}
    given = {name: value for name, value in changes.items() if value is not None}
    evaluation = dataclasses.replace(run.config.evaluation, **given)
    return dataclasses.replace(run, config=dataclasses.replace(run.config, evaluation=evaluation))


def convert(arguments: argparse.Namespace) -> bool:
    """A network of the authors' PyTorch codes as a model; exit status 1 if a block is not certified
    a contraction.

    The other commands take the model with ``--data``.
    """
    model = conversion.convert(arguments.FILE, arguments.architecture)
    model = model.freeze() if arguments.scale else model
    certificate = model.certificate()
    objective = "density" if isinstance(model, Density) else "classification"
    folder = path_of(arguments.output).parent
    folder.mkdir(parents=True, exist_ok=True)
    run = Run(folder, model, Config(objective=objective, data=DataConfig(FITTED_ARRAY)), "", 0)
    path = trained_run.save(run, arguments.output)
    _say(certificate.verdict, f"written: {path} ({len(path.read_bytes()) / 1e6:.2g} MB)")
    return certificate.certified


def plan(arguments: argparse.Namespace) -> bool:
    """Whether a training step, by the options of train.py, fits a machine that is not here; exit
    status 1 if it does not.
    """
    # The compiler for TPUs compiles without running anything.
    jax.config.update("jax_platforms", "cpu")
    config = parse_train_flags(["python -m iresnet_jax plan", *arguments.flags]).config
    made = plans.make(config, plans.machine(arguments.topology))
    _say(made)
    return made.problem is None


def _say(*lines: object) -> None:
    print("\n".join(map(str, lines)))


# --- options --------------------------------------------------------------------------------------


def count(text: str) -> int:
    """A number of examples, for argparse."""
    return checked(Count, int(text), "number")


def count_or_none(text: str) -> int:
    """A number of examples, for argparse; 0 for none."""
    return checked(CountOrNone, int(text), "number")


def radii(text: str) -> tuple[float, ...]:
    """Radii, for argparse."""
    return tuple(checked(Positive, float(number), "radius") for number in text.split(","))


OPTIONS: dict[str, dict[str, Any]] = {
    "FILE": {"help": "state_dict of the network, as npz"},
    "architecture": {
        "required": True,
        "help": "the command that trained the network, in quotes: its script and options",
    },
    "scale": {
        "action": "store_true",
        "help": "scale kernels by their certified norms into the budget",
    },
    "workdir": {"required": True, "help": "folder of the training run, or of a model"},
    "data": {"help": "data other than the training's, such as npy:FILE"},
    "num": {
        "type": count,
        "help": "how many examples, images of each side or samples (%(default)s)",
    },
    "certify": {
        "type": count_or_none,
        "help": "how many, from the first, get a guaranteed error; 0 for none (what takes some "
        "seconds, at most 64)",
    },
    "temperature": {"type": float, "help": "factor on the prior's scale (%(default)s)"},
    "seed": {"type": int, "help": "of the latents (%(default)s)"},
    "samples": {"type": count, "help": "of the model for each example (%(default)s)"},
    "context": {"help": "context, as --context=1.0,2.0,... or a .npy file with one per row"},
    "label": {"type": int, "help": "of which class, of a hybrid (any)"},
    "importance": {
        "type": count,
        "help": "also the importance-weighted bound of discrete data, with so many draws of noise "
        "an example",
    },
    "radii": {
        "type": radii,
        "help": "radii at which accuracy is verified and attacked, as .3,1.58: 2-norms of pixels "
        "on [0, 1], of a classifier",
    },
    "output": {"help": "where to write (%(default)s)"},
    "topology": {
        "required": True,
        "help": "v5e:4x8 and other TPU topologies; cuda:8 for eight GPUs",
    },
}


# Functions, and names in `OPTIONS`, some with a default; arguments without dashes are in capitals.
COMMANDS: dict[str, tuple[Callable[..., bool], str]] = {
    "evaluate": (evaluate, "workdir data importance radii"),
    "sample": (sample, "workdir num=64 temperature=1.0 seed=0 context label certify"),
    "reconstruct": (reconstruct, "workdir data num=512 certify"),
    "certify": (certify, "workdir"),
    "calibrate": (calibrate, "workdir data num=500 samples=99"),
    "report": (report, "workdir data importance radii"),
    "convert": (convert, "FILE architecture scale output=model.npz"),
    "plan": (plan, "topology"),
}


def make_parser() -> Parser:
    """The parser of `COMMANDS`."""
    parser = Parser(
        prog="python -m iresnet_jax", description="Everything before and after train.py."
    )
    parsers = parser.add_subparsers(
        dest="command", metavar="COMMAND", required=True, parser_class=Parser
    )
    for name, (execute, options) in COMMANDS.items():
        text = " ".join((inspect.getdoc(execute) or "").partition("\n\n")[0].split())
        command = parsers.add_parser(name, help=text, description=text)
        for option in options.split():
            flag, _, default = option.partition("=")
            settings: Any = OPTIONS[flag] | ({"default": default} if default else {})
            command.add_argument(flag if flag.isupper() else f"--{flag}", **settings)
        command.add_argument("--debug", action="store_true", help="show the traceback of a failure")
    return parser


def run(argv: Sequence[str]) -> int:
    """Runs one command; returns its exit status."""
    parser = make_parser()
    arguments, arguments.flags = parser.parse_known_args(argv)
    if arguments.flags and arguments.command != "plan":
        parser.error(f"unrecognized arguments: {' '.join(arguments.flags)}")
    platforms.cache_programs()
    execute, _ = COMMANDS[arguments.command]
    if "workdir" not in arguments:
        return 0 if execute(arguments) else 1
    folder, data = path_of(arguments.workdir), getattr(arguments, "data", None)
    platforms.use_all_cores(trained_run.read_config(folder))
    trained = trained_run.load(folder)
    return 0 if execute(trained.with_data(data) if data else trained, arguments) else 1


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and answers its mistakes in a sentence; returns its exit status."""
    argv = sys.argv[1:] if argv is None else argv
    return explain_failures(lambda: run(argv), debug="--debug" in argv)


if __name__ == "__main__":
    end_at_signals("give the same command to start again")
    sys.exit(main())
