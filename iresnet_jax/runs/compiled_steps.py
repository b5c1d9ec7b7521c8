"""Training steps that have been compiled, for runs in one process that differ in their data and seeds alone."""

import dataclasses
import threading
from collections import OrderedDict
from collections.abc import Callable

import jax.numpy as jnp

from iresnet_jax.models.density_spec import DensitySpec
from iresnet_jax.models.saved import Spec
from iresnet_jax.runs.config import Config, EvaluationConfig
from iresnet_jax.training import parallel
from iresnet_jax.training.step import TrainingStep
from iresnet_jax.training.trainer import CompiledStep

MOST = 32  # steps that are kept


class CompiledSteps:
    """Compiled training steps by what they depend on; the least recently used are dropped.

    Seeds and constants of the data, such as a mean, come with the state, see `TrainState.constants`.
    """

    def __init__(self):
        self._steps, self._lock = OrderedDict(), threading.Lock()

    def compiler(self, config: Config, spec: Spec) -> Callable[[TrainingStep], CompiledStep]:
        """``training step ->`` the step of an earlier run with equal settings and an equal model, or else a new one."""
        training = dataclasses.replace(
            config.training,
            **{"minutes": 0.0, "patience": 0, "log_every_steps": 1, "eval_every_steps": 1},
            **{"actnorm_examples": 1, "eval_examples": 1, "max_num_terms": 0},
        )
        # The length of a run with a time limit comes with the state and stretches the schedule, which rounds otherwise than one
        # of that length would. The size of noise comes with the batch.
        training = dataclasses.replace(training, total_steps=1 if config.training.minutes else config.training.schedule_steps)
        warmup = min(config.optimizer.warmup_steps / config.training.schedule_steps, 1.0)
        optimizer = dataclasses.replace(config.optimizer, warmup_steps=0)
        augmentation = dataclasses.replace(config.augmentation, noise=1.0 if config.augmentation.noise else 0.0)
        given = {"optimizer": optimizer, "augmentation": augmentation, "training": training}
        settings = dataclasses.replace(config, seed=0, evaluation=EvaluationConfig(), **given)
        model = spec.standard if isinstance(spec, DensitySpec) else spec

        def compiled(training_step: TrainingStep) -> CompiledStep:
            estimator = getattr(training_step.model, "estimator", None)  # whose number of terms may rise
            key = settings, warmup, model, estimator, jnp.result_type(float)
            with self._lock:
                step = self._steps.pop(key, None) or parallel.parallelize(training_step)
                self._steps[key] = step
                if len(self._steps) > MOST:
                    self._steps.popitem(last=False)
            return step

        return compiled
