"""Ours against normflows and a naive power series in PyTorch: same architectures, weights, cores and accuracy, in one run.

    python benchmarks/peers.py [--parts step,likelihood,...] [--time-to 3.37] [--quick]

Every peer, size and number of cores is a process of its own, pinned to its cores, and takes turns with the others. normflows
runs as in its examples. The naive series is Algorithm 2 of Behrmann et al. 2019 as it stands: Hutchinson's probe, and all terms
differentiated. Ours is the step of train.py with all that it sets up. For likelihoods, inverses and samples ours has a device
a core, as commands of `python -m iresnet_jax` have.

    step        time and largest memory of a training step, on one core and on two
    likelihood  seconds an image until |bias| + standard error of the log-likelihood is at most .001 bits/dim
    inverse     time of the inverse of a block to a true error of 1e-5, by its Lipschitz constant
    sampling    samples a second of trained flows to a true error of 1e-5
    startup     time from the start of a process to the end of its first step

The floor of our step is its arithmetic at the speed of one large matrix product on the same cores.

The peers train with Adam on batches that our preprocessing has gone over, and keep no moving average of their parameters.
normflows' seconds of a likelihood are extrapolated: time of a draw, times the draws that its measured variance asks for.
Inverses run by the rule of each side, and tuned: with the largest power of ten as tolerance that reaches the true error. Where
no tolerance of normflows does, both are tuned to the least error that it reaches. The true error is the largest of an entry of
the flow's input, against the preimage in float64, which PyTorch confirms.
"""

import argparse
import contextlib
import importlib.metadata
import tempfile
from dataclasses import asdict
from pathlib import Path

import _peers_inverse as inverse
import _peers_likelihood as likelihood
import _peers_training as training
from _peers_cases import colour_config
from _peers_processes import core_counts, workers
from _record import parser, table, write

SIZES = ("digits", "64", "128")  # the config, and channels of `colour_config`
PARTS = {
    "step": (training.steps, training.step_rows, training.STEP_HEADER),
    "likelihood": (likelihood.likelihoods, likelihood.rows, likelihood.HEADER),
    "inverse": (inverse.inverses, inverse.inverse_rows, inverse.INVERSE_HEADER),
    "sampling": (inverse.samples, inverse.sample_rows, inverse.SAMPLE_HEADER),
    "startup": (training.startups, training.startup_rows, training.STARTUP_HEADER),
}


def run(part, arguments):
    """Measures a part, prints its table and returns its results."""
    measure, rows, header = PARTS[part]
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        results = measure(arguments, stack.enter_context(workers()), folder)
    print(f"\n{part}\n{table(rows(results), header)}", flush=True)
    return results


def main():
    options = parser(__doc__)
    options.add_argument("--parts", default=",".join(PARTS), metavar="A,B", help=f"of {', '.join(PARTS)}; '' for none")
    options.add_argument("--sizes", nargs="+", default=SIZES, choices=SIZES, help="of the training step")
    options.add_argument("--time-to", type=float, metavar="X", help="also trains on Fashion-MNIST to X bits/dim; takes minutes")
    options.add_argument("--train-flag", action="append", default=[], metavar="=FLAG", help="of train.py in that training")
    arguments = options.parse_args()
    chosen = [part for part in arguments.parts.split(",") if part]
    if unknown := set(chosen) - set(PARTS):
        options.error(f"there are no parts {', '.join(sorted(unknown))}: choose of {', '.join(PARTS)}")
    try:
        versions = {name: importlib.metadata.version(name) for name in ("normflows", "torch")}
    except importlib.metadata.PackageNotFoundError as error:
        raise SystemExit(f"error: there is no package {error.name}: install the packages of the extra 'bench'") from None
    settings = {
        "versions": versions,
        "cores": core_counts(),
        "colour": asdict(colour_config(64).model),
        "likelihood_bits_per_dim": likelihood.TARGET,
        "inverse_error_of_an_entry": inverse.TOLERANCE,
    }
    for part in chosen:
        record(part, arguments, settings, run(part, arguments))
    if arguments.time_to is not None:
        with tempfile.TemporaryDirectory() as folder:
            results = training.time_to(arguments, Path(folder))
        print(f"\ntime to {arguments.time_to} bits/dim\n{table(training.time_rows(results), training.TIME_HEADER)}")
        record("time_to", arguments, settings, results)


def record(part, arguments, settings, results):
    """Writes the record of a part as soon as it is measured."""
    output = arguments.output and arguments.output.with_stem(f"{arguments.output.stem}_{part}")
    write(f"peers_{part}", argparse.Namespace(**{**vars(arguments), "output": output}), settings, results)


if __name__ == "__main__":
    main()
