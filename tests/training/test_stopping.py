"""A signal ends train.py in one sentence with status 130 or 143, whatever the process is doing."""

import contextlib
import re
import signal
import subprocess
import sys

import pytest
import runs
from runs import ROOT, TOTAL_STEPS

HINT = "the same command goes on from the last checkpoint"

# Runs a script as the command line does, and says so on stderr when it comes to a certain place.
DRIVER = """
import runpy, sys, time

moment, script, *arguments = sys.argv[1:]

def say():
    sys.stderr.write("NOW\\n")
    sys.stderr.flush()

class Finder:
    def find_spec(self, name, *_):
        if name == moment:
            say()
            time.sleep(60)

if moment.startswith("call "):
    import importlib
    module, name = moment.removeprefix("call ").rsplit(".", 1)
    def reached(*args, **kwargs):
        say()
        time.sleep(60)
    setattr(importlib.import_module(module), name, reached)
else:
    sys.meta_path.insert(0, Finder())
sys.argv = [script, *arguments]
runpy.run_path(script, run_name="__main__")
"""


@pytest.fixture(scope="module", autouse=True)
def compilations(tmp_path_factory):
    with runs.shared_compilations(tmp_path_factory):
        yield


@pytest.fixture(scope="module")
def config_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("configs") / "tiny_moons.py"
    path.write_text(runs.TOY_CONFIG)
    return path


def stopped(command, marker, number, **environment):
    """Status and stderr behind the marker of a command that gets a signal at the marker."""
    env = {**runs.environment(), **environment}
    with subprocess.Popen(command, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        for line in process.stderr:
            if re.search(marker, line):
                break
        else:
            pytest.fail("the process never came to the marker")
        process.send_signal(number)
        with contextlib.suppress(subprocess.TimeoutExpired):
            _, rest = process.communicate(timeout=30)
            return process.returncode, rest
        process.kill()
        pytest.fail("the signal did not end the process")


@pytest.mark.parametrize(
    ("moment", "number", "status"),
    [
        ("jax", signal.SIGTERM, 143),
        ("optax", signal.SIGINT, 130),
        ("call iresnet_jax.training.loop.Checkpoints", signal.SIGINT, 130),
    ],
)
def test_a_signal_ends_the_process_in_one_sentence(config_file, tmp_path, moment, number, status):
    script = [str(ROOT / "train.py"), f"--config={config_file}", f"--workdir={tmp_path}"]
    found, rest = stopped([sys.executable, "-c", DRIVER, moment, *script], "NOW", number)
    assert (found, rest) == (status, f"stopped by {number.name}: {HINT}\n")


def test_a_signal_ends_the_process_while_it_compiles(config_file, tmp_path):
    program = "_fun"  # the training step, as pmap calls it
    command = [sys.executable, str(ROOT / "train.py"), f"--config={config_file}", f"--workdir={tmp_path}"]
    found, rest = stopped(command, rf"module conversion \S*\({program}\)", signal.SIGTERM, JAX_LOG_COMPILES="1")
    assert found == 143
    assert rest.splitlines()[-1] == f"stopped by SIGTERM: {HINT}"
    assert "Traceback" not in rest


def test_a_step_that_is_not_on_disk_is_saved(config_file, tmp_path):
    command = [sys.executable, str(ROOT / "train.py"), f"--config={config_file}", f"--workdir={tmp_path}"]
    found, rest = stopped(command, "step 2 of", signal.SIGTERM)
    last = rest.splitlines()[-1]
    assert found == 143
    assert last == f"stopped by SIGTERM: {HINT}" or last.endswith(f"of {TOTAL_STEPS}: the same command goes on from it")
    assert list((tmp_path / "checkpoints").glob("*.npz"))
    assert "Traceback" not in rest
