"""Models of this library from networks that the authors' PyTorch codes trained.

| code | script | gives |
|---|---|---|
| invertible-resnet (Behrmann et al. 2019) | ``CIFAR_main.py`` | a density or a classifier of images |
| residual-flows (Chen et al. 2019) | ``train_img.py`` | a density of images |
| | ``train_toy.py`` | a density of the plane |

The command that trained a network says what it is; `docs/models.md` shows the way.
"""

import os
from collections.abc import Mapping
from typing import Any

from iresnet_jax.conversion import invertible_resnet, residual_flows
from iresnet_jax.conversion.arrays import Arrays, read_file
from iresnet_jax.conversion.training_command import parse
from iresnet_jax.models.classifier import Classifier
from iresnet_jax.models.density import Density
from iresnet_jax.models.saved import model_of

SCRIPTS = {
    "CIFAR_main.py": (invertible_resnet.CIFAR_MAIN, invertible_resnet.UNUSED, invertible_resnet.read),
    "train_img.py": (residual_flows.TRAIN_IMG, residual_flows.UNUSED, residual_flows.read_images),
    "train_toy.py": (residual_flows.TRAIN_TOY, residual_flows.UNUSED, residual_flows.read_toy),
}


def convert(weights: str | os.PathLike[str] | Mapping[str, Any], architecture: str) -> Density | Classifier:
    """The model that a network of another code is, with guaranteed bounds of its norms.

    Kernels are those that the code applies after training: divided by the norms that its last power iteration saw, where these
    are above the coefficient. Their true norms may be above it, which ``model.certificate()`` says. ``model.freeze()`` scales
    them into the budget.

    Args:
        weights: The ``state_dict``, as a ``.npz`` or ``.safetensors`` file or as arrays by name.
        architecture: The command that trained the network, its script and options, such as
            ``"train_img.py --data mnist --imagesize 28 --actnorm True"``.

    Raises:
        ValueError: If the file or the command cannot be read, or arrays are missing, left over or of another shape; the message
            names them.

    Example:
        >>> model = convert("weights.npz", "train_toy.py --nblocks 50 --actnorm True")  # doctest: +SKIP
        >>> print(model.certificate())  # doctest: +SKIP
    """
    script, options = parse(architecture, {name: known for name, (known, _, _) in SCRIPTS.items()})
    _, unused, read = SCRIPTS[script]
    arrays = Arrays(weights if isinstance(weights, Mapping) else read_file(weights), unused)
    spec, parts = read(arrays, options)
    arrays.check(architecture)
    model = model_of(spec, parts)
    assert isinstance(model, Density | Classifier)
    return model
