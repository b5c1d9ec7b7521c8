"""A trained model as its workdir holds it: where everything after training starts.

The parameters are the moving average of the checkpoint that was best on validation, and the weights are frozen: scaled by
guaranteed bounds of their norms, so that every block is a certified contraction whatever training used (`model.freeze`).
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from iresnet_jax.evaluation import frozen
from iresnet_jax.models import classifier
from iresnet_jax.models import flow as model
from iresnet_jax.training import naming, state
from iresnet_jax.training.backend import prepare_backend
from iresnet_jax.training.building import build_optimizer
from iresnet_jax.training.checkpoints import Checkpoints
from iresnet_jax.training.config import Config
from iresnet_jax.training.initialization import abstract_variables
from iresnet_jax.training.run_folder import CONFIG_FILE, read_config, read_model
from iresnet_jax.training.source import Source, load_source


@dataclass(frozen=True)
class Trained:
    """A trained model, its data and its settings.

    Attributes:
        workdir: Folder of the run.
        config: The settings it was trained with.
        spec: The model without its weights.
        source: The data.
        weights: The flow's frozen weights, for the functions of `density` or `classifier`.
        prior: The prior's parameters; None for a classifier.
        bounds: Guaranteed upper bounds of all layers' operator norms, by stage and layer, one a block.
        step: Updates behind these parameters.
        notes: Sentences a reader of any result must know, such as which checkpoint had to be used instead.
        head: A classifier's head; None for a density.
        statistics: The running averages of a classifier's BatchNorm.
    """

    workdir: Path
    config: Config
    spec: Any  # a density.DensitySpec or classifier.ClassifierSpec, as `is_classifier` tells
    source: Source
    weights: Any = field(repr=False)
    prior: Any = field(repr=False)
    bounds: Mapping[str, Mapping[str, Any]] = field(repr=False)
    step: int
    notes: tuple[str, ...] = ()
    head: Any = field(default=None, repr=False)
    statistics: Any = field(default=None, repr=False)

    @property
    def is_classifier(self) -> bool:
        """Whether this is a classifier and no density."""
        return isinstance(self.spec, classifier.ClassifierSpec)

    @property
    def has_classes(self) -> bool:
        """Whether it says of an image which class it belongs to."""
        return self.is_classifier or self.spec.num_classes is not None

    @property
    def is_bijective(self) -> bool:
        """Whether there is an inverse to try at least."""
        return not self.is_classifier or self.spec.is_bijective

    @property
    def is_constrained(self) -> bool:
        """Whether blocks are contractions, by certificate."""
        return self.config.constraint.norms != "none"

    @property
    def num_blocks(self) -> int:
        """Residual blocks of the flow."""
        return sum(stage.num_blocks for stage in self.spec.flow.stages)


def load(workdir: str | os.PathLike[str]) -> Trained:
    """Loads the best checkpoint of a run, or the latest where there is no best one, which `Trained.notes` then says.

    A folder with nothing of a training but ``frozen.npz``, as of the models kept under ``benchmarks/results``, will do as well.
    On an accelerator this also sets the precision of matrix products in this process, see `prepare_backend`.

    Args:
        workdir: Folder of the run, as `loop.train` filled it, or of a frozen model.

    Raises:
        ValueError: If it is no folder of a run, or its ``config.json`` is damaged.
        RuntimeError: If it has no checkpoint yet, or none that can be read.

    Example:
        >>> trained = load("runs/digits_density")  # doctest: +SKIP
        >>> samples, info = density.sample(
        ...     trained.spec, trained.weights, trained.prior, jax.random.key(0), 64
        ... )  # doctest: +SKIP
    """
    workdir = Path(workdir)
    if (workdir / frozen.FILE_NAME).exists() and not (workdir / CONFIG_FILE).exists():
        return _of_frozen(frozen.load(workdir), workdir)
    config = read_config(workdir)
    prepare_backend(config.training.matmul_precision)
    source = load_source(config.data.name, config.data.data_dir)
    spec, _ = read_model(workdir)
    optimizer = build_optimizer(config.optimizer, config.training.total_steps)
    variables = abstract_variables(config, spec)
    target = jax.eval_shape(lambda: state.create(_zeros(variables), optimizer))
    best, step, notes = _restore(Checkpoints(workdir), target, workdir)
    constrained = config.constraint.norms != "none"
    if isinstance(spec, classifier.ClassifierSpec) and not spec.is_bijective:
        fixed = model.Frozen(best.ema, {}, {})
    else:
        fixed = jax.jit(lambda params: model.freeze(spec.flow, params, constrained=constrained))(best.ema)
    return Trained(
        workdir=workdir,
        config=config,
        spec=spec,
        source=source,
        weights=fixed.weights,
        prior=best.ema.get("prior"),
        bounds=fixed.bounds,
        step=step,
        notes=notes,
        head=best.ema.get("head"),
        statistics=best.batch_stats or None,
    )


def _of_frozen(found: Any, workdir: Path) -> Trained:
    """A frozen model as `load` returns it, with its data; its bounds are computed anew, from the weights in the file."""
    prepare_backend(found.config.training.matmul_precision)
    params = {name: {naming.STACKED: {**stage["branch"], "actnorm": stage["actnorm"]}} for name, stage in found.weights.items()}
    fixed = jax.jit(lambda params: model.freeze(found.spec.flow, params, constrained=False))(params)
    return Trained(
        workdir=workdir,
        config=found.config,
        spec=found.spec,
        source=load_source(found.config.data.name, found.config.data.data_dir),
        weights=fixed.weights,
        prior=getattr(found, "prior", None),
        bounds=fixed.bounds,
        step=found.step,
        head=getattr(found, "head", None),
        statistics=getattr(found, "statistics", None),
    )


def require_bijection(trained: Trained) -> None:
    """Raises ``ValueError`` in one sentence where something is asked of a network with BatchNorm in its branches."""
    if not trained.is_bijective:
        raise ValueError(f"{trained.workdir} holds a network with BatchNorm in its branches: it has no bounds and no inverse")


def require_density(trained: Trained, what: str) -> None:
    """Raises ``ValueError`` in one sentence where something is asked of a classifier that only a density has."""
    if trained.is_classifier:
        raise ValueError(
            f"{trained.workdir} holds a classifier, which has no {what}: that takes a run with a density objective"
        )


def _restore(checkpoints: Checkpoints, target: Any, workdir: Path) -> tuple[state.TrainState, int, tuple[str, ...]]:
    """The state to use, its step, and what is to be said about the choice."""
    why = "there is no checkpoint chosen on validation"
    try:
        if restored := checkpoints.restore_best(target):
            return (*restored, ())
    except RuntimeError:
        why = "the checkpoint that was best on validation is damaged"
    restored = checkpoints.restore_latest(target)
    if restored is None:
        raise RuntimeError(f"{workdir} has no checkpoint yet: the first is written at the first evaluation of the training")
    return (*restored, (f"These are the parameters of the latest checkpoint, step {restored[1]}: {why}.",))


def _zeros(shapes: Any) -> Any:
    return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
