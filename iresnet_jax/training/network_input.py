"""Examples as a model's network sees them, and back."""

import jax

from iresnet_jax.models import classifier, density
from iresnet_jax.models.classifier import ClassifierSpec
from iresnet_jax.training.building import Spec


def network_input(spec: Spec, key: jax.Array, examples: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Examples as the model sees them: continuous, with images in [0, 1], and as the input of its network.

    Args:
        spec: The model.
        key: Of a density's dequantisation.
        examples: Images of integer levels, or points.
    """
    if isinstance(spec, ClassifierSpec):
        return examples / (spec.num_levels - 1), classifier.preprocess(spec, examples)
    x = density.to_continuous(spec, key, examples)
    return x, density.transform(spec, x)[0]


def from_network_input(spec: Spec, there: jax.Array) -> jax.Array:
    """The inverse of the second step of `network_input`."""
    return classifier.unpad(spec, there) if isinstance(spec, ClassifierSpec) else density.untransform(spec, there)
