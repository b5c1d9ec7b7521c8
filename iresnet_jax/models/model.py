"""The common part of all models: replacing fields, a certificate, saving, the record of a training.

A file holds the spec as JSON and the arrays, and nothing of the training. Bounds of norms are not
stored, see `bounds`: a file cannot claim a certificate that its weights do not have.

**Leading axes.** Models run one example, a batch, or any axes of examples as one batch, and give
the axes back. Axes of examples and of their contexts broadcast against each other: ``(b, d)`` and
``(k,)`` are a batch under one context, ``(d,)`` and ``(n, k)`` are one example under ``n``
contexts. A batch with a context for each example takes no operation.
"""

import dataclasses
import json
import math
import operator
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, Bool, Float, Int, Num

from iresnet_jax.bijections.bijection import Bijection
from iresnet_jax.bijections.chain import Rematerialize
from iresnet_jax.bijections.residual import Solver
from iresnet_jax.maths import platforms
from iresnet_jax.maths.keys import typed_key
from iresnet_jax.maths.logdet_estimator import LogdetEstimator
from iresnet_jax.maths.logdet_exact import ExactLogdet
from iresnet_jax.maths.platforms import fast_compile
from iresnet_jax.maths.upward_rounding import said_up
from iresnet_jax.models import contexts
from iresnet_jax.models.architecture import FlowSpec, check_names
from iresnet_jax.models.certificate import Certificate, certificate_of, check_claims
from iresnet_jax.models.contractions import check_fit, freeze
from iresnet_jax.models.flow import (
    FlowBounds,
    as_params,
    bounded,
    bounds_of,
    carried_bounds,
    flow_bijection,
    is_traced,
)
from iresnet_jax.pytrees import in_words, largest, pytree, share, tagged
from iresnet_jax.storage import path_of, replacing

FILE_NAME = "model.npz"
FORMAT = 2
HEADER = "header"
MODELS: dict[type, Any] = {}  # by the class of their spec
STOPPED = "it was stopped"  # why a training ended that somebody stopped

M = TypeVar("M", bound="Model")
T = TypeVar("T")


@pytree(arrays=("estimator",))
class How:
    """How a model runs, never what it is.

    Attributes:
        estimator: Log-determinant of the blocks; None of a classifier, which needs none.
        solver: Inverse of the blocks.
        unroll: Whether blocks are unrolled instead of scanned.
        rematerialize: What the backward pass recomputes, see `iresnet_jax.bijections.chain.Repeat`.
    """

    estimator: LogdetEstimator | None = None
    solver: Solver = Solver()
    unroll: bool = False
    rematerialize: Rematerialize = "nothing"

    def in_training(
        self, spec: Any, *, unroll: bool | None = None, rematerialize: Rematerialize | None = None
    ) -> "How":
        """How training steps run a model; by default what is fastest.

        On CPUs a step of unrolled blocks of images is up to 1.7 times as fast; blocks of vectors
        are scanned, which compiles sooner. A scan writes all that it keeps for the backward pass
        into stacks, which takes longer than computing what is elementwise again.
        """
        if unroll is None:
            is_image = len(spec.flow.event_shape) == 3
            unroll = self.unroll or (is_image and platforms.platform() == "cpu")
        if rematerialize is None:
            is_exact = isinstance(self.estimator, ExactLogdet)
            is_free = is_exact and not unroll and self.rematerialize == "nothing"
            rematerialize = "elementwise" if is_free else self.rematerialize
        return dataclasses.replace(self, unroll=unroll, rematerialize=rematerialize)

    def for_step(self, key: Any) -> "How":
        """The same with the random length of a series drawn once for all blocks, examples and
        devices of a step.
        """
        if self.estimator is None:
            return self
        return dataclasses.replace(self, estimator=self.estimator.fix_length(key))


class DecodeInfo(NamedTuple):
    """How an inverse ended, one entry an example: the fields of `FixedPointInfo`, and what it made
    on the way.

    Attributes:
        num_evals: Evaluations of the branches.
        residual: Largest residual of a block.
        error_bound: Bound of the Euclidean error of continuous data; infinite where nothing is
            known.
        converged: Whether the iteration met its tolerance in all blocks.
        flow_input: What the flow's inverse made of the latents.
        flow_error_bound: Bound of the Euclidean error of `flow_input`.
        continuous: Data before levels are rounded.
        padding_residual: Euclidean norm of a classifier's padding channels, in the units of
            `flow_input`: 0 for the features of an image, and the distance from those of all images
            otherwise. None of a density.
    """

    num_evals: Int[Array, "..."]
    residual: Float[Array, "..."]
    error_bound: Float[Array, "..."]
    converged: Bool[Array, "..."]
    flow_input: Float[Array, "..."]
    flow_error_bound: Float[Array, "..."]
    continuous: Float[Array, "..."]
    padding_residual: Float[Array, "..."] | None = None

    def __repr__(self) -> str:
        return in_words(
            self,
            lambda: (
                f"{share(self.converged)} converged, residuals of blocks at most "
                f"{largest(self.residual)}\n  error_bound, a product over all blocks, at most "
                f"{largest(self.error_bound)}; ir.certify.decode has a sharp one of "
                "certified models"
            ),
        )


class Attempt(NamedTuple):
    """One of several training runs, the best of which gave the model.

    Attributes:
        what: What distinguishes it from the others.
        loss: Lowest validation loss.
        best_step: Updates that led to it; 0 is the start.
        num_steps: Updates of the run.
        seconds: Time of the run, without compilation.
    """

    what: str
    loss: float
    best_step: int
    num_steps: int
    seconds: float


@dataclass(frozen=True)
class History:
    """Measurements of a training run.

    Attributes:
        train: Measurements of training steps, averaged between two of them: a list of values by
            name, "step" among them.
        validation: Measurements on the validation split, likewise.
        step: Step whose parameters the model has, the best on validation.
        loss: Validation loss of the model; NaN without validation.
        losses: Its loss on each held-out example; None if only the mean is known.
        num_steps: Updates of the training.
        seconds: Its time, without the compilation of the step.
        attempts: Runs that were tried, in their order; empty if there was one run only.
        ended: Why no further one was tried.
    """

    train: Mapping[str, list[float]]
    validation: Mapping[str, list[float]]
    step: int
    loss: float = math.nan
    losses: np.ndarray | None = None
    num_steps: int = 0
    seconds: float = 0.0
    attempts: tuple[Attempt, ...] = ()
    ended: str = ""

    @classmethod
    def from_records(cls, records: Sequence[Mapping[str, Any]], step: int) -> "History":
        """The history in the records of `runs.metrics.read_metrics`."""
        train, validation = (
            _columns([r for r in records if r["split"] == split])
            for split in ("train", "validation")
        )
        return cls(train, validation, step)

    def __repr__(self) -> str:
        ended = f"\n  ended, as {self.ended}" if self.ended else ""
        loss = "no validation" if math.isnan(self.loss) else f"validation loss {self.loss:.4f}"
        return (
            f"History: the model is that of step {self.step} of {self.num_steps}, {loss}; print() "
            f"shows all{ended}"
        )

    def __str__(self) -> str:
        names = [name for name in self.validation if name not in ("step", "wall_time_s")]
        lines = ["step  seconds  " + "  ".join(names)] if names else []
        if not names and not self.attempts:
            lines = [f"step {self.step}, no validation"]
        for i, step in enumerate(self.validation.get("step", [])):
            values = "  ".join(f"{self.validation[name][i]:.4f}" for name in names)
            best = "  <- this model" if step == self.step else ""
            lines.append(f"{step:.0f}  {self.validation['wall_time_s'][i]:.1f}  {values}{best}")
        for run in self.attempts:
            lines.append(
                f"{run.what}: {run.loss:.4f} at step {run.best_step} of {run.num_steps}, "
                f"{run.seconds:.1f} s"
            )
        return "\n".join(lines + [f"ended, as {self.ended}"] * bool(self.ended))


def _columns(records: list[Mapping[str, Any]]) -> dict[str, list[float]]:
    names = [
        name
        for name in (records[0] if records else {})
        if name != "split" and all(name in r for r in records)
    ]
    return {name: [float(record[name]) for record in records] for name in names}


class Examples(NamedTuple):
    """Examples as one batch, with the axes that they came in.

    Attributes:
        x: The batch ``(b, ...)``.
        context: Context of each example ``(b, k)``; None without.
        axes: Leading axes of the examples, whose product is ``b``.
    """

    x: Any
    context: Any
    axes: tuple[int, ...]

    def keys(self, key: Any) -> Any:
        """One key or None as it is, or one key per example as a vector of them."""
        key = None if key is None else typed_key(key)
        return key if key is None or key.ndim < 2 else key.reshape(-1)

    def restore(self, results: T) -> T:
        """Arrays of the batch ``(b, ...)``, a tree of them, with the examples' own axes."""
        if len(self.axes) == 1:
            return results
        return jax.tree.map(lambda a: a.reshape(*self.axes, *a.shape[1:]), results)


def as_batch(
    x: Any, event_shape: tuple[int, ...], context: Any = None, context_dim: int = 0
) -> Examples:
    """Examples ``(..., *event_shape)`` and contexts ``(..., context_dim)`` as one batch.

    Arrays that do not end in these shapes are left as they are, for the model to refuse.
    """
    event_shape = tuple(event_shape)
    x = x if isinstance(x, jax.Array | np.ndarray) else np.asarray(x)
    axes = x.shape[: -len(event_shape)]
    if x.shape != (*axes, *event_shape):
        return Examples(x, context, x.shape[:1])
    if context is not None and context_dim:
        context = contexts.as_vectors(context, context_dim)
        if context.shape[-1:] == (context_dim,):
            axes = np.broadcast_shapes(axes, context.shape[:-1])
            context = _flat(context, axes, (context_dim,))
    return Examples(_flat(x, axes, event_shape), context, axes)


def _flat(array: Any, axes: tuple[int, ...], own: tuple[int, ...]) -> Any:
    """An array of ``own`` shape behind axes that broadcast to ``axes``, as a batch."""
    if len(axes) == 1 and array.shape == (*axes, *own):
        return array
    # known numbers stay known under jit, and are checked
    xp = jnp if isinstance(array, jax.Array) else np
    return xp.broadcast_to(array, (*axes, *own)).reshape(math.prod(axes), *own)


class Model:
    """A model as a value: `spec`, all that defines it but its weights, and `weights` of its flow,
    see `flow`.

    Attributes:
        arrays: Names of the fields with arrays beside the weights.
    """

    arrays: ClassVar[tuple[str, ...]] = ()
    spec: Any
    weights: Any
    how: How

    def __init_subclass__(cls, *, spec: type | None = None) -> None:
        if spec is not None:
            MODELS[spec] = cls

    def with_(self: M, **changes: Any) -> M:
        """The same model with other fields, also with those of `how`, such as ``solver``."""
        how = {field.name for field in dataclasses.fields(How)} & changes.keys()
        if how:
            own = {name: changes.pop(name) for name in how}
            changes["how"] = dataclasses.replace(changes.get("how", self.how), **own)
        if "weights" in changes:
            changes["weights"] = bounded(changes["weights"], None)
        elif "spec" in changes and changes["spec"].flow != self.spec.flow:
            check_fit(changes["spec"].flow, self.weights)
        found = dataclasses.replace(self, **changes)  # pyright: ignore[reportArgumentType, reportCallIssue]
        vars(found)["_known"] = vars(self).get("_known")
        return found

    def __getstate__(self) -> dict[str, Any]:
        """The fields."""
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}  # pyright: ignore[reportArgumentType]

    @property
    def learned(self) -> dict[str, Any]:
        """The fields in `arrays`."""
        return {name: getattr(self, name) for name in self.arrays}

    def promoted(self, x: Any) -> Array:
        """Numbers in the precision of the weights, if theirs is lower."""
        x = jnp.asarray(x)
        return x.astype(jnp.result_type(x, *jax.tree.leaves(as_params(self.weights))))

    def __repr__(self) -> str:
        num = sum(map(np.size, jax.tree.leaves((as_params(self.weights), self.learned))))
        return (
            f"{type(self).__name__} of {described(self.spec)}: "
            f"{self.spec.flow.num_blocks} residual blocks, {num:,} parameters\n"
            f"  {self._guarantee()}"
        )

    def _guarantee(self) -> str:
        """What is known of the blocks of these very weights, without computing anything."""
        if not self.spec.constrained:
            return "without a constraint: no inverse is promised"
        found = self._known_bounds() if self.weights else {}
        if found is None:
            return "print(model.certificate()) computes whether every block is invertible"
        if not found:
            return "certified: there are no residual blocks, and all else is invertible"
        bound = max(float(np.max(each.lipschitz)) for each in found.values())
        if not bound < 1:
            return f"NOT CERTIFIED: Lip(g) <= {said_up(bound, 4)}"
        claims = dict.fromkeys(stage.branch.claim for stage in self.spec.flow.all_stages)
        if claims := [claim for claim in claims if claim]:
            return f"not proven: invertible if {' and '.join(claims)}"
        return f"certified: every block is invertible, Lip(g) <= {said_up(bound, 4)}"

    # ------------------------------------------------------------------------------- there and back

    def encode(self, x: Any, key: Any = None, *, context: Any = None) -> Float[Array, "... d"]:
        """Latents of data, the features of a classifier, as vectors.

        Args:
            x: Data.
            key: Source of the noise of integer levels of a density; None takes the middle of each
                level's cell.
            context: Contexts of a conditional model.
        """
        examples = self._examples(x, context)
        return examples.restore(_encode(self, examples.x, examples.context, examples.keys(key)))

    def decode(
        self, z: Any, *, context: Any = None, bounds: FlowBounds | None = None
    ) -> tuple[Num[Array, "..."], DecodeInfo]:
        """Data of latents, and how the inverse ended; `certify.decode` guarantees the error of the
        same data.

        Its ``error_bound`` is in the units of continuous data: [0, 1) for integer levels, before
        they are rounded down, and the scale of [0, 1] for images of a classifier. It is the product
        of the blocks' bounds, without the rounding of the preprocessing, and says little about a
        deep flow. Without a constraint the iteration may not converge, or to other data.

        Args:
            z: Latents.
            context: Contexts of a conditional model.
            bounds: See `bounds`.
        """
        latents, bounds = self._latents(z, context), self._own(bounds)
        return latents.restore(_decode(self, latents.x, latents.context, bounds))

    def flow(self, context: Any = None, *, bounds: FlowBounds | None = None) -> Bijection:
        """The residual flow alone, from preprocessed data to latents."""
        weights, given = self.weights, self.scale_context(context)
        return self.flow_of(self.spec.flow, bounded(weights, self._own(bounds)), given)

    def class_log_probs(self, x: Any, key: Any = None, *, context: Any = None) -> Array:
        """``log p(y | x)`` for every class ``y``; arguments are those of ``logits``."""
        return jax.nn.log_softmax(self.logits(x, key, context=context))  # pyright: ignore[reportAttributeAccessIssue]

    def scale_context(self, context: Any) -> Any:
        """Contexts as the flow takes them."""
        return context

    def flow_of(self, spec: FlowSpec, weights: Any, context: Any = None) -> Bijection:
        """The bijection of a flow's weights, run as this model says."""
        how = self.how
        return flow_bijection(
            spec,
            weights,
            how.estimator or ExactLogdet(),
            how.solver,
            context=context,
            unroll=how.unroll,
            rematerialize=how.rematerialize,
        )

    def _examples(self, x: Any, context: Any = None) -> Examples:
        """Data and contexts as one batch, checked."""
        spec = self.spec
        context = spec.context_numbers(context)
        batch = as_batch(spec.numbers(x), spec.example_shape, context, spec.context_dim)
        return batch._replace(x=spec.checked(batch.x))

    def _latents(self, z: Any, context: Any) -> Examples:
        """Latents and contexts as one batch."""
        spec = self.spec
        context = spec.context_numbers(context)
        return as_batch(jnp.asarray(z), (spec.flow.num_dims,), context, spec.context_dim)

    # ----------------------------------------------------------------------------------- its bounds

    def bounds(self) -> FlowBounds:
        """Guaranteed bounds of all blocks, for your own programs.

        Methods such as `decode` bound the weights themselves outside of ``jit``: a program of
        norms, or some microseconds where they have bounded these very arrays before. Within
        ``jit`` a model has no bounds unless it is handed them: it inverts as well, and reports
        infinite error bounds and no convergence.

        Example:
            >>> decode = jax.jit(lambda model, z, bounds: model.decode(z, bounds=bounds))
            >>> x, info = decode(model, z, model.bounds())  # doctest: +SKIP
        """
        found = self._known_bounds()
        if found is None:
            found = bounds_of(self.spec.flow, self.weights)
            remember(self, found)
        return found

    def _known_bounds(self) -> FlowBounds | None:
        """Bounds that were computed of these very arrays before."""
        known = vars(self).get("_known")
        if known is not None and known[0] == self.spec.flow:
            arrays = _bounded_arrays(self)
            if len(arrays) == len(known[1]) and all(map(operator.is_, arrays, known[1])):
                return known[2]
        return None

    def _own(self, bounds: FlowBounds | None) -> FlowBounds | None:
        """The bounds that were handed in, or those of the weights outside of a program."""
        return self.bounds() if bounds is None and not is_traced(self.weights) else bounds

    def certificate(self) -> Certificate:
        """Norms of all layers and Lipschitz constants of all blocks and of the whole model,
        estimated and guaranteed.
        """
        spec, bounds = self.spec, self.bounds()
        return certificate_of(
            spec.flow, self.weights, bounds, spec.bilipschitz(), constrained=spec.constrained
        )

    def freeze(self: M) -> M:
        """The same model, every block certified to be within the budget of ``spec.flow.coeff``,
        see `contractions.freeze`.
        """
        if not self.spec.constrained:
            raise ValueError(
                "this network has no Lipschitz constraint: there is nothing to freeze it to"
            )
        weights = freeze(self.spec.flow, as_params(self.weights))
        return remember(self.with_(weights=weights), carried_bounds(weights))

    def check_branches(self, x: Any, *, context: Any = None) -> None:
        """Checks bounds that are not proven on data, by ratios ``|g(x) - g(y)| / |x - y|``:
        those of branches and activations of your own. ``ValueError`` names the block that
        stretches data by more than it claims, and both numbers. `Density.init` and
        `Classifier.init` check on their examples.
        """
        scaled = None
        if context is not None:
            x, context, _ = self._examples(x, context)
            scaled = self.scale_context(context)
        check_claims(self.spec.flow, self.weights, self.preprocess(x), scaled)  # pyright: ignore[reportAttributeAccessIssue]

    def save(self, path: str | os.PathLike[str], about: Mapping[str, Any] | None = None) -> Path:
        """Writes the model to one file, which `iresnet_jax.load` reads; a file that was there is
        replaced in one step.

        Args:
            path: The file; ``.npz`` is its customary end.
            about: JSON data that travel with the model, such as the settings of its training.
        """
        check_names(self.spec.flow)
        path = path_of(path)
        header = {"format": FORMAT, "spec": tagged(self.spec), "about": dict(about or {})}
        arrays: dict[str, Any] = {HEADER: np.frombuffer(json.dumps(header).encode(), np.uint8)}
        learned = {"params": as_params(self.weights), **self.learned}
        for key, leaf in jax.tree.leaves_with_path(learned):
            array = np.asarray(leaf)
            if not np.all(np.isfinite(array)):
                raise ValueError(f"{array_name(key)} holds numbers that are not finite")
            arrays[array_name(key)] = array.astype(np.promote_types(array.dtype, np.float32))
        with replacing(path) as incoming, incoming.open("wb") as file:
            np.savez_compressed(file, **arrays)
        return path


def described(spec: Any) -> str:
    """What a model is of: the shape of an example, and how many levels, classes and contexts."""
    shape = spec.example_shape
    kind = f"vectors of {shape[0]}" if len(shape) == 1 else f"images {' x '.join(map(str, shape))}"
    numbers = {
        "levels": spec.num_levels,
        "classes": spec.num_classes,
        "numbers of context": spec.context_dim,
    }
    return ", ".join([kind, *(f"{num} {what}" for what, num in numbers.items() if num)])


# One program each: outside of ``jit``, every operation would be one of its own, and every loop one
# at every call.


@fast_compile
def _encode(model: Any, x: Array, context: Any, key: Any) -> Float[Array, "b d"]:
    return model.flow(context).forward(model.preprocess(x, key))


@fast_compile
def _decode(model: Any, z: Array, context: Any, bounds: Any) -> tuple[Array, DecodeInfo]:
    return model.to_data(*model.flow(context, bounds=bounds).inverse(model.promoted(z)))


def _bounded_arrays(model: Model) -> list[Any]:
    """The arrays that bounds depend on."""
    branches = {name: block.branch for name, block in model.weights.items()}
    return jax.tree.leaves({name: (own.weights, own.gain) for name, own in branches.items()})


def remember(model: M, bounds: FlowBounds) -> M:
    """The model, which remembers bounds of its very arrays.

    They are those of JAX, which do not change; those of NumPy do, and their bounds are computed
    again.
    """
    arrays = _bounded_arrays(model)
    leaves = (*arrays, *jax.tree.leaves(bounds))
    if all(isinstance(leaf, jax.Array) and not isinstance(leaf, Tracer) for leaf in leaves):
        vars(model)["_known"] = model.spec.flow, arrays, bounds
    return model


def array_name(path: Any) -> str:
    """Name of an array in a file by its path in a pytree, such as
    ``params/stage0/blocks/conv0/kernel``.
    """
    return jax.tree_util.keystr(path, simple=True, separator="/")
