"""Ours against normflows and a naive power series in PyTorch: same architectures, weights, cores and accuracy, in one run.

    python benchmarks/peers.py [--parts step,likelihood,...] [--quick]

Every peer, size and number of cores is a process of its own, pinned to its cores, and takes turns with the others. The naive
series is Algorithm 2 of Behrmann et al. 2019 as it stands: Hutchinson's probe, differentiated through all its terms.

Parts: `step`, time and memory of a training step.
"""

import contextlib
import importlib.metadata
import tempfile
from dataclasses import asdict
from pathlib import Path

from _peers_cases import colour_config, step_config, write_batches
from _peers_processes import core_counts, workers
from _peers_step import WARMUP
from _record import Timing, parser, table, write

from iresnet_jax.json_dataclasses import to_plain

OURS, NORMFLOWS, NAIVE = "ours", "normflows", "naive"
SIZES = ("digits", "64", "128")  # the config, and channels of `colour_config`
TARGETS = {NORMFLOWS: 2.0, NAIVE: 2.5}  # times as fast as a peer that a step should be


def take_turns(asked, *, turns, seconds_a_turn):
    """Seconds of one unit of work of every worker, in turns.

    Args:
        asked: ``num ->`` seconds of each of ``num`` units, by name.
        turns: Measurements of each.
        seconds_a_turn: About what a measurement takes.
    """
    once = {name: ask(1) for name, ask in asked.items()}
    nums = {name: max(round(seconds_a_turn / seconds), 1) for name, seconds in once.items()}
    measured = {name: [] for name in asked}
    for _ in range(turns):
        for name, ask in asked.items():
            measured[name].append(ask(nums[name]))
    return {name: Timing(tuple(seconds)) for name, seconds in measured.items()}


def step_cases(config, folder):
    """Module, case and arguments of the workers of a training step, by peer; arguments want their number of threads."""
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


def steps(arguments):
    """Training steps: time by number of cores and largest memory, of every size."""
    sizes, turns, seconds = (arguments.sizes, 10, 3.0) if not arguments.quick else (("quick",), 2, 0.2)
    rows, results = [], {}
    for size in sizes:
        config = colour_config(8, num_blocks=1) if size == "quick" else step_config(size)
        with contextlib.ExitStack() as stack:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            start = stack.enter_context(workers())
            running = {}
            for peer, (module, case, given) in step_cases(config, folder).items():
                for count, cores in core_counts().items():
                    threads = {} if peer == OURS else {"threads": count}
                    running[peer, count] = start(cores, module, case, given | threads, own_cache(folder, count))
            asked = {name: lambda num, worker=worker: worker.ask("steps", num=num) for name, worker in running.items()}
            timings = take_turns(asked, turns=turns, seconds_a_turn=seconds)
            memory = {name: worker.ask("memory") for name, worker in running.items()}
            module, case, given = step_cases(config, folder)[OURS]
            for count, cores in core_counts().items():  # and of a second run, which need not compile
                again = start(cores, module, case, given, own_cache(folder, count))
                again.ask("steps", num=WARMUP)
                memory[OURS, count]["peak_bytes_of_a_second_run"] = again.ask("memory")["peak_bytes"]
        results[size] = {"batch_size": config.training.batch_size, "num_terms": config.logdet.num_terms, "cores": {}}
        for (peer, count), timing in timings.items():
            own = timings[OURS, count]
            found = {**timing.summary(), **memory[peer, count], "times_ours": own.speedup_over(timing)}
            one = timings[peer, 1]
            found["times_as_fast_as_on_one_core"] = timing.speedup_over(one)
            results[size]["cores"].setdefault(count, {})[peer] = found
        for count, peers in results[size]["cores"].items():
            rows += [step_row(size, count, peer, peers) for peer in peers]
    header = ("size", "cores", "peer", "ms a step", "quartiles", "times ours", "target", "times one core")
    header += ("peak GB", "times ours", "after warm-up", "2nd run")
    print(table(rows, header))
    return results


def own_cache(folder, count):
    """Environment of a process on so many cores, whose compiled programs stand in a folder of their own, empty at first."""
    return {"IRESNET_JAX_CACHE_DIR": str(folder / f"cache{count}")}


def step_row(size, count, peer, peers):
    """A line of the table of `steps`."""
    found, ours = peers[peer], peers[OURS]
    low, high = (1e3 * quartile for quartile in found["quartiles_s"])

    def giga(name):
        return "" if found.get(name) is None else f"{found[name] / 1e9:.2f}"

    whole = found["peak_bytes"]
    return (
        size,
        count,
        peer,
        f"{1e3 * found['median_s']:.1f}",
        f"{low:.1f}-{high:.1f}",
        f"{found['times_ours']:.2f}",
        TARGETS.get(peer, ""),
        f"{found['times_as_fast_as_on_one_core']:.2f}",
        giga("peak_bytes"),
        "" if whole is None else f"{whole / ours['peak_bytes']:.2f}",
        giga("peak_bytes_after_warmup"),
        giga("peak_bytes_of_a_second_run"),
    )


PARTS = {"step": steps}


def main():
    options = parser(__doc__)
    options.add_argument("--parts", default=",".join(PARTS), metavar="A,B", help=f"of {', '.join(PARTS)}")
    options.add_argument("--sizes", nargs="+", default=SIZES, choices=SIZES, help="of the training step")
    arguments = options.parse_args()
    chosen = arguments.parts.split(",")
    if unknown := set(chosen) - set(PARTS):
        options.error(f"there are no parts {', '.join(sorted(unknown))}: choose of {', '.join(PARTS)}")
    try:
        versions = {name: importlib.metadata.version(name) for name in ("normflows", "torch")}
    except importlib.metadata.PackageNotFoundError as error:
        raise SystemExit(f"error: there is no package {error.name}: install the packages of the extra 'bench'") from None
    results = {part: PARTS[part](arguments) for part in chosen}
    settings = {"versions": versions, "parts": chosen, "colour": asdict(colour_config(64).model)}
    write("peers", arguments, settings, results)


if __name__ == "__main__":
    main()
