"""Test examples to latents or features and back: is the trained network invertible, and how exactly?"""

import os
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from iresnet_jax.bijections import bijection as bijections
from iresnet_jax.bijections import reshape
from iresnet_jax.data import feed
from iresnet_jax.evaluation.trained import Trained, require_bijection
from iresnet_jax.files import replacing
from iresnet_jax.maths.inverse.fixed_point import example_norm
from iresnet_jax.models import flow as model
from iresnet_jax.report import plots
from iresnet_jax.training.building import build_solver
from iresnet_jax.training.network_input import from_network_input, network_input

NUM_EXAMPLES = 512  # at most, unless asked for: a sample large enough to see a rare failure, small enough for a laptop
NUM_SHOWN = 8
RECOVERED = 1e-4  # largest entry of an error up to which an example counts as recovered, whatever was promised
REFINED_ATOL = 1e-13


class RoundTrip(NamedTuple):
    """How examples came back, and how the inverse ended for each.

    Attributes:
        max_abs_error: Largest entry of the error of each, in the units of the flow's input.
        euclidean_error: Euclidean norm of the same.
        error_bound: What is guaranteed for it by certified Lipschitz bounds, propagated through the chain.
        converged: Whether each example's inverse met its tolerance in all blocks.
        num_evals: Evaluations of residual branches in all blocks together.
    """

    max_abs_error: Float[Array, " n"] | Float[np.ndarray, " n"]
    euclidean_error: Float[Array, " n"] | Float[np.ndarray, " n"]
    error_bound: Float[Array, " n"] | Float[np.ndarray, " n"]
    converged: Bool[Array, " n"] | Bool[np.ndarray, " n"]
    num_evals: Int[Array, " n"] | Int[np.ndarray, " n"]


class Reconstructions(NamedTuple):
    """Examples and what became of them.

    Attributes:
        originals: Continuous examples: images in [0, 1], or points.
        reconstructions: After encoding and inverting, in the precision of training.
        padding_residual: Euclidean norm of a classifier's padding channels after that; 0 without them.
        trip: How that went.
        refined: How it went with both ways in float64, for the first 512 examples.
    """

    originals: Float[np.ndarray, "n ..."]
    reconstructions: Float[np.ndarray, "n ..."]
    padding_residual: Float[np.ndarray, " n"]
    trip: RoundTrip
    refined: RoundTrip


def reconstruct(trained: Trained, num: int = NUM_EXAMPLES) -> Reconstructions:
    """Encodes test examples and inverts their latents, in the precision of training and in float64.

    Args:
        trained: The model.
        num: Test examples, from the first; at most all there are.

    Raises:
        ValueError: If ``num`` is not positive.
    """
    require_bijection(trained)
    if num < 1:
        raise ValueError(f"the number of examples must be at least 1, got {num}")
    spec = trained.spec
    examples = trained.source.held_out("test", num, trained.config.seed)
    key = jax.random.key(trained.config.seed)
    batch_size = min(trained.config.evaluation.batch_size, len(examples))
    solver = build_solver(trained.config.evaluation)

    pad_channels = spec.pad_channels if trained.is_classifier else 0

    @jax.jit
    def prepare(key, examples):
        return network_input(spec, key, examples)

    @jax.jit
    def single(weights, there):
        back, trip = round_trip(spec.flow, weights, there, solver)
        return from_network_input(spec, back), reshape.padding_residual(back, pad_channels), trip

    @jax.jit
    def double(weights, there):
        precise = solver._replace(atol=REFINED_ATOL, refine=True)
        return round_trip(spec.flow, weights, there.astype(jnp.float64), precise)[1]

    parts, refined = [], []
    for i, (indices, mask) in enumerate(feed.eval_batches(len(examples), batch_size)):
        originals, there = prepare(jax.random.fold_in(key, i), examples[indices])
        outputs = jax.device_get((originals, *single(trained.weights, there)))
        parts.append(jax.tree.map(lambda values, mask=mask: values[mask], outputs))
        if i * batch_size < NUM_EXAMPLES:
            with jax.enable_x64():
                trip = jax.device_get(double(trained.weights, there))
            refined.append(jax.tree.map(lambda values, mask=mask: values[mask], trip))

    def joined(parts):
        return jax.tree.map(lambda *values: np.concatenate(values), *parts)

    originals, reconstructions, padding_residual, trip = joined(parts)
    return Reconstructions(originals, reconstructions, padding_residual, trip, joined(refined))


def round_trip(
    spec: model.FlowSpec, weights: Any, there: Float[Array, "b ..."], solver: bijections.Solver
) -> tuple[Float[Array, "b ..."], RoundTrip]:
    """The flow and its inverse.

    The solver bounds the distance to the exact preimage of the latents as they are. Encoding has rounded them, in each block
    by no more than the solver allows for the rounding of its residual; so twice its bound holds for the way there and back.

    Args:
        spec: The flow.
        weights: Frozen weights.
        there: Inputs of the flow.
        solver: How to invert.

    Returns:
        What came back, and how it went.
    """
    bijection = model.bijection(spec, weights, solver=solver)
    back, info = bijection.inverse(bijection.forward(there))
    error = back - there
    largest = jnp.max(jnp.abs(error), axis=tuple(range(1, error.ndim)))
    return back, RoundTrip(largest, example_norm(error), 2 * info.error_bound, info.converged, info.num_evals)


def summarize(trained: Trained, result: Reconstructions) -> dict[str, Any]:
    """The numbers of a report.

    Returns:
        ``max_abs_error`` and ``max_error_bound`` in the units of the flow's input, ``max_euclidean_error``,
        ``fraction_within_bound`` of the examples' Euclidean errors, ``fraction_converged``, ``fraction_recovered`` (to 1e-4,
        whatever the bounds promise), ``mean_evals`` (a block and example), ``num_examples``, for images
        ``max_grey_level_error``, for padded ones ``max_padding_residual``; and ``refined``, the same in float64.
    """

    def numbers(trip: RoundTrip) -> dict[str, Any]:
        return {
            "max_abs_error": float(trip.max_abs_error.max()),
            "max_euclidean_error": float(trip.euclidean_error.max()),
            "max_error_bound": float(trip.error_bound.max()),
            "fraction_within_bound": float((trip.euclidean_error <= trip.error_bound).mean()),
            "fraction_converged": float(trip.converged.mean()),
            "fraction_recovered": float((trip.max_abs_error <= RECOVERED).mean()),
            "mean_evals": float(trip.num_evals.mean() / trained.num_blocks),
        }

    summary = {**numbers(result.trip), "num_examples": len(result.originals), "refined": numbers(result.refined)}
    if trained.spec.num_levels is not None:
        pixels = np.abs(result.reconstructions - result.originals).max()
        summary["max_grey_level_error"] = float(pixels * (trained.spec.num_levels - trained.is_classifier))
    if trained.is_classifier and trained.spec.pad_channels:
        summary["max_padding_residual"] = float(result.padding_residual.max())
    return summary


def describe(summary: dict[str, Any]) -> str:
    """The verdict, in one line."""
    converged = round(summary["fraction_converged"] * summary["num_examples"])
    grey = f" ({summary['max_grey_level_error']:.2g} grey levels)" if "max_grey_level_error" in summary else ""
    verdict = "inverted" if converged == summary["num_examples"] else "NOT INVERTED"
    recovered = round(summary["fraction_recovered"] * summary["num_examples"])
    by_luck = "" if converged == recovered else f"; {recovered} came back to {RECOVERED:g}"
    return (
        f"inverse: {verdict}; {converged} of {summary['num_examples']} test examples converged, largest error "
        f"{summary['max_abs_error']:.2g}{grey}, Euclidean {summary['max_euclidean_error']:.2g} with bound "
        f"{summary['max_error_bound']:.2g}, {summary['mean_evals']:.1f} evaluations a block; in float64 "
        f"{summary['refined']['max_euclidean_error']:.2g} with bound {summary['refined']['max_error_bound']:.2g}{by_luck}"
    )


def figure(result: Reconstructions) -> Any | None:
    """Originals above their reconstructions; None for points."""
    if result.originals.ndim != 4:
        return None
    shown = slice(0, NUM_SHOWN)
    return plots.reconstruction_pairs(
        result.originals[shown], result.reconstructions[shown], np.asarray(result.trip.max_abs_error)[shown]
    )


def write(result: Reconstructions, folder: str | os.PathLike[str]) -> Path | None:
    """Writes ``reconstructions.png`` into a folder, for images."""
    if (drawn := figure(result)) is None:
        return None
    path = Path(folder) / "reconstructions.png"
    with replacing(path) as incoming:
        drawn.savefig(incoming, format="png", dpi=150)
    return path
