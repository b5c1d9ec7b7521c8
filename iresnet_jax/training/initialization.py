"""The variables that training starts from."""

from typing import Any

import jax
import numpy as np

from iresnet_jax.data.dataset import DataSet
from iresnet_jax.models import linen
from iresnet_jax.models.classifier import Classifier, ClassifierSpec
from iresnet_jax.models.density import Density
from iresnet_jax.training.config import Config
from iresnet_jax.training.from_config import Spec


def num_parameters(params: Any) -> int:
    """Numbers in a tree of arrays."""
    return sum(leaf.size for leaf in jax.tree.leaves(params))


def _module(config: Config, spec: Spec) -> linen.ResidualFlow | linen.Classifier:
    if isinstance(spec, ClassifierSpec):
        return linen.Classifier(spec, last_scale=config.model.last_scale)
    return linen.ResidualFlow(spec.flow, prior=spec.prior, last_scale=config.model.last_scale, num_classes=spec.num_classes)


def abstract_variables(config: Config, spec: Spec) -> Any:
    """Shapes and dtypes of the variables, without computing them."""
    example = jax.ShapeDtypeStruct((2, *spec.flow.event_shape), np.float32)
    return jax.eval_shape(_module(config, spec).init, jax.random.key(0), example)


def initial_variables(config: Config, spec: Spec, data: DataSet) -> Any:
    """Fresh variables, ActNorm fitted to training data."""
    key_init, key_noise, key_data = jax.random.split(jax.random.fold_in(jax.random.key(config.seed), 2**31), 3)
    examples = data.random_train(key_data, config.training.actnorm_examples)
    module = _module(config, spec)

    def initialize(key, key_noise, examples):
        if isinstance(spec, ClassifierSpec):
            return module.init(key, Classifier(spec, {}, {}, {}).preprocess(examples))
        return module.init(key, Density(spec, {}, {}).preprocess(examples, key_noise))

    return jax.jit(initialize)(key_init, key_noise, examples)
