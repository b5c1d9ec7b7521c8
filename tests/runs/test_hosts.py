"""Several processes train as one does, on the same devices to the bit; what ends one of them ends all, in one sentence each."""

import functools
import shutil
import signal
import time
from pathlib import Path

import jax
import numpy as np
import pytest
import tiny_runs as runs
from one_of_several import start

from iresnet_jax.runs import hosts, loop
from iresnet_jax.runs.checkpoints import load_named
from iresnet_jax.runs.metrics import read_metrics
from iresnet_jax.training import parallel

ROUNDING = 2e-5  # float32 sums over another number of devices, amplified by 40 steps, of an array's largest entry
VANISHING = 2e-8  # what sums of numbers around 1 leave where they vanish, as gradients of biases in front of ActNorm do
SPARSE = {"training.total_steps": 40, "training.eval_every_steps": 20}
EXACT = {**SPARSE, "evaluation.logdet.kind": "exact"}
OBJECTIVES = {"toy": EXACT, "classifier": SPARSE}
LONG = {  # runs that something ends, of what compiles fastest
    "training.total_steps": 100_000,
    "training.eval_every_steps": 100_000,
    "training.blocks": "unroll",
    "model.stages": ({"num_blocks": 1, "hidden": (4,)},),
    "logdet.kind": "exact",
}
DEADLINE_S = 60
LOST_S = 5
ENDS_OF_THE_LOST = (hosts.LOST, -signal.SIGABRT)  # by this library's words, and by JAX's
ADVICE = "the same command on all processes, or on fewer, goes on from the last checkpoint"


def finish(processes):
    """Exit statuses, and what was said on stderr, transports' own lines left out."""
    statuses = [process.wait(4 * DEADLINE_S) for process in processes]
    return statuses, [[line for line in process.said() if not line.startswith("[Gloo]")] for process in processes]


def await_step(workdir, step, processes):
    """Waits until a run has logged a step."""
    deadline = time.monotonic() + DEADLINE_S
    while not any(record["step"] >= step and record["split"] == "train" for record in read_metrics(workdir)):
        assert time.monotonic() < deadline
        assert all(process.poll() is None for process in processes), finish(processes)
        time.sleep(0.1)


def final(workdir):
    """Step and arrays of the newest checkpoint."""
    path = max((Path(workdir) / "checkpoints").glob("*.npz"), key=lambda path: int(path.stem))
    return int(path.stem), load_named(path)


def logs(workdir):
    """What a run measured, without times."""
    kept = [{k: v for k, v in record.items() if "second" not in k and k != "wall_time_s"} for record in read_metrics(workdir)]
    return [record for record in kept if record["split"] != "timing"]


def assert_close(found, expected):
    """The same step, and arrays that are as close as rounding lets them be."""
    (step, arrays), (expected_step, expected_arrays) = found, expected
    assert step == expected_step == 40
    for place, array in expected_arrays.items():
        atol = max(ROUNDING * float(np.abs(array).max(initial=0)), VANISHING)
        np.testing.assert_allclose(arrays[place].astype(float), array.astype(float), rtol=0, atol=atol, err_msg=place)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Folders of the same trainings by one process with two devices, and by two processes.

    Two with a device each train the classifier. Two with two devices each go on with the toy where the one stood after half its
    steps, and have folders of their own.
    """
    folder = tmp_path_factory.mktemp("trained")
    of_two = {name: (name, str(folder / f"{name}-two"), changes) for name, changes in OBJECTIVES.items()}
    processes = start(2, [of_two["classifier"]], folder / "classifier")
    for name, changes in OBJECTIVES.items():
        loop.train(runs.config_of(runs.CONFIGS[name], **changes), folder / f"{name}-one")
    assert finish(processes) == ([0, 0], [[], []])
    shutil.copytree(folder / "toy-one", folder / "toy-two")
    (folder / "toy-two" / "checkpoints" / "40.npz").unlink()
    elsewhere = ("toy", str(folder / "elsewhere"), EXACT)
    assert finish(start(2, [of_two["toy"]], folder / "toy", other=elsewhere, num_devices=2)) == ([0, 0], [[], []])
    assert not (folder / "elsewhere").exists()  # the folder is that of process 0
    return folder


@pytest.mark.parametrize("name", OBJECTIVES)
def test_runs_do_not_depend_on_how_devices_are_spread(trained, name):
    assert jax.local_device_count() == 2
    assert_close(final(trained / f"{name}-two"), final(trained / f"{name}-one"))
    for found, expected in zip(logs(trained / f"{name}-two"), logs(trained / f"{name}-one"), strict=True):
        assert found.pop("split") == expected.pop("split")
        assert found == pytest.approx(expected, rel=1e-4, abs=1e-5)


def test_one_process_goes_on_where_two_were(trained, tmp_path):
    shutil.copytree(trained / "classifier-two", tmp_path / "run")
    (tmp_path / "run" / "checkpoints" / "40.npz").unlink()
    loop.train(runs.config_of(runs.CONFIGS["classifier"], **SPARSE), tmp_path / "run")
    assert_close(final(tmp_path / "run"), final(trained / "classifier-one"))


# --- ends -------------------------------------------------------------------------------------------------------------


def test_a_signal_to_one_process_saves_the_same_step_and_ends_both(tmp_path):
    processes = start(2, [["toy", str(tmp_path / "run"), LONG]], tmp_path)
    await_step(tmp_path / "run", 3, processes)
    processes[1].send_signal(signal.SIGTERM)
    statuses, said = finish(processes)
    assert statuses == [128 + signal.SIGTERM] * 2
    step, _ = final(tmp_path / "run")
    sentence = f"stopped by SIGTERM after step {step} of {LONG['training.total_steps']}: the same command goes on from it"
    assert said == [[sentence], ["SIGTERM: saving after this step; a second signal stops at once", sentence]]


def test_a_process_that_is_killed_ends_the_other(tmp_path):
    processes = start(2, [["toy", str(tmp_path / "run"), LONG]], tmp_path)
    await_step(tmp_path / "run", 3, processes)
    processes[1].send_signal(signal.SIGKILL)
    statuses, said = finish(processes)
    assert statuses == [hosts.LOST, -signal.SIGKILL]
    assert said[0][-1].startswith(f"another process has failed or cannot be reached, see what it said: {ADVICE} (")


def test_a_suspended_coordinator_ends_the_other_and_itself_when_it_wakes(tmp_path):
    processes = start(2, [["toy", str(tmp_path / "run"), LONG]], tmp_path, lost_s=LOST_S)
    await_step(tmp_path / "run", 3, processes)
    processes[0].send_signal(signal.SIGSTOP)
    assert processes[1].wait(DEADLINE_S) in ENDS_OF_THE_LOST
    processes[0].send_signal(signal.SIGCONT)
    assert processes[0].wait(DEADLINE_S) in ENDS_OF_THE_LOST


def test_a_process_that_fails_alone_says_why_and_ends_the_other(tmp_path):
    processes = start(2, [["toy", str(tmp_path / "run"), LONG]], tmp_path)
    await_step(tmp_path / "run", 3, processes)
    checkpoints = tmp_path / "run" / "checkpoints"
    for file in checkpoints.glob("*"):
        file.unlink()
    if checkpoints.exists():
        checkpoints.rmdir()
    checkpoints.write_text("a file where process 0 wants to write")
    processes[1].send_signal(signal.SIGTERM)
    (status, other), said = finish(processes)
    assert status == 2
    assert "error: the checkpoint of step" in said[0][-1]
    assert other in ENDS_OF_THE_LOST


def test_what_processes_must_have_alike_is_compared(tmp_path):
    workdir = str(tmp_path / "run")
    processes = start(
        2, [["toy", workdir, {"training.batch_size": 16}]], tmp_path, other=["toy", workdir, {"training.batch_size": 32}]
    )
    statuses, said = finish(processes)
    assert statuses == [2, 2]
    assert all("config.training.batch_size is 32 in process 1 and 16 in process 0" in " ".join(lines) for lines in said)


def test_minutes_are_for_one_process(monkeypatch, tmp_path):
    monkeypatch.setattr(parallel, "num_processes", lambda: 2)
    with pytest.raises(ValueError, match=r"minutes must be 0 with 2 processes"):
        loop.train(runs.config_of(runs.CONFIGS["toy"], **{"training.minutes": 1.0}), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_missing_and_wrong_arguments_are_refused(monkeypatch):
    asked = []
    monkeypatch.setattr(hosts.jax.distributed, "initialize", functools.partial(refused, asked))
    with pytest.raises(ValueError, match="several processes need --coordinator_address, --num_processes and --process_id"):
        hosts.initialize("localhost:1")
    with pytest.raises(ValueError, match=r"--process_id must lie in \[0, 2\)"):
        hosts.initialize("localhost:1", 2, 2)
    hosts.initialize()
    monkeypatch.delenv("TPU_WORKER_HOSTNAMES", raising=False)  # which a plan for TPUs sets
    for name, value in SINGLE:
        with monkeypatch.context() as patch:
            patch.setenv(name, value)
            hosts.initialize()
    assert asked == [None] * 2 + ["deactivate"] * len(SINGLE)


SINGLE = [("SLURM_NTASKS", "1"), ("OMPI_COMM_WORLD_SIZE", "1"), ("KUBERNETES_SERVICE_HOST", "10.0.0.1")]


def refused(asked, *arguments, cluster_detection_method, **options):
    """JAX's function, once it has started: it finds no cluster, and says whether it was asked to look for one."""
    asked.append(cluster_detection_method)
    raise ValueError("Number of processes must be defined.")
