"""Trains the model of a config, then reports on it.

    python train.py --config=configs/digits_density.py --config.training.batch_size=128

Flags:
    --config          file with the settings; configs/digits_density.py by default
    --config.FIELD    overrides one of them; --config.model.stages[0].num_blocks=8 reaches into
                      a stage
    --workdir         folder of the run: config, metrics, checkpoints, model, report;
                      runs/<config file>_<variant> by default; gs://bucket/run and
                      s3://bucket/run, too
    --debug           show the traceback of a failure

Ctrl-C and SIGTERM save the step that was reached, from the second step on, and end with status 130
and 143. The same command goes on from there, a run of so many steps to the same result.

A run on many hosts is the same command on each of them, see docs/clusters.md. TPU pods, SLURM, Open
MPI and Kubernetes are detected; otherwise every process needs

    --coordinator_address   HOST:PORT of process 0
    --num_processes         number of processes
    --process_id            number of this process, from 0
"""

import gc
import logging
import os
import signal
import sys

BLOWN_UP = 2  # exit status of a run that blew up, whose report is of the best model before
HINT = "the same command goes on from the last checkpoint, or starts again if there is none yet"


def _stop_at_once(number, _):
    os.write(2, f"stopped by {signal.Signals(number).name}: {HINT}\n".encode())
    os._exit(128 + number)


def _use_large_pages():
    """Starts this command again with glibc's memory in large pages, in which a CPU's steps take
    up to a third less time.
    """
    tunables = os.environ.get("GLIBC_TUNABLES", "")
    is_new = "glibc.malloc.hugetlb" not in tunables and "IRESNET_JAX_RESTARTED" not in os.environ
    if is_new and sys.platform == "linux" and sys.gettrace() is None:
        asked = f"{tunables}:glibc.malloc.hugetlb=1".lstrip(":")
        os.execve(
            sys.executable,
            sys.orig_argv,
            {**os.environ, "GLIBC_TUNABLES": asked, "IRESNET_JAX_RESTARTED": "1"},
        )


if __name__ == "__main__":  # before the imports, which take seconds
    _use_large_pages()
    for number in (signal.SIGINT, signal.SIGTERM):
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, _stop_at_once)
from iresnet_jax.evaluation.report import write
from iresnet_jax.maths import platforms
from iresnet_jax.runs import hosts, job, trained_run
from iresnet_jax.runs.config import parse_train_flags
from iresnet_jax.training import parallel


def run(argv: list[str]) -> int:
    """Trains and reports, as the command line says."""
    given = parse_train_flags(argv)
    hosts.initialize(given.coordinator_address, given.num_processes, given.process_id)
    if not hosts.is_shared():
        platforms.use_all_cores(given.config)
    platforms.start_backend()
    platforms.cache_programs()
    with hosts.ending_together():
        if not parallel.is_first():
            logging.getLogger("iresnet_jax").setLevel(logging.WARNING)
        model = job.train(given.config, given.workdir)
    if parallel.is_first():
        trained = trained_run.load(given.workdir)
        path = trained_run.save(trained)
        print(
            write(trained), f"model: {path}", f"report: {given.workdir / 'report.html'}", sep="\n"
        )
    return BLOWN_UP if model.history.ended.startswith("blow-up") else 0


def main(argv: list[str]) -> int:
    """The exit status of `run`."""
    if {"-h", "--help"} & {*argv}:
        print(__doc__)
        return 0
    logging.getLogger("iresnet_jax").setLevel(logging.INFO)
    return hosts.explain_failures(lambda: run(argv), debug="--debug" in argv)


if __name__ == "__main__":
    platforms.keep_freed_memory()
    gc.set_threshold(50_000, 20, 100)  # imports and tracing make many objects that live on
    logging.basicConfig(format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    status = main(sys.argv)
    sys.stdout.flush()
    # an orderly end takes XLA's clients apart beside their threads, and has waited for ever
    os._exit(status)
