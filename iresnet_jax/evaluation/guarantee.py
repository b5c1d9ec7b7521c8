"""Guaranteed errors of inverses that were computed in bulk: of how many examples, and their median and worst.

The guarantee is about the inverse of latents as they are. A round trip also rounds when it encodes, so its error may be larger.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import jax
import numpy as np
from jaxtyping import Float, Num

from iresnet_jax.certification.decoding import Decoded, certified
from iresnet_jax.certification.inverse import InverseCertificate
from iresnet_jax.certification.prepared import check
from iresnet_jax.maths.enclosures.upward_rounding import said_up
from iresnet_jax.models.architecture import FlowSpec
from iresnet_jax.models.classifier import Classifier
from iresnet_jax.models.density import Density

MOST_EXAMPLES, TOO_LONG_S = 64, 120.0
STEP_S, OPERATIONS_A_SECOND = 1e-3, 1e10  # rough: of one step's residuals, and of dense products, on one CPU core


@dataclass(frozen=True)
class InverseGuarantee:
    """Guaranteed errors of computed inverses of the whole flow, rounding included, see `certify.inverse`.

    Attributes:
        num_examples: Examples that were certified, the first ones.
        num_applied: Those to whose whole trajectory the theorem applied; the blocks' bounds multiply for the others.
        median_bound: Median of the Euclidean bounds, in the units of the flow's input; infinite if nothing was certified.
        max_bound: Largest of them.
        median_data_bound: Median of the bounds in the units of continuous data, or of images on the scale of [0, 1].
        max_data_bound: Largest of them.
        fraction_certain: Fraction of the discrete entries whose level, or value on a grid, is guaranteed; None without such.
        median_beta: Median of ``beta``, the bound of how far residuals of the trajectory's equations reach.
        K: Lipschitz constant of the equations' derivative.
        max_h: Largest ``h = beta K eta``.
        max_error: Largest measured distance of these inverses from the exact ones of the same latents, in the units of the
            flow's input; None if it is not known.
        reason: Why the theorem did not apply, or nothing was certified; empty if it applied to all.
    """

    num_examples: int = 0
    num_applied: int = 0
    median_bound: float = math.inf
    max_bound: float = math.inf
    median_data_bound: float = math.inf
    max_data_bound: float = math.inf
    fraction_certain: float | None = None
    median_beta: float = math.inf
    K: float = math.inf
    max_h: float = math.inf
    max_error: float | None = None
    reason: str = ""

    def __str__(self) -> str:
        if not self.num_examples:
            return f"guaranteed error of the inverse: none, {self.reason}"
        how = "by the theorem for the whole flow" if self.num_applied else "by the bounds of the blocks, which multiply"
        how += f" for {self.num_applied}" if 0 < self.num_applied < self.num_examples else ""
        how += f" ({self.reason})" if self.reason else ""
        certain = "" if self.fraction_certain is None else f"; {100 * self.fraction_certain:.4g} % of the levels are certain"
        measured = "" if self.max_error is None else f" (measured: {self.max_error:.2g})"
        return (
            f"guaranteed error of the inverse of given latents, Euclidean: at most {said_up(self.max_bound, 2)}{measured} in "
            f"the flow's units and {said_up(self.max_data_bound, 2)} in the data's (medians {self.median_bound:.2g} and "
            f"{self.median_data_bound:.2g}), of {self.num_examples} examples {how}{certain}"
        )


def seconds_each(spec: FlowSpec) -> float:
    """About how long an example takes on one core, compilation aside: a residual and ten products of matrices a step."""
    return spec.num_blocks * (STEP_S + 20.0 * spec.num_dims**3 / OPERATIONS_A_SECOND)


def affordable(spec: FlowSpec, seconds: float) -> int:
    """How many examples take about that many seconds: a power of two up to `MOST_EXAMPLES`, and 0 where one takes minutes."""
    each = seconds_each(spec)
    return 0 if each > TOO_LONG_S else 2 ** int(np.log2(np.clip(seconds / each, 1, MOST_EXAMPLES)))


def bound_inverses(
    model: Density | Classifier,
    parts: Sequence[Decoded],
    num: int,
    contexts: Num[np.ndarray, "n k"] | None = None,
) -> tuple[InverseGuarantee, InverseCertificate | None, Float[np.ndarray, " m"]]:
    """What is guaranteed of the first examples that were decoded, as numbers of a report and example by example.

    Args:
        parts: Batches of examples, as NumPy's arrays.
        num: Examples to certify, at most; 0 where one takes too long.
        contexts: Their contexts, of a conditional density.

    Returns:
        The summary, which says why where nothing is guaranteed; the certificates, None where nothing is; and the measured
        distances of these inverses from the exact ones, Euclidean.
    """
    try:
        check(model)
    except ValueError as error:
        return InverseGuarantee(reason=str(error)), None, np.zeros(0)
    if num == 0:
        minutes = seconds_each(model.spec.flow) / 60
        return InverseGuarantee(reason=f"an example would take about {minutes:.0f} min, see certify.inverse"), None, np.zeros(0)
    first = jax.tree.map(lambda *values: np.concatenate(values)[:num], *parts)
    contexts = None if contexts is None else contexts[: len(first.latents)]
    info = certified(model, first, context=contexts)
    grid = model.spec.grid if isinstance(model, Density) else None
    is_discrete = slice(None) if grid is None else np.asarray(grid.spacing) > 0
    own, reason = info.certificate, ""
    errors = np.linalg.norm((np.asarray(first.flow_input) - own.refined).reshape(len(own.refined), -1), axis=1)
    if not np.all(own.applied):
        jumps = not np.all(np.isfinite(own.K))
        names = ", ".join(sorted({stage.activation for stage in model.spec.flow.stages}))
        reason = f"slopes of {names} jump" if jumps else "the others' bounds are those of the blocks, which multiply"
    summary = InverseGuarantee(
        num_examples=len(info.error_bound),
        num_applied=int(np.sum(own.applied)),
        median_bound=float(np.median(own.error_bound)),
        max_bound=float(np.max(own.error_bound)),
        median_data_bound=float(np.median(info.error_bound)),
        max_data_bound=float(np.max(info.error_bound)),
        fraction_certain=None if info.certain is None else float(np.mean(info.certain[..., is_discrete])),
        median_beta=float(np.median(own.beta)),
        K=float(np.max(own.K)),
        max_h=float(np.max(own.h)),
        max_error=float(np.max(errors)),
        reason=reason,
    )
    return summary, own, errors
