"""Commands of ``python -m iresnet_jax``; `iresnet_jax.__main__` has their table and options.

Each command prints its result and returns whether it succeeded: if not, the exit status is 1.
"""

import argparse
import dataclasses
import functools
import math
import sys
from typing import Any

import jax
import numpy as np
from jaxtyping import Float

from iresnet_jax import conversion
from iresnet_jax.data.arrays import FITTED_ARRAY
from iresnet_jax.evaluation import (
    calibration,
    classification,
    likelihood,
    robustness,
    round_trips,
    samples,
)
from iresnet_jax.evaluation.plots import reconstructions, write_png, write_samples
from iresnet_jax.evaluation.report import write
from iresnet_jax.models.architecture import FlowSpec
from iresnet_jax.models.certificate import Certificate
from iresnet_jax.models.classifier import Classifier
from iresnet_jax.models.contexts import as_vectors
from iresnet_jax.models.density import Density
from iresnet_jax.runs import plan as plans
from iresnet_jax.runs.command_line import parse_train_flags
from iresnet_jax.runs.config import Config, DataConfig
from iresnet_jax.runs.trained_run import Run, save
from iresnet_jax.storage import path_of

# Rough time for guaranteed errors of inverses if no number of examples is given.
CERTIFY_S = 5.0


def evaluate(run: Run, arguments: argparse.Namespace) -> bool:
    """Measures a model on the test examples."""
    run = _with_settings(run, arguments).with_data_checked()
    model, examples = run.model, run.test_examples()
    settings, seed = run.config.evaluation, run.config.seed
    lines = []
    if isinstance(model, Density):
        floor, contexts = run.data.entropy, run.test_contexts()
        lines.append(
            likelihood.measure(
                model, examples, settings, seed, contexts=contexts, entropy_floor=floor
            )
        )
    if run.model.spec.num_classes is not None:
        labels = run.data.labels["test"]
        lines.append(classification.evaluate(model, examples, labels, settings.batch_size))
        if isinstance(model, Classifier) and settings.radii:
            lines.append(robustness.measure(model, examples, labels, settings, seed)[0])
    _say(*run.notes, *lines)
    return True


def sample(run: Run, arguments: argparse.Namespace) -> bool:
    """Draws samples of a density."""
    model, size = run.model, run.config.evaluation.batch_size
    if not isinstance(model, Density):
        raise ValueError(
            f"{run.folder} holds no density, so there are no samples: that takes a "
            "density objective"
        )
    contexts = None
    if arguments.context is not None:
        contexts = read_contexts(arguments.context, model.spec.context_dim)
        if len(contexts) > arguments.num:
            raise ValueError(
                f"{len(contexts)} contexts need as many samples, got --num {arguments.num}: give "
                f"--num {len(contexts)}"
            )
    values, convergence = samples.draw(
        model,
        arguments.num,
        size,
        temperature=arguments.temperature,
        seed=arguments.seed,
        labels=None if arguments.label is None else [arguments.label] * arguments.num,
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
    try:
        if text.endswith(".npy"):
            found = np.load(text, allow_pickle=False)
        else:
            found = np.array([float(n) for n in text.split(",")])
        if not np.all(np.isfinite(found)):
            raise ValueError("not all are finite")
        return np.atleast_2d(as_vectors(found.astype(np.float32), context_dim))
    except (MemoryError, OSError, TypeError, ValueError) as error:
        raise ValueError(
            f"--context takes numbers such as 1.0,2.0 or a .npy file, got {text!r}: {error}"
        ) from None


def reconstruct(run: Run, arguments: argparse.Namespace) -> bool:
    """Encodes test examples and inverts them."""
    run = run.with_data_checked()
    examples, size = run.test_examples()[: arguments.num], run.config.evaluation.batch_size
    contexts = run.test_contexts()
    contexts = None if contexts is None else contexts[: arguments.num]
    num = _num_certified(arguments, run.model.spec.flow)
    result = round_trips.reconstruct(
        run.model, examples, size, run.config.seed, contexts=contexts, num_certified=num
    )
    figure = reconstructions(result.originals, result.reconstructions)
    lines = [*run.notes, result.summary]
    if figure is not None:
        lines.append(f"written: {write_png(figure, run.folder / 'reconstructions.png')}")
    _say(*lines)
    return result.summary.fraction_converged == 1


def _num_certified(arguments: argparse.Namespace, flow: FlowSpec) -> int | None:
    """Number of examples to certify: the requested number, or as many as take some seconds; None
    for none.
    """
    if arguments.certify is None:
        return round_trips.affordable(flow, CERTIFY_S)
    return arguments.certify or None


def certify(run: Run, _: argparse.Namespace) -> bool:
    """Bounds the Lipschitz constant of every layer and block."""
    certificate = run.model.certificate()
    of_noise = run.model.noise_certificate() if isinstance(run.model, Density) else None
    _say(*run.notes, certificate, *([f"flow of noise:\n{of_noise}"] if of_noise else ()))
    return certificate.certified and (of_noise is None or of_noise.certified)


def calibrate(run: Run, arguments: argparse.Namespace) -> bool:
    """Tests whether posteriors contain the truth as often as they state."""
    run = run.with_data_checked()
    found = calibration.calibrate_run(run, arguments.num, arguments.samples)
    _say(*run.notes, found)
    return found.is_calibrated


def report(run: Run, arguments: argparse.Namespace) -> bool:
    """Writes all results."""
    _say(write(_with_settings(run, arguments)), f"report: {run.folder / 'report.html'}")
    return True


def _with_settings(run: Run, arguments: argparse.Namespace) -> Run:
    """The run, with the requested importance-weighted bound and robustness in its evaluation."""
    changes: dict[str, Any] = {
        "num_importance_draws": arguments.importance,
        "radii": arguments.radii,
    }
    if arguments.importance is not None and not (
        isinstance(run.model, Density) and run.model.spec.is_discrete
    ):
        raise ValueError(
            "--importance is for densities of integer levels or of data with cells: leave it out"
        )
    if arguments.radii is not None and not isinstance(run.model, Classifier):
        raise ValueError("--radii are for classifiers: leave them out")
    evaluation = dataclasses.replace(
        run.config.evaluation, **{k: v for k, v in changes.items() if v is not None}
    )
    return dataclasses.replace(run, config=dataclasses.replace(run.config, evaluation=evaluation))


def convert(arguments: argparse.Namespace) -> bool:
    """Converts a network of the authors' PyTorch codes to a model, which the other commands take
    with ``--data``.
    """
    model = conversion.convert(arguments.FILE, arguments.architecture)
    certificate = model.certificate()
    excess = _excess(certificate)
    if arguments.scale:
        model = model.freeze()
        certificate, excess = model.certificate(), f"{excess}; now they are within it"
    objective = "density" if isinstance(model, Density) else "classification"
    folder = path_of(arguments.output).parent
    folder.mkdir(parents=True, exist_ok=True)
    run = Run(folder, model, Config(objective=objective, data=DataConfig(FITTED_ARRAY)), "", 0)
    path = save(run, arguments.output)
    _say(excess, certificate.verdict, f"written: {path} ({len(path.read_bytes()) / 1e6:.2g} MB)")
    return certificate.certified


def _excess(certificate: Certificate) -> str:
    """A sentence on the excess of certified norms of layers over the coefficient."""
    layers = [
        (f"{block.name}/{layer.name}", layer.bound)
        for block in certificate.blocks
        for layer in block.layers
    ]
    coeff = certificate.coeff or math.nan
    num_above = sum(bound > coeff for _, bound in layers)
    name, largest = max(layers, key=lambda layer: layer[1])
    return (
        f"{num_above} of {len(layers)} layers have a certified norm above the coefficient "
        f"{coeff:g}; the largest is {largest:.5f} ({100 * (largest / coeff - 1):+.2g} %), of {name}"
    )


def plan(arguments: argparse.Namespace) -> bool:
    """Compiles the training step of a config for a machine that is not here."""
    # The compiler for TPUs compiles without running anything.
    jax.config.update("jax_platforms", "cpu")
    config = parse_train_flags(["python -m iresnet_jax plan", *arguments.flags]).config
    say = functools.partial(print, file=sys.stderr, flush=True)
    made = plans.make(config, plans.machine(arguments.topology), say=say)
    _say(made)
    return made.problem is None


def _say(*lines: object) -> None:
    print("\n".join(map(str, lines)))
