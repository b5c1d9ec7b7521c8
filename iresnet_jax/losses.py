r"""Losses for `train` against an energy: a density that is known up to a constant, ``p(x) = exp(log_density(x)) / Z``."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Key

from iresnet_jax.checked_dataclasses import Count, checked
from iresnet_jax.maths.energies import LogDensity, log_density_of, not_finite
from iresnet_jax.models.density import Density

SHARES = ("logits", "class_logits")  # parameters of priors that say how often a component is drawn
_NOT_FINITE = "not_finite"


@dataclass(frozen=True)
class ReverseKL:
    """The loss of `reverse_kl`."""

    log_density: LogDensity
    num: int
    path: bool

    def __call__(self, model: Density, batch: Any, key: Key[Array, ""]) -> tuple[Array, dict[str, Array]]:
        """The divergence of the target from the model, up to ``log Z``; the batch counts for nothing."""
        if model.spec.is_discrete:
            raise ValueError("samples of integer levels or on a grid have no density: give model.continuous")
        key_sample, key_probe = jax.random.split(key)
        fixed = jax.tree.map(jax.lax.stop_gradient, model)
        if self.path:
            z = model.sample_latents(key_sample, self.num)
            x = model.decode(z)[0]
            log_prob = fixed.log_prob(x, key_probe)
        else:
            x, log_prob, _, _ = model.sample_and_log_prob(key_sample, self.num)
            z = fixed.encode(jax.lax.stop_gradient(x)) if _shares(model.prior) else None
        values = log_density_of(self.log_density, x)
        differences = log_prob - values
        loss = jnp.mean(differences)
        if z is not None and (shares := _shares(model.prior)):
            # Draws of a component are no differentiable function of how often it is drawn: the score is.
            prior = {**fixed.prior, **shares}
            score = fixed.with_(prior=prior).log_prior(jax.lax.stop_gradient(z))
            centred = jax.lax.stop_gradient(differences - loss)
            surrogate = jnp.mean(centred * score) * self.num / max(self.num - 1, 1)  # the mean has a share of each sample
            loss = loss + surrogate - jax.lax.stop_gradient(surrogate)
        return loss, {_NOT_FINITE: jnp.sum(~jnp.isfinite(values)).astype(loss.dtype)}

    def check(self, metrics: Mapping[str, Any]) -> None:
        """Raises ``ValueError`` if the log-density of samples of a step was NaN or infinite."""
        if (bad := float(metrics[_NOT_FINITE])) > 0:
            raise ValueError(not_finite(max(round(bad), 1), self.num, "samples of the model"))


@dataclass(frozen=True)
class SymmetricKL:
    """The loss of `symmetric_kl`."""

    reverse: ReverseKL

    def __call__(self, model: Density, batch: Any, key: Key[Array, ""]) -> tuple[Array, dict[str, Array]]:
        """The sum of both divergences, up to a constant."""
        key_batch, key_reverse = jax.random.split(key)
        reverse, metrics = self.reverse(model, None, key_reverse)
        forward = -jnp.mean(model.log_prob(batch, key_batch))
        return forward + reverse, {"forward": forward, "reverse": reverse, **metrics}

    def check(self, metrics: Mapping[str, Any]) -> None:
        """Raises ``ValueError`` if the log-density of samples of a step was NaN or infinite."""
        self.reverse.check(metrics)


def reverse_kl(log_density: LogDensity, num: int = 128, *, path: bool = True) -> ReverseKL:
    r"""``KL(q | p) - log Z = E_q [log q(x) - log_density(x)]`` by samples of the model ``q``: needs no data.

    Modes in which no sample falls stay unseen: `symmetric_kl` and `fit_energy` find them.

    Args:
        log_density: ``(b, ...) -> (b,)``, a differentiable function of batches, up to a constant.
        num: Samples of each step, on each device. The weights of components, as those of a mixture, learn from two on; those of
            a prior of one's own get no gradient from here.
        path: Whether gradients go through samples alone and leave out the score of the model, which has mean 0 ("sticking the
            landing", Roeder et al. 2017): their variance vanishes as the model approaches the target.

    Example:
        >>> loss = reverse_kl(lambda x: -0.5 * jnp.sum(x**2, axis=1))
        >>> trained = train(model, loss, steps=1000, key=jax.random.key(0))  # doctest: +SKIP
    """
    return ReverseKL(log_density, checked(Count, num, "num"), path)


def symmetric_kl(log_density: LogDensity, num: int = 128, *, path: bool = True) -> SymmetricKL:
    r"""``KL(p | q) + KL(q | p)`` up to a constant, by samples of the target, which are the batch, and of the model.

    The first divergence does not let go of a mode that the samples have seen, and the second one is not limited by how many
    samples there are.

    Args:
        log_density: As for `reverse_kl`.
        num: Samples of the model in each step, on each device.
        path: As for `reverse_kl`.

    Example:
        >>> trained = train(model, symmetric_kl(log_density), samples, key=jax.random.key(0))  # doctest: +SKIP
    """
    return SymmetricKL(reverse_kl(log_density, num, path=path))


def _shares(prior: Any) -> dict[str, Array]:
    return {name: prior[name] for name in SHARES if name in prior} if isinstance(prior, Mapping) else {}
