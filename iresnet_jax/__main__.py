"""Everything after training: ``python -m iresnet_jax COMMAND --workdir DIR``."""

import argparse
import sys
from collections.abc import Sequence
from typing import NoReturn

from iresnet_jax.training.command_line import MISTAKE, explain_failures, quiet_backends
from iresnet_jax.training.interruption import end_at_signals


class Parser(argparse.ArgumentParser):
    """Answers mistakes in one sentence, without the usage."""

    def error(self, message: str) -> NoReturn:
        """Prints what was wrong and where to look, and exits."""
        print(f"error: {message}; see {self.prog} --help", file=sys.stderr)
        raise SystemExit(MISTAKE)


def evaluate(arguments: argparse.Namespace) -> int:
    """Test likelihood with its standard error; of a model with classes, its test error."""
    from iresnet_jax.evaluation import accuracy, likelihood, trained
    from iresnet_jax.evaluation.examples import held_out

    run = trained.load(arguments.workdir)
    settings, seed, source = run.config.evaluation, run.config.seed, run.source
    examples = held_out(source, settings, seed)
    results = []
    if not run.is_classifier:
        floor = None if source.toy is None else float(source.toy.entropy)
        results.append(likelihood.evaluate(run, examples, settings, seed, entropy_floor=floor))
    if run.has_classes:
        results.append(accuracy.evaluate(run, examples, source.labels("test"), settings.batch_size))
    _say(*run.notes, *results)
    return 0


def sample(arguments: argparse.Namespace) -> int:
    """Samples, to samples.png and samples.npy; exit status 1 if the inverse did not converge for all of them."""
    from iresnet_jax.evaluation import samples, trained
    from iresnet_jax.report.pictures import write_samples

    run = trained.load(arguments.workdir)
    labels = None if arguments.label is None else [arguments.label] * arguments.num
    how = {"temperature": arguments.temperature, "seed": arguments.seed, "labels": labels}
    drawn = samples.draw(run, arguments.num, run.config.evaluation, **how)
    png, npy = write_samples(drawn.values, run.spec.num_levels, arguments.workdir)
    _say(*run.notes, drawn.quality, f"written: {png} and {npy}")
    return 0 if drawn.converged.all() else 1


def reconstruct(arguments: argparse.Namespace) -> int:
    """Test examples encoded and inverted, to reconstructions.png; exit status 1 if the inverse failed for any."""
    from iresnet_jax.evaluation import inversion, trained
    from iresnet_jax.evaluation.examples import held_out
    from iresnet_jax.report.pictures import reconstructions, write_png

    run = trained.load(arguments.workdir)
    settings, seed = run.config.evaluation, run.config.seed
    result = inversion.reconstruct(run, held_out(run.source, settings, seed)[: arguments.num], settings, seed)
    figure = reconstructions(result)
    path = None if figure is None else write_png(figure, run.workdir / "reconstructions.png")
    _say(*run.notes, result.summary, f"written: {path}" if path else "")
    return 0 if result.trip.converged.all() else 1


def certify(arguments: argparse.Namespace) -> int:
    """Certified Lipschitz bound of every layer and block; exit status 1 if a block is not certified a contraction."""
    from iresnet_jax.evaluation import lipschitz, trained

    run = trained.load(arguments.workdir)
    certificate = lipschitz.measure(run)
    _say(*run.notes, certificate)
    return 0 if certificate.certified else 1


def freeze(arguments: argparse.Namespace) -> int:
    """The certified model as one small file, frozen.npz, for use without the workdir."""
    from iresnet_jax.evaluation import frozen, lipschitz, trained

    run = trained.load(arguments.workdir)
    certificate = lipschitz.measure(run)
    path = frozen.save(run, arguments.output)
    _say(*run.notes, certificate.verdict(), f"written: {path} ({path.stat().st_size / 1e6:.2g} MB)")
    return 0 if certificate.certified else 1


def ood(arguments: argparse.Namespace) -> int:
    """How well the model's scores tell other images from test images: AUROC, with each score's definition."""
    from iresnet_jax.evaluation import trained
    from iresnet_jax.evaluation.ood import compare

    run = trained.load(arguments.workdir)
    how = {"num": arguments.num, "data_dir": run.config.data.data_dir}
    _say(*run.notes, compare(run, run.source, arguments.against, run.config.evaluation, run.config.seed, **how))
    return 0


def report(arguments: argparse.Namespace) -> int:
    """All of it, to report.json and report.html."""
    from iresnet_jax.evaluation import trained
    from iresnet_jax.report.report import write

    run = trained.load(arguments.workdir)
    _say(write(run), f"report: {run.workdir / 'report.html'}")
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


def _say(*results: object) -> None:
    print("\n".join(filter(None, map(str, results))))


if __name__ == "__main__":
    end_at_signals("give the same command to start again")
    sys.exit(main())
