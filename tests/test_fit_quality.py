"""What `fit` makes of arrays, tables and the README's first example in seconds."""

import os
import subprocess
import sys

import jax
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from scipy import special, stats
from sklearn.datasets import load_iris
from test_docs import README, blocks
from tiny_runs import ROOT

import iresnet_jax as ir

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore:fit had time for")]

MINUTES = 0.25  # of each fit


def crescent(rng, num):
    x = rng.normal(size=(num, 2))
    x[:, 1] += x[:, 0] ** 2
    return x, stats.norm.logpdf(x - np.stack([0 * x[:, 0], x[:, 0] ** 2], axis=1)).sum(axis=1)


def modes(rng, num):
    x = rng.normal(size=(num, 5)) + 8 * rng.integers(0, 2, (num, 1))
    of_modes = [stats.norm.logpdf(x - mean).sum(axis=1) for mean in (0, 8)]
    return x, special.logsumexp(of_modes, axis=0) - np.log(2)


def dependent_columns(rng, num):
    """A category on which a number depends, and a count."""
    place, count = rng.choice(3, num, p=[0.5, 0.3, 0.2]), rng.poisson(3, num)
    height = rng.normal(2.0 * place, 0.5)
    table = pd.DataFrame({"city": np.array(["Bern", "Oslo", "Rome"])[place], "height": height})
    log_p = np.log([0.5, 0.3, 0.2])[place] + stats.norm.logpdf(height, 2.0 * place, 0.5)
    return table.assign(count=count), log_p + stats.poisson.logpmf(count, 3)


def amounts(rng, num):
    """An amount that is often 0, and a flag that it tells."""
    is_paid = rng.random(num) < 0.6
    amount = np.where(is_paid, rng.exponential(size=num), 0.0)
    log_p = np.where(is_paid, np.log(0.6) - amount, np.log(0.4))
    return pd.DataFrame({"paid": is_paid, "amount": amount}), log_p


# What may be lost of the truth's mean log-density, in nats. On half a core it was .04, .10, .26 and
# .29, the tables without an update for want of time; half as much again is the margin, or .1.
LOST = {crescent: 0.14, modes: 0.2, dependent_columns: 0.38, amounts: 0.44}


@pytest.mark.parametrize("draw", LOST, ids=lambda draw: draw.__name__)
def test_densities_of_arrays_and_tables_are_near_the_truth(draw):
    train, _ = draw(np.random.default_rng(0), 1000)
    test, truth = draw(np.random.default_rng(1), 2000)
    model = ir.fit(train, key=jax.random.key(0), minutes=MINUTES, progress=False)
    found = model.log_prob(test if isinstance(test, pd.DataFrame) else test.astype(np.float32))
    assert np.mean(truth - np.asarray(found, np.float64)) < LOST[draw]
    assert model.certificate().certified


def test_classes_are_told_apart():
    x, labels = load_iris(return_X_y=True)
    train, test = np.arange(0, 150, 2), np.arange(1, 150, 2)
    fit = {"key": jax.random.key(0), "minutes": MINUTES, "progress": False}
    model = ir.fit(x[train].astype(np.float32), labels[train], **fit)
    log_p = np.asarray(model.class_log_probs(x[test].astype(np.float32)), np.float64)
    assert np.mean(log_p.argmax(axis=1) == labels[test]) > 0.92  # measured: .95 and .13
    assert -log_p[np.arange(75), labels[test]].mean() < 0.25


def test_the_first_example_of_the_readme_as_printed(tmp_path):
    """In a process of its own, as users have it: the model is near the horseshoe, and is saved."""
    first, second, *_ = [block.code for block in blocks(README) if block.language == "python"]
    assert "ir.fit(x, key=jax.random.key(0), minutes=0.5)" in first
    environment = {name: own for name, own in os.environ.items() if name != "XLA_FLAGS"}
    environment |= {"PYTHONPATH": str(ROOT), "MPLBACKEND": "Agg"}
    command = [sys.executable, "-c", first + second]
    subprocess.run(command, cwd=tmp_path, env=environment, check=True, timeout=300)
    assert plt.imread(tmp_path / "horseshoe.png").std() > 0
    model, rng = ir.load(tmp_path / "model.npz"), np.random.default_rng(1)
    angles = 1.5 * np.pi * (np.arange(1000) + 0.5) / 1000
    curve = np.stack([np.cos(angles), np.sin(angles)], axis=1)
    x = curve[rng.integers(0, 1000, 2000)] + 0.1 * rng.normal(size=(2000, 2))
    parts = stats.norm.logpdf(x[:, None], curve[None], 0.1).sum(axis=2)
    truth = special.logsumexp(parts, axis=1) - np.log(1000)
    found = np.asarray(model.log_prob(x.astype(np.float32)), np.float64)
    assert np.mean(truth - found) < 0.05  # measured: .013
    samples, info = model.sample(jax.random.key(1), 5000)
    assert info.converged.all()
    assert np.mean(np.abs(np.linalg.norm(samples, axis=1) - 1) < 0.4) > 0.98
