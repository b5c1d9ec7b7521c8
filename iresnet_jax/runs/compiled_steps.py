"""Training steps that have been compiled, for runs in one process that differ in their data alone."""

import dataclasses
from collections import OrderedDict
from collections.abc import Callable

from iresnet_jax.models.saved import Spec
from iresnet_jax.runs.config import Config, DataConfig, EvaluationConfig
from iresnet_jax.training.trainer import Step


class CompiledSteps:
    """Compiled training steps by what they depend on; the least recently used are dropped.

    A model's constants of the data, such as a mean, are part of its spec: runs share a step if their specs are equal.

    Args:
        most: Largest number of steps that are kept.
    """

    def __init__(self, most: int = 32):
        self._most, self._steps = most, OrderedDict()

    def step(self, config: Config, spec: Spec, num_terms: int, compile_step: Callable[[], Step]) -> Step:
        """The step of an earlier run that was compiled with equal arguments, or else a new one.

        Args:
            config: Settings of the run.
            spec: Its model.
            num_terms: Terms of the log-determinant.
            compile_step: Makes a new step.
        """
        training = dataclasses.replace(
            config.training,
            **{"minutes": 0.0, "patience": 0, "log_every_steps": 1, "eval_every_steps": 1},
            **{"total_steps": 1, "actnorm_examples": 1, "eval_examples": 1, "max_num_terms": 0},
        )
        # The length of the run comes with the state, and stretches the schedule.
        warmup = min(config.optimizer.warmup_steps / config.training.total_steps, 1.0)
        optimizer = dataclasses.replace(config.optimizer, warmup_steps=0)
        # The size of noise comes with the batch.
        augmentation = dataclasses.replace(config.augmentation, noise=1.0 if config.augmentation.noise else 0.0)
        given = {"data": DataConfig(), "evaluation": EvaluationConfig(), "training": training, "augmentation": augmentation}
        settings = dataclasses.replace(config, optimizer=optimizer, **given)
        key = (settings, spec, num_terms, warmup)
        step = self._steps.pop(key, None) or compile_step()
        self._steps[key] = step
        if len(self._steps) > self._most:
            self._steps.popitem(last=False)
        return step
