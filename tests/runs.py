"""Tiny training runs for the tests around training, and a cache so that equal programs compile once for all of them."""

import contextlib
import functools
import importlib.util
import os
from pathlib import Path

import jax
import pytest
from jax.experimental.compilation_cache import compilation_cache

from iresnet_jax.training.config import parse

ROOT = Path(__file__).parents[1]
TOTAL_STEPS, EVAL_EVERY = 40, 2

TOY_CONFIG = f"""
from iresnet_jax.training.config import default_config

def get_config():
    config = default_config()
    config.data.name = "moons"
    config.model.stages = ({{"num_blocks": 2, "hidden": (8, 8)}},)
    config.preprocessing.transform = "none"
    config.training.update({{"total_steps": {TOTAL_STEPS}, "eval_every_steps": {EVAL_EVERY}, "log_every_steps": 1,
        "blocks": "scan", "batch_size": 16, "eval_examples": 32, "actnorm_examples": 32}})
    config.evaluation.update({{"num_examples": 256, "num_probe_draws": 2}})
    config.references.values = (("somebody", 2.45),)
    return config
"""

DIGITS_CONFIG = """
from iresnet_jax.training.config import default_config

def get_config():
    config = default_config()
    config.model.stages = ({"num_blocks": 1, "hidden": (4,), "kernel_sizes": (3, 3)},)
    config.preprocessing.update({"transform": "equalize", "alpha": 1e-3, "entrywise": True})
    config.training.update({"total_steps": 6, "eval_every_steps": 3, "log_every_steps": 3,
        "batch_size": 32, "actnorm_examples": 64})
    config.evaluation.update({"num_dequantisations": 2, "num_probe_draws": 2})
    return config
"""


@contextlib.contextmanager
def shared_compilations(tmp_path_factory):
    """Keeps compiled programs on disk for as long as pytest runs, in subprocesses too."""
    settings = {
        "jax_compilation_cache_dir": str(tmp_path_factory.getbasetemp() / "compiled"),
        "jax_persistent_cache_min_compile_time_secs": 0.0,
    }
    before = {name: getattr(jax.config, name) for name in settings}
    with pytest.MonkeyPatch.context() as patch:
        for name, value in settings.items():
            jax.config.update(name, value)
            patch.setenv(name.upper(), str(value))
        compilation_cache.reset_cache()
        yield
    for name, value in before.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()


@functools.cache
def train_script():
    """The module train.py."""
    spec = importlib.util.spec_from_file_location("train_script", ROOT / "train.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def config_of(source, **changes):
    """The parsed config of a config file's text, with settings such as ``{"training.total_steps": 3}`` changed."""
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
