"""Bounds of Lipschitz constants that are the user's word, beside what a batch of data shows: a
bound that is none is refused.

A branch of one's own says its constant itself. Ratios ``|g(x) - g(y)| / |x - y|`` of pairs of the
batch, and ``|J v| / |v|`` along directions of power iteration, are lower bounds of it: one above
the claim proves the claim wrong, none proves it right.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float

from iresnet_jax.branches.branch import Branch
from iresnet_jax.maths.fixed_point import example_norm
from iresnet_jax.maths.platforms import fast_compile
from iresnet_jax.models.architecture import FlowSpec
from iresnet_jax.models.flow import FlowWeights, branch_inputs

EXAMPLES = 256  # of a batch, at most, whose pairs are measured
RTOL = 1e-3  # by which a ratio may be above a claim: rounding, and bounds that are attained


def check_claims(
    spec: FlowSpec,
    weights: FlowWeights,
    x: Float[Array, "b ..."],
    context: Float[Array, "b k"] | None = None,
) -> None:
    """Checks bounds on the user's word on inputs of the flow; there is nothing to check of other
    branches.

    Arguments are those of `flow.branch_inputs`.

    Raises:
        ValueError: If a branch claims less than is measured, claims no number, or mixes the
            examples of a batch.
    """
    names = {
        stage.name: stage.spec.branch_name for stage in spec.layout if stage.branch.word == "user"
    }
    if not names:
        return
    if not len(x):
        raise ValueError("branches are checked on data, got none: give some examples")
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
