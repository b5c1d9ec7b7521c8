"""Log-densities of the priors once more, with guaranteed errors: balls for latents in balls."""

import functools
from collections.abc import Mapping
from typing import Any

import numpy as np

from iresnet_jax.maths.enclosures.ball_arithmetic import LOG_2PI, Ball, exp, joined, log_sum_exp, softplus


def log_prob(kind: str, params: Mapping[str, Any], z: Ball) -> Ball:
    """Log-density of latents ``(b, d)``, one an example; parameters count as the numbers that they are.

    Args:
        kind: A name in `priors.PRIORS`.
        params: Parameters of the prior; with ``class_logits`` those of the classes' priors, whose mixture it is.
        z: Latents.

    Raises:
        ValueError: If there is no enclosure of this prior.
    """
    own = {name: Ball.of(np.asarray(values, np.float64)) for name, values in params.items()}
    if "class_logits" not in own:
        return _independent(kind, own, z)
    logits, classes = own.pop("class_logits"), []
    for i in range(len(logits.radius)):
        of_class = {name: values.map(lambda part, i=i: part[i]) for name, values in own.items()}
        classes.append(_independent(kind, of_class, z) + logits.map(lambda part, i=i: part[i]))
    return log_sum_exp(joined(functools.partial(np.stack, axis=-1), classes)) - log_sum_exp(logits)


def _independent(kind: str, params: Mapping[str, Ball], z: Ball) -> Ball:
    """``sum (log p(t) - log_scale)`` with ``t = (z - mean) / scale``."""
    if kind == "gaussian":
        t = _standardized(z, params["mean"], params["log_std"])
        log_density = -(t * t + LOG_2PI) * Ball.of(0.5) - params["log_std"]
    elif kind == "logistic":
        t = _standardized(z, params["mean"], params["log_scale"])
        log_density = -(softplus(t) + softplus(-t)) - params["log_scale"]
    else:
        raise ValueError(f"the prior {kind!r} has no guaranteed enclosure: certify.log_det gives the flow's part")
    return log_density.sum()


def _standardized(z: Ball, mean: Ball, log_scale: Ball) -> Ball:
    return (z - mean) * exp(-log_scale)
