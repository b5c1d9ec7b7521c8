"""Invertible residual networks in JAX (Behrmann et al., ICML 2019).

Models are `Density`, `Classifier` and `Reconstructor`; `load` reads them. Everything they are made of works by itself on arrays
and callables.
Importing this needs JAX and jaxtyping alone; names and collections of Flax are in `iresnet_jax.models.linen`.
"""

import os
from collections.abc import Mapping, Sequence
from typing import Any

from iresnet_jax import certification as certify
from iresnet_jax.bijections.bijection import Bijection
from iresnet_jax.bijections.chain import chain, repeat
from iresnet_jax.bijections.multiscale import Stage, multiscale
from iresnet_jax.bijections.residual import Solver, residual_bijection
from iresnet_jax.bijections.transforms.dequantize import Grid
from iresnet_jax.bijections.transforms.equalize import Equalize
from iresnet_jax.bijections.transforms.logit import Center, Identity, Logit
from iresnet_jax.bijections.transforms.standardize import Standardize, Whiten
from iresnet_jax.branches.branch import Branch, BranchSpec, CallableBranch
from iresnet_jax.branches.feedforward import FeedforwardSpec
from iresnet_jax.maths.convolution import conv
from iresnet_jax.maths.inverse.fixed_point import FixedPointInfo, invert_residual
from iresnet_jax.maths.logdet.estimator import LogdetInfo
from iresnet_jax.maths.logdet.exact import ExactLogdet, dense_logdet
from iresnet_jax.maths.logdet.hutchinson_series import SeriesLogdet
from iresnet_jax.maths.logdet.krylov import KrylovLogdet
from iresnet_jax.maths.logdet.roulette import RouletteLogdet
from iresnet_jax.maths.norms.power_iteration import soft_normalize, spectral_norm
from iresnet_jax.models.architecture import FlowSpec, StageSpec
from iresnet_jax.models.classifier import Classifier, ClassifierSpec
from iresnet_jax.models.density import Density, DensitySpec
from iresnet_jax.models.flow import Block, constrain, flow_bijection, freeze
from iresnet_jax.models.reconstructor import Reconstructor, ReconstructorSpec

__all__ = [
    "Bijection",
    "Block",
    "Branch",
    "BranchSpec",
    "CallableBranch",
    "Center",
    "Classifier",
    "ClassifierSpec",
    "Density",
    "DensitySpec",
    "Equalize",
    "ExactLogdet",
    "FeedforwardSpec",
    "FixedPointInfo",
    "FlowSpec",
    "Grid",
    "Identity",
    "KrylovLogdet",
    "LogdetInfo",
    "Logit",
    "Reconstructor",
    "ReconstructorSpec",
    "RouletteLogdet",
    "SeriesLogdet",
    "Solver",
    "Stage",
    "StageSpec",
    "Standardize",
    "Whiten",
    "certify",
    "chain",
    "constrain",
    "conv",
    "dense_logdet",
    "fit",
    "flow_bijection",
    "freeze",
    "invert_residual",
    "load",
    "multiscale",
    "repeat",
    "residual_bijection",
    "soft_normalize",
    "spectral_norm",
]


def fit(
    x: Any,
    labels: Any = None,
    *,
    context: Any = None,
    key: Any = None,
    minutes: float | int | None = None,
    steps: int | None = None,
    objective: str | None = None,
    architecture: Sequence[StageSpec] | None = None,
    validation_fraction: float = 0.1,
    validation: Any = None,
    settings: Mapping[str, Any] | None = None,
    workdir: str | os.PathLike[str] | None = None,
    progress: bool = True,
) -> Density | Classifier:
    """Trains a model of an array: the density of ``x``, the classes of ``x``, or the density of ``x`` given a context.

    Settings are chosen from the shape, the number and the kind of the examples. The loop is that of ``train.py``: a tenth of
    the examples validate, the parameters are averaged, training ends early once validation no longer improves, and the model is
    the best one on validation, certified. Floats are continuous; integer images are levels; integer entries of vectors, and
    floats on a grid, are dequantised. A density of fewer than 2000 vectors is trained twice, with and without
    noise on the examples, which prevents overfitting, and validation chooses. Needs ``pip install 'iresnet_jax[train]'``.

    Ctrl-C ends training, in a notebook too, and gives the best model so far.

    Args:
        x: Vectors ``(n, d)`` or images ``(n, h, w, c)``.
        labels: Classes, integers from 0 on, one per example.
        context: Context vectors ``(n, k)``: the model is then ``p(x | context)``.
        key: Source of all randomness; key 0 by default.
        minutes: Longest time for training, compilation included; 3 by default. Fewer than 2000 vectors need less.
        steps: Number of updates instead of a time, in one run that can be repeated, to the last bit on one machine.
        objective: "density", "classification" or "hybrid" (both in one); by default "density" without labels, and with labels
            "classification" of images and "hybrid" of vectors.
        architecture: Stages of the flow.
        validation_fraction: Share of the examples that validates.
        validation: Examples that validate instead of a share of ``x``: an array like ``x``, or with labels or contexts
            ``(x, labels, context)``. The first 4096 count.
        settings: Other settings of a config file by their names, such as ``{"optimizer.learning_rate": 1e-3}``.
        workdir: Folder for checkpoints and metrics, from which the same call resumes after an interruption; temporary by
            default.
        progress: Whether lines of progress are written to stderr.

    Returns:
        The model, with what training saw in its ``history``.

    Raises:
        ValueError: If arrays or settings do not fit together, or an entry of ``x`` has no density; the message names it.

    Example:
        >>> model = fit(x, minutes=3)  # doctest: +SKIP
        >>> samples, info = model.sample(jax.random.key(1), 16)  # doctest: +SKIP
    """
    from iresnet_jax.fitting import fit as fit_array  # late: training takes more packages than the mathematics

    return fit_array(
        x,
        labels,
        context=context,
        key=key,
        minutes=minutes,
        steps=steps,
        objective=objective,
        architecture=architecture,
        validation_fraction=validation_fraction,
        validation=validation,
        settings=settings,
        workdir=workdir,
        progress=progress,
    )


def load(path: str | os.PathLike[str]) -> Density | Classifier | Reconstructor:
    """Reads a trained model: a file that ``model.save`` wrote, a folder that holds ``model.npz``, or the folder of a run.

    The bounds of all blocks are computed from the weights in the file. The folder of a run gives its best checkpoint on
    validation, and reading it needs the packages of training (``pip install 'iresnet_jax[train]'``).

    Args:
        path: The file or folder.

    Raises:
        ValueError: If there is no model, or it is damaged or from another version.

    Example:
        >>> model = load("runs/digits_density")  # doctest: +SKIP
        >>> samples, info = model.sample(jax.random.key(0), 64)  # doctest: +SKIP
    """
    from iresnet_jax.models import saved  # late: reading files is not part of the mathematics

    if os.path.isdir(path) and os.path.exists(os.path.join(path, "config.json")):
        from iresnet_jax.runs import trained_run

        return trained_run.load(path).model
    return saved.load(path)
