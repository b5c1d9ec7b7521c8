"""The certificate of a model: the Lipschitz constants of its layers, of its blocks and of the whole
map.

Every layer has its norm as power iteration sees it, from below, and a guaranteed bound from above;
every block has their products. The bounds concern the stored weights in exact arithmetic.

A branch of one's own says its constant itself, and one with an activation of one's own relies on
its slopes. `check_claims` compares such claims with data: ratios ``|g(x) - g(y)| / |x - y|`` of
pairs, and ``|J v| / |v|`` along directions of power iteration, are lower bounds. One above the
claim proves the claim wrong, none proves it right.
"""

import dataclasses
import functools
import math
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float

from iresnet_jax.branches.branch import Branch
from iresnet_jax.maths.fixed_point import example_norm
from iresnet_jax.maths.lipschitz_bounds import BiLipschitz
from iresnet_jax.maths.platforms import fast_compile
from iresnet_jax.maths.upward_rounding import said_up
from iresnet_jax.models.architecture import FlowSpec
from iresnet_jax.models.contractions import FlowNorms, constrain
from iresnet_jax.models.flow import (
    FlowBounds,
    FlowWeights,
    as_params,
    bilipschitz,
    blocks_of,
    bounded,
    branch_inputs,
)

EXAMPLES = 256  # of a batch, at most, whose pairs are measured
RTOL = 1e-3  # by which a ratio may be above a claim: rounding, and bounds that are attained


@dataclass(frozen=True)
class Constant:
    """The Lipschitz constant of a layer or of a block's branch.

    Attributes:
        name: "conv0" of a layer, "stage0/block03" of a block.
        target: Largest constant that the constraint allows; None without one.
        estimate: Norm by power iteration, or the product of the layers', from below; NaN of a
            branch without layers.
        bound: Upper bound, guaranteed if ``claim`` is empty.
        layers: Constants of a block's layers; none of a layer.
        claim: What the bound relies on without a proof, see `BranchSpec.claim`.
    """

    name: str
    target: float | None
    estimate: float
    bound: float
    layers: tuple["Constant", ...] = ()
    claim: str = ""


@dataclass(frozen=True)
class Certificate:
    """Lipschitz constants of a whole model. As a string it is a table with a verdict, and the
    constants of the whole model.

    Attributes:
        coeff: Coefficient of the constraint; None without one.
        budget: "layer" or "block", see `FlowSpec`; None without a constraint.
        blocks: Every residual block.
        forward: Guaranteed bound of ``Lip(F)`` from data to latents.
        inverse: Guaranteed bound of ``Lip(F^-1)``; infinite where nothing is known.
    """

    coeff: float | None
    budget: str | None
    blocks: tuple[Constant, ...]
    forward: float
    inverse: float

    @property
    def certified(self) -> bool:
        """Whether every block is proven to be invertible: its bound is below 1, and no claim."""
        return all(block.bound < 1 and not block.claim for block in self.blocks)

    @property
    def max_block(self) -> float:
        """The largest bound of a block; NaN if one is, 0 without blocks."""
        bounds = (block.bound for block in self.blocks)
        return max(bounds, key=lambda bound: (math.isnan(bound), bound), default=0.0)

    @property
    def target(self) -> float | None:
        """Largest Lipschitz constant that the constraint allows a block; None without a
        constraint.
        """
        return max(
            (block.target for block in self.blocks if block.target is not None), default=None
        )

    @property
    def verdict(self) -> str:
        """One line: whether every block is invertible, and whether that is proven."""
        num, bound = len(self.blocks), said_up(self.max_block, 5)
        if not num:
            return "certified: there are no residual blocks, and all else is invertible"
        if failed := [block.name for block in self.blocks if not block.bound < 1]:
            return (
                f"NOT CERTIFIED: no bound of Lip(g) below 1 for {len(failed)} of {num} blocks, the "
                f"first is {failed[0]}"
            )
        if claimed := [block for block in self.blocks if block.claim]:
            claims = " and ".join(dict.fromkeys(block.claim for block in claimed))
            return (
                f"not proven: {len(claimed)} of {num} blocks, the first is {claimed[0].name}, are "
                f"invertible if {claims}; Lip(g) <= {bound}"
            )
        return f"certified: every one of {num} blocks is invertible, proven by Lip(g) <= {bound}"

    @property
    def table(self) -> str:
        """Target, estimate and upper bound of every layer and block, a line each."""
        rows = []
        for block in self.blocks:
            rows += [(f"{block.name}/{layer.name}", layer) for layer in block.layers]
            rows.append((block.name, block))
        width = max((len(name) for name, _ in rows), default=0)
        lines = [f"{'':{width}}   target  estimate  upper bound"]
        for name, row in rows:
            limit = "" if row.target is None else f"{row.target:.4f}"
            estimate = "" if math.isnan(row.estimate) else f"{row.estimate:.5f}"
            claim = "  not proven" if row.claim else ""
            lines.append(
                f"{name:{width}}  {limit:>7}  {estimate:>8}  {said_up(row.bound, 5):>11}{claim}"
            )
        return "\n".join(lines)

    def __repr__(self) -> str:
        return f"Certificate: {self.verdict}"

    def __str__(self) -> str:
        whole = (
            f"whole model, products over blocks: Lip(F) <= {said_up(self.forward, 5)}, Lip(F^-1) "
            f"<= {said_up(self.inverse, 3)}"
        )
        return f"{self.table}\n{whole}\n{self.verdict}"


def certificate_of(
    spec: FlowSpec,
    weights: FlowWeights,
    bounds: FlowBounds,
    preprocessing: BiLipschitz,
    *,
    constrained: bool = True,
) -> Certificate:
    """The certificate of a flow's weights behind a map with the constants of its preprocessing.

    Bounds are those of the weights, see `flow.bounds_of`. Weights are ``constrained`` if they are
    meant to satisfy ``spec.coeff``.
    """
    weights = bounded(blocks_of(spec, weights), bounds)
    per_layer = spec.coeff if constrained and spec.budget == "layer" else None
    per_block = spec.coeff if constrained else None
    blocks = []
    estimates_of, flow = _estimates_and_bounds(spec, weights)
    for stage in spec.layout:
        branch = weights[stage.name].branch
        of_parts, estimates = jax.device_get((branch.norms or {}, estimates_of[stage.name]))
        for k in range(stage.spec.num_blocks):
            parts = tuple(
                Constant(
                    part.name,
                    per_layer,
                    float(estimates[part.name][k]),
                    float(of_parts[part.name][k]),
                )
                for part in stage.branch.parts
            )
            target = math.prod([per_layer] * len(parts)) if per_layer and parts else per_block
            estimate = math.prod(part.estimate for part in parts) if parts else math.nan
            bound = float(np.asarray(branch.lipschitz_bound)[k])
            blocks.append(
                Constant(
                    f"{stage.name}/block{k:02d}", target, estimate, bound, parts, branch.spec.claim
                )
            )
    whole = preprocessing.compose(flow)
    coeff, budget = (spec.coeff, spec.budget) if constrained else (None, None)
    return Certificate(coeff, budget, tuple(blocks), float(whole.forward), float(whole.inverse))


@functools.partial(fast_compile, static_argnums=(0,))
def _estimates_and_bounds(spec: FlowSpec, weights: FlowWeights) -> tuple[FlowNorms, BiLipschitz]:
    """Norms of all layers by power iteration to a tolerance, and the bounds of the whole flow,
    compiled as one program.
    """
    estimated = constrain(spec, as_params(weights), spec.initial_iterates(jax.random.key(0)))
    return estimated.norms, bilipschitz(spec, weights)


def check_claims(
    spec: FlowSpec,
    weights: FlowWeights,
    x: Float[Array, "b ..."],
    context: Float[Array, "b k"] | None = None,
) -> None:
    """Checks claimed bounds on inputs of the flow; there is nothing to check of proven ones.

    Arguments are those of `flow.branch_inputs`. A branch that claims less than is measured, claims
    no number, or mixes the examples of a batch raises ``ValueError``.
    """
    names = {stage.name: stage.spec.branch_name for stage in spec.layout if stage.branch.claim}
    if not names:
        return
    contexts = None if context is None else jnp.asarray(context[:EXAMPLES])
    found = jax.device_get(
        _measure(spec, tuple(names), weights, jnp.asarray(x[:EXAMPLES]), contexts)
    )
    for stage, measured in found.items():
        for k, (claim, ratio, mixing) in enumerate(zip(*measured, strict=True)):
            if not (np.isfinite(claim) and claim >= 0):
                wrong = (
                    f"claims the Lipschitz constant {claim:.4g}: lipschitz_bound() must be a "
                    "finite number"
                )
            elif mixing > RTOL:
                wrong = (
                    "gives an example other values if the batch has other examples: each must "
                    "be computed alone"
                )
            elif not ratio <= claim * (1 + RTOL):
                wrong = (
                    f"claims the Lipschitz constant {claim:.4g}, and {ratio:.4g} was measured on "
                    "the data: its "
                    "lipschitz_bound() is no upper bound, and nothing that relies on it would hold"
                )
            else:
                continue
            raise ValueError(f"the branch {names[stage]!r} of {stage}/block{k:02d} {wrong}")


@functools.partial(fast_compile, static_argnums=(0, 1))
def _measure(
    spec: FlowSpec,
    names: tuple[str, ...],
    weights: FlowWeights,
    x: Float[Array, "b ..."],
    context: Float[Array, "b k"] | None,
) -> dict[str, tuple[Float[Array, " k"], ...]]:
    """Each block's claim, before any factor on its output, the largest ratio that was found, and
    `_mixing`; by stage.
    """
    inputs = branch_inputs(spec, weights, x, context)

    def of_block(own):
        block, x = own
        branch = dataclasses.replace(block.branch, gain=None)
        claim = branch.spec.lipschitz_bound(branch.weights).astype(x.dtype)
        ratio = jnp.maximum(_pairs(branch, x, context), _directions(branch, x, context))
        return claim, ratio, _mixing(branch, x, context)

    return {name: lax.map(of_block, (weights[name], inputs[name])) for name in names}


def _pairs(
    branch: Branch, x: Float[Array, "b ..."], context: Float[Array, "b k"] | None
) -> Float[Array, ""]:
    """The largest ratio of neighbours in the batch, each pair under one context, less what
    rounding may add.
    """
    g, y = branch.given(context), jnp.roll(x, 1, axis=0)
    values, others, distance = g(x), g(y), example_norm(x - y)
    rounding = 32 * jnp.finfo(x.dtype).eps * (example_norm(values) + example_norm(others))
    is_apart = distance > 1e-2 * jnp.mean(distance)  # differences of closer ones are rounding
    return jnp.max(
        jnp.where(
            is_apart,
            (example_norm(values - others) - rounding) / jnp.where(is_apart, distance, 1),
            0,
        )
    )


def _directions(
    branch: Branch, x: Float[Array, "b ..."], context: Float[Array, "b k"] | None
) -> Float[Array, ""]:
    """The largest ``|J v| / |v|`` in 20 steps of power iteration at some examples."""
    x, context = x[:16], None if context is None else context[:16]
    _, push = jax.linearize(branch.given(context), x)
    pull = jax.linear_transpose(push, x)

    def unit(v):
        norm = example_norm(v)
        return v / jnp.where(norm > 0, norm, 1).reshape(-1, *(1,) * (v.ndim - 1))

    def step(v, _):
        pushed = push(v)
        return unit(pull(pushed)[0]), jnp.max(example_norm(pushed))

    start = unit(jax.random.normal(jax.random.key(0), x.shape, x.dtype))
    return jnp.max(lax.scan(step, start, length=20)[1])


def _mixing(
    branch: Branch, x: Float[Array, "b ..."], context: Float[Array, "b k"] | None
) -> Float[Array, ""]:
    """Largest change of the first half's values by the second half, relative to the largest
    value.
    """
    half = (len(x) + 1) // 2
    whole, alone = (
        branch.given(context)(x),
        branch.given(None if context is None else context[:half])(x[:half]),
    )
    largest = jnp.max(jnp.abs(whole))
    return jnp.max(jnp.abs(whole[:half] - alone)) / jnp.where(largest > 0, largest, 1)
