"""Does this tree compute what an older one does, as fast, and do stopped runs go on to the bit?

    python benchmarks/reference.py --against COMMIT_OR_FOLDER [--parts steps kept plan] [--tree DIR]

Parts:
    steps   from a run folder of the older tree at step 20, 20 more steps of six small configs give
            the same bits
    kept    kept models give the same log-likelihoods, logits, inverses and certificates
    plan    the plan of a step on four TPU v5e chips is the same; needs the extra 'tpu'
    kills   a run that is killed ten times ends with the bits of one that is not, in a folder and in
            a bucket; of this tree alone; a bucket needs the extra 'test'
    time    time and memory of a step of three configs and of `train` on vectors, in turns
    fit     log-likelihood of `fit` on eight data sets with three keys; takes an hour

The first four are made by default. Each process has the package of one tree. Trees need not have
anything in common but commands, files and what _reference.py calls. The record keeps other parts
that were held against the same commit. The exit status is 1 if a part does not hold.
"""

import contextlib
import importlib.util
import json
import os
import re
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from _processes import workers
from _record import RESULTS, ROOT, made_with, parser, show, write

STEPS, SAVED = 40, 20
# Large parts of the networks of configs/ are cut off: one or two narrow blocks a stage.
SMALL = ("training.batch_size=32", "training.actnorm_examples=64", "training.eval_examples=64")
DIGITS = (
    *SMALL,
    "model.stages[0].num_blocks=2",
    "model.stages[0].hidden=(8,)",
    "model.stages[1].num_blocks=1",
    "model.stages[1].hidden=(8,)",
)
TOY = (
    *SMALL,
    "training.minutes=0.0",
    "model.prior_components=8",
    "model.stages[0].num_blocks=2",
    "model.stages[0].hidden=(8,8)",
)
CONFIGS = {
    "exact": ("digits_density", *DIGITS, "logdet.kind=exact", "augmentation.transformations=()"),
    "roulette_transformations": (
        "digits_density",
        *DIGITS,
        "logdet.kind=roulette",
        "training.num_parts=2",
    ),
    "hybrid_variational": (
        "digits_hybrid",
        *DIGITS,
        "model.dequantization=variational",
        "model.noise.num_blocks=1",
        "model.noise.hidden=(4,)",
        "model.noise.network=(8,4)",
        "training.blocks=scan",
    ),
    "classification_batchnorm": (
        "digits_classification",
        *SMALL,
        "model.stages[0].num_blocks=1",
        "model.stages[0].hidden=(8,8)",
        "model.stages[1].num_blocks=2",
        "model.stages[1].hidden=(8,8)",
    ),
    "toy": ("toy_2d:moons", *TOY),
    "vectors_context": (
        "tabular",
        *SMALL,
        "logdet.kind=series",
        "model.stages[0].num_blocks=2",
        "model.stages[0].hidden=(16,)",
    ),
}
# Shape and levels of a model's data by the first word of its folder; vectors have a scale.
DATA = {
    "digits": ((8, 8, 1), 17),
    "mnist": ((28, 28, 1), 256),
    "fashion": ((28, 28, 1), 256),
    "cifar10": ((32, 32, 3), 256),
    "bsds300": ((63,), 0.1),
    "toy": ((2,), 1.0),
}
EXAMPLES = 8
NUM_KILLS, KILLED_STEPS, KILLED_EVERY = 10, 600, 10
KILLED = (
    "toy_2d:moons",
    *TOY,
    f"training.eval_every_steps={KILLED_EVERY}",
    f"training.total_steps={KILLED_STEPS}",
)
TIMED = {"digits_density": 400, "digits_hybrid": 400, "toy_2d:moons": 200}  # steps
TURNS, WINDOW = 5, 20
VECTORS = {"num": 5000, "dims": 16}
TIMED_STEPS = {"fewer": 200, "more": 1200}
FITTED = ("breast_cancer", "wine", "diabetes", "ridges")
FITTED += ("spiral_1500", "ring_1500", "checkerboard_1500", "overlapping_1500")
KEYS, MINUTES = 3, 0.4
MOST_SLOWER, MOST_WORSE = 0.03, 0.05  # ratio less one, nats
TIMES = re.compile("second|time")  # names of measurements that differ from run to run


class Tree:
    """A working tree: its commands, and processes that have its package."""

    def __init__(self, folder, cache):
        self.folder = folder.resolve()
        self.environment = {"PYTHONPATH": str(self.folder), "IRESNET_JAX_CACHE_DIR": str(cache)}

    @contextlib.contextmanager
    def worker(self):
        """A process of `_reference.Tree`."""
        with workers() as start:
            arguments = {"tree": str(self.folder)}
            yield start(None, "_reference", "Tree", arguments, self.environment)

    def output(self, *command):
        """What a command prints."""
        return subprocess.run(
            [sys.executable, *command],
            cwd=self.folder,
            env=os.environ | self.environment,
            stdout=subprocess.PIPE,
            text=True,
            check=True,
        ).stdout

    def train(self, config, workdir, *overrides, until, environment=None):
        """Runs ``train.py`` and kills it as soon as ``until()``, which would not have a report;
        the largest memory of the process.
        """
        flags = [f"--config=configs/{config.replace(':', '.py:', 1)}", f"--workdir={workdir}"]
        flags[0] += "" if ":" in config else ".py"
        with tempfile.TemporaryFile("w+") as said:
            process = subprocess.Popen(
                [sys.executable, "train.py", *flags, *(f"--config.{each}" for each in overrides)],
                cwd=self.folder,
                env=os.environ | self.environment | dict(environment or {}),
                stdout=said,
                stderr=said,
            )
            try:
                while not until():
                    if os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT):
                        said.seek(0)
                        raise RuntimeError(f"{flags} ended too soon:\n{said.read()[-3000:]}")
                    time.sleep(0.001)
            finally:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(process.pid, 9)
                _, status, used = os.wait4(process.pid, 0)
                process.returncode = os.waitstatus_to_exitcode(status)
        return 1024 * used.ru_maxrss


class Folder:
    """A run on disk: its address, and variables by which a process finds it."""

    environment: Mapping[str, str] = {}

    def __init__(self, path):
        self.workdir = self.path = path

    def reached(self, step):
        """A function that tells whether there is a checkpoint of this step or a later one."""
        return lambda: self.newest() >= step

    def newest(self):
        """Step of the newest checkpoint, 0 without."""
        names = (path.stem for path in self.path.glob("checkpoints/*.npz"))
        return max((int(name) for name in names if name.isdecimal()), default=0)

    def is_saving(self):
        """Whether a checkpoint is being written."""
        return any(
            not re.fullmatch(r"\d+\.npz", path.name) for path in self.path.glob("checkpoints/*")
        )

    def arrays(self, step):
        """The arrays of a checkpoint."""
        with np.load(self.path / "checkpoints" / f"{step}.npz") as archive:
            return _without_times(archive)

    def measurements(self):
        """Lines of the log by step and split, without times."""
        lines = map(json.loads, (self.path / "metrics.jsonl").read_text().splitlines())
        return {
            f"{line['step']} {line['split']} {name}": np.array(value)
            for line in lines
            for name, value in line.items()
            if not TIMES.search(name) and name not in ("step", "split")
        }


def _without_times(archive):
    """Arrays without what a checkpoint says of its training, in which there are times."""
    return {name: array for name, array in archive.items() if name != "(about)"}


class Bucket(Folder):
    """A run in a bucket of a server of moto's in this process."""

    def __init__(self):
        import threading

        from moto.server import DomainDispatcherApplication, create_backend_app
        from werkzeug.serving import WSGIRequestHandler, make_server

        class Quiet(WSGIRequestHandler):
            def log(self, *_):
                pass

        self.workdir = "s3://bucket/run"
        self._moto = DomainDispatcherApplication(create_backend_app)
        self._num_puts, self._newest = 0, 0
        handlers = {"threaded": True, "request_handler": Quiet}
        self._server = make_server("127.0.0.1", 0, self._answer, **handlers)
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        self.environment = {
            "AWS_ACCESS_KEY_ID": "somebody",
            "AWS_SECRET_ACCESS_KEY": "secret",
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_ENDPOINT_URL": f"http://127.0.0.1:{self._server.server_port}",
        }
        self._client().create_bucket(Bucket="bucket")

    def _client(self):
        import boto3

        keys = {name.lower(): value for name, value in self.environment.items()}
        return boto3.client(
            "s3",
            endpoint_url=keys["aws_endpoint_url"],
            region_name=keys["aws_default_region"],
            aws_access_key_id=keys["aws_access_key_id"],
            aws_secret_access_key=keys["aws_secret_access_key"],
        )

    def _answer(self, environ, start_response):
        saved = re.search(r"/checkpoints/(\d+)\.npz", environ["PATH_INFO"])
        if environ["REQUEST_METHOD"] != "PUT" or not saved:
            return self._moto(environ, start_response)
        self._num_puts += 1
        try:
            time.sleep(0.05)  # for a kill within a put, whose body has not been read yet
            answer = self._moto(environ, start_response)
        finally:
            self._num_puts -= 1
        self._newest = int(saved[1])
        return answer

    def newest(self):
        """Step of the last checkpoint that was put."""
        return self._newest

    def is_saving(self):
        """Whether a checkpoint is being put."""
        return self._num_puts > 0

    def arrays(self, step):
        """The arrays of a checkpoint."""
        key = f"run/checkpoints/{step}.npz"
        with tempfile.TemporaryFile() as file:
            self._client().download_fileobj("bucket", key, file)
            file.seek(0)
            with np.load(file) as archive:
                return _without_times(archive)

    def close(self):
        """Stops the server."""
        self._server.shutdown()
        self._server.server_close()


def compared(old, new):
    """How many arrays of two dictionaries have the same bytes, and how far the others are off."""
    common, different = [name for name in old if name in new], {}
    for name in common:
        a, b = old[name], new[name]
        if (a.shape, a.dtype, a.tobytes()) != (b.shape, b.dtype, b.tobytes()):
            different[name] = _distance(a, b)
    return {
        "equal": len(common) - len(different),
        "different": different,
        "only_old": sorted(old.keys() - new.keys()),
        "only_new": sorted(new.keys() - old.keys()),
    }


def _distance(a, b):
    """Largest difference over the largest number; infinite for what cannot be subtracted."""
    if a.shape != b.shape or a.dtype.kind in "US" or b.dtype.kind in "US":
        return float("inf")
    a, b = a.astype(float), b.astype(float)
    same = (a == b) | (np.isnan(a) & np.isnan(b))
    off = np.where(same, 0, np.abs(np.where(same, 0, a) - np.where(same, 0, b)))
    largest = float(off.max() / max(np.abs(np.where(np.isfinite(a), a, 0)).max(), 1e-30))
    return largest if np.isfinite(largest) else float("inf")


def is_equal(found):
    """Whether what two trees have in common is the same, and is not nothing."""
    return not found["different"] and found["equal"] > 0


def steps(old, new, temporary, quick):
    """Steps of the new tree from a checkpoint of the old one, beside the old one's own."""
    results, table = {}, temporary / "table.csv"
    rows = np.random.default_rng(0).normal(size=(300, 4)) @ np.triu(np.ones((4, 4)))
    np.savetxt(table, rows, delimiter=",", header="context,a,b,c", comments="")
    for name, (config, *overrides) in list(CONFIGS.items())[: 1 if quick else None]:
        overrides += [f"training.total_steps={STEPS}", f"training.eval_every_steps={SAVED}"]
        overrides += ["training.log_every_steps=5"]
        if config == "tabular":
            overrides.append(f"data.name=csv:{table}")
        runs = [Folder(temporary / f"{name}_{tree}") for tree in ("old", "new")]
        old.train(config, runs[0].path, *overrides, until=runs[0].reached(STEPS))
        shutil.copytree(runs[0].path, runs[1].path)
        (runs[1].path / "checkpoints" / f"{STEPS}.npz").unlink()
        log = runs[1].path / "metrics.jsonl"
        lines = log.read_text().splitlines(keepends=True)
        log.write_text("".join(line for line in lines if json.loads(line)["step"] <= SAVED))
        if runs[1].newest() != SAVED:
            raise RuntimeError(f"{runs[1].path} is not at step {SAVED}")
        new.train(config, runs[1].path, *overrides, until=runs[1].reached(STEPS))
        found = compared(*(run.arrays(STEPS) for run in runs))
        moved = compared(runs[0].arrays(SAVED), runs[0].arrays(STEPS))["different"]
        log = compared(*(run.measurements() for run in runs))
        results[name] = {**found, "moved_by_steps": len(moved), "log": log}
        show(results[name], f"steps {name}")
    return results, all(is_equal(found) and is_equal(found["log"]) for found in results.values())


def kept(old, new, temporary, quick):
    """What both trees say of the older one's kept models."""
    results, rng = {}, np.random.default_rng(0)
    kept_in = old.folder / "benchmarks" / "results"
    inputs, outputs = temporary / "inputs.npz", [temporary / f"{k}.npz" for k in range(2)]
    with old.worker() as one, new.worker() as other:
        for file in sorted(kept_in.rglob("digits*/model.npz" if quick else "model.npz")):
            name = str(file.parent.relative_to(kept_in))
            shape, levels = DATA[name.replace("/", "_").partition("_")[0]]
            x = (
                rng.integers(0, levels, (EXAMPLES, *shape)).astype(np.uint8)
                if len(shape) == 3
                else (levels * rng.normal(size=(EXAMPLES, *shape))).astype(np.float32)
            )
            z = rng.normal(size=(EXAMPLES, np.prod(shape))).astype(np.float32)
            np.savez(inputs, x=x, z=z)
            for worker, output in zip((one, other), outputs, strict=True):
                paths = {"inputs": str(inputs), "output": str(output)}
                worker.ask("kept", folder=str(file.parent), **paths)
            results[name] = compared(*(dict(np.load(output)) for output in outputs))
            show(results[name], f"kept {name}")
    return results, all(map(is_equal, results.values()))


def plan(old, new, temporary, quick):
    """What the plan of a step says, but for how long it took."""
    if importlib.util.find_spec("libtpu") is None:
        return {"skipped": "there is no package libtpu: pip install 'iresnet_jax[tpu]'"}, None
    command = ["plan", "--config", "configs/digits_hybrid.py", "--topology", "v5e:2x2"]
    said = [
        re.sub(r"planned in .*", "", tree.output("-m", "iresnet_jax", *command))
        for tree in (old, new)
    ]
    return {"equal": said[0] == said[1], "old": said[0], "new": said[1]}, said[0] == said[1]


def kills(old, new, temporary, quick):
    """Runs of the new tree that are killed again and again, beside one that is not."""
    config, *overrides = KILLED
    whole, results = Folder(temporary / "whole"), {}
    new.train(config, whole.workdir, *overrides, until=whole.reached(KILLED_STEPS))
    places: dict[str, Folder] = {"folder": Folder(temporary / "killed")}
    if all(importlib.util.find_spec(name) for name in ("moto", "s3fs", "boto3")):
        places["bucket"] = Bucket()
    else:
        results["bucket"] = {"skipped": "there are no moto and s3fs: pip install '.[test]'"}
    for name, place in places.items():
        reached = []
        for kill in range(2 if quick else NUM_KILLS):
            moment = _moment(place, kill)
            environment = place.environment
            new.train(config, place.workdir, *overrides, until=moment, environment=environment)
            reached.append(f"{'in the save after' if kill % 2 else 'after'} {place.newest()}")
            if place.newest() == KILLED_STEPS:
                raise RuntimeError(f"the run had ended before kill {kill + 1}")
        new.train(
            config,
            place.workdir,
            *overrides,
            until=place.reached(KILLED_STEPS),
            environment=place.environment,
        )
        found = compared(whole.arrays(KILLED_STEPS), place.arrays(KILLED_STEPS))
        results[name] = {**found, "kills": reached}
        show(results[name], f"kills {name}")
        if isinstance(place, Bucket):
            place.close()
    return results, all("skipped" in found or is_equal(found) for found in results.values())


def _moment(place, kill):
    """A function that is true at the moment of a kill: while a process starts, in a save, some
    milliseconds after one.
    """
    first, began = place.newest(), time.monotonic()
    if kill == 0:
        return lambda: time.monotonic() - began > 3
    if kill % 2:
        return lambda: place.newest() > first and place.is_saving()

    def is_over():
        if place.newest() > first:
            time.sleep(0.007 * kill)
            return True
        return False

    return is_over


def timed(old, new, temporary, quick):
    """Ratios of medians, new over old, of processes that take turns."""
    trees, results, turns = {"old": old, "new": new}, {}, 1 if quick else TURNS
    for config, total in list(TIMED.items())[: 1 if quick else None]:
        overrides = [f"training.total_steps={total}", f"training.eval_every_steps={total}"]
        overrides += [f"training.log_every_steps={WINDOW}", "training.minutes=0.0"]
        measured = {tree: {"step_seconds": [], "peak_bytes": []} for tree in trees}
        for turn in range(-1, turns):  # the first of all fills the cache of compiled programs
            for name, tree in trees.items():
                run = Folder(temporary / f"{config.replace(':', '_')}_{name}_{turn}")
                peak = tree.train(config, run.path, *overrides, until=run.reached(total))
                lines = map(json.loads, (run.path / "metrics.jsonl").read_text().splitlines())
                seconds = [line["seconds_per_step"] for line in lines if line["split"] == "train"]
                if turn >= 0:
                    measured[name]["step_seconds"].append(statistics.median(seconds))
                    measured[name]["peak_bytes"].append(peak)
        results[config] = _ratios(measured)
        show(results[config], f"time {config}")
    measured = {
        name: {"step_seconds": [], "peak_bytes": [], "programs": [], "first_seconds": []}
        for name in trees
    }
    for turn in range(-1, turns):
        for name, tree in trees.items():
            with tree.worker() as worker:
                said = worker.ask("start", **VECTORS)
                said["step_seconds"] = worker.ask("seconds_per_step", **TIMED_STEPS)
                said["peak_bytes"] = worker.ask("peak_bytes")
            for what, value in said.items() if turn >= 0 else ():
                measured[name][what].append(value)
    results["train"] = _ratios(measured)
    show(results["train"], "time train")
    limited = ("step_seconds", "peak_bytes")
    return results, all(
        found[what]["ratio"] <= 1 + MOST_SLOWER for found in results.values() for what in limited
    )


def _ratios(measured):
    return {
        what: {
            **{name: statistics.median(measured[name][what]) for name in measured},
            "ratio": statistics.median(measured["new"][what])
            / statistics.median(measured["old"][what]),
            "all": {name: measured[name][what] for name in measured},
        }
        for what in measured["old"]
    }


def fit(old, new, temporary, quick):
    """How many nats the old tree's `fit` is above the new one's on the same test examples."""
    import _tables

    results, file = {}, temporary / "data.npz"
    for name in FITTED[: 1 if quick else None]:
        by_key = {"old": [], "new": []}
        for seed in range(1 if quick else KEYS):
            table = _tables.load(name, seed, quick=True)
            np.savez(file, train=np.concatenate([table.train, table.validation]), test=table.test)
            for label, tree in {"old": old, "new": new}.items():
                with tree.worker() as worker:
                    asked = {"data": str(file), "seed": seed, "minutes": MINUTES}
                    by_key[label].append(worker.ask("fit", **asked))
        off = np.subtract(by_key["old"], by_key["new"])
        results[name] = {"old_minus_new": float(off.mean()), **by_key}
        show(results[name], f"fit {name}")
    mean = float(np.mean([found["old_minus_new"] for found in results.values()]))
    results["mean"] = {"old_minus_new": mean}
    show(results["mean"], "fit mean")
    return results, mean <= MOST_WORSE


PARTS = {"steps": steps, "kept": kept, "plan": plan, "kills": kills, "time": timed, "fit": fit}


@contextlib.contextmanager
def tree_of(against, temporary):
    """The folder of the older tree and its commit; that of a commit is made from this repository
    and lasts as long as the context.
    """

    def git(*command, at=ROOT):
        return subprocess.run(
            ["git", "-C", at, *command], stdout=subprocess.PIPE, text=True, check=True
        ).stdout.strip()

    if Path(against).is_dir():
        yield Path(against), git("rev-parse", "--short", "HEAD", at=against)
        return
    commit = git("rev-parse", "--short", f"{against}^{{commit}}")
    git("worktree", "add", "--quiet", "--detach", str(temporary / "older"), commit)
    try:
        yield temporary / "older", commit
    finally:
        git("worktree", "remove", "--force", str(temporary / "older"))


def main():
    options = parser(__doc__)
    options.add_argument(
        "--against", required=True, metavar="OLDER", help="commit or folder of the older tree"
    )
    options.add_argument(
        "--tree", type=Path, default=ROOT, metavar="DIR", help="folder to hold to it, not this one"
    )
    options.add_argument(
        "--parts", nargs="+", choices=PARTS, default=["steps", "kept", "plan", "kills"]
    )
    arguments = options.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # processes and folders end with it
    with contextlib.ExitStack() as stack:
        temporary = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        folder, commit = stack.enter_context(tree_of(arguments.against, temporary))
        trees = [Tree(folder, temporary / "cache_old"), Tree(arguments.tree, temporary / "cache")]
        settings, results, failed = {"against": commit}, {}, []
        path = arguments.output or RESULTS / "reference.json"
        if path.exists() and (record := json.loads(path.read_text()))["settings"] == {
            "quick": arguments.quick,
            **settings,
        }:
            results = record["results"]
        for part in arguments.parts:
            (place := temporary / part).mkdir()
            began = time.monotonic()
            found, holds = PARTS[part](*trees, place, arguments.quick)
            made = {"seconds": time.monotonic() - began, **made_with(["jax", "numpy"])}
            results[part] = {"holds": holds, **made, "found": found}
            verdict = {True: "holds", False: "DOES NOT HOLD", None: f"skipped, {found}"}[holds]
            print(f"{part}: {verdict}", flush=True)
            failed += [part] if holds is False else []
            write("reference", arguments, settings, results, is_shown=True)
    raise SystemExit(1 if failed else 0)


if __name__ == "__main__":
    main()
