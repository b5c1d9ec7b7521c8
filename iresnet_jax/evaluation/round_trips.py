"""Round trips of test examples through latents or features, and samples: is the trained network
invertible, and how exactly?

A guarantee concerns the inverse of given latents. A round trip also rounds in the encoding, so its
error may be larger.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Num

from iresnet_jax.certification.decode import certified
from iresnet_jax.certification.prepared import check
from iresnet_jax.maths.fixed_point import example_norm
from iresnet_jax.maths.upward_rounding import said_up
from iresnet_jax.models.architecture import FlowSpec
from iresnet_jax.models.classifier import Classifier
from iresnet_jax.models.density import Density
from iresnet_jax.models.model import DecodeInfo
from iresnet_jax.training import parallel
from iresnet_jax.training.objectives import evaluation_keys

# Most examples inverted in float64: enough to see a rare failure, few enough for a laptop.
NUM_EXAMPLES = 512
REFINED_ATOL = 1e-13
MOST_CERTIFIED, TOO_LONG_S = 64, 120.0  # most examples, and most seconds per example
# Rough speed of one step's residuals, and of dense products, on one CPU core.
STEP_S, OPERATIONS_A_SECOND = 1e-3, 1e10

UNITS = "in the units of the data (grey levels and pixels: [0, 1])"


@dataclass(frozen=True)
class Guarantee:
    """Guaranteed errors of computed inverses of the whole flow, rounding included, see
    `certify.inverse`.

    Attributes:
        num_examples: Number of first examples that were certified.
        num_applied: Examples to whose whole trajectory the theorem applied; for the others the
            blocks' bounds multiply.
        max_bound: Largest of the Euclidean bounds, in the units of the flow's input; infinite if
            nothing was certified.
        max_data_bound: Largest of the bounds in the units of continuous data, or of images on the
            scale of [0, 1].
        max_error: Largest measured distance of these inverses from the exact ones of the same
            latents, in the units of the flow's input; None if it is not known.
        fraction_certain: Fraction of the discrete entries whose level, or value with a cell, is
            guaranteed; None without discrete entries.
        reason: Why nothing was certified; empty if something was.
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
        how = "by the bounds of the blocks, which multiply"
        if self.num_applied == self.num_examples:
            how = "by the theorem for the whole flow"
        elif self.num_applied:
            how = f"by the theorem for the whole flow for {self.num_applied} of them, else {how}"
        certain = ""
        if self.fraction_certain is not None:
            certain = f"; {100 * self.fraction_certain:.4g} % of the levels are certain"
        return (
            "guaranteed error of the inverse of given latents, Euclidean: at most "
            f"{said_up(self.max_data_bound, 2)} {UNITS}, {said_up(self.max_bound, 2)} in those of "
            f"the flow's input (measured: {self.max_error:.2g}), of {self.num_examples} examples "
            f"{how}{certain}"
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

    @classmethod
    def of(cls, there: Any, back: Any, info: Any, num_blocks: int, **others: Any) -> Any:
        """The errors of inputs of the flow that came back.

        The solver bounds the distance to the exact preimage of the computed latents. Encoding
        rounds these in each block by at most the solver's allowance for rounding of its residual,
        so twice the solver's bound holds for the round trip.
        """
        error = jnp.asarray(back) - jnp.asarray(there)
        lengths, bounds = example_norm(error), 2 * info.error_bound
        return cls(
            max_abs_error=float(jnp.abs(error).max()),
            max_euclidean_error=float(lengths.max()),
            max_error_bound=float(bounds.max()),
            fraction_within_bound=float((lengths <= bounds).mean()),
            fraction_converged=float(info.converged.mean()),
            mean_evals=float(info.num_evals.mean() / num_blocks),
            **others,
        )


@dataclass(frozen=True)
class Inversion(RoundTrips):
    """Round trips in the precision of training, and in float64.

    Attributes:
        num_examples: Test examples.
        refined: Round trips in float64 of the first test examples.
        guarantee: Guaranteed errors of the first examples, in the precision of training; None if
            not requested.
        max_data_error: Largest entry of any error in the units of continuous data, or of images on
            the scale of [0, 1].
    """

    num_examples: int
    refined: RoundTrips
    guarantee: Guarantee | None
    max_data_error: float

    @property
    def headline(self) -> str:
        """A line, and one with a guarantee if there is one."""
        converged = round(self.fraction_converged * self.num_examples)
        verdict = "inverted" if converged == self.num_examples else "NOT INVERTED"
        line = (
            f"inverse: {verdict}; {converged} of {self.num_examples} test examples came back, "
            f"largest error {self.max_data_error:.2g} {UNITS}"
        )
        found = self.guarantee
        if not found or not math.isfinite(found.max_data_bound):
            return line
        latents = f"decoding the latents of the first {found.num_examples} examples"
        bound = said_up(found.max_data_bound, 2)
        return f"{line}\nguaranteed: {latents} errs by at most {bound}, Euclidean"

    def __str__(self) -> str:
        line = (
            f"{self.headline}\nin the units of the flow's input: largest error of a round trip "
            f"{self.max_abs_error:.2g}, Euclidean {self.max_euclidean_error:.2g}, in float64 "
            f"{self.refined.max_euclidean_error:.2g}; {self.mean_evals:.1f} evaluations a block"
        )
        return "\n".join(
            [line, *([str(self.guarantee)] if self.guarantee else []), *self.warnings()]
        )

    def warnings(self) -> list[str]:
        """Sentences about errors beyond their bounds, and about examples that did not converge."""
        found = [
            f"{100 * (1 - trips.fraction_within_bound):.3g} % of the inversion errors in "
            f"{precision} exceed their bound: a Lipschitz constant or the rounding is "
            "underestimated."
            for precision, trips in (("the precision of training", self), ("float64", self.refined))
            if trips.fraction_within_bound < 1
        ]
        if self.fraction_converged < 1:
            percent = 100 * (1 - self.fraction_converged)
            found.append(f"The inverse did not converge for {percent:.3g} % of the examples.")
        return found


def reconstruct(
    model: Density | Classifier,
    examples: Num[np.ndarray, "n ..."],
    batch_size: int,
    seed: int,
    *,
    contexts: Num[np.ndarray, "n k"] | None = None,
    num_certified: int | None = None,
) -> tuple[np.ndarray, np.ndarray, Inversion]:
    """Encodes examples and inverts their latents on all devices, in the precision of training and
    in float64.

    Args:
        examples: Images of integer levels, or points; at least one. The first 512 are inverted in
            float64 too.
        contexts: Context of each example, for a conditional density.
        num_certified: Number of first examples whose inverse `certify.inverse` certifies; 0 means
            that one takes too long, None that it was not requested.

    Returns:
        The examples as continuous data, images in [0, 1] or points; what came back; the summary.
    """
    key = jax.random.key(seed)

    def batch_of(places):
        keys = evaluation_keys(key, places, 0, 0)[0]
        return *parallel.rows_of(examples, contexts)(places), keys

    bounds, num_blocks = model.bounds(), model.spec.flow.num_blocks
    originals, there, latents, data, info = parallel.over_batches(
        _there_and_back, (model, bounds), batch_of, len(examples), batch_size
    )
    precise = model.with_(solver=model.how.solver._replace(atol=REFINED_ATOL, refine=True))
    with jax.enable_x64():
        own, rows = (precise, bounds), parallel.rows_of(there, contexts)
        num = min(len(examples), NUM_EXAMPLES)
        back, how = parallel.over_batches(_in_float64, own, rows, num, batch_size)
        refined = RoundTrips.of(there[:num].astype(np.float64), back, how, num_blocks)
    found = bound_inverses(model, latents, data, info, num_certified, contexts)
    of_flow = info._replace(error_bound=info.flow_error_bound)
    others = {"num_examples": len(examples), "refined": refined, "guarantee": found}
    others["max_data_error"] = float(np.abs(info.continuous - originals).max())
    summary = Inversion.of(there, info.flow_input, of_flow, num_blocks, **others)
    return originals, info.continuous, summary


def _there_and_back(own, batch):
    """Continuous examples, inputs of the flow that they make, their latents, and what these make
    of themselves.
    """
    (model, bounds), (examples, context, keys) = own, batch
    originals, there = model.dequantize(examples, keys), model.preprocess(examples, keys)
    latents = model.flow(context).forward(there)
    return originals, there, latents, *model.decode(latents, context=context, bounds=bounds)


def _in_float64(own, batch):
    (model, bounds), batch = own, jax.tree.map(lambda values: values.astype(jnp.float64), batch)
    there, context = batch
    flow = model.flow(context, bounds=bounds)
    return flow.inverse(flow.forward(there))


# --- samples --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class SampleConvergence:
    """Convergence of the inverses of a number of samples.

    Attributes:
        num: Samples.
        failed: Numbers of the samples whose inverse did not meet its tolerance.
        guarantee: Guaranteed errors of the first samples; None if not requested.
    """

    num: int
    failed: tuple[int, ...] = ()
    guarantee: Guarantee | None = None

    def __str__(self) -> str:
        line = f"samples: the inverse converged for {self.num - len(self.failed)} of {self.num}"
        return "\n".join(
            [line, *([str(self.guarantee)] if self.guarantee else []), *self.warnings()]
        )

    def warnings(self) -> list[str]:
        """A sentence that numbers the samples whose inverse did not converge."""
        if not self.failed:
            return []
        named = ", ".join(map(str, self.failed[:10])) + (", ..." if len(self.failed) > 10 else "")
        return [
            f"The inverse did not converge for {len(self.failed)} of {self.num} samples, "
            f"numbers {named}."
        ]


def draw(
    model: Density,
    num: int,
    batch_size: int,
    *,
    temperature: float = 1.0,
    seed: int = 0,
    labels: Sequence[int] | None = None,
    contexts: Float[np.ndarray, "_ k"] | None = None,
    num_certified: int | None = None,
) -> tuple[Num[np.ndarray, "n ..."], SampleConvergence]:
    """Samples of ``model.sample(jax.random.key(seed), num)`` and their convergence, on all devices.

    Args:
        num: Samples, at least 1.
        batch_size: Most samples that are inverted at once.
        temperature: Factor on the prior's scale, at least 0; 1 samples the model.
        seed: Seed of the latents.
        labels: Class of each sample, if the model's classes have priors; drawn by default.
        contexts: Context of each sample, for a conditional density; fewer contexts than samples are
            repeated.
        num_certified: Number of first samples that `certify.inverse` certifies; 0 means that one
            takes too long, None that it was not requested.

    Example:
        >>> values, convergence = draw(model, 64, 64, temperature=0.8)  # doctest: +SKIP
    """
    of_classes = None if labels is None else np.asarray(labels)
    latents = np.asarray(
        model.sample_latents(jax.random.key(seed), num, temperature=temperature, labels=of_classes)
    )
    taken = None if contexts is None else contexts[np.arange(num) % len(contexts)]
    data, info = parallel.over_batches(
        _decode, (model, model.bounds()), parallel.rows_of(latents, taken), num, batch_size
    )
    guarantee = bound_inverses(model, latents, data, info, num_certified, taken)
    failed = np.flatnonzero(~info.converged).tolist()
    return data, SampleConvergence(num, tuple(failed), guarantee)


def _decode(own, batch):
    (model, bounds), (latents, context) = own, batch
    return model.decode(latents, context=context, bounds=bounds)


# --- guarantees -----------------------------------------------------------------------------------


def seconds_each(spec: FlowSpec) -> float:
    """Rough time of a certificate on one core without compilation: a residual and ten matrix
    products per step.
    """
    return spec.num_blocks * (STEP_S + 20.0 * spec.num_dims**3 / OPERATIONS_A_SECOND)


def affordable(spec: FlowSpec, seconds: float) -> int:
    """Number of examples that take about ``seconds``: a power of two up to 64, or 0 if one takes
    minutes.
    """
    each = seconds_each(spec)
    return 0 if each > TOO_LONG_S else 2 ** int(np.log2(np.clip(seconds / each, 1, MOST_CERTIFIED)))


def bound_inverses(
    model: Density | Classifier,
    latents: Any,
    data: Any,
    info: DecodeInfo,
    num: int | None,
    contexts: Num[np.ndarray, "n k"] | None = None,
) -> Guarantee | None:
    """Guarantees of the first decoded examples, or the reason why there are none.

    Args:
        latents: Latents as vectors, as NumPy's arrays.
        data: What `Model.decode` made of them.
        info: How it ended.
        num: Examples to certify, at most; 0 if one takes too long; None if it was not requested.
        contexts: Their contexts, of a conditional density.
    """
    if num is None:
        return None
    try:
        check(model)
    except ValueError as error:
        return Guarantee(reason=str(error))
    if num == 0:
        minutes = seconds_each(model.spec.flow) / 60
        return Guarantee(
            reason=f"an example would take about {minutes:.0f} min, see certify.inverse"
        )
    latents, data, info, given = jax.tree.map(
        lambda values: values[:num], (latents, data, info, contexts)
    )
    found = certified(model, latents, data, info, context=given)
    own, certain = found.certificate, found.certain
    errors = np.asarray(info.flow_input) - own.refined
    if certain is not None:
        cells = model.spec.cells if isinstance(model, Density) else None
        if cells is not None:  # of the entries that have levels, or values with cells
            certain = certain[..., np.asarray((cells.spacing > 0) | (cells.has_levels > 0))]
        certain = float(np.mean(certain))
    return Guarantee(
        num_examples=len(found.error_bound),
        num_applied=int(np.sum(own.applied)),
        max_bound=float(np.max(own.error_bound)),
        max_data_bound=float(np.max(found.error_bound)),
        max_error=float(np.linalg.norm(errors.reshape(len(errors), -1), axis=1).max()),
        fraction_certain=certain,
    )
