r"""The objective "inversion": images are reconstructed from measurements by the inverse of a network (Arndt et al. 2023, 2024).

    loss = (1 - a) |P(F^-1(y)) - x|^2 + a |F(x) - y|^2,    y = A x + s n

At ``a = 0`` the inverse itself is trained, through implicit gradients of every block's fixed point: at its best it is the
posterior mean among the maps whose Lipschitz constant is at most ``1 / (1 - L)``. At ``a = 1`` the network learns the forward
operator, and its inverse regularises by ``L`` alone. The errors of round trips through a network are in `evaluation.inversion`.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from iresnet_jax.bijections.residual import Solver
from iresnet_jax.data.dataset import DataSet
from iresnet_jax.data.measurements import Measurement
from iresnet_jax.maths.inverse.fixed_point import example_norm
from iresnet_jax.models.flow import Constrained
from iresnet_jax.models.reconstructor import Reconstructor, ReconstructorSpec
from iresnet_jax.runs.config import Config
from iresnet_jax.runs.from_config import (
    Constrain,
    build_constraint,
    build_measurement,
    build_solver,
    compiled_constraint,
    rematerialize,
    unroll,
)
from iresnet_jax.training import parallel
from iresnet_jax.training.initialization import abstract_variables, initial_variables
from iresnet_jax.training.objectives.objective import HeldOut, Loss, Objective, UpdateRule, build_rule, update
from iresnet_jax.training.parallel import example_keys
from iresnet_jax.training.state import TrainState


def objective(config: Config, data: DataSet, spec: ReconstructorSpec) -> Objective:
    """The images of a data set from measurements of them."""
    settings, rule = config.inverse_problem, build_rule(config)
    step = make_step(
        Reconstructor(
            spec,
            {},
            solver=Solver(atol=settings.training_atol),
            unroll=unroll(config.training.blocks),
            rematerialize=rematerialize(config),
        ),
        make_constraint(config, spec),
        rule,
        build_measurement(settings),
        seed=config.seed,
        forward_share=settings.forward_share,
    )
    return Objective(
        name="loss",
        examples=data.examples["train"],
        rule=rule,
        initial_variables=lambda: initial_variables(config, spec, data),
        abstract_variables=lambda: abstract_variables(config, spec),
        make_step=lambda num_terms: step,
        make_validation=lambda: Validation(config, spec, data),
        loss=lambda held_out: held_out["relative_error"],
    )


def make_constraint(config: Config, spec: ReconstructorSpec) -> Constrain:
    """``(params, spectral) ->`` the weights that run, for training steps; ActNorm is the identity and gets no gradient."""
    constrain = build_constraint(config.constraint, spec.flow, training=True)

    def without_actnorm(params, spectral) -> Constrained:
        constrained = constrain(params, spectral)
        weights = {
            name: block._replace(actnorm=jax.tree.map(jnp.zeros_like, block.actnorm))
            for name, block in constrained.weights.items()
        }
        return constrained._replace(weights=weights)

    return without_actnorm


def make_step(
    model: Reconstructor,
    constrain: Constrain,
    rule: UpdateRule,
    measurement: Measurement,
    *,
    seed: int,
    forward_share: float,
) -> Callable[[TrainState, Any], tuple[TrainState, dict[str, Any]]]:
    """The step ``(state, images) -> (state, metrics)``, for `parallel.parallelize`.

    The noise of an example depends on (seed, step, place in the whole batch): a run gives the same result on any number of
    devices, and no image is measured twice alike.

    Args:
        model: The model without weights.
        constrain: ``(params, spectral) ->`` constrained weights.
        rule: How a gradient changes the state.
        measurement: How images are measured.
        seed: Seed of the run.
        forward_share: ``a`` of the loss.
    """

    def step(state: TrainState, images: Any) -> tuple[TrainState, dict[str, Any]]:
        key = jax.random.fold_in(jax.random.key(seed), state.step)
        x = model.preprocess(images)
        y = measurement.draw(example_keys(key, len(images)), x)

        def loss_of(weights, free, examples):
            del free  # there are no parameters without a constraint
            x, y = examples
            return loss(model.with_(weights=weights), x, y, forward_share=forward_share)

        return update(state, constrain, loss_of, (x, y), rule)

    return step


def loss(model: Reconstructor, x: jax.Array, y: jax.Array, *, forward_share: float) -> Loss:
    """The loss of images in [0, 1] and their measurements, and its parts as far as they are computed."""
    value, metrics = jnp.zeros((), x.dtype), {}
    if forward_share < 1:
        found, info = model.reconstruct(y)
        squared = jnp.mean(_squared_norm(found - x))
        value += (1 - forward_share) * squared
        metrics |= {"reconstruction": squared, "solver_evals": jnp.mean(info.num_evals.astype(x.dtype))}
    if forward_share > 0:
        squared = jnp.mean(_squared_norm(model.measure(x) - y))
        value += forward_share * squared
        metrics |= {"forward": squared}
    return Loss(value, {"loss": value, **metrics})


def measured_errors(model: Reconstructor, batch: tuple[Any, Any]) -> dict[str, Any]:
    """Squared and relative errors of the reconstructions of ``(images in [0, 1], measurements)``, for `parallelize_eval`."""
    x, y = batch
    found, info = model.reconstruct(y)
    squared = _squared_norm(found - x)
    errors = {"reconstruction": squared, "relative_error": relative_error(found, x), "converged": info.converged}
    return {**errors, "forward": _squared_norm(model.measure(x) - y)} if model.spec.constrained else errors


def relative_error(found: jax.Array, x: jax.Array) -> jax.Array:
    """``|found - x| / |x|`` of every image; of one that is black all over, ``|found|`` in units of one white pixel."""
    norm = example_norm(x)
    return example_norm(found - x) / jnp.where(norm > 0, norm, 1)


def _squared_norm(x: jax.Array) -> jax.Array:
    return jnp.sum(jnp.square(x), axis=tuple(range(1, x.ndim)))


class Validation:
    """Errors of held-out images, always measured alike, under averaged parameters with norms iterated to their tolerance."""

    def __init__(self, config: Config, spec: ReconstructorSpec, data: DataSet):
        self._spec, self._share = spec, config.inverse_problem.forward_share
        images = data.held_out("validation", config.training.eval_examples, config.seed)
        self._x = np.asarray(Reconstructor(spec, {}).preprocess(images))
        self._y = build_measurement(config.inverse_problem).held_out(self._x, config.seed, "validation")
        self._constraint, self._solver = config.constraint, build_solver(config.evaluation)
        self._evaluate = parallel.parallelize_eval(measured_errors)
        self._batch_size = config.evaluation.batch_size

    def __call__(self, current: TrainState) -> HeldOut:
        """The means over all images."""
        weights = {stage.name: current.ema[stage.name] for stage in self._spec.flow.layout}
        constrain = compiled_constraint(self._constraint, self._spec.flow)
        weights = constrain(*parallel.on_first_device((weights, current.spectral))).weights
        model = Reconstructor(self._spec, weights, solver=self._solver)
        outputs = parallel.over_batches(
            self._evaluate, model, lambda indices: (self._x[indices], self._y[indices]), len(self._x), self._batch_size
        )
        means = {name: float(values.mean(dtype=np.float64)) for name, values in outputs.items()}
        value = (1 - self._share) * means["reconstruction"] + self._share * means.get("forward", 0.0)
        return HeldOut({"loss": value, **means})
