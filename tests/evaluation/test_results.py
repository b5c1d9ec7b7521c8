"""Training times from a log, and the environment of a result."""

import os

import jax
import pytest

from iresnet_jax.evaluation import machine_and_versions
from iresnet_jax.evaluation.results import TrainingTimes


def test_training_times_are_those_of_the_log():
    records = [
        {"step": 0, "split": "timing", "wall_time_s": 3.0, "compile_seconds": 2.5},
        *(
            {"step": k, "split": "train", "wall_time_s": 3.0 + k, "seconds_per_step": s}
            for k, s in enumerate((9.0, 0.1, 0.2), 1)
        ),
    ]
    assert TrainingTimes.from_metrics(records, 2) == TrainingTimes(
        steps=2, total_steps=3, seconds_per_step=0.2, compile_seconds=2.5, total_seconds=6.0
    )
    assert TrainingTimes.from_metrics([], 0) == TrainingTimes(steps=0, total_steps=0)


def test_environment_names_versions_and_devices():
    facts = machine_and_versions.describe()
    assert facts.jax == jax.__version__
    assert facts.cpu_count >= 1


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="this system cannot pin a process to processors")
def test_environment_counts_the_processors_that_the_process_may_use():
    allowed = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(allowed)})
    try:
        assert machine_and_versions.describe().cpu_count == 1
    finally:
        os.sched_setaffinity(0, allowed)
