"""Test examples to latents or features and back: is the trained network invertible, and how
exactly?

A guarantee is about the inverse of latents as they are. A round trip also rounds when it encodes,
so its error may be larger.
"""

import math
from dataclasses import asdict, dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Num

from iresnet_jax.certification.decode import Decoded, certified, to_data
from iresnet_jax.certification.prepared import check
from iresnet_jax.maths import activations
from iresnet_jax.maths.fixed_point import FixedPointInfo, example_norm
from iresnet_jax.maths.upward_rounding import said_up
from iresnet_jax.models.architecture import FlowSpec
from iresnet_jax.models.classifier import Classifier
from iresnet_jax.models.density import Density
from iresnet_jax.training import parallel
from iresnet_jax.training.density import evaluation_keys

# examples inverted in float64, at most: enough to see a rare failure, few enough for a laptop
NUM_EXAMPLES = 512
REFINED_ATOL = 1e-13
MOST_CERTIFIED, TOO_LONG_S = 64, 120.0  # examples, and seconds that one may take
# rough: of one step's residuals, and of dense products, on one CPU core
STEP_S, OPERATIONS_A_SECOND = 1e-3, 1e10


@dataclass(frozen=True)
class Guarantee:
    """Guaranteed errors of computed inverses of the whole flow, rounding included, see
    `certify.inverse`.

    Attributes:
        num_examples: Examples that were certified, the first ones.
        num_applied: Those to whose whole trajectory the theorem applied; the blocks' bounds
            multiply for the others.
        max_bound: Largest of the Euclidean bounds, in the units of the flow's input; infinite if
            nothing was certified.
        max_data_bound: Largest of the bounds in the units of continuous data, or of images on the
            scale of [0, 1].
        max_error: Largest measured distance of these inverses from the exact ones of the same
            latents, in the units of the flow's input; None if it is not known.
        fraction_certain: Fraction of the discrete entries whose level, or value with a cell, is
            guaranteed; None without such.
        reason: Why the theorem did not apply, or nothing was certified; empty if it applied to all.
    """

    num_examples: int = 0
    num_applied: int = 0
    max_bound: float = math.inf
    max_data_bound: float = math.inf
    max_error: float | None = None
    fraction_certain: float | None = None
    reason: str = ""

    def __str__(self) -> str:
        if not self.num_examples:
            return f"guaranteed error of the inverse: none, {self.reason}"
        how = (
            "by the theorem for the whole flow"
            if self.num_applied
            else "by the bounds of the blocks, which multiply"
        )
        how += f" for {self.num_applied}" if 0 < self.num_applied < self.num_examples else ""
        how += f" ({self.reason})" if self.reason else ""
        certain = (
            ""
            if self.fraction_certain is None
            else f"; {100 * self.fraction_certain:.4g} % of the levels are certain"
        )
        return (
            "guaranteed error of the inverse of given latents, Euclidean: at most "
            f"{said_up(self.max_bound, 2)} (measured: "
            f"{self.max_error:.2g}) in the flow's units and {said_up(self.max_data_bound, 2)} in "
            "the data's, of "
            f"{self.num_examples} examples {how}{certain}"
        )


@dataclass(frozen=True)
class RoundTrips:
    """Errors of examples that were encoded and inverted.

    Attributes:
        max_abs_error: Largest entry of any error, in the units of the flow's input.
        max_euclidean_error: Largest Euclidean norm of an example's error.
        max_error_bound: Largest bound of a Euclidean error that multiplies the bounds of the
            blocks: vacuous for deep flows.
        fraction_within_bound: Fraction of examples whose Euclidean error is within its bound.
        fraction_converged: Fraction of examples whose inverse met its tolerance.
        mean_evals: Evaluations of the branch, mean over blocks and examples.
    """

    max_abs_error: float
    max_euclidean_error: float
    max_error_bound: float
    fraction_within_bound: float
    fraction_converged: float
    mean_evals: float


@dataclass(frozen=True)
class Inversion(RoundTrips):
    """Round trips in the precision of training, and in float64.

    Attributes:
        num_examples: Test examples.
        refined: Round trips in float64 of the first test examples.
        guarantee: Guaranteed errors of the first examples, in the precision of training; None if
            that was not asked for.
    """

    num_examples: int
    refined: RoundTrips
    guarantee: Guarantee | None = None

    def __str__(self) -> str:
        converged = round(self.fraction_converged * self.num_examples)
        verdict = "inverted" if converged == self.num_examples else "NOT INVERTED"
        line = (
            f"inverse: {verdict}; {converged} of {self.num_examples} test examples converged, "
            "largest error of a round trip "
            f"{self.max_abs_error:.2g}, Euclidean {self.max_euclidean_error:.2g}, in float64 "
            f"{self.refined.max_euclidean_error:.2g}, {self.mean_evals:.1f} evaluations a block"
        )
        return "\n".join(
            [line, *([str(self.guarantee)] if self.guarantee else []), *self.warnings()]
        )

    def warnings(self) -> list[str]:
        """Sentences about errors beyond their bounds, and about examples that did not converge."""
        found = [
            f"{100 * (1 - trips.fraction_within_bound):.3g} % of the inversion errors in "
            f"{precision} exceed their bound: a "
            "Lipschitz constant or the rounding is underestimated."
            for precision, trips in (("the precision of training", self), ("float64", self.refined))
            if trips.fraction_within_bound < 1
        ]
        if self.fraction_converged < 1:
            percent = 100 * (1 - self.fraction_converged)
            found.append(f"The inverse did not converge for {percent:.3g} % of the examples.")
        return found


class RoundTrip(NamedTuple):
    """Errors of each example that came back, and the end of its inverse.

    Attributes:
        max_abs_error: Largest entry of the error, in the units of the flow's input.
        euclidean_error: Euclidean norm of the error.
        info: End of the inverse; its error bound is that of the round trip.
    """

    max_abs_error: Float[Array, " n"] | Float[np.ndarray, " n"]
    euclidean_error: Float[Array, " n"] | Float[np.ndarray, " n"]
    info: FixedPointInfo


class Reconstructions(NamedTuple):
    """Examples as continuous data, images in [0, 1] or points; what encoding and inverting made
    of them; and the numbers.
    """

    originals: Float[np.ndarray, "n ..."]
    reconstructions: Float[np.ndarray, "n ..."]
    summary: Inversion


def reconstruct(
    model: Density | Classifier,
    examples: Num[np.ndarray, "n ..."],
    batch_size: int,
    seed: int,
    *,
    contexts: Num[np.ndarray, "n k"] | None = None,
    num_certified: int | None = None,
) -> Reconstructions:
    """Encodes examples and inverts their latents on all devices, in the precision of training and
    in float64.

    Args:
        examples: Images of integer levels, or points; at least one. The first 512 are inverted in
            float64 too.
        contexts: Context of each example, of a conditional density.
        num_certified: Examples whose inverse is certified by `certify.inverse`, from the first; 0
            says that one takes too long, None that nobody asked.
    """
    num, num_refined, key = len(examples), min(len(examples), NUM_EXAMPLES), jax.random.key(seed)

    def batch_of(places):
        context = None if contexts is None else contexts[places]
        return examples[places], context, evaluation_keys(key, places, 0, 0)[0]

    placed = model.with_bounds()
    originals, there, decoded, trip = parallel.over_batches(
        _there_and_back, placed, batch_of, num, batch_size
    )
    precise = placed.with_(solver=model.solver._replace(atol=REFINED_ATOL, refine=True))
    with jax.enable_x64():
        refined = parallel.over_batches(
            _in_float64, precise, parallel.rows_of(there, contexts), num_refined, batch_size
        )
    num_blocks = model.spec.flow.num_blocks
    found = (
        None if num_certified is None else bound_inverses(model, decoded, num_certified, contexts)
    )
    summary = Inversion(
        **asdict(summarize(trip, num_blocks)),
        num_examples=num,
        refined=summarize(refined, num_blocks),
        guarantee=found,
    )
    return Reconstructions(originals, decoded.continuous, summary)


def _there_and_back(model, batch):
    """Continuous examples, inputs of the flow that they make, all that a certificate of the
    inverse takes, and the errors.
    """
    examples, context, keys = batch
    if isinstance(model, Density):
        originals, there, flow = (
            model.dequantize(examples, keys),
            model.preprocess(examples, keys),
            model.flow(context),
        )
    else:
        originals, there, flow = (
            examples / (model.spec.num_levels - 1),
            model.preprocess(examples),
            model.flow(),
        )
    decoded = to_data(model, flow.forward(there), context=context)
    return originals, there, decoded, _compared(there, decoded.flow_input, decoded.info)


def _in_float64(model, batch):
    return round_trip(model, *jax.tree.map(lambda values: values.astype(jnp.float64), batch))


def summarize(trip: RoundTrip, num_blocks: int) -> RoundTrips:
    """Maxima, fractions and means over examples."""
    return RoundTrips(
        max_abs_error=float(trip.max_abs_error.max()),
        max_euclidean_error=float(trip.euclidean_error.max()),
        max_error_bound=float(trip.info.error_bound.max()),
        fraction_within_bound=float((trip.euclidean_error <= trip.info.error_bound).mean()),
        fraction_converged=float(trip.info.converged.mean()),
        mean_evals=float(trip.info.num_evals.mean() / num_blocks),
    )


def round_trip(
    model: Density | Classifier,
    there: Float[Array, "b ..."],
    context: Float[Array, "b k"] | None = None,
) -> RoundTrip:
    """The model's flow and its inverse, under a context if the model is conditional.

    The solver bounds the distance to the exact preimage of the latents as they are. Encoding
    rounded them, in each block by no more than the solver allows for rounding of its residual; so
    twice the solver's bound holds for the way there and back.
    """
    bijection = model.flow(context) if isinstance(model, Density) else model.flow()
    back, info = bijection.inverse(bijection.forward(there))
    return _compared(there, back, info)


def _compared(there, back, info) -> RoundTrip:
    error = back - there
    largest = jnp.max(jnp.abs(error), axis=tuple(range(1, error.ndim)))
    return RoundTrip(largest, example_norm(error), info._replace(error_bound=2 * info.error_bound))


# --- guarantees -----------------------------------------------------------------------------------


def seconds_each(spec: FlowSpec) -> float:
    """About how long a certificate takes on one core, compilation aside: a residual and ten
    products of matrices a step.
    """
    return spec.num_blocks * (STEP_S + 20.0 * spec.num_dims**3 / OPERATIONS_A_SECOND)


def affordable(spec: FlowSpec, seconds: float) -> int:
    """Number of examples that take about that many seconds: a power of two up to 64, and 0 where
    one takes minutes.
    """
    each = seconds_each(spec)
    return 0 if each > TOO_LONG_S else 2 ** int(np.log2(np.clip(seconds / each, 1, MOST_CERTIFIED)))


def bound_inverses(
    model: Density | Classifier,
    decoded: Decoded,
    num: int,
    contexts: Num[np.ndarray, "n k"] | None = None,
) -> Guarantee:
    """Guarantees of the first examples that were decoded, or the reason why there are none.

    Args:
        decoded: Examples, as NumPy's arrays.
        num: Examples to certify, at most; 0 where one takes too long.
        contexts: Their contexts, of a conditional density.
    """
    try:
        check(model)
    except ValueError as error:
        return Guarantee(reason=str(error))
    if num == 0:
        minutes = seconds_each(model.spec.flow) / 60
        return Guarantee(
            reason=f"an example would take about {minutes:.0f} min, see certify.inverse"
        )
    first = jax.tree.map(lambda values: values[:num], decoded)
    info = certified(
        model, first, context=None if contexts is None else contexts[: len(first.latents)]
    )
    cells = model.spec.cells if isinstance(model, Density) else None
    is_discrete = slice(None) if cells is None else np.asarray(cells.gaps[:, 0] > 0)
    own, reason = info.certificate, ""
    errors = np.linalg.norm(
        (np.asarray(first.flow_input) - own.refined).reshape(len(own.refined), -1), axis=1
    )
    if not np.all(own.applied):
        names = {stage.activation for stage in model.spec.flow.stages}
        jumping = sorted(name for name in names if activations.get(name).slope_lipschitz is None)
        those_of_blocks = "the others' bounds are those of the blocks, which multiply"
        reason = f"slopes of {', '.join(jumping)} jump" if jumping else those_of_blocks
    return Guarantee(
        num_examples=len(info.error_bound),
        num_applied=int(np.sum(own.applied)),
        max_bound=float(np.max(own.error_bound)),
        max_data_bound=float(np.max(info.error_bound)),
        max_error=float(np.max(errors)),
        fraction_certain=None
        if info.certain is None
        else float(np.mean(info.certain[..., is_discrete])),
        reason=reason,
    )
