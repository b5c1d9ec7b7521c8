r"""Reconstructions of test images from measurements: their errors, and what becomes of perturbed measurements beside the bound.

The inverse problem is that of `training.objectives.inversion`; round trips through a network are in `evaluation.inversion`.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Integer, Key

from iresnet_jax.data.measurements import Measurement
from iresnet_jax.evaluation.likelihood import split_error
from iresnet_jax.maths.inverse.fixed_point import example_norm
from iresnet_jax.models.reconstructor import Reconstructor
from iresnet_jax.runs.trained_run import Run
from iresnet_jax.training import parallel
from iresnet_jax.training.objectives.inversion import relative_error

NUM_PERTURBED = 128  # test measurements that are perturbed, at most
NUM_ITERATIONS = 20  # power iterations that look for the direction in which the reconstruction changes most
LEAST_NOISE = 0.01  # size of perturbations where measurements have less noise
SMALL = 0.01  # of that size, for perturbations that see the Jacobian alone


@dataclass(frozen=True)
class InverseProblem:
    """Reconstructions of test images from measurements, and what perturbed measurements do to them.

    Attributes:
        relative_error: ``|P(F^-1(y)) - x| / |x|``, mean over test images.
        stderr: Standard error of ``relative_error``.
        psnr: Peak signal-to-noise ratio in dB, mean over test images.
        num_examples: Test images.
        certified_amplification: Guaranteed bound of ``|F^-1(y + d) - F^-1(y)| / |d|``: 1 / (1 - L). Of a network without a
            constraint the product of its blocks' bounds, often useless.
        largest_amplification: Largest such ratio of all perturbations.
        largest_amplification_of_noise: Largest such ratio for random noise.
        num_perturbed: Measurements that were perturbed.
        fraction_within_bound: Fraction of test images and perturbed measurements whose error was within its certified bound.
        fraction_converged: Fraction of test images whose inverse met its tolerance.
        width: Standard deviation of the blur in pixels.
        noise: Standard deviation of the noise, as a fraction of the range from black to white.
    """

    relative_error: float
    stderr: float
    psnr: float
    num_examples: int
    certified_amplification: float
    largest_amplification: float
    largest_amplification_of_noise: float
    num_perturbed: int
    fraction_within_bound: float
    fraction_converged: float
    width: float
    noise: float

    def __str__(self) -> str:
        lines = [
            f"reconstruction: relative error {self.relative_error:.4f} ± {self.stderr:.4f}, {self.psnr:.2f} dB, of "
            f"{self.num_examples} test images (blur of {self.width:g} pixels, {100 * self.noise:g} % noise)",
            f"amplification of perturbations: certified {self.certified_amplification:.4g} at most; found "
            f"{self.largest_amplification:.4g} in the worst directions of {self.num_perturbed} measurements, "
            f"{self.largest_amplification_of_noise:.4g} for noise",
        ]
        return "\n".join([*lines, *self.warnings()])

    def warnings(self) -> list[str]:
        """Sentences about errors beyond their bounds and images whose inverse did not converge."""
        found = []
        if (outside := 1 - self.fraction_within_bound) > 0:
            found.append(
                f"{100 * outside:.3g} % of the reconstructions exceed their certified bound: a constant is underestimated."
            )
        if self.fraction_converged < 1:
            percent = 100 * (1 - self.fraction_converged)
            found.append(f"The inverse did not converge for {percent:.3g} % of the measurements: allow more evaluations.")
        return found


class Reconstructed(NamedTuple):
    """Test images, their measurements and what was made of them.

    Attributes:
        x: Images with pixels in [0, 1].
        y: Measurements.
        found: Reconstructions.
        relative_error: ``|found - x| / |x|`` of every image.
        within_bound: Whether ``|F^-1(y) - x| <= |y - F(x)| / (1 - L)``, the bound of this image's error, held.
        converged: Whether the inverse met its tolerance.
    """

    x: Float[np.ndarray, "n h w c"]
    y: Float[np.ndarray, "n h w c"]
    found: Float[np.ndarray, "n h w c"]
    relative_error: Float[np.ndarray, " n"]
    within_bound: Bool[np.ndarray, " n"]
    converged: Bool[np.ndarray, " n"]


class Perturbed(NamedTuple):
    """What perturbations ``d`` of measurements did, one entry an image.

    Attributes:
        random: ``|R(y + d) - R(y)| / |d|`` for noise ``d``.
        adversarial: The largest of the same for directions that were looked for, of the size of the noise and much smaller.
        within_bound: Whether all were within the certified bound, up to the solver's own error bounds.
    """

    random: Float[Array, " b"] | Float[np.ndarray, " b"]
    adversarial: Float[Array, " b"] | Float[np.ndarray, " b"]
    within_bound: Bool[Array, " b"] | Bool[np.ndarray, " b"]


def evaluate_run(run: Run) -> tuple[InverseProblem, Reconstructed]:
    """Measures the model of a run on its test images, see `evaluate`."""
    assert isinstance(run.model, Reconstructor)
    settings, seed = run.config.evaluation, run.config.seed
    return evaluate(
        run.model, run.test_examples(), run.config.inverse_problem.measurement(), batch_size=settings.batch_size, seed=seed
    )


def evaluate(
    model: Reconstructor, images: Integer[np.ndarray, "n h w c"], measurement: Measurement, *, batch_size: int, seed: int
) -> tuple[InverseProblem, Reconstructed]:
    """Errors of reconstructions, and the amplification of perturbations: certified, and the largest that was found.

    Raises:
        ValueError: If there are fewer than 2 images.
    """
    x = np.asarray(model.preprocess(images))
    y = measurement.held_out(x, seed, "test")
    certified = model.noise_amplification
    outputs = parallel.over_batches(_reconstruct, model, parallel.rows_of(x, y), len(x), batch_size)
    allowed = certified * outputs.pop("data_error") + outputs.pop("error_bound")
    found = Reconstructed(x, y, within_bound=outputs.pop("distance") <= allowed, **outputs)
    perturbed = perturb(model, y[:NUM_PERTURBED], max(measurement.noise, LEAST_NOISE), certified, seed)
    error = split_error(found.relative_error[:, None, None])
    squared = np.mean((found.found - x).astype(np.float64) ** 2, axis=(1, 2, 3))
    summary = InverseProblem(
        relative_error=error.mean,
        stderr=error.stderr,
        psnr=float(np.mean(-10 * np.log10(np.maximum(squared, 1e-12)))),
        num_examples=len(x),
        certified_amplification=certified,
        largest_amplification=float(np.maximum(perturbed.random, perturbed.adversarial).max()),
        largest_amplification_of_noise=float(perturbed.random.max()),
        num_perturbed=len(perturbed.random),
        fraction_within_bound=float(np.concatenate([found.within_bound, perturbed.within_bound]).mean()),
        fraction_converged=float(found.converged.mean()),
        width=measurement.width,
        noise=measurement.noise,
    )
    return summary, found


def _reconstruct(model: Reconstructor, batch):
    """Reconstructions of ``(images, measurements)``, for `parallel.over_batches`."""
    x, y = batch
    inverted, info = model.invert(y)
    found = jnp.clip(inverted, 0, 1)
    return {
        "found": found,
        "relative_error": relative_error(found, x),
        "distance": example_norm(inverted - x),
        "data_error": example_norm(y - model.measure(x)) if model.spec.constrained else jnp.full(len(x), jnp.inf),
        "error_bound": info.error_bound,
        "converged": info.converged,
    }


def perturb(model: Reconstructor, y: Float[np.ndarray, "b h w c"], noise: float, certified: float, seed: int) -> Perturbed:
    """Perturbs measurements by noise and in the directions in which the reconstruction changes most, before the projection.

    A direction comes from power iteration on ``J^T J`` with ``J`` the Jacobian of ``F^-1`` at a measurement.

    Args:
        noise: Standard deviation of the noise in every pixel, which also sets the size of adversarial perturbations.
        certified: `Reconstructor.noise_amplification` of the model.
    """
    key = jax.random.fold_in(jax.random.key(seed), 2**31 + 6)
    return jax.device_get(_perturb(model, jnp.asarray(y), noise, certified, key))


@jax.jit
def _perturb(model, y, noise, certified, key: Key[Array, ""]) -> Perturbed:
    normal, size = jax.random.normal(key, y.shape), noise * math.sqrt(math.prod(y.shape[1:]))
    before, info = model.invert(y)
    _, push = jax.linearize(lambda y: model.invert(y)[0], y)
    pull = jax.linear_transpose(push, y)

    def of_norm(d, size):
        return d * (size / jnp.maximum(example_norm(d), 1e-30)).reshape(-1, 1, 1, 1)

    direction = jax.lax.fori_loop(0, NUM_ITERATIONS, lambda _, d: of_norm(pull(push(d))[0], 1.0), of_norm(normal, 1.0))

    def moved_by(d):
        after, info_after = model.invert(y + d)
        moved, norm = example_norm(after - before), example_norm(d)
        slack = info.error_bound + info_after.error_bound + jnp.finfo(y.dtype).eps * certified * (example_norm(y) + norm)
        return moved / norm, moved <= certified * norm + slack

    perturbations = noise * normal, of_norm(direction, size), of_norm(direction, SMALL * size)
    ratios, within = jax.lax.map(moved_by, jnp.stack(perturbations))
    return Perturbed(ratios[0], jnp.maximum(ratios[1], ratios[2]), within.all(axis=0))
