"""Whether a run of two processes survives what can happen to one of them: it must end cleanly, and go on to the same result.

    python benchmarks/faults.py [--faults 25] [--quick]

Each fault hits process 0 or 1 of a run on a moon-shaped toy while it compiles, takes steps, validates or saves:

    SIGKILL    the process is gone at once, as when memory runs out
    SIGTERM    a scheduler asks it to stop
    SIGSTOP    it hangs for longer than the others wait for a sign of life; then it goes on, and has to find that out itself

A clean end is one within `END_S` seconds after which no process is left. Then the same command is given on both, and the final
parameters must be those of a run without faults, to the last bit. Nothing is repaired by hand in between. Statuses are those of
`iresnet_jax.runs.hosts`; "JAX" counts ends by JAX's own words, where process 0 and its coordinator are gone.
"""

import json
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from _record import ROOT, parser, show, write

from iresnet_jax.runs.checkpoints import load_named
from iresnet_jax.runs.config import default_config, parse
from iresnet_jax.runs.metrics import read_metrics
from iresnet_jax.runs.run_folder import CONFIG_FILE

END_S, START_S = 60.0, 120.0  # seconds
TOTAL_STEPS, EVAL_EVERY = 200, 10
SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGSTOP)
MOMENTS = ("compiling", "stepping", "validating", "saving")


def work(coordinator, process, workdir):
    """Trains as one of two processes: a small run that validates and saves often."""
    from iresnet_jax.runs import hosts, signals
    from iresnet_jax.runs.command_line import explain_failures
    from iresnet_jax.runs.loop import train

    settings = default_config()
    settings.data.name = "moons"
    settings.model.stages = ({"num_blocks": 4, "hidden": (32, 32)},)
    settings.preprocessing.transform = "none"
    often = {"total_steps": TOTAL_STEPS, "eval_every_steps": EVAL_EVERY, "log_every_steps": 1}
    settings.training.update({**often, "batch_size": 64, "blocks": "scan"})

    def run():
        hosts.initialize(coordinator, 2, process)
        with hosts.ending_together():
            train(parse(settings), workdir)
        return 0

    signals.end_at_signals("the same command goes on from the last checkpoint")
    return explain_failures(run)


class Pair:
    """The two processes of a run."""

    def __init__(self, workdir):
        with socket.socket() as probe:
            probe.bind(("localhost", 0))
            coordinator = f"localhost:{probe.getsockname()[1]}"
        environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"}
        command = [sys.executable, "-W", "ignore", __file__, "--worker", coordinator]
        self.workdir = workdir
        self.logs = [tempfile.TemporaryFile(mode="w+") for _ in range(2)]
        self.processes = [
            subprocess.Popen([*command, str(number), str(workdir)], env=environment, stdout=log, stderr=log)
            for number, log in enumerate(self.logs)
        ]

    def reach(self, moment, rng):
        """Waits for a moment of the run, and says whether it came."""
        deadline, step = time.monotonic() + START_S, rng.randrange(EVAL_EVERY + 1, TOTAL_STEPS // 2)
        if moment == "compiling":  # once all have met: of one that never comes nobody can tell
            while not (self.workdir / CONFIG_FILE).exists() and time.monotonic() < deadline:
                time.sleep(0.01)
            time.sleep(rng.uniform(0, 4))
            return (self.workdir / CONFIG_FILE).exists()
        while time.monotonic() < deadline and all(process.poll() is None for process in self.processes):
            records = read_metrics(self.workdir)
            logged = max((record["step"] for record in records if record["split"] == "train"), default=0)
            validated = max((record["step"] for record in records if record["split"] == "validation"), default=0)
            now = "stepping" if logged % EVAL_EVERY else "validating" if validated < logged else "saving"
            if logged >= step and now == moment:
                return True
            time.sleep(0.001)
        return False

    def end(self, within):
        """Exit statuses; None for a process that did not end in time and was killed."""
        deadline, statuses = time.monotonic() + within, []
        for process in self.processes:
            try:
                statuses.append(process.wait(max(deadline - time.monotonic(), 0.1)))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
                statuses.append(None)
        return statuses

    def said(self):
        """The last own line of each process."""
        lines = []
        for log in self.logs:
            log.seek(0)
            own = [line for line in log.read().splitlines() if not line.startswith(("[Gloo]", "***", " "))]
            lines.append(own[-1] if own else "")
        return lines


def newest(workdir):
    """Step and arrays of the newest checkpoint."""
    path = max((workdir / "checkpoints").glob("*.npz"), key=lambda path: int(path.stem))
    return int(path.stem), load_named(path)


def try_fault(number, folder, expected):
    """One fault, the end that it makes, and how the run goes on."""
    rng = random.Random(number)
    sent, moment = SIGNALS[number % len(SIGNALS)], MOMENTS[number // len(SIGNALS) % len(MOMENTS)]
    victim = (number + number // (len(SIGNALS) * len(MOMENTS))) % 2
    pair = Pair(folder / str(number))
    reached = pair.reach(moment, rng)
    began = time.monotonic()
    pair.processes[victim].send_signal(sent)
    if sent == signal.SIGSTOP:
        other = pair.processes[1 - victim]
        while other.poll() is None and time.monotonic() < began + END_S:
            time.sleep(0.1)
        pair.processes[victim].send_signal(signal.SIGCONT)
    statuses = pair.end(max(began + END_S - time.monotonic(), 10.0))
    seconds, said = time.monotonic() - began, pair.said()
    resumed, (step, arrays) = Pair(pair.workdir).end(4 * START_S), newest(pair.workdir)
    is_same = step == expected[0] and all(np.array_equal(arrays[name], a, equal_nan=True) for name, a in expected[1].items())
    return {
        **{"signal": sent.name, "moment": moment, "reached": reached, "process": victim},
        "statuses": statuses,
        "said": said,
        "seconds": seconds,
        "ended": None not in statuses and seconds < END_S,
        "by_jax": -signal.SIGABRT in statuses,
        "resumed": resumed == [0, 0] and is_same,
    }


def main():
    """Tries all faults and writes the record."""
    command = parser(__doc__)
    command.add_argument("--faults", type=int, default=25, help="how many (25)")
    arguments = command.parse_args()
    num_faults = min(arguments.faults, 2) if arguments.quick else arguments.faults
    with tempfile.TemporaryDirectory() as folder:
        without = Pair(Path(folder) / "without")
        if (statuses := without.end(4 * START_S)) != [0, 0]:
            raise SystemExit(f"error: a run without faults ended with {statuses}: {without.said()}")
        expected = newest(Path(folder) / "without")
        found = []
        for number in range(num_faults):
            found.append(try_fault(number, Path(folder), expected))
            print(json.dumps(found[-1]), flush=True)
    summary = {
        "faults": len(found),
        **{key: sum(fault[key] for fault in found) for key in ("reached", "ended", "by_jax", "resumed")},
    }
    show(summary)
    settings = {"end_s": END_S, "total_steps": TOTAL_STEPS, "eval_every_steps": EVAL_EVERY}
    write("faults", arguments, settings, {"summary": summary, "faults": found}, is_shown=True)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--worker"]:
        sys.exit(work(sys.argv[2], int(sys.argv[3]), Path(sys.argv[4])))
    main()
