"""Everything after training: ``python -m iresnet_jax COMMAND --workdir DIR``; and, before it, ``plan`` and ``profile``."""

import argparse
import sys
import tempfile
from collections.abc import Sequence
from typing import TYPE_CHECKING, NoReturn

from iresnet_jax.runs import allocator, machine
from iresnet_jax.runs.command_line import DEFAULT_CONFIG, MISTAKE, explain_failures, parse_train_flags, quiet_backends
from iresnet_jax.runs.signals import end_at_signals

if TYPE_CHECKING:
    import numpy as np

    from iresnet_jax.models.architecture import FlowSpec
    from iresnet_jax.runs.trained_run import Run

CERTIFY_S = 5.0  # roughly, for guaranteed errors of inverses where no number of examples is asked for


class Parser(argparse.ArgumentParser):
    """Answers mistakes in one sentence, without the usage."""

    def error(self, message: str) -> NoReturn:
        """Prints what was wrong and where to look, and exits."""
        print(f"error: {message}; see {self.prog} --help", file=sys.stderr)
        raise SystemExit(MISTAKE)


def evaluate(trained: "Run", _: argparse.Namespace) -> int:
    """Test likelihood, test error of a model with classes, divergence from a known posterior, or error of reconstructions."""
    from iresnet_jax.evaluation import accuracy, inverse_problem, likelihood, posterior
    from iresnet_jax.models.density import Density
    from iresnet_jax.models.reconstructor import Reconstructor

    trained = trained.with_data_checked()
    model, settings, seed, examples = trained.model, trained.config.evaluation, trained.config.seed, trained.test_examples()
    results = []
    if isinstance(model, Density):
        floor, contexts = trained.data.entropy, trained.test_contexts()
        results.append(likelihood.measure(model, examples, settings, seed, contexts=contexts, entropy_floor=floor).summary)
        if compared := posterior.compare_run(trained):
            results.append(compared.summary)
    if isinstance(model, Reconstructor):
        results.append(inverse_problem.evaluate_run(trained)[0])
    elif trained.has_classes:
        results.append(accuracy.evaluate(model, examples, trained.data.labels["test"], settings.batch_size))
    _say(*trained.notes, *results)
    return 0


def sample(trained: "Run", arguments: argparse.Namespace) -> int:
    """Samples, to samples.png and samples.npy; exit status 1 if the inverse did not converge for all of them."""
    from iresnet_jax.evaluation import samples
    from iresnet_jax.models.density import Density
    from iresnet_jax.report.pictures import write_samples

    model, size = trained.model, trained.config.evaluation.batch_size
    if not isinstance(model, Density):
        raise ValueError(f"{trained.folder} holds no density, so there are no samples: that takes a density objective")
    labels = None if arguments.label is None else [arguments.label] * arguments.num
    contexts = context_vectors(arguments.context, model.spec.flow.context_dim)
    drawn = samples.draw(
        model,
        arguments.num,
        size,
        temperature=arguments.temperature,
        seed=arguments.seed,
        labels=labels,
        contexts=contexts,
        num_certified=_num_certified(arguments, model.spec.flow),
    )
    png, npy = write_samples(drawn.values, model.spec.num_levels, trained.folder)
    _say(*trained.notes, drawn.quality, f"written: {png} and {npy}")
    return 0 if drawn.converged.all() else 1


def context_vectors(text: str | None, context_dim: int) -> "np.ndarray | None":
    """The context vectors that ``--context`` gives: numbers separated by commas, or a ``.npy`` file with one a row.

    Raises:
        ValueError: If the model takes none, needs one, or takes vectors of another length.
    """
    import numpy as np

    if text is None:
        if context_dim:
            raise ValueError(f"this density takes a context: give its {context_dim} numbers with --context 1.0,2.0,...")
        return None
    if not context_dim:
        raise ValueError("this density takes no context: leave --context out")
    try:
        given = np.load(text, allow_pickle=False) if text.endswith(".npy") else np.array([float(n) for n in text.split(",")])
        contexts = np.atleast_2d(given).astype(np.float32)
    except (OSError, ValueError) as error:
        raise ValueError(f"--context takes numbers such as 1.0,2.0 or a .npy file, got {text!r}: {error}") from None
    if contexts.ndim != 2 or contexts.shape[1] != context_dim or not np.all(np.isfinite(contexts)):
        raise ValueError(f"--context must give {context_dim} finite numbers a sample, got shape {contexts.shape}")
    return contexts


def reconstruct(trained: "Run", arguments: argparse.Namespace) -> int:
    """Test examples encoded and inverted, to reconstructions.png; exit status 1 if the inverse failed for any."""
    from iresnet_jax.evaluation import inversion
    from iresnet_jax.models.classifier import Classifier
    from iresnet_jax.report.pictures import reconstructions, write_png

    if isinstance(trained.model, Classifier):
        trained.model.require_bijection()
    trained = trained.with_data_checked()
    examples, size = trained.test_examples()[: arguments.num], trained.config.evaluation.batch_size
    contexts = trained.test_contexts()
    contexts = None if contexts is None else contexts[: arguments.num]
    num = _num_certified(arguments, trained.model.spec.flow)
    result = inversion.reconstruct(trained.model, examples, size, trained.config.seed, contexts=contexts, num_certified=num)
    figure = reconstructions(result)
    path = None if figure is None else write_png(figure, trained.folder / "reconstructions.png")
    _say(*trained.notes, result.summary, f"written: {path}" if path else "")
    return 0 if result.trip.converged.all() else 1


def certify(trained: "Run", _: argparse.Namespace) -> int:
    """Certified Lipschitz bound of every layer and block; exit status 1 if a block is not certified a contraction."""
    certificate = trained.model.certificate()
    _say(*trained.notes, certificate)
    return 0 if certificate.certified else 1


def freeze(trained: "Run", arguments: argparse.Namespace) -> int:
    """The certified model as one small file, model.npz, for use without the folder of its training."""
    from iresnet_jax.runs.trained_run import save

    certificate = trained.model.certificate()
    path = save(trained, arguments.output)
    _say(*trained.notes, certificate.verdict, f"written: {path} ({path.stat().st_size / 1e6:.2g} MB)")
    return 0 if certificate.certified else 1


def ood(trained: "Run", arguments: argparse.Namespace) -> int:
    """How well the model's scores tell other images from test images: AUROC, with each score's definition."""
    from iresnet_jax.evaluation.ood import compare

    trained = trained.with_data_checked()
    settings, seed, data_dir = trained.config.evaluation, trained.config.seed, trained.config.data.data_dir
    against, num = arguments.against, arguments.num
    _say(*trained.notes, compare(trained.model, trained.data, against, settings, seed, num=num, data_dir=data_dir))
    return 0


def robustness(trained: "Run", arguments: argparse.Namespace) -> int:
    """Verified accuracy by radius, beside the accuracy under attack; exit status 1 if the attack breaks a certificate."""
    from iresnet_jax.evaluation.robustness import evaluate
    from iresnet_jax.models.classifier import Classifier

    model = trained.model
    if not isinstance(model, Classifier):
        raise ValueError(f"{trained.folder} holds a density: radii are certified for classifiers")
    trained = trained.with_data_checked()
    images, labels = trained.test_examples()[: arguments.num], trained.data.labels["test"][: arguments.num]
    size = trained.config.evaluation.batch_size
    result = evaluate(model, images, labels, radii=arguments.radii, batch_size=size, seed=trained.config.seed)
    _say(*trained.notes, result)
    return 0 if result.num_broken == 0 else 1


def report(trained: "Run", _: argparse.Namespace) -> int:
    """All results, to report.json and report.html."""
    from iresnet_jax.report.report import write

    _say(write(trained), f"report: {trained.folder / 'report.html'}")
    return 0


SHARED = (evaluate, sample, reconstruct, report)  # commands whose examples are shared by all devices


def plan(arguments: argparse.Namespace, rest: Sequence[str]) -> int:
    """Whether the training step of a config fits a machine that is not here; exit status 1 if it does not."""
    import jax

    jax.config.update("jax_platforms", "cpu")  # the compiler for TPUs is asked to compile, not to run
    from iresnet_jax.runs.planning import plan as plans

    config = parse_train_flags(["plan", *rest], default_config=DEFAULT_CONFIG).config
    made = plans.make(config, plans.machine(arguments.topology), find_largest=arguments.largest_batch)
    _say(made)
    return 0 if made.problem is None else 1


def profile(arguments: argparse.Namespace, rest: Sequence[str]) -> int:
    """Where the time of a config's training step goes on this machine: a table, and a trace to look into."""
    config = parse_train_flags(["profile", *rest], default_config=DEFAULT_CONFIG).config
    machine.use_all_cores(config)
    from iresnet_jax.runs.machine import keep_compiled_programs
    from iresnet_jax.runs.planning import profile as profiles

    keep_compiled_programs()
    _say(profiles.take(config, arguments.output or tempfile.mkdtemp(prefix="iresnet_jax_profile_")))
    return 0


def count(text: str, least: int = 1) -> int:
    """A number of examples, for argparse."""
    number = int(text)
    if number < least:
        raise argparse.ArgumentTypeError(f"it must be at least {least}, got {number}")
    return number


def numbers(text: str) -> tuple[float, ...]:
    """Numbers separated by commas, for argparse."""
    return tuple(float(number) for number in text.split(","))


def make_parser() -> Parser:
    """The commands and their options."""
    parser = Parser(prog="python -m iresnet_jax", description="Everything before and after train.py.")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True, parser_class=Parser)
    options = {}
    for command in (evaluate, sample, reconstruct, certify, freeze, ood, robustness, report):
        described = command.__doc__ or ""
        option = commands.add_parser(command.__name__, help=described, description=described)
        option.add_argument("--workdir", required=True, metavar="DIR", help="folder of the training run, or of a model")
        option.add_argument("--debug", action="store_true", help="show the traceback of a failure")
        option.set_defaults(run=command)
        options[command.__name__] = option
    for name in ("evaluate", "reconstruct", "ood", "robustness", "report"):
        options[name].add_argument("--data", metavar="NAME", help="data instead of those of training, such as npy:FILE")
    for name in ("sample", "reconstruct"):
        options[name].add_argument(
            "--certify",
            type=lambda text: count(text, least=0),
            metavar="N",
            help="how many, from the first, get a guaranteed error; 0 for none (what takes some seconds, at most 64)",
        )
    options["sample"].add_argument("--num", type=int, default=64, help="how many (64)")
    options["sample"].add_argument("--temperature", type=float, default=1.0, help="factor on the prior's scale (1)")
    options["sample"].add_argument("--seed", type=int, default=0, help="of the latents (0)")
    options["sample"].add_argument("--context", metavar="NUMBERS", help="context: 1.0,2.0,... or a .npy file with one a row")
    options["sample"].add_argument("--label", type=int, help="of which class, of a hybrid (any)")
    options["ood"].add_argument("--against", default="rotated", help="rotated (default), noise, or the name of a data set")
    options["ood"].add_argument("--num", type=count, default=2000, help="how many images of each side, at most (2000)")
    options["robustness"].add_argument("--num", type=count, default=100, help="how many test images, from the first (100)")
    options["robustness"].add_argument(
        "--radii",
        type=numbers,
        default=(0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0),
        metavar="NUMBERS",
        help="norms of perturbations of pixels in [0, 1], increasing (0.001,0.003,...,1)",
    )
    options["freeze"].add_argument("--output", metavar="FILE", help="where to write (model.npz in the workdir)")
    options["reconstruct"].add_argument("--num", type=count, default=512, help="how many test examples, from the first (512)")
    described = plan.__doc__ or ""
    option = commands.add_parser("plan", help=described, description=f"{described} Other options: those of train.py.")
    option.add_argument("--topology", required=True, help="v5e:4x8 and other TPU topologies; cuda:8 for eight GPUs")
    option.add_argument(
        "--largest-batch", action="store_true", help="find the largest batch that fits, in several compilations"
    )
    option.add_argument("--debug", action="store_true", help="show the traceback of a failure")
    described = profile.__doc__ or ""
    option = commands.add_parser("profile", help=described, description=f"{described} Other options: those of train.py.")
    option.add_argument("--output", metavar="DIR", help="where to write the trace (a new temporary folder)")
    option.add_argument("--debug", action="store_true", help="show the traceback of a failure")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; returns its exit status."""
    parser = make_parser()
    arguments, rest = parser.parse_known_args(argv)
    quiet_backends()
    if of_config := {"plan": plan, "profile": profile}.get(arguments.command):
        return explain_failures(lambda: of_config(arguments, rest), debug=arguments.debug)
    if rest:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")

    def command() -> int:
        from iresnet_jax.runs import trained_run  # slow to import: --help and mistakes are answered without it
        from iresnet_jax.runs.machine import keep_compiled_programs

        keep_compiled_programs()
        if arguments.run in SHARED:
            machine.use_all_cores(trained_run.read_config(arguments.workdir))
        run, data = trained_run.load(arguments.workdir), getattr(arguments, "data", None)
        return arguments.run(run.with_data(data) if data else run, arguments)

    return explain_failures(command, debug=arguments.debug)


def _num_certified(arguments: argparse.Namespace, flow: "FlowSpec") -> int | None:
    """Examples to certify: as many as were asked for, or as take some seconds; None for none."""
    from iresnet_jax.evaluation.guarantee import affordable

    return affordable(flow, CERTIFY_S) if arguments.certify is None else arguments.certify or None


def _say(*results: object) -> None:
    print("\n".join(filter(None, map(str, results))))


if __name__ == "__main__":
    runs_steps = sys.argv[1:2] == ["profile"]  # as train.py runs them
    if runs_steps:
        allocator.use_large_pages()
    allocator.collect_garbage_rarely()
    end_at_signals("give the same command to start again")
    if runs_steps:
        allocator.keep_freed_memory()
        machine.compile_quickly()
    sys.exit(main())
