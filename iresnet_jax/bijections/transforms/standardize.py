r"""Continuous data on a common scale: every entry by itself, or all of them decorrelated.

Both are affine, ``y = A (x - m)`` with constants of the training data, so ``log|det dy/dx| = log|det A|`` is the same for all
examples. The constants are kept in float64 and rounded to the dtype of the data where they are used: what `constants` gives and
`bijection` takes may be arguments of a program, which models fitted to different data then share.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int

from iresnet_jax.bijections.bijection import Bijection, exact_bijection
from iresnet_jax.bijections.transforms.enclosure import Enclosure, affine, on_balls
from iresnet_jax.maths.convolution_certificate import dense_norm_bound
from iresnet_jax.maths.lipschitz_bounds import BiLipschitz
from iresnet_jax.maths.upward_rounding import UP, U, at_least

_ROUNDING = 1e-5  # relative error of constants rounded to float32 and of their products, with a wide margin
SMALLEST_WITHIN = 1e-2  # least standard deviation within classes that `Whiten.fit` takes, in those of all data
_TINY = 1e-300  # more than what products lose by underflow
Constants = Mapping[str, Any]  # numbers of a transform in float64, by name, or such mappings
SHRINKAGE = 1e-6  # least share by which correlations shrink: single precision inverts the factor


@dataclass(frozen=True)
class Standardize:
    """``y = (x - mean) / scale``, entry by entry.

    Attributes:
        mean: One number an entry of a vector or a channel of an image, subtracted.
        scale: Positive numbers in the same form, divided by.
    """

    mean: tuple[float, ...]
    scale: tuple[float, ...]

    def __post_init__(self):
        if len(self.mean) != len(self.scale) or not self.mean:
            raise ValueError(f"mean and scale need one number an entry each, got {len(self.mean)} and {len(self.scale)}")
        if not (np.all(np.isfinite([*self.mean, *self.scale])) and min(self.scale) > 0):
            raise ValueError("mean must be finite and scale positive and finite: an entry is constant or too large")

    @classmethod
    def fit(cls, x: Float[np.ndarray, "n ..."]) -> "Standardize":
        """Mean and standard deviation of every entry along the last axis, over all others."""
        rows = np.asarray(x, np.float64).reshape(-1, np.shape(x)[-1])
        return cls(tuple(rows.mean(axis=0).tolist()), tuple(rows.std(axis=0).tolist()))

    @classmethod
    def fit_contexts(cls, contexts: Float[np.ndarray, "n k"]) -> "Standardize":
        """`fit`, but entries that are constant keep their scale."""
        rows = np.asarray(contexts, np.float64)
        scale = rows.std(axis=0)
        return cls(tuple(rows.mean(axis=0).tolist()), tuple(np.where(scale > 0, scale, 1).tolist()))

    @property
    def standard(self) -> "Standardize":
        """The identity of as many entries."""
        return Standardize((0.0,) * len(self.mean), (1.0,) * len(self.mean))

    def constants(self) -> Constants:
        """What `bijection` computes with."""
        scale = np.asarray(self.scale)
        fixed = {"log_det": -np.sum(np.log(scale)), "inverse_lipschitz": inverse_bound(self)}
        return {"mean": np.asarray(self.mean), "scale": scale, **fixed}

    def entry_scales(self, constants: Constants | None = None) -> Any:
        """Standard deviation of each entry."""
        return (constants or self.constants())["scale"]

    def bijection(self, constants: Constants | None = None) -> Bijection:
        """The affine map; its log-determinant is ``-sum log(scale)``, once for each pixel of an image.

        Args:
            constants: Those of another `Standardize` of as many entries, in place of its own.
        """
        given = self.constants() if constants is None else constants

        def parts(x):
            shape = (1,) * (x.ndim - 1) + (-1,)
            mean, scale, log_det = (jnp.asarray(given[name], x.dtype) for name in ("mean", "scale", "log_det"))
            return mean.reshape(shape), scale.reshape(shape), jnp.full(len(x), np.prod(x.shape[1:-1]) * log_det, x.dtype)

        def forward_and_logdet(x):
            mean, scale, log_det = parts(x)
            return (x - mean) / scale, log_det

        def inverse_and_logdet(y):
            mean, scale, log_det = parts(y)
            return y * scale + mean, -log_det

        return exact_bijection(forward_and_logdet, inverse_and_logdet, inverse_lipschitz=given["inverse_lipschitz"])

    def bilipschitz(self) -> BiLipschitz:
        """``1 / min(scale)`` and ``max(scale)``, rounded up."""
        return _bilipschitz(1 / min(self.scale), max(self.scale))

    @on_balls
    def enclose_inverse(self, y: Float[np.ndarray, "b d"], radius: Float[np.ndarray, " b"]) -> Enclosure:
        """Intervals of ``scale y + mean``."""
        scale, mean = (np.tile(values, y.shape[1] // len(values)) for values in (self.scale, self.mean))
        center = y * scale + mean
        errors = 2 * U * (np.abs(y * scale) + np.abs(center)) + _TINY
        return affine(center, errors, radius[:, None] * scale, np.full(len(y), max(self.scale)))


@dataclass(frozen=True)
class Whiten:
    """``y = factor^-1 (x - mean)`` for vectors: data of covariance ``factor factor^T`` get the identity's.

    A residual block of constant L stretches by a factor between 1 - L and 1 + L in any direction: a flow needs many blocks to
    undo correlations, which one triangular matrix undoes exactly.

    Attributes:
        mean: One number an entry, subtracted.
        factor: Rows of a lower triangular matrix with a positive diagonal.
    """

    mean: tuple[float, ...]
    factor: tuple[tuple[float, ...], ...]

    def __post_init__(self):
        matrix = np.asarray(self.factor)
        if matrix.shape != (len(self.mean),) * 2 or not len(matrix):
            raise ValueError(f"factor must be a square matrix with a row an entry of the {len(self.mean)}, got {matrix.shape}")
        if not (np.all(np.isfinite(matrix)) and np.all(np.isfinite(self.mean))):
            raise ValueError("mean and factor must be finite: an entry of the data is too large")
        if np.any(np.triu(matrix, 1)) or not np.all(np.diag(matrix) > 0):
            raise ValueError("factor must be lower triangular with a positive diagonal: use Whiten.fit")

    @classmethod
    def fit(cls, x: Float[np.ndarray, "n d"], labels: Int[np.ndarray, " n"] | None = None) -> "Whiten":
        """Mean and Cholesky factor of the covariance of data whose entries all vary; with labels, the one within classes.

        A prior for each class, with independent entries, then begins as the normal density of linear discriminant analysis.

        Entries are scaled to variance 1 first. Their correlations shrink towards 0 by the share that minimises the expected
        squared error of n examples (Schaefer and Strimmer 2005, eq. 10), at least by `SHRINKAGE`, so the factor exists for
        fewer examples than entries and for entries that repeat one another.
        """
        rows = np.asarray(x, np.float64)
        mean, total = rows.mean(axis=0), rows.std(axis=0)
        centred = rows - mean
        if labels is not None:
            centred = np.array(centred)
            for label in np.unique(labels):
                centred[labels == label] -= centred[labels == label].mean(axis=0)
        scale = np.maximum(centred.std(axis=0), SMALLEST_WITHIN * total)
        factor = scale[:, None] * np.linalg.cholesky(shrunk_correlation(centred / scale))
        return cls(tuple(mean.tolist()), tuple(map(tuple, factor.tolist())))

    @property
    def standard(self) -> "Whiten":
        """The identity of as many entries."""
        return Whiten((0.0,) * len(self.mean), tuple(map(tuple, np.eye(len(self.mean)).tolist())))

    def constants(self) -> Constants:
        """What `bijection` computes with."""
        factor = np.asarray(self.factor)
        fixed = {"log_det": -np.sum(np.log(np.diag(factor))), "inverse_lipschitz": inverse_bound(self)}
        return {"mean": np.asarray(self.mean), "factor": factor, "inverse": np.linalg.inv(factor), **fixed}

    def entry_scales(self, constants: Constants | None = None) -> Any:
        """Standard deviation of each entry, of data within classes if labels were given."""
        factor = (constants or self.constants())["factor"]
        return (factor**2).sum(axis=1) ** 0.5

    def bijection(self, constants: Constants | None = None) -> Bijection:
        """The affine map; its log-determinant is ``-sum log(diagonal of factor)``.

        Args:
            constants: Those of another `Whiten` of as many entries, in place of its own.
        """
        given = self.constants() if constants is None else constants

        def parts(x, matrix):
            mean, matrix, log_det = (jnp.asarray(given[name], x.dtype) for name in ("mean", matrix, "log_det"))
            return mean[None], matrix.T, jnp.full(len(x), log_det, x.dtype)

        def forward_and_logdet(x):
            mean, inverse, log_det = parts(x, "inverse")
            return (x - mean) @ inverse, log_det

        def inverse_and_logdet(y):
            mean, factor, log_det = parts(y, "factor")
            return y @ factor + mean, -log_det

        return exact_bijection(forward_and_logdet, inverse_and_logdet, inverse_lipschitz=given["inverse_lipschitz"])

    def bilipschitz(self) -> BiLipschitz:
        """Norms of the inverse of ``factor`` and of itself, rounded up; its least singular value has too large an error."""
        factor = np.asarray(self.factor)
        inverse, num = np.linalg.inv(factor), len(factor)
        rounding = (num + 2) * np.finfo(float).eps * np.linalg.norm(np.abs(inverse) @ np.abs(factor))
        defect = np.linalg.norm(inverse @ factor - np.eye(num)) + rounding
        of_inverse, of_factor = float(np.linalg.norm(inverse, 2)), float(np.linalg.norm(factor, 2))
        return _bilipschitz(of_inverse / (1 - float(defect)) if defect < 1 else float("inf"), of_factor)

    @on_balls
    def enclose_inverse(self, y: Float[np.ndarray, "b d"], radius: Float[np.ndarray, " b"]) -> Enclosure:
        """Intervals of ``factor y + mean``, from the norms of the factor and of its rows."""
        factor, mean = np.asarray(self.factor), np.asarray(self.mean)
        center = y @ factor.T + mean
        errors = 4 * len(mean) * U * (np.abs(y) @ np.abs(factor).T + np.abs(mean)) + _TINY
        with jax.enable_x64():
            largest = float(dense_norm_bound(jnp.asarray(factor)))
        return affine(center, errors, radius[:, None] * np.linalg.norm(factor, axis=1) * UP, np.full(len(y), largest))


def shrunk_correlation(z: Float[np.ndarray, "n d"]) -> Float[np.ndarray, "d d"]:
    r"""Correlation matrix of standardised data, off-diagonal entries times ``1 - s``.

    ``s = sum_{i != j} Var(r_ij) / sum_{i != j} r_ij^2`` within [`SHRINKAGE`, 1]; the variance of a correlation is that of the
    products ``z_i z_j`` (Schaefer and Strimmer 2005, eq. 10).
    """
    num = len(z)
    correlation = z.T @ z / num
    off = ~np.eye(z.shape[1], dtype=bool)
    variance = ((z**2).T @ z**2 / num - correlation**2)[off].sum() / max(num - 1, 1)
    signal = (correlation[off] ** 2).sum()
    share = 1.0 if signal == 0 else float(np.clip(variance / signal, SHRINKAGE, 1.0))
    return np.where(off, (1 - share) * correlation, 1.0)


def inverse_bound(transform: Any) -> np.float64:
    """The Lipschitz constant of a transform's inverse as a number, within the trace of a program, too."""
    with jax.ensure_compile_time_eval():
        return np.float64(transform.bilipschitz().inverse)


def _bilipschitz(forward: float, inverse: float) -> BiLipschitz:
    return BiLipschitz(*(at_least(value * (1 + _ROUNDING)) for value in (forward, inverse)))
