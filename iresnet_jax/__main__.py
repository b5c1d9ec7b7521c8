"""Everything after training: ``python -m iresnet_jax COMMAND --workdir DIR``."""

import argparse
import sys
from collections.abc import Sequence
from typing import NoReturn

from iresnet_jax.training.command_line import MISTAKE, explain_failures, quiet_backends
from iresnet_jax.training.interruption import take_over


class Parser(argparse.ArgumentParser):
    """Answers mistakes in one sentence, without the usage."""

    def error(self, message: str) -> NoReturn:
        """Prints what was wrong and where to look, and exits."""
        print(f"error: {message}; see {self.prog} --help", file=sys.stderr)
        raise SystemExit(MISTAKE)


def evaluate(arguments: argparse.Namespace) -> int:
    """Test likelihood with its standard error, from the unbiased estimator; of a model with classes, its test error."""
    from iresnet_jax.evaluation import accuracy as classify
    from iresnet_jax.evaluation import likelihood as evaluate
    from iresnet_jax.evaluation import trained

    model = trained.load(arguments.workdir)
    said = [] if model.is_classifier else [evaluate.describe(evaluate.evaluate(model))]
    if model.has_classes:
        said.append(classify.describe(classify.evaluate(model)))
    _say(*model.notes, *said)
    return 0


def sample(arguments: argparse.Namespace) -> int:
    """Samples, to samples.png and samples.npy; exit status 1 if the inverse did not converge for all of them."""
    from iresnet_jax.evaluation import samples as sample
    from iresnet_jax.evaluation import trained

    model = trained.load(arguments.workdir)
    labels = None if arguments.label is None else [arguments.label] * arguments.num
    samples = sample.draw(model, arguments.num, temperature=arguments.temperature, seed=arguments.seed, labels=labels)
    png, npy = sample.write(model, samples, arguments.workdir)
    _say(*model.notes, sample.describe(samples), f"written: {png} and {npy}")
    return 0 if samples.converged.all() else 1


def reconstruct(arguments: argparse.Namespace) -> int:
    """Test examples encoded and inverted, to reconstructions.png; exit status 1 if the inverse failed for any."""
    from iresnet_jax.evaluation import inversion as reconstruct
    from iresnet_jax.evaluation import trained

    model = trained.load(arguments.workdir)
    result = reconstruct.reconstruct(model, arguments.num)
    path = reconstruct.write(result, arguments.workdir)
    _say(*model.notes, reconstruct.describe(reconstruct.summarize(model, result)), f"written: {path}" if path else "")
    return 0 if result.trip.converged.all() else 1


def certify(arguments: argparse.Namespace) -> int:
    """Certified Lipschitz bound of every layer and block; exit status 1 if a block is not certified a contraction."""
    from iresnet_jax.evaluation import lipschitz, trained

    model = trained.load(arguments.workdir)
    constants = lipschitz.measure(model)
    _say(*model.notes, lipschitz.table(constants), lipschitz.verdict(constants))
    return 0 if constants["certified"] else 1


def freeze(arguments: argparse.Namespace) -> int:
    """The certified model as one small file, frozen.npz, for use without the workdir."""
    from iresnet_jax.evaluation import frozen, lipschitz, trained

    model = trained.load(arguments.workdir)
    constants = lipschitz.measure(model)
    path = frozen.save(model, arguments.output)
    _say(*model.notes, lipschitz.verdict(constants), f"written: {path} ({path.stat().st_size / 1e6:.2g} MB)")
    return 0 if constants["certified"] else 1


def ood(arguments: argparse.Namespace) -> int:
    """How well the model's scores tell other images from test images: AUROC, with each score's definition."""
    from iresnet_jax.evaluation import ood, trained

    model = trained.load(arguments.workdir)
    _say(*model.notes, ood.describe(ood.compare(model, arguments.against, num=arguments.num)))
    return 0


def report(arguments: argparse.Namespace) -> int:
    """All of it, to report.json and report.html."""
    from iresnet_jax.evaluation import trained
    from iresnet_jax.report import report

    model = trained.load(arguments.workdir)
    _say(report.describe(report.write(model), model.workdir))
    return 0


def count(text: str) -> int:
    """A number of examples, for argparse."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"it must be at least 1, got {number}")
    return number


def make_parser() -> Parser:
    """The commands and their options."""
    parser = Parser(prog="python -m iresnet_jax", description="Everything after training a model with train.py.")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True, parser_class=Parser)
    options = {}
    for command in (evaluate, sample, reconstruct, certify, freeze, ood, report):
        described = command.__doc__ or ""
        option = commands.add_parser(command.__name__, help=described, description=described)
        option.add_argument("--workdir", required=True, metavar="DIR", help="folder of the training run, or of a frozen model")
        option.add_argument("--debug", action="store_true", help="show the traceback of a failure")
        option.set_defaults(run=command)
        options[command.__name__] = option
    options["sample"].add_argument("--num", type=int, default=64, help="how many (64)")
    options["sample"].add_argument("--temperature", type=float, default=1.0, help="factor on the prior's scale (1)")
    options["sample"].add_argument("--seed", type=int, default=0, help="of the latents (0)")
    options["sample"].add_argument("--label", type=int, help="of which class, of a hybrid (any)")
    options["ood"].add_argument("--against", default="rotated", help="rotated (default), noise, or the name of a data set")
    options["ood"].add_argument("--num", type=count, default=2000, help="how many images of each side, at most (2000)")
    options["freeze"].add_argument("--output", metavar="FILE", help="where to write (frozen.npz in the workdir)")
    options["reconstruct"].add_argument("--num", type=count, default=512, help="how many test examples, from the first (512)")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; returns its exit status."""
    arguments = make_parser().parse_args(argv)
    quiet_backends()
    return explain_failures(lambda: arguments.run(arguments), debug=arguments.debug)


def _say(*lines: str) -> None:
    print("\n".join(filter(None, lines)))


if __name__ == "__main__":
    take_over("give the same command to start again")
    sys.exit(main())
