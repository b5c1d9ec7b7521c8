"""Several processes train as one does; what ends one of them ends all, in one sentence."""

import signal
import time

import jax
import numpy as np
import pytest
import tiny_runs as runs
from one_of_several import start

from iresnet_jax.runs import hosts, job
from iresnet_jax.runs.metrics import read_metrics
from iresnet_jax.training import parallel

# float32 sums over another number of devices, amplified by 8 steps, of an array's largest entry
ROUNDING = 2e-5
# what sums of numbers around 1 leave where they vanish, as gradients of biases in front of ActNorm
# do
VANISHING = 2e-8
LONG = {  # runs that something ends, of what compiles fastest
    "training.total_steps": 100_000,
    "training.eval_every_steps": 100_000,
    "training.log_every_steps": 25,
    "training.blocks": "unroll",
    "model.stages": ({"num_blocks": 1, "hidden": (4,), "actnorm": False},),
    "logdet.kind": "exact",
    "optimizer.name": "sgd",
    "optimizer.clip_norm": 0.0,
}
DEADLINE_S = 60
ADVICE = "start all processes again by the same command, which goes on from the last checkpoint"


def finish(processes):
    """Exit statuses, and what was said on stderr, transports' own lines left out."""
    statuses = [process.wait(4 * DEADLINE_S) for process in processes]
    return statuses, [
        [line for line in process.said() if not line.startswith("[Gloo]")] for process in processes
    ]


def await_step(workdir, step, processes):
    """Waits until a run has logged a step."""
    deadline = time.monotonic() + DEADLINE_S
    while not any(
        record["step"] >= step and record["split"] == "train" for record in read_metrics(workdir)
    ):
        assert time.monotonic() < deadline
        assert all(process.poll() is None for process in processes), finish(processes)
        time.sleep(0.05)


def final(workdir):
    """Step and arrays of the newest checkpoint."""
    return runs.newest(workdir), runs.arrays_of(workdir)


def assert_close(found, expected):
    """The same step, and arrays that are as close as rounding lets them be."""
    (step, arrays), (expected_step, expected_arrays) = found, expected
    assert step == expected_step
    for place, array in expected_arrays.items():
        atol = max(ROUNDING * float(np.abs(array).max(initial=0)), VANISHING)
        np.testing.assert_allclose(
            arrays[place].astype(float), array.astype(float), rtol=0, atol=atol, err_msg=place
        )


@pytest.fixture(scope="module")
def stopped(tmp_path_factory):
    """The folder of a run whose process 1 was told to stop, exit statuses, and what was said."""
    folder = tmp_path_factory.mktemp("stopped")
    processes = start(2, [["toy", str(folder / "run"), LONG]], folder)
    await_step(folder / "run", 3, processes)
    processes[1].send_signal(signal.SIGTERM)
    return folder / "run", *finish(processes)


@pytest.mark.slow
def test_a_signal_to_one_process_saves_the_same_step_and_ends_both(stopped):
    workdir, statuses, said = stopped
    assert statuses == [128 + signal.SIGTERM] * 2
    step, _ = final(workdir)
    sentence = (
        f"stopped by SIGTERM after step {step} of {LONG['training.total_steps']}: the same "
        "command goes on from it"
    )
    assert said == [
        [sentence],
        ["SIGTERM: saving after this step; a second signal stops at once", sentence],
    ]


@pytest.mark.slow
def test_a_process_that_is_killed_ends_the_other(tmp_path):
    """Of a run with a time limit, whose processes agree on its length at every line of the log."""
    processes = start(
        2, [["toy", str(tmp_path / "run"), {**LONG, "training.minutes": 60.0}]], tmp_path
    )
    await_step(tmp_path / "run", 3, processes)
    processes[1].send_signal(signal.SIGKILL)
    statuses, said = finish(processes)
    assert statuses == [hosts.LOST, -signal.SIGKILL]
    assert said[0][-1].startswith(
        f"another process has failed or cannot be reached, and its own output says why: {ADVICE} ("
    )


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The same training by one process with two devices, and by two with one each."""
    folder = tmp_path_factory.mktemp("trained")
    of_two, elsewhere = (("classifier", str(folder / name), {}) for name in ("two", "elsewhere"))
    processes = start(2, [of_two], folder / "processes", other=elsewhere)
    runs.trained(tmp_path_factory, "classifier").rename(folder / "one")
    assert finish(processes) == ([0, 0], [[], []])
    assert not (folder / "elsewhere").exists()  # the folder is that of process 0
    return folder


def test_runs_do_not_depend_on_how_devices_are_spread(trained):
    assert jax.local_device_count() == 2
    assert_close(final(trained / "two"), final(trained / "one"))
    for found, expected in zip(
        *(runs.measurements(trained / name) for name in ("two", "one")), strict=True
    ):
        assert found.pop("split") == expected.pop("split")
        assert found == pytest.approx(expected, rel=1e-4, abs=1e-5)


@pytest.mark.parametrize(
    ("ours", "theirs", "difference"),
    [
        (
            '"seed": 0',
            '"seed": 7',
            "all processes need the same run: run.config.seed is 7 in process 1 and 0 in process 0",
        ),
        (
            '"fingerprint": "',
            '"fingerprint": "no',
            "all processes need the same run: run.data.fingerprint is ",
        ),
    ],
)
def test_what_processes_must_have_alike_is_compared(
    monkeypatch, tmp_path, ours, theirs, difference
):
    """With the texts that another process would have sent."""
    monkeypatch.setattr(hosts.jax, "process_count", lambda: 2)
    of_all = lambda own: [own, own.replace(ours, theirs)]  # noqa: E731
    monkeypatch.setattr(parallel, "texts_of_all", of_all)
    with pytest.raises(ValueError, match=difference):
        job.train(runs.config_of(runs.CONFIGS["toy"]), tmp_path / "run")
    assert not (tmp_path / "run").exists()
