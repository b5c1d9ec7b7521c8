"""Invertible residual networks in JAX (Behrmann et al., ICML 2019).

`fit` makes a model from an array, `train` from any loss, `fit_energy` from an unnormalised density;
`load` reads a saved one. Models are `Density` and `Classifier`, and everything they are made of
works alone on arrays and callables. `certify` bounds errors, `adapters` are for other libraries.
Importing this needs JAX and jaxtyping alone; names and collections of Flax are in
`iresnet_jax.models.linen`.
"""

import importlib
import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from iresnet_jax.bijections.bijection import Bijection
from iresnet_jax.bijections.bounded import Bounded
from iresnet_jax.bijections.chain import Chain as chain
from iresnet_jax.bijections.chain import Multiscale as multiscale
from iresnet_jax.bijections.chain import Repeat as repeat
from iresnet_jax.bijections.chain import Stage
from iresnet_jax.bijections.equalize import Equalize
from iresnet_jax.bijections.logit import Logit
from iresnet_jax.bijections.marginals import Marginals
from iresnet_jax.bijections.residual import Residual as residual_bijection
from iresnet_jax.bijections.residual import Solver
from iresnet_jax.bijections.standardize import Center, Identity, Standardize, Whiten
from iresnet_jax.branches.branch import Branch, BranchSpec, CallableBranch
from iresnet_jax.branches.feedforward import FeedforwardSpec
from iresnet_jax.maths.convolution import conv
from iresnet_jax.maths.fixed_point import FixedPointInfo, invert_residual
from iresnet_jax.maths.logdet_estimator import LogdetInfo
from iresnet_jax.maths.logdet_exact import ExactLogdet, dense_logdet
from iresnet_jax.maths.logdet_krylov import KrylovLogdet
from iresnet_jax.maths.logdet_series import RouletteLogdet, SeriesLogdet
from iresnet_jax.maths.power_iteration import soft_normalize, spectral_norm
from iresnet_jax.models.architecture import FlowSpec, NoiseSpec, StageSpec
from iresnet_jax.models.classifier import Classifier, ClassifierSpec
from iresnet_jax.models.contractions import constrain, freeze
from iresnet_jax.models.density import Density
from iresnet_jax.models.density_spec import DensitySpec
from iresnet_jax.models.flow import Block, flow_bijection
from iresnet_jax.models.free import Free
from iresnet_jax.storage import path_of

if TYPE_CHECKING:
    from iresnet_jax import adapters, losses
    from iresnet_jax import certification as certify
    from iresnet_jax.energies import evaluate_energy, fit_energy
    from iresnet_jax.fitting import fit
    from iresnet_jax.training.callbacks import Callback
    from iresnet_jax.training.checkpoints import Checkpoints
    from iresnet_jax.training.train import train

__all__ = [
    "Bijection",
    "Block",
    "Bounded",
    "Branch",
    "BranchSpec",
    "CallableBranch",
    "Callback",
    "Center",
    "Checkpoints",
    "Classifier",
    "ClassifierSpec",
    "Density",
    "DensitySpec",
    "Equalize",
    "ExactLogdet",
    "FeedforwardSpec",
    "FixedPointInfo",
    "FlowSpec",
    "Free",
    "Identity",
    "KrylovLogdet",
    "LogdetInfo",
    "Logit",
    "Marginals",
    "NoiseSpec",
    "RouletteLogdet",
    "SeriesLogdet",
    "Solver",
    "Stage",
    "StageSpec",
    "Standardize",
    "Whiten",
    "adapters",
    "certify",
    "chain",
    "constrain",
    "conv",
    "dense_logdet",
    "evaluate_energy",
    "fit",
    "fit_energy",
    "flow_bijection",
    "freeze",
    "invert_residual",
    "load",
    "losses",
    "multiscale",
    "repeat",
    "residual_bijection",
    "soft_normalize",
    "spectral_norm",
    "train",
]

_MODULES = {"adapters": "adapters", "certify": "certification", "losses": "losses"}
_TRAINING = {
    "Callback": "iresnet_jax.training.callbacks",
    "Checkpoints": "iresnet_jax.training.checkpoints",
    "evaluate_energy": "iresnet_jax.energies",
    "fit": "iresnet_jax.fitting",
    "fit_energy": "iresnet_jax.energies",
    "train": "iresnet_jax.training.train",
}


def __getattr__(name: str) -> Any:
    """Imports `certify`, `adapters`, `losses` and training on first use: they need more packages
    than the mathematics.
    """
    if name in _MODULES:
        return importlib.import_module(f"iresnet_jax.{_MODULES[name]}")
    if name in _TRAINING:
        try:
            return getattr(importlib.import_module(_TRAINING[name]), name)
        except ModuleNotFoundError as error:
            extra = "energies" if name.endswith("_energy") else "train"
            missing = f"iresnet_jax.{name} needs {error.name}: pip install 'iresnet_jax[{extra}]'"
            raise ModuleNotFoundError(missing, name=error.name) from error
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__


def load(
    path: str | os.PathLike[str], *, branches: Mapping[str, Any] | None = None, prior: Any = None
) -> Density | Classifier:
    """Reads a trained model: a file that ``model.save`` wrote, a folder that holds ``model.npz``,
    or the folder of a run.

    The bounds of all blocks are computed from the weights in the file. The folder of a run gives
    its best checkpoint on validation, and reading it needs the packages of training (``pip install
    'iresnet_jax[train]'``).

    Args:
        path: The file or folder.
        branches: Functions that make custom branches, by their names in the file, which imports no
            code.
        prior: A custom prior with the structure of the file's.

    Raises:
        ValueError: If there is no model, it is damaged or from another version, or a custom part is
            missing.

    Example:
        >>> model = load("runs/digits_density")  # doctest: +SKIP
        >>> samples, info = model.sample(jax.random.key(0), 64)  # doctest: +SKIP
    """
    from iresnet_jax.models import saved  # late: reading files is not part of the mathematics

    if (path_of(path) / "config.json").exists():
        from iresnet_jax.runs import trained_run

        if branches is not None or prior is not None:
            raise ValueError(
                f"{path} is the folder of a run, which names kinds: call kinds.register in place "
                "of branches and prior"
            )
        return trained_run.load(path).model
    return saved.read(path, branches=branches, prior=prior)[0]
