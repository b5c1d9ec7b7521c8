"""Test examples to latents or features and back: is the trained network invertible, and how exactly?"""

from dataclasses import asdict, dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Num

from iresnet_jax.bijections.reshape import padding_residual
from iresnet_jax.certification.decoding import to_data
from iresnet_jax.certification.inverse import InverseCertificate
from iresnet_jax.evaluation import guarantee
from iresnet_jax.evaluation.guarantee import InverseGuarantee
from iresnet_jax.maths.inverse.fixed_point import example_norm
from iresnet_jax.models.classifier import Classifier, ClassifierSpec
from iresnet_jax.models.density import Density
from iresnet_jax.training import parallel
from iresnet_jax.training.parallel import eval_batches

NUM_EXAMPLES = 512  # examples inverted in float64, at most: enough to see a rare failure, few enough for a laptop
REFINED_ATOL = 1e-13
RECOVERED = 1e-4  # largest entry of an error up to which an example counts as recovered, whatever was promised


@dataclass(frozen=True)
class RoundTrips:
    """Errors of examples that were encoded and inverted.

    Attributes:
        max_abs_error: Largest entry of any error, in the units of the flow's input.
        max_euclidean_error: Largest Euclidean norm of an example's error.
        max_error_bound: Largest bound of a Euclidean error that multiplies the bounds of the blocks: vacuous for deep flows.
        fraction_within_bound: Fraction of examples whose Euclidean error is within its bound.
        fraction_converged: Fraction of examples whose inverse met its tolerance.
        fraction_recovered: Fraction of examples with no entry off by more than 1e-4, whatever was promised.
        mean_evals: Evaluations of the branch, mean over blocks and examples.
    """

    max_abs_error: float
    max_euclidean_error: float
    max_error_bound: float
    fraction_within_bound: float
    fraction_converged: float
    fraction_recovered: float
    mean_evals: float


@dataclass(frozen=True)
class Inversion(RoundTrips):
    """Round trips in the precision of training, and in float64.

    Attributes:
        num_examples: Test examples.
        refined: Round trips in float64 of the first test examples.
        max_grey_level_error: Largest error of a pixel in grey levels; None for points.
        max_padding_residual: Largest Euclidean norm of what should be zero padding; None without padding.
        guarantee: Guaranteed errors of the first examples, in the precision of training; None if that was not asked for.
    """

    num_examples: int
    refined: RoundTrips
    max_grey_level_error: float | None = None
    max_padding_residual: float | None = None
    guarantee: InverseGuarantee | None = None

    def __str__(self) -> str:
        converged, recovered = (round(f * self.num_examples) for f in (self.fraction_converged, self.fraction_recovered))
        grey = "" if self.max_grey_level_error is None else f" ({self.max_grey_level_error:.2g} grey levels)"
        verdict = "inverted" if converged == self.num_examples else "NOT INVERTED"
        by_luck = "" if converged == recovered else f"; {recovered} came back to {RECOVERED:g}"
        line = (
            f"inverse: {verdict}; {converged} of {self.num_examples} test examples converged, largest error of a round trip "
            f"{self.max_abs_error:.2g}{grey}, Euclidean {self.max_euclidean_error:.2g}, in float64 "
            f"{self.refined.max_euclidean_error:.2g}, {self.mean_evals:.1f} evaluations a block{by_luck}"
        )
        lines = [line]
        if self.guarantee:
            lines.append(f"{self.guarantee}{'; a round trip also rounds its latents' if self.guarantee.num_examples else ''}")
        return "\n".join([*lines, *self.warnings(promised=False)])  # the verdict says what did not converge

    def warnings(self, *, promised: bool = True) -> list[str]:
        """Sentences about errors beyond their bounds and, where an inverse is promised, examples that did not converge."""
        wrong = "a Lipschitz constant or the rounding is underestimated."
        found = []
        if not self.max_abs_error <= self.max_error_bound:
            found.append(f"The largest inversion error exceeds its bound: {wrong}")
        for precision, trips in (("the precision of training", self), ("float64", self.refined)):
            if (outside := 1 - trips.fraction_within_bound) > 0:
                found.append(f"{100 * outside:.3g} % of the inversion errors in {precision} exceed their bound: {wrong}")
        if promised and self.fraction_converged < 1:
            percent = 100 * (1 - self.fraction_converged)
            found.append(f"The inverse did not converge for {percent:.3g} % of the examples: allow more evaluations.")
        return found


class RoundTrip(NamedTuple):
    """How each example came back, and how its inverse ended.

    Attributes:
        max_abs_error: Largest entry of the error, in the units of the flow's input.
        euclidean_error: Euclidean norm of the error.
        error_bound: Guaranteed bound of the Euclidean error, by the product of the blocks' bounds: vacuous for deep flows.
        converged: Whether the inverse met its tolerance in all blocks.
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
        reconstructions: Examples after encoding and inverting, in the precision of training.
        trip: Round trips of all examples.
        refined: Round trips in float64 of the first 512 examples.
        summary: The numbers of a report.
        certificate: Certified inverses of the first examples in the precision of training; None where there are none.
        certified_errors: Distances of their computed inverses from the exact ones of the same latents, Euclidean.
    """

    originals: Float[np.ndarray, "n ..."]
    reconstructions: Float[np.ndarray, "n ..."]
    trip: RoundTrip
    refined: RoundTrip
    summary: Inversion
    certificate: InverseCertificate | None = None
    certified_errors: Float[np.ndarray, " m"] = np.zeros(0)


def reconstruct(
    model: Density | Classifier,
    examples: Num[np.ndarray, "n ..."],
    batch_size: int,
    seed: int,
    *,
    contexts: Num[np.ndarray, "n k"] | None = None,
    num_certified: int | None = None,
) -> Reconstructions:
    """Encodes examples and inverts their latents on all devices, in the precision of training and in float64.

    Args:
        examples: Images of integer levels, or points; at least one.
        contexts: Context of each example, of a conditional density.
        num_certified: Examples whose inverse is certified by `certify.inverse`, from the first; 0 says that one takes too long,
            None that nobody asked.
    """
    spec, key = model.spec, jax.random.key(seed)
    placed = parallel.on_local_devices(model)
    precise = placed.with_(solver=model.solver._replace(atol=REFINED_ATOL, refine=True))
    parts, refined, to_certify = [], [], []
    for i, (indices, mask) in enumerate(eval_batches(len(examples), min(batch_size, len(examples)))):
        originals, there = jax.device_get(_originals(model, jax.random.fold_in(key, i), examples[indices]))
        context = None if contexts is None else contexts[indices]
        rows, num = parallel.rows_of(there, context), len(there)
        *outputs, decoded = originals, *parallel.over_batches(_there_and_back, placed, rows, num, num)
        parts.append(jax.tree.map(lambda values, mask=mask: values[mask], outputs))
        if i * batch_size < (num_certified or 0):
            to_certify.append(jax.tree.map(lambda values, mask=mask: values[mask], decoded))
        if i * batch_size < NUM_EXAMPLES:
            with jax.enable_x64():
                trip = parallel.over_batches(_in_float64, precise, rows, num, num)
            refined.append(jax.tree.map(lambda values, mask=mask: values[mask], trip))

    def joined(parts):
        return jax.tree.map(lambda *values: np.concatenate(values), *parts)

    originals, reconstructions, padding, trip = joined(parts)
    exact = joined(refined)
    grey = None
    if spec.num_levels is not None:
        # A density spreads levels over [0, 1) in cells, the others put the last level at 1.
        grey = float(np.abs(reconstructions - originals).max() * (spec.num_levels - (not isinstance(model, Density))))
    found, certificate, errors = None, None, np.zeros(0)
    if num_certified is not None:
        found, certificate, errors = guarantee.bound_inverses(model, to_certify, num_certified, contexts)
    summary = Inversion(
        **asdict(summarize(trip, spec.flow.num_blocks)),
        num_examples=len(originals),
        refined=summarize(exact, spec.flow.num_blocks),
        max_grey_level_error=grey,
        max_padding_residual=float(padding.max()) if isinstance(spec, ClassifierSpec) and spec.pad_channels else None,
        guarantee=found,
    )
    return Reconstructions(originals, reconstructions, trip, exact, summary, certificate, errors)


@jax.jit
def _originals(model, key, examples):
    """Continuous examples, and the inputs of the flow that they make."""
    if not isinstance(model, Density):
        return examples / (model.spec.num_levels - 1), model.preprocess(examples)
    return model.dequantize(examples, key), model.preprocess(examples, key)


def _there_and_back(model, batch):
    """Continuous examples that came back, what is in their padding, how it went, and what a certificate takes."""
    there, context = batch
    flow = model.flow(context) if isinstance(model, Density) else model.flow()
    decoded = to_data(model, flow.forward(there), context=context)
    padding = padding_residual(decoded.flow_input, model.spec.pad_channels if isinstance(model, Classifier) else 0)
    return decoded.continuous, padding, _compared(there, decoded.flow_input, decoded.info), decoded


def _in_float64(model, batch):
    return round_trip(model, *jax.tree.map(lambda values: values.astype(jnp.float64), batch))


def summarize(trip: RoundTrip, num_blocks: int) -> RoundTrips:
    """Maxima, fractions and means over examples."""
    return RoundTrips(
        max_abs_error=float(trip.max_abs_error.max()),
        max_euclidean_error=float(trip.euclidean_error.max()),
        max_error_bound=float(trip.error_bound.max()),
        fraction_within_bound=float((trip.euclidean_error <= trip.error_bound).mean()),
        fraction_converged=float(trip.converged.mean()),
        fraction_recovered=float((trip.max_abs_error <= RECOVERED).mean()),
        mean_evals=float(trip.num_evals.mean() / num_blocks),
    )


def round_trip(
    model: Density | Classifier, there: Float[Array, "b ..."], context: Float[Array, "b k"] | None = None
) -> RoundTrip:
    """How the model's flow and its inverse go, under a context if the model is conditional.

    The solver bounds the distance to the exact preimage of the latents as they are. Encoding rounded them, in each block by no
    more than the solver allows for rounding of its residual; so twice the solver's bound holds for the way there and back.
    """
    bijection = model.flow(context) if isinstance(model, Density) else model.flow()
    back, info = bijection.inverse(bijection.forward(there))
    return _compared(there, back, info)


def _compared(there, back, info) -> RoundTrip:
    error = back - there
    largest = jnp.max(jnp.abs(error), axis=tuple(range(1, error.ndim)))
    return RoundTrip(largest, example_norm(error), 2 * info.error_bound, info.converged, info.num_evals)
