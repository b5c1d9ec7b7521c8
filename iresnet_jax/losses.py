r"""Losses for `train` by an energy, that is, a density that is known up to a constant, ``p(x) =
exp(log_density(x)) / Z``.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Key

from iresnet_jax.models.density import Density

LogDensity = Callable[[Array], Any]  # (b, ...) -> (b,)
# (model, batch, key) -> loss, or loss and metrics
Loss = Callable[[Density, Any, Key[Array, ""]], Any]


def reverse_kl(log_density: LogDensity, num: int = 128) -> Loss:
    r"""``KL(q | p) - log Z = E_q [log q(x) - log_density(x)]`` by samples of the model ``q``,
    without data.

    Modes in which no sample falls stay unseen: `symmetric_kl` and `fit_energy` find them. Gradients
    go through samples only and leave out the score of the model, which has mean 0 ("sticking the
    landing", Roeder et al. 2017): their variance vanishes as the model approaches the target.

    Args:
        log_density: ``(b, ...) -> (b,)``, a differentiable function of batches, up to a constant.
        num: Samples per step and device. The weights of a mixture's components need at least two to
            learn.

    Example:
        >>> loss = reverse_kl(lambda x: -0.5 * jnp.sum(x**2, axis=1))
        >>> trained = train(model, loss, steps=1000, key=jax.random.key(0))  # doctest: +SKIP
    """

    def loss(model: Density, batch: Any, key: Key[Array, ""]) -> Array:
        del batch
        model.spec.check_continuous()
        key_sample, key_probe = jax.random.split(key)
        fixed = jax.tree.map(jax.lax.stop_gradient, model)
        z = model.sample_latents(key_sample, num)
        x = model.decode(z)[0]
        differences = fixed.log_prob(x, key_probe) - log_density_of(log_density, x)
        value = jnp.mean(differences)
        if not (names := getattr(model.prior, "scored", ())):
            return value
        # Drawing a component is not differentiable in its weight; the score replaces this gradient.
        prior = dataclasses.replace(
            fixed.prior, **{name: getattr(model.prior, name) for name in names}
        )
        score = fixed.with_(prior=prior).log_prior(jax.lax.stop_gradient(z))
        # The factor corrects for each sample's share in the mean.
        centred = jax.lax.stop_gradient(differences - value) * num / max(num - 1, 1)
        surrogate = jnp.mean(centred * score)
        return value + surrogate - jax.lax.stop_gradient(surrogate)

    return loss


def symmetric_kl(log_density: LogDensity, num: int = 128) -> Loss:
    r"""``KL(p | q) + KL(q | p)`` up to a constant, by samples of the target (the batch) and of the
    model.

    The first divergence keeps modes that the samples have seen, and the second is not limited by
    the number of samples. Arguments are as for `reverse_kl`.

    Example:
        >>> loss = symmetric_kl(log_density)  # doctest: +SKIP
        >>> trained = train(model, loss, samples, key=jax.random.key(0))  # doctest: +SKIP
    """
    reverse_loss = reverse_kl(log_density, num)

    def loss(model: Density, batch: Any, key: Key[Array, ""]) -> tuple[Array, dict[str, Array]]:
        key_batch, key_reverse = jax.random.split(key)
        forward = -jnp.mean(model.log_prob(batch, key_batch))
        reverse = reverse_loss(model, None, key_reverse)
        return forward + reverse, {"forward": forward, "reverse": reverse}

    return loss


def log_density_of(log_density: LogDensity, x: Any, where: str | None = None) -> Float[Array, " b"]:
    """The log-density of a batch; with the name of a place, checked to be finite there."""
    values = jnp.asarray(log_density(x))
    if values.shape != x.shape[:1]:
        raise ValueError(
            f"log_density must give one number for each of {len(x)} examples, shape ({len(x)},), "
            f"got shape {values.shape}: a function of one example becomes one of batches by "
            "jax.vmap"
        )
    if where and (bad := int(np.sum(~np.isfinite(values)))):
        raise ValueError(
            f"log_density is NaN or infinite at {bad} of {len(values)} {where}: it must be finite "
            "wherever samples may fall; parameters with ends are to be mapped to the whole line "
            "first"
        )
    return values
