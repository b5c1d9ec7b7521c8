"""Training in `peers.py`: time and memory of a step, time to the first one, and time to a likelihood."""

import contextlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path

from _peers_cases import colour_config, step_config, write_batches
from _peers_processes import core_counts, pinned, take_turns
from _peers_step import WARMUP
from _record import RESULTS, Timing

from iresnet_jax.json_dataclasses import to_plain

OURS, NORMFLOWS, NAIVE = "ours", "normflows", "naive"
TARGETS = {NORMFLOWS: 2.0, NAIVE: 2.5}  # times as fast as a peer that a step should be
TRAIN_PY = Path(__file__).resolve().parents[1] / "train.py"
FASHION = TRAIN_PY.parent / "configs" / "fashion_mnist_density.py"
KEPT = RESULTS / "density_comparison_fashion_mnist.json"
POLL_S = 0.02


def step_cases(config, folder):
    """Module, case and arguments of the workers of a training step, by peer; PyTorch's want their number of threads, too."""
    architecture, num_dims = write_batches(config, folder / "batches.npz")
    of_peers = {
        "architecture": architecture,
        "batches": str(folder / "batches.npz"),
        "num_dims": num_dims,
        "num_terms": config.logdet.num_terms,
        "num_steps": config.constraint.num_steps,
        "learning_rate": config.optimizer.learning_rate,
        "clip_norm": config.optimizer.clip_norm,
    }
    peers = {kind: ("_peers_step", "PyTorch", {"kind": kind, **of_peers}) for kind in (NORMFLOWS, NAIVE)}
    return {OURS: ("_peers_step", "Ours", {"config": to_plain(config)}), **peers}


def own_cache(folder, name):
    """Environment of a process whose compiled programs stand in a folder of their own, empty at first."""
    return {"IRESNET_JAX_CACHE_DIR": str(folder / f"cache_{name}")}


def steps(arguments, start, folder):
    """Training steps: time by number of cores and largest memory, of every size."""
    sizes, effort = arguments.sizes, {"turns": 5, "seconds_a_turn": 2.0}
    if arguments.quick:
        sizes, effort = ("quick",), {"turns": 2, "seconds_a_turn": 0.2}
    results = {}
    for size in sizes:
        config = colour_config(8, num_blocks=1) if size == "quick" else step_config(size)
        cases, running = step_cases(config, folder), {}
        for peer, (module, case, given) in cases.items():
            for count, cores in core_counts().items():
                threads = {} if peer == OURS else {"threads": count}
                running[peer, count] = start(cores, module, case, given | threads, own_cache(folder, f"{size}_{count}"))
        asked = {name: lambda num, worker=worker: worker.ask("steps", num=num) for name, worker in running.items()}
        timings = take_turns(asked, **effort)
        memory = {name: worker.ask("memory") for name, worker in running.items()}
        for worker in running.values():
            worker.stop()
        module, case, given = cases[OURS]
        for count, cores in core_counts().items():  # a second run finds the programs of the first
            again = start(cores, module, case, given, own_cache(folder, f"{size}_{count}"))
            again.ask("steps", num=WARMUP)
            memory[OURS, count]["peak_bytes_of_a_second_run"] = again.ask("memory")["peak_bytes"]
            arithmetic = again.ask("arithmetic")
            memory[OURS, count] |= {**arithmetic, "floor_s": arithmetic["flops"] / arithmetic["matmul_peak_flops"]}
            again.stop()
        results[size] = {"batch_size": config.training.batch_size, "num_terms": config.logdet.num_terms, "cores": {}}
        for (peer, count), timing in timings.items():
            found = {**timing.summary(), **memory[peer, count]}
            found["times_ours"] = timings[OURS, count].speedup_over(timing)
            found["times_as_fast_as_on_one_core"] = timing.speedup_over(timings[peer, 1])
            results[size]["cores"].setdefault(str(count), {})[peer] = found
    return results


def step_rows(results):
    """The table of `steps`."""
    rows = []
    for size, found in results.items():
        for count, peers in found["cores"].items():
            rows += [_step_row(size, count, peer, own, peers[OURS]) for peer, own in peers.items()]
    return rows


def _step_row(size, count, peer, found, ours):
    low, high = (1e3 * quartile for quartile in found["quartiles_s"])

    def gigabytes(name):
        return "" if found.get(name) is None else f"{found[name] / 1e9:.2f}"

    return (
        size,
        count,
        peer,
        f"{1e3 * found['median_s']:.1f}",
        f"{low:.1f}-{high:.1f}",
        f"{found['times_ours']:.2f}",
        TARGETS.get(peer, ""),
        f"{found['times_as_fast_as_on_one_core']:.2f}",
        gigabytes("peak_bytes"),
        "" if found["peak_bytes"] is None else f"{found['peak_bytes'] / ours['peak_bytes']:.2f}",
        gigabytes("peak_bytes_of_a_second_run"),
        "" if found.get("floor_s") is None else f"{1e3 * found['floor_s']:.1f}",
    )


STEP_HEADER = ("size", "cores", "peer", "ms a step", "quartiles", "times ours", "target", "times one core")
STEP_HEADER += ("peak GB", "times ours", "2nd run GB", "floor ms")


def startups(arguments, start, folder):
    """Seconds from the start of a process until the first training step of the digits density is done."""
    config, cores = step_config("digits"), max(core_counts().values(), key=len)
    module, case, given = step_cases(config, folder)[NORMFLOWS]
    measured = {"ours, cold": [], "ours, warm": [], NORMFLOWS: []}
    for number in range(2 if arguments.quick else 3):
        for name in ("cold", "warm"):
            workdir = folder / f"{name}_{number}"
            measured[f"ours, {name}"].append(_first_step(workdir, cores, own_cache(folder, f"startup_{number}")))
        worker = start(cores, module, case, given | {"threads": len(cores), "warmup": 1})
        measured[NORMFLOWS].append(worker.ready_s)
        worker.stop()
    return {name: Timing(tuple(seconds)).summary() for name, seconds in measured.items()}


def startup_rows(results):
    """The table of `startups`."""
    return [(name, f"{own['median_s']:.1f}", "-".join(f"{s:.1f}" for s in own["quartiles_s"])) for name, own in results.items()]


STARTUP_HEADER = ("peer", "s to the first step", "quartiles")


def _first_step(workdir, cores, environment):
    """Seconds until train.py says in its log that a step is done; the run is then killed."""
    flags = [f"--config={FASHION.with_name('digits_density.py')}", f"--workdir={workdir}"]
    with _training(flags, cores, environment) as (process, began):
        for _ in _lines(workdir, process, lambda line: line["split"] == "timing"):
            return time.perf_counter() - began
    raise RuntimeError("train.py ended before its first step was done")


def time_to(arguments, folder):
    """Seconds of train.py until validation of Fashion-MNIST is at ``arguments.time_to`` bits/dim, beside normflows' record."""
    cores, workdir, reached = max(core_counts().values(), key=len), folder / "fashion_mnist", None
    flags = [f"--config={FASHION}", f"--workdir={workdir}", *arguments.train_flag]
    validations = []
    with _training(flags, cores, {}) as (process, began):
        for line in _lines(workdir, process, lambda line: line["split"] == "validation"):
            seconds, value = time.perf_counter() - began, line["bits_per_dim"]
            print(f"ours: {seconds / 60:.1f} min, step {line['step']}, validation {value:.4f} bits/dim", flush=True)
            validations.append({"seconds": seconds, "step": line["step"], "bits_per_dim": value})
            if value <= arguments.time_to:
                reached = seconds
                break
    kept = json.loads(KEPT.read_text())
    log = kept["results"][NORMFLOWS]["validation"]
    theirs = next((60 * entry["minutes"] for entry in log if entry["validation"] <= arguments.time_to), None)
    return {
        "target": arguments.time_to,
        "seconds": reached,
        "validations": validations,
        "flags": arguments.train_flag,
        "normflows_kept": {"seconds": theirs, "last": log[-1], "environment": kept["environment"]},
        "times_as_fast": theirs / reached if theirs and reached else None,
    }


def time_rows(results):
    """The table of `time_to`."""
    theirs = results["normflows_kept"]

    def minutes(seconds):
        return "not reached" if seconds is None else f"{seconds / 60:.1f}"

    last = f"{theirs['last']['validation']:.3f} after {theirs['last']['minutes']:.0f} min"
    ours = f"{results['validations'][-1]['bits_per_dim']:.3f}" if results["validations"] else ""
    return [(OURS, minutes(results["seconds"]), ours), (f"{NORMFLOWS}, kept record", minutes(theirs["seconds"]), last)]


TIME_HEADER = ("peer", "minutes", "validation bits/dim")


@contextlib.contextmanager
def _training(flags, cores, environment):
    """A run of train.py and when it began; it is killed in the end."""
    began = time.perf_counter()
    with pinned(cores):
        process = subprocess.Popen(
            [sys.executable, str(TRAIN_PY), *flags],
            env={**os.environ, **environment},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
    try:
        yield process, began
    finally:
        process.kill()
        process.wait()


def _lines(workdir, process, wanted):
    """Lines of the metrics of a run, as they are written, until it ends."""
    path, read = workdir / "metrics.jsonl", 0
    while True:
        is_over = process.poll() is not None
        if path.exists():
            whole = path.read_text().rpartition("\n")[0].splitlines()
            for line in map(json.loads, whole[read:]):
                if wanted(line):
                    yield line
            read = len(whole)
        if is_over:
            if process.returncode:
                raise RuntimeError(f"train.py ended with status {process.returncode}")
            return
        time.sleep(POLL_S)
