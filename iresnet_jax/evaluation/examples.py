"""Test examples of a run."""

from typing import Any

import numpy as np

from iresnet_jax.training.run import Source


def held_out(source: Source, settings: Any, seed: int) -> np.ndarray:
    """All test images, or fresh points of a toy.

    Args:
        source: Data of the run.
        settings: Settings of evaluation; ``num_examples`` is the number of points.
        seed: Seed of the run.
    """
    num = settings.num_examples if source.images is None else len(source.labels("test"))
    return source.held_out("test", num, seed)
