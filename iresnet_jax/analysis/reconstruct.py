"""Test examples to latents and back, in the precision of training: is the trained network invertible, and how exactly?"""

import os
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float, Int

from iresnet_jax import density, model
from iresnet_jax.analysis import plots
from iresnet_jax.analysis.trained import Trained
from iresnet_jax.data import feed
from iresnet_jax.fixed_point import example_norm
from iresnet_jax.training import config as config_lib

NUM_EXAMPLES = 512  # at most, unless asked for: a sample large enough to see a rare failure, small enough for a laptop
NUM_SHOWN = 8


class Reconstructions(NamedTuple):
    """Examples, what became of them, and how the inverse ended for each.

    Attributes:
        originals: Continuous examples: images in [0, 1), or points.
        reconstructions: After encoding and inverting.
        max_abs_error: Largest entry of the error of each, in the units of the flow's input.
        euclidean_error: Euclidean norm of the same.
        error_bound: What the solver promises for it, propagated through the chain; conditional on the estimated norms. It
            knows nothing of the rounding of the way forward.
        converged: Whether each example's inverse met its tolerance in all blocks.
        num_evals: Evaluations of residual branches in all blocks together.
    """

    originals: Float[np.ndarray, "n ..."]
    reconstructions: Float[np.ndarray, "n ..."]
    max_abs_error: Float[np.ndarray, " n"]
    euclidean_error: Float[np.ndarray, " n"]
    error_bound: Float[np.ndarray, " n"]
    converged: Bool[np.ndarray, " n"]
    num_evals: Int[np.ndarray, " n"]


def reconstruct(trained: Trained, num: int = NUM_EXAMPLES) -> Reconstructions:
    """Encodes test examples and inverts their latents.

    Args:
        trained: The model.
        num: Test examples, from the first; at most all there are.

    Raises:
        ValueError: If ``num`` is not positive.
    """
    if num < 1:
        raise ValueError(f"the number of examples must be at least 1, got {num}")
    spec = trained.spec
    examples = trained.source.held_out("test", num, trained.config.seed)
    solver = config_lib.build_solver(trained.config.evaluation)

    @jax.jit
    def round_trip(weights, key, examples):
        x = density.to_continuous(spec, key, examples)
        there, _ = density.transform(spec, x)
        flow = model.bijection(spec.flow, weights, solver=solver)
        back, info = flow.inverse(flow.forward(there))
        error = back - there
        largest = jnp.max(jnp.abs(error), axis=tuple(range(1, error.ndim)))
        x_back = density.untransform(spec, back)
        return x, x_back, largest, example_norm(error), info.error_bound, info.converged, info.num_evals

    key = jax.random.key(trained.config.seed)
    batch_size = min(trained.config.evaluation.batch_size, len(examples))
    parts = []
    for i, (indices, mask) in enumerate(feed.eval_batches(len(examples), batch_size)):
        outputs = jax.device_get(round_trip(trained.weights, jax.random.fold_in(key, i), examples[indices]))
        parts.append(jax.tree.map(lambda values, mask=mask: values[mask], outputs))
    return Reconstructions(*(np.concatenate(values) for values in zip(*parts, strict=True)))


def summarize(trained: Trained, result: Reconstructions) -> dict[str, Any]:
    """The numbers of a report.

    Returns:
        ``max_abs_error`` and ``max_error_bound`` in the units of the flow's input, ``max_euclidean_error``,
        ``fraction_converged``, ``mean_evals`` (a block and example), ``num_examples``, and for images ``max_grey_level_error``.
    """
    numbers = {
        "max_abs_error": float(result.max_abs_error.max()),
        "max_euclidean_error": float(result.euclidean_error.max()),
        "max_error_bound": float(result.error_bound.max()),
        "fraction_converged": float(result.converged.mean()),
        "mean_evals": float(result.num_evals.mean() / trained.num_blocks),
        "num_examples": len(result.originals),
    }
    if trained.spec.num_levels is not None:
        pixels = np.abs(result.reconstructions - result.originals).max()
        numbers["max_grey_level_error"] = float(pixels * trained.spec.num_levels)
    return numbers


def describe(summary: dict[str, Any]) -> str:
    """The verdict, in one line."""
    converged = round(summary["fraction_converged"] * summary["num_examples"])
    grey = f" ({summary['max_grey_level_error']:.2g} grey levels)" if "max_grey_level_error" in summary else ""
    verdict = "inverted" if converged == summary["num_examples"] else "NOT INVERTED"
    return (
        f"inverse: {verdict}; {converged} of {summary['num_examples']} test examples converged, largest error "
        f"{summary['max_abs_error']:.2g}{grey}, Euclidean {summary['max_euclidean_error']:.2g} with bound "
        f"{summary['max_error_bound']:.2g}, {summary['mean_evals']:.1f} evaluations a block"
    )


def figure(result: Reconstructions) -> Any | None:
    """Originals above their reconstructions; None for points."""
    if result.originals.ndim != 4:
        return None
    shown = slice(0, NUM_SHOWN)
    return plots.reconstruction_pairs(result.originals[shown], result.reconstructions[shown], result.max_abs_error[shown])


def write(result: Reconstructions, folder: str | os.PathLike[str]) -> Path | None:
    """Writes ``reconstructions.png`` into a folder, for images."""
    if (drawn := figure(result)) is None:
        return None
    path = Path(folder) / "reconstructions.png"
    drawn.savefig(path, dpi=150)
    return path
