r"""Log-likelihoods whose log-determinants have a stated accuracy, by the cheapest estimator of every block.

A pilot on a few examples measures for every block the variance of an estimate by one probe and how its bias falls with the
number of products; `probes.cheapest` then chooses between the exact log-determinant and Krylov subspaces, with the closed
form of the trace where there is one. All examples follow, and probes are added in rounds until the target is met.

The accuracy is ``bias + standard error`` of an example's log-likelihood, root mean square over examples; the standard error is
that over probes, and `probes` says how the bias is estimated. Each example has its own keys, so results do not depend on
batches.
"""

import functools
import math
from dataclasses import dataclass, replace
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Num

from iresnet_jax.branches.branch import Branch
from iresnet_jax.evaluation import probes
from iresnet_jax.evaluation.probes import PROBES_AT_ONCE, Block, Choice, Sums, rms
from iresnet_jax.maths.enclosures.upward_rounding import said_up
from iresnet_jax.maths.logdet.estimator import LogdetEstimator, LogdetInfo, draw_probes
from iresnet_jax.maths.logdet.exact import ExactLogdet
from iresnet_jax.maths.logdet.krylov import nested_quadratic_forms
from iresnet_jax.models.density import Density
from iresnet_jax.models.flow import branch_inputs
from iresnet_jax.training import parallel
from iresnet_jax.training.objectives.density import evaluation_keys
from iresnet_jax.training.parallel import eval_batches

PILOT_EXAMPLES, PILOT_PROBES = 32, 4
# Dimensions of the pilot's Krylov subspaces; the last stands for the truth. A later set follows if one does not suffice.
PILOT_SIZES = ((2, 3, 4, 6, 8, 10, 12), (12, 16, 20, 24), (24, 32, 40, 48))
PILOT_DRAW = 2**20  # number of the pilot's draw, which no other draw has
CHEAP = 100.0  # products for which a block is exact without a pilot, which takes half as many
MAX_ROUNDS = 5
FULL_ENTRIES = 2**26  # entries of full Jacobians that are in memory together


@dataclass(frozen=True)
class Accuracy:
    """Error of examples' log-likelihoods that comes from their log-determinants, root mean square over examples.

    Attributes:
        target: Largest ``bias + stderr`` that was asked for, in ``unit``.
        bias: Estimate of how far the expectation over probes is off, from how Krylov subspaces of increasing dimension converge
            for the same probes; 0 if exact.
        stderr: Standard error over probes, of the mean over noise draws; 0 if exact.
        bias_bound: Guaranteed bound of the bias if the Lipschitz constants are guaranteed; often far above it.
        products: Operations of an example for each noise draw, in those of a product with a block's Jacobian, summed over
            blocks.
        plan: What every stage does, in words.
        unit: "bits/dim" or "nats".
    """

    target: float
    bias: float
    stderr: float
    bias_bound: float
    products: float
    plan: tuple[str, ...]
    unit: str

    @property
    def met(self) -> bool:
        """Whether the target was met."""
        return self.bias + self.stderr <= self.target

    def __str__(self) -> str:
        found = f"bias about {self.bias:.1g} (at most {said_up(self.bias_bound, 1)}) + stderr {self.stderr:.1g} {self.unit}"
        verdict = f"{'within' if self.met else 'NOT within'} {self.target:g}"
        return (
            f"log-determinants of an example: {found}, {verdict}; as dear as {self.products:,.0f} products with Jacobians "
            f"({'; '.join(self.plan)})"
        )


def log_prob(
    model: Density,
    examples: Num[np.ndarray, "n ..."],
    target: float,
    seed: int = 0,
    *,
    num_dequantisations: int = 1,
    batch_size: int = 256,
    contexts: Num[np.ndarray, "n k"] | None = None,
) -> tuple[Float[np.ndarray, "n s"], Accuracy]:
    """Log-likelihood of every example and noise draw in nats, and how accurate its log-determinants are.

    Args:
        target: Largest bias + standard error of an example, in bits/dim of images or nats of points, root mean square over
            examples, for the mean over noise draws.
        seed: Seed of noise and probes; the noise is that of `likelihood.measure` with this seed.
        num_dequantisations: Noise draws of an example.
        contexts: Context of each example, of a conditional density.

    Raises:
        ValueError: If the target is not positive.
    """
    if not 0 < target < math.inf:
        raise ValueError(f"the target of the error must be a positive number of {model.spec.unit}, got {target}")
    in_nats, spec = target / model.spec.unit_of_a_nat, model.spec
    evaluation = _Evaluation(model, examples, jax.random.key(seed), batch_size, contexts)
    blocks = evaluation.pilot(in_nats, num_dequantisations)
    choices = probes.cheapest(blocks, in_nats, num_dequantisations)
    sums = Sums(choices, (len(examples), num_dequantisations))
    draws = [choice.num_probes // PROBES_AT_ONCE for choice in choices]
    for is_first in (True, *(False for _ in range(MAX_ROUNDS))):
        for noise_draw in range(num_dequantisations):
            evaluation.add(sums, choices, noise_draw, draws, is_first=is_first)
        sums.num_draws = [num + more for num, more in zip(sums.num_draws, draws, strict=True)]
        draws = sums.missing_draws(in_nats)
        if not any(draws):
            break
    done = [replace(choice, num_probes=sums.num_probes(b)) for b, choice in enumerate(choices)]
    accuracy = Accuracy(
        target=target,
        bias=sums.bias() * spec.unit_of_a_nat,
        stderr=sums.stderr() * spec.unit_of_a_nat,
        bias_bound=sums.bias_bound() * spec.unit_of_a_nat,
        products=sum(choice.cost(block) / block.product for choice, block in zip(done, blocks, strict=True)),
        plan=_in_words(blocks, done),
        unit=spec.unit,
    )
    return sums.log_prob(), accuracy


class _Evaluation:
    """The programs of an evaluation and the data that they run on."""

    def __init__(self, model, examples, key, batch_size, contexts):
        self._model, self._examples, self._key, self._contexts = model, examples, key, contexts
        self._batch_size = batch_size
        self._blocks = [(stage, k) for stage in model.spec.flow.layout for k in range(stage.spec.num_blocks)]

    def pilot(self, target: float, num_noise: int) -> list[Block]:
        """What the plan has to know, from a few examples."""
        blocks = []
        for stage, _ in self._blocks:
            product = stage.branch.product_operations
            blocks.append(Block(stage.name, product, stage.branch.logdet_cost * product))
        numbers = np.arange(min(PILOT_EXAMPLES, len(self._examples)))
        asked, prepared = [b for b, block in enumerate(blocks) if block.exact > CHEAP * block.product], None
        for sizes in PILOT_SIZES:
            if not asked:
                break
            prepared = prepared or self._prepare(numbers, len(numbers), 0)
            for b in asked:
                outputs = self._of_block(b, sizes, PILOT_PROBES, prepared, len(numbers), 0, PILOT_DRAW)
                values = np.asarray(outputs["values"], np.float64)  # (example, dimension, probe)
                errors = (values - values[:, -1:]).mean(axis=2)[:, :-1]
                biases = {size + 1: rms(errors[:, i]) for i, size in enumerate(sizes[:-1])}
                variance = float(values[:, -1].var(axis=1, ddof=1).mean())
                blocks[b] = replace(blocks[b], variance=variance, biases={**(blocks[b].biases or {}), **biases})
            asked = probes.worth_more_steps(blocks, sizes[-1] + 1, target, num_noise)
        return blocks

    def add(self, sums: Sums, choices: list[Choice], noise_draw: int, draws: list[int], *, is_first: bool) -> None:
        """Adds draws of probes for every block; at first also exact blocks and everything else."""
        num, multiple = len(self._examples), parallel.all_devices()
        size = -(-min(self._batch_size, num) // multiple) * multiple
        for numbers, mask in eval_batches(num, size):
            prepared, rows = self._prepare(numbers, size, noise_draw), numbers[mask]
            if is_first:
                sums.known[rows, noise_draw] = prepared["known"][mask]
            for b, choice in enumerate(choices):
                if not choice.num_steps and is_first:
                    exact = self._of_block(b, (), 0, prepared, size, noise_draw, 0)["values"]
                    sums.known[rows, noise_draw] += exact[mask]
                sizes = tuple(range(choice.num_steps - 2, choice.num_steps + 1))
                for draw in range(sums.num_draws[b], sums.num_draws[b] + draws[b]):
                    outputs = self._of_block(b, sizes, PROBES_AT_ONCE, prepared, size, noise_draw, draw)
                    sums.add(b, rows, noise_draw, outputs["values"][mask], outputs["bounds"][mask])

    def _prepare(self, numbers, size, noise_draw):
        """The likelihood without the log-determinants of blocks, the blocks' inputs, and what else they need."""
        examples, contexts = self._examples[numbers], None if self._contexts is None else self._contexts[numbers]

        def batch_of(places):
            keys = evaluation_keys(self._key, numbers[places], noise_draw, 0)
            return examples[places], None if contexts is None else contexts[places], *keys

        model = self._model.with_(estimator=_NoLogdet())
        found = parallel.over_batches(_prepare_batch, model, batch_of, len(numbers), size)
        return {**found, "numbers": numbers}

    def _of_block(self, b, sizes, num_probes, prepared, size, noise_draw, draw):
        stage, k = self._blocks[b]
        branch = jax.tree.map(lambda w: w[k], self._model.weights[stage.name].branch)
        task = _Task(branch, sizes, num_probes)
        inputs, contexts, numbers = prepared["inputs"][stage.name], prepared.get("context"), prepared["numbers"]

        def batch_of(places):
            keys = _probe_keys(self._key, numbers[places], noise_draw, b, draw)
            return inputs[places, k], None if contexts is None else contexts[places], keys

        if not sizes and branch.logdet is None:
            fits, multiple = max(FULL_ENTRIES // math.prod(stage.branch.in_shape) ** 2, 1), parallel.all_devices()
            size = min(size, max(fits // multiple, 1) * multiple)
        return parallel.over_batches(_evaluate_block, task, batch_of, len(numbers), size)


@jax.tree_util.register_static
@dataclass(frozen=True)
class _NoLogdet(LogdetEstimator):
    """Log-determinants of 0, for all other terms of a likelihood."""

    unbiased: ClassVar[bool] = False

    def _estimate(self, branch, x, key, lipschitz_bound, trace, jacobian, logdet):
        zeros = jnp.zeros(len(x), x.dtype)
        return zeros, LogdetInfo(zeros, zeros)


@functools.partial(jax.tree_util.register_dataclass, data_fields=["branch"], meta_fields=["sizes", "num_probes"])
@dataclass(frozen=True)
class _Task:
    """A block to evaluate: exactly if there are no sizes of Krylov subspaces."""

    branch: Branch
    sizes: tuple[int, ...]
    num_probes: int


def _prepare_batch(model, batch):
    x, context, key_noise, key_probe = batch
    terms = model.terms(x, key_noise, key_probe, context=context)
    of_noise, without = (
        run.dequantize_and_logdet(x, key_noise, key_probe)[1] for run in (model.with_(estimator=ExactLogdet()), model)
    )
    y, context = model.preprocess(x, key_noise), model.scale_context(context)
    inputs = branch_inputs(model.spec.flow, model.weights, y, context, bfloat16=model.bfloat16)
    known = terms.log_prob + (of_noise - without)  # the log-determinant of the flow of noise is exact
    found = {"known": known, "inputs": {name: jnp.moveaxis(stage, 0, 1) for name, stage in inputs.items()}}
    return found if context is None else {**found, "context": context}


def _evaluate_block(task, batch):
    x, context, keys = batch
    branch = task.branch.given(context)
    if not task.sizes:
        return {"values": ExactLogdet()(branch, x, jacobian=branch.jacobian, logdet=branch.logdet)[0]}
    probes = draw_probes(keys, x, task.num_probes)
    values, bounds = nested_quadratic_forms(
        branch, x, probes, task.sizes, lipschitz_bound=branch.lipschitz_bound, trace=branch.trace
    )
    return {"values": jnp.moveaxis(values, 2, 0), "bounds": jnp.moveaxis(bounds, 1, 0)}


@jax.jit
def _probe_keys(key, examples, noise_draw, block, draw):
    _, keys = evaluation_keys(key, examples, noise_draw, draw)
    return jax.vmap(lambda key: jax.random.fold_in(key, block))(keys)


def _in_words(blocks: list[Block], choices: list[Choice]) -> tuple[str, ...]:
    """What the blocks of every stage did."""
    words = []
    for stage in dict.fromkeys(block.stage for block in blocks):
        own = [choice for block, choice in zip(blocks, choices, strict=True) if block.stage == stage]
        estimated = [choice for choice in own if choice.num_steps]
        parts = [f"{len(own) - len(estimated)} exact"] if len(own) > len(estimated) else []
        if estimated:
            least, most = (end(choice.num_probes for choice in estimated) for end in (min, max))
            num = f"{least}-{most}" if least < most else f"{most}"
            parts.append(f"{len(estimated)} by {num} probes of {estimated[0].num_steps} products each")
        words.append(f"{stage}: blocks {', '.join(parts)}")
    return tuple(words)
