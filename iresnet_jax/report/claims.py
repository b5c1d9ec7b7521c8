"""What the numbers of a report allow one to claim: which likelihood it holds, whether bounds are proven, what cannot be right.

The report is the dictionary described in ``page.render``; any entry may be missing.
"""

import math
from collections.abc import Mapping
from typing import Any

from iresnet_jax.report.markup import number


def objective(report: Mapping[str, Any]) -> tuple[str, str]:
    """The key of the likelihood in the report, and its unit."""
    return ("nll", "nats") if "nll" in report else ("bits_per_dim", "bits/dim")


def entropy_floor(report: Mapping[str, Any]) -> float | None:
    """The entropy of the data in nats, if known."""
    return report.get("entropy_floor", (report.get("nll") or {}).get("entropy_floor"))


def is_certified(report: Mapping[str, Any]) -> bool:
    """True if every block carries a certified bound."""
    blocks = (report.get("lipschitz") or {}).get("blocks") or ()
    return bool(blocks) and all(block.get("bound") is not None for block in blocks)


def contradictions(report: Mapping[str, Any]) -> list[str]:
    """Sentences about numbers that cannot all be right, or that leave a promise open."""
    found = []
    key, _ = objective(report)
    result, floor = report.get(key) or {}, entropy_floor(report)
    mean, slack = result.get("mean"), 5.0 * (result.get("stderr") or 0.0) + (result.get("truncation_bound") or 0.0)
    if mean is not None and not math.isfinite(mean):
        found.append("The likelihood is not finite.")
    if mean is not None and floor is not None and mean + slack < floor:
        found.append("The likelihood lies below the entropy of the data by more than its error allows: this is a bug.")
    inverse = report.get("inverse") or {}
    error, bound, fraction = (inverse.get(k) for k in ("max_abs_error", "max_error_bound", "fraction_converged"))
    if error is not None and bound is not None and not error <= bound:
        found.append("The largest inversion error exceeds its bound: a Lipschitz constant or the rounding is underestimated.")
    for precision, trip in (("the precision of training", inverse), ("float64", inverse.get("refined") or {})):
        within = trip.get("fraction_within_bound")
        if within is not None and within < 1.0:
            found.append(
                f"{100 * (1 - within):.3g} % of the inversion errors in {precision} exceed their bound: a Lipschitz constant "
                "or the rounding is underestimated."
            )
    blocks = (report.get("lipschitz") or {}).get("blocks") or ()
    if blocks and all(block.get("target", 0) is None for block in blocks):
        loose = sum(not (block.get("bound") or math.inf) < 1.0 for block in blocks)
        found.append(
            f"This network has no Lipschitz constraint: {loose} of its {len(blocks)} blocks are not certified contractions, so "
            "no inverse is promised."
        )
        return found
    if fraction is not None and fraction < 1.0:
        found.append(f"The inverse did not converge for {100 * (1 - fraction):.3g} % of the examples: allow more evaluations.")
    for block in blocks:
        estimate, bound = block.get("estimate"), block.get("bound")
        if estimate is not None and not estimate < 1.0:
            found.append(
                f"{block.get('name')}: Lipschitz estimate {number(estimate)} is not below 1, the inverse may not exist."
            )
        elif bound is not None and not bound < 1.0:
            found.append(f"{block.get('name')}: certified bound {number(bound)} is not below 1, invertibility is not proven.")
        if estimate is not None and bound is not None and estimate > bound * (1 + 1e-5):
            found.append(f"{block.get('name')}: the estimate {number(estimate)} exceeds the certified bound {number(bound)}.")
    return found
