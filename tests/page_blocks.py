"""Runs the Python blocks of pages as a reader would: ``python tests/page_blocks.py BLOCKS.json`` in
a folder with their files.

A process of its own has one device and no shape checks, as users have. Models are small: ``ir.fit``
makes two updates of one block where a page names no architecture, and equal calls train once for
all pages. Where a page names no optimizer, updates are plain descent, which compiles sooner than
Muon. ``ir.fit_energy``, which has tests of its own, trains nothing.
"""

import functools
import gc
import inspect
import json
import re
import sys
import traceback
from pathlib import Path

import jax
import matplotlib as mpl
import numpy as np

import iresnet_jax as ir
from iresnet_jax import estimators, fitting
from iresnet_jax.training import train as loop
from iresnet_jax.training.optimizers import OptimizerConfig

FITTED = {}
SHORTER = {
    r"\bsteps=\d+|\bminutes=[\d.]+": "steps=2",
    r"\b(num_blocks=|StageSpec\()\d+": r"\g<1>1",
    r"\b(num_(warmup|samples)=)\d+": r"\g<1>32",
    r"\bcv=5\b": "cv=2",
    r"\(3, 3, 16, 64\)": "(3, 3, 2, 3)",
    # points of the README and of a notebook, which share their programs with those of my_array.npy
    r"\b(5000|1500)\b": "256",
    r"\b500(, context=|, 1\))": r"16\1",
    r"hidden=\(32(, 32)?,?\), kernel_sizes=\(3, (1, )?3\)": "hidden=(4,), kernel_sizes=(1, 1)",
    r"mcmc\.run\(.*\)": "",  # which compiles for long, in test_adapters.py
    r'            ir\.StageSpec\(num_blocks=\d+, hidden=\(64,\), activation="clipswish"\),\n': "",
    # a flow whose programs the page has compiled
    r'\((32|128),\), activation="clipswish"': '(64,), activation="clipswish"',
    r"key\(0\), 3\)": "key(0), 1)",  # of the models that disagree where data are few
}


def fit_once(fit):
    """``fit``, which remembers its models by the content of the arrays and the settings."""

    @functools.wraps(fit)
    def remembering(*arrays, **options):
        contents = [
            np.asarray(a).tobytes() for a in [*arrays, options.get("context")] if a is not None
        ]
        if np.ndim(arrays[0]) == 2 and options.get("architecture") is None:
            options["architecture"] = [ir.StageSpec(num_blocks=1, hidden=(4,))]
        rest = {name: value for name, value in options.items() if name != "context"}
        call = repr(
            (
                contents,
                {**rest, "key": rest.get("key") is not None and jax.random.key_data(rest["key"])},
            )
        )
        if call not in FITTED:
            FITTED[call] = fit(*arrays, **options)
        return FITTED[call]

    return remembering


def energy_of(fit_energy):
    """A density with the stages that ``fit_energy`` is given, if it takes these arguments."""
    signature = inspect.signature(fit_energy)

    def fresh(*arguments, **options):
        given = signature.bind(*arguments, **options).arguments
        x = given["scale"] * np.random.default_rng(0).normal(size=(256, given["num_dims"]))
        return ir.Density.init(given["key"], x, stages=given["stages"])

    return fresh


def run_page(page: str, blocks: list[tuple[int, str]]) -> str | None:
    """Runs the blocks of a page with short trainings; the traceback of what failed."""
    namespace = {"__name__": "__main__"}
    for line, code in blocks:
        for long, short in SHORTER.items():
            code = re.sub(long, short, code)
        try:
            exec(compile("\n" * (line - 1) + code, page, "exec"), namespace)
        except BaseException:
            return traceback.format_exc()
    return None


def main(path: str) -> None:
    """Writes what failed, by page, over the blocks."""
    gc.set_threshold(50_000, 20, 100)  # makes tracing faster
    mpl.use("Agg")
    ir.fit = estimators.fit = fit_once(ir.fit)
    ir.fit_energy = energy_of(ir.fit_energy)
    loop.OptimizerConfig = fitting.OptimizerConfig = lambda name, *values, **options: (
        OptimizerConfig("sgd", *values, **options)
    )
    outcomes = {}
    for page, blocks in json.loads(Path(path).read_text()).items():
        outcomes[page] = run_page(page, blocks)
    Path(path).write_text(json.dumps(outcomes))


if __name__ == "__main__":
    main(*sys.argv[1:])
