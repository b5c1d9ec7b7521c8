"""Tiny training runs that all tests share."""

import functools
import importlib.util
import logging
import os
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest

from iresnet_jax.models.free import abstract
from iresnet_jax.runs import job, trained_run
from iresnet_jax.runs.config import parse
from iresnet_jax.runs.metrics import read_metrics
from iresnet_jax.storage import locked
from iresnet_jax.training.checkpoints import Store
from iresnet_jax.training.step import Step, first_state

ROOT = Path(__file__).parents[1]
TOTAL_STEPS, EVAL_EVERY = 20, 2

TOY_CONFIG = f"""
from iresnet_jax.runs.config import default_config

def get_config():
    config = default_config()
    config.data.name = "moons"
    config.model.stages = ({{"num_blocks": 2, "hidden": (8,)}},)
    config.preprocessing.transform = "none"
    # Without a bias that validation would look for by two more programs.
    config.logdet.update({{"kind": "roulette", "distribution": "geometric", "parameter": 0.5}})
    config.training.update({{"total_steps": {TOTAL_STEPS}, "eval_every_steps": {EVAL_EVERY}}})
    config.training.update({{"log_every_steps": 1,
        "blocks": "scan", "batch_size": 16, "eval_examples": 32, "actnorm_examples": 32}})
    config.evaluation.update({{"num_examples": 256, "num_probe_draws": 2}})
    config.evaluation.logdet.kind = "exact"
    config.references.values = (("somebody", 2.45),)
    return config
"""

DIGITS_CONFIG = """
from iresnet_jax.runs.config import default_config

def get_config():
    config = default_config()
    config.model.stages = ({"num_blocks": 1, "hidden": (4,), "kernel_sizes": (3, 3)},)
    config.preprocessing.update({"transform": "equalize", "alpha": 1e-3, "entrywise": True})
    config.training.update({"total_steps": 6, "eval_every_steps": 3, "log_every_steps": 3,
        "batch_size": 32, "actnorm_examples": 64})
    config.evaluation.update({"num_dequantisations": 2, "num_probe_draws": 2})
    return config
"""

CLASSIFIER_CONFIG = """
from iresnet_jax.runs.config import default_config

def get_config():
    config = default_config()
    config.objective = "classification"
    config.model.stages = ({"num_blocks": 2, "hidden": (4,), "kernel_sizes": (3, 1), "squeeze": 2},)
    config.classifier.update({"pad_channels": 1, "label_smoothing": 0.1})
    config.augmentation.update({"crop_padding": 1, "flip": True})
    config.optimizer.update({"name": "sgd", "learning_rate": 0.3, "warmup_steps": 2})
    config.optimizer.update({"clip_norm": 0.0, "weight_decay": 1e-3})
    config.training.update({"total_steps": 8, "eval_every_steps": 2, "log_every_steps": 2})
    config.training.update({"batch_size": 64,
        "actnorm_examples": 128, "ema_decay": 0.5, "blocks": "scan"})
    config.references.values = (("somebody", 1.25),)
    return config
"""

HYBRID_CONFIG = """
from iresnet_jax.runs.config import default_config

def get_config():
    config = default_config()
    config.objective = "hybrid"
    config.model.stages = ({"num_blocks": 1, "hidden": (4,)},)
    config.model.dequantization = "variational"
    config.model.noise.update({"num_blocks": 1, "hidden": (3,), "network": (4, 2), "window": 3})
    # as above
    config.logdet.update({"kind": "roulette", "distribution": "geometric", "parameter": 0.5})
    config.optimizer.update({"learning_rate": 1e-2, "warmup_steps": 2})
    config.hybrid.update({"weight": 2.0, "initial_weight": 4.0, "ramp_steps": 4})
    config.training.update({"total_steps": 8, "eval_every_steps": 4, "log_every_steps": 2})
    config.training.update({"batch_size": 32,
        "actnorm_examples": 64, "ema_decay": 0.5, "blocks": "unroll"})
    config.evaluation.update({"num_dequantisations": 1, "num_probe_draws": 1})
    config.evaluation.logdet.kind = "exact"
    return config
"""

CONFIGS = {"toy": TOY_CONFIG, "classifier": CLASSIFIER_CONFIG, "hybrid": HYBRID_CONFIG}
RETURNED = "returned.npz"  # file of a run from `trained`: the model that the training returned
TRACES = "traces"  # file of a run from `trained`: how often its step was traced


def trained(tmp_path_factory, name):
    """The folder of a run of `CONFIGS`, trained once for all processes and copied."""
    whole = shared(tmp_path_factory) / name
    with locked(whole):
        if not whole.exists():
            incoming, traces = tmp_path_factory.mktemp("incoming"), []
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(Step, "__call__", _counted(Step.__call__, traces))
                job.train(config_of(CONFIGS[name]), incoming).save(incoming / RETURNED)
            (incoming / TRACES).write_text(str(len(traces)))
            incoming.rename(whole)
    return shutil.copytree(whole, tmp_path_factory.mktemp(name) / "run")


def newest(workdir):
    """The step of a run's newest checkpoint."""
    return max(int(path.stem) for path in (workdir / "checkpoints").glob("*.npz"))


def arrays_of(workdir, step=None):
    """The arrays of a checkpoint by name, by default of the newest one."""
    with (
        Store(workdir).path(newest(workdir) if step is None else step).open("rb") as file,
        np.load(file) as archive,
    ):
        return {name: archive[name] for name in archive.files if not name.startswith("(")}


def measurements(workdir):
    """What a run wrote down, without times."""
    kept = [
        {k: v for k, v in record.items() if "second" not in k and k != "wall_time_s"}
        for record in read_metrics(workdir)
    ]
    return [record for record in kept if record["split"] != "timing"]


def assert_ends_like(workdir, reference):
    """The same bits in the last state, and the same measurements."""
    ours, theirs = arrays_of(workdir), arrays_of(reference)
    assert {name: array.tobytes() for name, array in ours.items()} == {
        name: array.tobytes() for name, array in theirs.items()
    }
    assert measurements(workdir) == measurements(reference)


def fixtures_of(name):
    """Fixtures of a module: the folder of a run of `CONFIGS`, and the loaded run."""

    @pytest.fixture(scope="module")
    def workdir(tmp_path_factory):
        return trained(tmp_path_factory, name)

    @pytest.fixture(scope="module")
    def loaded(workdir):
        return trained_run.load(workdir)

    return workdir, loaded


def shorten_reports(patch):
    """Certifies 8 examples for reports, whose figures are not drawn."""
    patch.setattr("iresnet_jax.evaluation.round_trips.MOST_CERTIFIED", 8)
    patch.setattr("iresnet_jax.evaluation.plots.data_uri", lambda figure: "data:image/png;base64,")


def _counted(function, calls):
    @functools.wraps(function)
    def counted(*arguments):
        calls.append(1)
        return function(*arguments)

    return counted


def shared(tmp_path_factory):
    """The temporary folder of all test processes."""
    folder = tmp_path_factory.getbasetemp()
    return folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder


@functools.cache
def train_script():
    """The module train.py."""
    spec = importlib.util.spec_from_file_location("train_script", ROOT / "train.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def train_main(*arguments):
    """The exit status of ``train.py``, which lets its process log more; here this ends with it."""
    levels = {logger: logger.level for logger in map(logging.getLogger, ("iresnet_jax", "jax"))}
    try:
        return train_script().main(["train.py", *map(str, arguments)])
    finally:
        for logger, level in levels.items():
            logger.setLevel(level)


def config_of(source, **changes):
    """The parsed config of a file's text, with settings such as training.total_steps changed."""
    settings = settings_of(source)
    with settings.unlocked():
        settings.update_from_flattened_dict(changes)
    return parse(settings)


def settings_of(source):
    """What a config file's text returns."""
    namespace = {}
    exec(source, namespace)
    return namespace["get_config"]()


def environment():
    """For subprocesses: this process's, in which the package is found."""
    return {**os.environ, "PYTHONPATH": str(ROOT)}


def random_state(made):
    """The state of a job with random numbers: initialisation takes long to compile."""
    rng = np.random.default_rng(0)
    free = abstract(made.spec)
    params, iterates, statistics = jax.tree.map(
        lambda leaf: 0.1 * rng.normal(size=leaf.shape).astype(leaf.dtype),
        (free.params, free.iterates, free.statistics),
    )
    free = free.with_(params=params, iterates=iterates, statistics=statistics)
    optimizer, length = made.arguments["optimizer"], made.arguments["schedule_steps"]
    return first_state(free, optimizer, length)


def one_block(*, training=None, **estimator):
    """A config of one block of the plane, trained by this estimator and validated exactly."""
    settings = settings_of(TOY_CONFIG)
    settings.model.stages = ({"num_blocks": 1, "hidden": (8,)},)
    settings.logdet.update(estimator)
    settings.evaluation.logdet.kind = "exact"
    settings.training.update({"blocks": "unroll", **(training or {})})
    return parse(settings)


def random_weights(spec, scale=1.0, seed=0):
    """Weights of a kind of branch, drawn by NumPy: JAX would compile a program for each shape."""
    rng = np.random.default_rng(seed)
    shapes = jax.eval_shape(spec.initial_weights, jax.random.key(0))
    weights = jax.tree.map(lambda leaf: rng.normal(0, 0.4, leaf.shape).astype(np.float32), shapes)
    return {
        name: {**own, "kernel": np.float32(scale) * own["kernel"]} for name, own in weights.items()
    }
