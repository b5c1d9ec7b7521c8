"""Ours against normflows and a naive power series in PyTorch: same architectures, weights, cores
and accuracy, in one run.

    python benchmarks/peers.py [--parts step likelihood ...] [--quick]

    step        time and largest memory of a training step, on one core and on two
    likelihood  seconds an image until |bias| + standard error of the log-likelihood is at most .001
    bits/dim inverse     time of the inverse of a block to a true error of 1e-5, by its Lipschitz
    constant sampling    samples a second of trained flows to a true error of 1e-5

In training every peer, size and number of cores is a process of its own, pinned to its cores, and
takes turns with the others. The naive series is Algorithm 2 of Behrmann et al. 2019 as it stands.
Ours is the step of train.py with all that it sets up. How trained flows are measured is in
_peers_trained.py.
"""

import argparse
import importlib.metadata
import tempfile
from dataclasses import asdict
from pathlib import Path

import jax
import numpy as np
from _models import config_file, read_config
from _peers_flows import architecture
from _peers_trained import NORMFLOWS, OURS, TARGET, TOLERANCE, inverses, likelihoods, samples
from _processes import core_counts, most_cores, pin, workers
from _record import parser, show, take_turns, write
from _steps import WARMUP, prepare_jax

from iresnet_jax.runs import plan
from iresnet_jax.runs.config import default_config, parse, to_plain
from iresnet_jax.runs.job import model_spec

NAIVE = "naive"
SIZES = ("digits", "64", "128")  # the config, and channels of `colour_config`
NUM_BATCHES = 4
DIGITS = config_file("digits_density")


def colour_config(width, num_blocks=4):
    """Three scales of blocks 3x3-1x1-3x3 with ELU on 32 x 32 x 3: 5 terms of the series, 5 power
    iterations, 32 images.
    """
    config = default_config()
    config.data.name = "cifar10"  # random images stand in for it
    block = {
        "num_blocks": num_blocks,
        "hidden": (width, width),
        "kernel_sizes": (3, 1, 3),
        "activation": "elu",
        "squeeze": 2,
    }
    config.model.stages = (block, block, block)
    config.constraint.num_steps = 5
    config.logdet.update({"kind": "series", "num_terms": 5, "num_probes": 1})
    config.training.update({"batch_size": 32, "actnorm_examples": 256})
    return parse(config)


def step_cases(config, folder):
    """Case and arguments of the workers of a training step, by peer."""
    data, size = plan.data_for(config), config.training.batch_size
    spec = model_spec(config, data)
    examples = np.asarray(data.examples["train"][: NUM_BATCHES * size])
    x = np.moveaxis(np.asarray(jax.jit(spec.preprocess)(examples, jax.random.key(0))), -1, 1)
    np.save(folder / "batches.npy", x.reshape(NUM_BATCHES, size, *x.shape[1:]))
    of_peers = {
        "architecture": architecture(spec),
        "batches": str(folder / "batches.npy"),
        "num_terms": config.logdet.num_terms,
        "num_steps": config.constraint.num_steps,
        "learning_rate": config.optimizer.learning_rate,
        "clip_norm": config.optimizer.clip_norm,
    }
    peers = {kind: ("TorchSteps", {"kind": kind, **of_peers}) for kind in (NORMFLOWS, NAIVE)}
    return {OURS: ("OurSteps", {"config": to_plain(config)}), **peers}


def own_cache(folder, name):
    """Environment of a process whose compiled programs stand in a folder of their own, empty at
    first.
    """
    return {"IRESNET_JAX_CACHE_DIR": str(folder / f"cache_{name}")}


def steps(arguments, start, folder):
    """Training steps: time by number of cores and largest memory, of every size."""
    effort = (
        {"turns": 2, "seconds_a_turn": 0.2}
        if arguments.quick
        else {"turns": 5, "seconds_a_turn": 2.0}
    )
    results = {}
    for size in ("8",) if arguments.quick else SIZES:
        config = (
            read_config(DIGITS)
            if size == "digits"
            else colour_config(int(size), 1 if arguments.quick else 4)
        )
        cases, running = step_cases(config, folder), {}
        for peer, (case, given) in cases.items():
            for count, cores in core_counts().items():
                running[peer, count] = start(
                    cores, "_steps", case, given, own_cache(folder, f"{size}_{count}")
                )
        asked = {
            name: lambda num, worker=worker: worker.ask("steps", num=num)
            for name, worker in running.items()
        }
        timings = take_turns(asked, **effort)
        memory = {name: worker.ask("memory") for name, worker in running.items()}
        for worker in running.values():
            worker.stop()
        for count, cores in core_counts().items():  # a second run finds the programs of the first
            again = start(cores, "_steps", *cases[OURS], own_cache(folder, f"{size}_{count}"))
            again.ask("steps", num=WARMUP)
            memory[OURS, count]["peak_bytes_of_a_second_run"] = again.ask("memory")["peak_bytes"]
            again.stop()
        results[size] = {
            "batch_size": config.training.batch_size,
            "num_terms": config.logdet.num_terms,
            "cores": {},
        }
        for (peer, count), timing in timings.items():
            found = {**timing.summary(), **memory[peer, count]}
            found["times_ours"] = timings[OURS, count].speedup_over(timing)
            found["times_as_fast_as_on_one_core"] = timing.speedup_over(timings[peer, 1])
            results[size]["cores"].setdefault(str(count), {})[peer] = found
    return results


HERE = {"likelihood": likelihoods, "inverse": inverses, "sampling": samples}
PARTS = ("step", *HERE)


def main():
    options = parser(__doc__)
    options.add_argument(
        "--parts", nargs="+", choices=PARTS, default=PARTS, metavar="PART", help=", ".join(PARTS)
    )
    arguments = options.parse_args()
    try:
        versions = {name: importlib.metadata.version(name) for name in ("normflows", "torch")}
    except importlib.metadata.PackageNotFoundError as error:
        raise SystemExit(
            f"error: there is no package {error.name}: install the packages of the extra 'bench'"
        ) from None
    settings = {
        "versions": versions,
        "cores": core_counts(),
        "colour": asdict(colour_config(64).model),
        "likelihood_bits_per_dim": TARGET,
        "inverse_error_of_an_entry": TOLERANCE,
    }

    def record(part, results):
        show(results, part)
        output = arguments.output and arguments.output.with_stem(f"{arguments.output.stem}_{part}")
        write(
            f"peers_{part}",
            argparse.Namespace(**{**vars(arguments), "output": output}),
            settings,
            results,
            is_shown=True,
        )

    pin(most_cores())  # PyTorch has as many threads, ours a device for every core
    prepare_jax()
    for part in arguments.parts:
        with workers() as start, tempfile.TemporaryDirectory() as folder:
            record(
                part,
                HERE[part](arguments) if part in HERE else steps(arguments, start, Path(folder)),
            )


if __name__ == "__main__":
    main()
