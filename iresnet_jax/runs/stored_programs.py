"""Compiled programs on disk that a later process finds without tracing what an earlier one has traced.

JAX's cache on disk spares a start the compiling alone: a process has to trace and lower a program to look for it. A file here
is found by the key of `program_keys`. It names another one by the text of the lowered program, which holds the executable as
JAX serialises it, and which changed sources find as well if they lower to the same. A program without a key, such as one with a
branch of one's own, and one that returns random keys are traced at every start.

The files lie in the subfolder `FOLDER` of JAX's cache, if that is switched on, local, and used by one process. They hold
pickles and machine code: trust them as far as those of JAX's cache. A damaged or foreign file counts as none.
"""

import contextlib
import functools
import hashlib
import os
import pickle
import threading
import time
import zlib
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import jax
import jax.monitoring
import numpy as np
from jax.experimental import serialize_executable
from jax.experimental.compilation_cache import compilation_cache

from iresnet_jax.atomic_files import replacing
from iresnet_jax.data.cache import user_folder
from iresnet_jax.maths import platforms
from iresnet_jax.runs import machine
from iresnet_jax.runs.program_keys import described, described_arguments, environment, key_of

FOLDER = "traced"
# Of all programs of either kind when a process starts or first writes one; those that were not used for longest are removed.
MOST_BYTES, MOST_BYTES_TRACED = 2**30, 2**28
LEAST_S = 0.03  # time of compilation below which JAX's cache does not keep a program, as looking for one takes time, too
RETRIEVAL = "/iresnet_jax/stored_programs/retrieval_time_sec"  # event of `jax.monitoring`
LAPACK = "@lapack_"  # what a lowered program names its functions by
# JAX's events when it looks for a program in its cache and when it finds it there.
ASKED, HIT = "/jax/compilation_cache/compile_requests_use_cache", "/jax/compilation_cache/cache_hits"
# What an executable holds that the text of its program leaves out. It holds all arguments, and the text those that are used.
NOT_IN_TEXT = ("kept_var_idx", "committed", "global_out_avals")

_settings: Any = jax.config  # whose fields type checkers cannot see
_own_folder: str | None = None  # once `keep_compiled_programs` has set it


def keep_compiled_programs() -> Path | None:
    """Keeps compiled programs on disk from now on: the next process finds what this one traces and compiles.

    `ir.fit`, `ir.train`, `train.py` and the commands call it. A process that only loads a model leaves JAX's settings alone:
    call it there before the model computes, and the next process traces and compiles next to nothing for its first ``log_prob``
    or ``sample``. Settings of JAX take precedence: ``JAX_COMPILATION_CACHE_DIR`` names another folder,
    ``JAX_ENABLE_COMPILATION_CACHE=false`` keeps nothing.

    Returns:
        The folder, under the user's cache folder; None if JAX's own settings hold, or it cannot be written.
    """
    global _own_folder
    platforms.find_programs_by(find)
    if not _settings.jax_enable_compilation_cache:
        return None
    if (known := _settings.jax_compilation_cache_dir) is not None:
        return Path(known) if known == _own_folder else None
    folder = user_folder() / "programs" / machine.processor()
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)  # who can write there can have code run here
    except OSError:
        return None
    if not os.access(folder, os.W_OK):
        return None
    remove_oldest(folder.glob("*-cache"), MOST_BYTES)
    _own_folder = str(folder)
    jax.config.update("jax_compilation_cache_dir", _own_folder)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", LEAST_S)
    compilation_cache.reset_cache()  # which programs that were compiled before have fixed
    return folder


def remove_oldest(paths: Iterable[Path], most_bytes: int) -> None:
    """Removes files that were not used for longest until the others take at most ``most_bytes``.

    JAX, which can do so for its cache, would look at every file before it writes one.
    """
    programs = []
    for path in paths:
        with contextlib.suppress(OSError):  # another process has removed it
            found = path.stat()
            programs.append((max(found.st_atime, found.st_mtime), found.st_size, path))
    total = sum(size for _, size, _ in programs)
    for _, size, path in sorted(programs):
        if total <= most_bytes:
            return
        with contextlib.suppress(OSError):
            path.unlink()
        total -= size


def find(name: str, function: Any, lower: Callable[[], Any], arguments: tuple[Any, ...], options: dict[str, Any]) -> Any:
    """A compiled program from disk, or else one that is compiled and left there; None where programs are not kept.

    Args:
        name: Name of what is compiled, for `jax.monitoring`.
        function: What is compiled, with all that it is bound to.
        lower: Traces and lowers it for the arguments, and returns a `jax.stages.Lowered`.
        arguments: Arrays, or their shapes and dtypes.
        options: Options of XLA.
    """
    directory = _settings.jax_compilation_cache_dir
    # Several processes would have to find the same ones: JAX's cache, which they share, knows how to.
    if not directory or "://" in str(directory) or not _settings.jax_enable_compilation_cache or jax.process_count() > 1:
        return None
    try:
        folder, key = Path(directory, FOLDER), key_of((function, options), arguments)
    except Exception:  # `program_keys.UnknownError`, and whatever an object that is none of ours raises when it is looked at
        return None
    with contextlib.suppress(Exception):  # there is no list of what damaged files raise
        return _program(folder, _read(folder, key), arguments, name)
    lowered = lower()
    try:
        if any(jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.extended) for leaf in jax.tree.leaves(lowered.out_info)):
            raise ValueError("random keys from a file are not of the kinds of generators that JAX knows by identity")
        more = {name: str(lowered._lowering.compile_args[name]) for name in NOT_IN_TEXT}
        about = described((options, more)), described_arguments(arguments), described(lowered.out_tree)
        text = repr((lowered.as_text(), about, environment(with_sources=False)))
    except Exception:
        return lowered.compile(compiler_options=options or None)
    own = hashlib.sha256(text.encode()).digest()
    with contextlib.suppress(Exception):
        program = _program(folder, own, arguments, name)
        _write(folder, key, own)
        return program
    events = _events()
    events.clear()
    program = lowered.compile(compiler_options=options or None)
    if ASKED in events and HIT not in events:  # of a program from its cache, jaxlib 0.10 serialises but a part
        with contextlib.suppress(Exception):  # a full disk, or a program that JAX cannot serialise
            _write(folder, own, _serialized(program, calls_lapack=LAPACK in text))
            _write(folder, key, own)
    return program


def _program(folder: Path, key: bytes, arguments: tuple[Any, ...], name: str) -> Any:
    began = time.time()
    serialized, out_tree, num_devices, calls_lapack = pickle.loads(_read(folder, key))
    if calls_lapack:
        _load_lapack()
    program = serialize_executable.deserialize_and_load(
        serialized, jax.tree.structure((arguments, {})), out_tree, execution_devices=jax.local_devices()[:num_devices]
    )
    jax.monitoring.record_event_duration_secs(RETRIEVAL, time.time() - began, fun_name=name)
    return program


@functools.cache
def _load_lapack() -> None:
    """Makes JAX load LAPACK's functions, which it does when it lowers a call of one: without them, a program would crash."""
    jax.jit(jax.lax.linalg.cholesky).lower(jax.ShapeDtypeStruct((1, 1), np.float32))


def _serialized(program: Any, *, calls_lapack: bool) -> bytes:
    serialized, _, out_tree = serialize_executable.serialize(program)
    placements = jax.tree.leaves((program.input_shardings, program.output_shardings))
    first = jax.local_devices()[: len(placements[0].device_set)]
    for placement in placements:
        mesh = getattr(placement, "mesh", None)
        if first != [*(placement.device_set if mesh is None else mesh.devices.flat)]:
            raise ValueError("the program is one of other devices than the first ones in their order")
    return pickle.dumps((serialized, out_tree, len(first), calls_lapack))


def _read(folder: Path, key: bytes) -> bytes:
    """What was written by this key."""
    path = folder / hashlib.sha256(key).hexdigest()
    digest, packed = (content := path.read_bytes())[:32], content[32:]
    if digest != hashlib.sha256(key + packed).digest():
        raise ValueError(f"{path} is damaged")
    with contextlib.suppress(OSError):
        os.utime(path)
    return zlib.decompress(packed)


def _write(folder: Path, key: bytes, content: bytes) -> None:
    packed = zlib.compress(content, 1)
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    with replacing(folder / hashlib.sha256(key).hexdigest()) as incoming:
        incoming.write_bytes(hashlib.sha256(key + packed).digest() + packed)
    _make_room(folder)


@functools.cache
def _make_room(folder: Path) -> None:
    remove_oldest(folder.iterdir(), MOST_BYTES_TRACED)


def _events() -> set[str]:
    """The events that JAX has reported of this thread."""
    _listen()
    if not hasattr(_of_thread, "events"):
        _of_thread.events = set()
    return _of_thread.events


_of_thread = threading.local()


@functools.cache
def _listen() -> None:
    jax.monitoring.register_event_listener(lambda event, **_: getattr(_of_thread, "events", set()).add(event))
