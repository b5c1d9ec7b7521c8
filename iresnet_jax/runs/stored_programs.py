"""Compiled programs on disk that a later process finds without tracing what an earlier one has traced.

JAX's cache on disk spares a start the compiling alone: a process has to trace and lower a program to look for it. A file here
is found by the key of `program_keys`. It names another one by the text of the lowered program, which holds the executable as
JAX serialises it, and which changed sources find as well if they lower to the same. A program without a key, such as one with a
branch of one's own, is traced at every start.

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
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.monitoring
from jax.experimental import serialize_executable

from iresnet_jax.atomic_files import replacing
from iresnet_jax.maths import platforms
from iresnet_jax.runs import machine
from iresnet_jax.runs.program_keys import described, environment, key_of
from iresnet_jax.training import parallel

FOLDER = "traced"
MOST_BYTES = 2**27  # of all files, of which a step has 1 to 3 MB; those that were not used for longest are removed
RETRIEVAL = "/iresnet_jax/stored_programs/retrieval_time_sec"  # event of `jax.monitoring`
COMPILED = "/jax/compilation_cache/cache_misses"  # JAX's event of a program that was not in its cache

_settings: Any = jax.config  # whose fields type checkers cannot see


def parallelize(step_fn: Callable[[Any, Any], tuple[Any, Any]]) -> parallel.ParallelStep:
    """`parallel.parallelize` of a step whose ``compile`` looks for its program on disk, and else leaves it there."""
    return parallel.parallelize(step_fn, find_program=functools.partial(find, step_fn))


def find(function: Callable[..., Any], lower: Callable[[], Any], *arguments: Any) -> Any:
    """A compiled program from disk, or else one that is compiled by `platforms.compile_quickly` and left there.

    Args:
        function: What is compiled.
        lower: Traces and lowers it for the arguments, and returns a `jax.stages.Lowered`.
        arguments: Arrays, or their shapes and dtypes.
    """
    directory = _settings.jax_compilation_cache_dir
    # Several processes would have to find the same ones: JAX's cache, which they share, knows how to.
    if not directory or "://" in str(directory) or not _settings.jax_enable_compilation_cache or jax.process_count() > 1:
        return platforms.compile_quickly(lower())
    try:
        folder, key = Path(directory, FOLDER), key_of(function, arguments)
    except Exception:  # `program_keys.UnknownError`, and whatever an object that is none of ours raises when it is looked at
        return platforms.compile_quickly(lower())
    with contextlib.suppress(Exception):  # there is no list of what damaged files raise
        return _program(folder, _read(folder, key), arguments)
    lowered = lower()
    try:
        text = repr((lowered.as_text(), described(lowered.out_tree), environment(with_sources=False)))
    except Exception:
        return platforms.compile_quickly(lowered)
    own = hashlib.sha256(text.encode()).digest()
    with contextlib.suppress(Exception):
        program = _program(folder, own, arguments)
        _write(folder, key, own)
        return program
    with _events() as events:
        program = platforms.compile_quickly(lowered)
    if COMPILED in events:  # of a program from its cache, jaxlib 0.10 serialises but a part
        with contextlib.suppress(Exception):  # a full disk, or a program that JAX cannot serialise
            _write(folder, own, _serialized(program))
            _write(folder, key, own)
    return program


def _program(folder: Path, key: bytes, arguments: tuple[Any, ...]) -> Any:
    began = time.time()
    serialized, out_tree, num_devices = pickle.loads(_read(folder, key))
    program = serialize_executable.deserialize_and_load(
        serialized, jax.tree.structure((arguments, {})), out_tree, execution_devices=jax.local_devices()[:num_devices]
    )
    jax.monitoring.record_event_duration_secs(RETRIEVAL, time.time() - began, fun_name="stored program")
    return program


def _serialized(program: Any) -> bytes:
    serialized, _, out_tree = serialize_executable.serialize(program)
    placements = jax.tree.leaves((program.input_shardings, program.output_shardings))
    first = jax.local_devices()[: len(placements[0].device_set)]
    for placement in placements:
        mesh = getattr(placement, "mesh", None)
        if first != [*(placement.device_set if mesh is None else mesh.devices.flat)]:
            raise ValueError("the program is one of other devices than the first ones in their order")
    return pickle.dumps((serialized, out_tree, len(first)))


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
    machine.remove_oldest(folder.iterdir(), MOST_BYTES)


@contextlib.contextmanager
def _events() -> Iterator[set[str]]:
    """The events that JAX reports of this thread until ``with`` ends."""
    thread, events = threading.get_ident(), set[str]()

    def note(event: str, **_: Any) -> None:
        if threading.get_ident() == thread:
            events.add(event)

    jax.monitoring.register_event_listener(note)
    try:
        yield events
    finally:
        jax.monitoring.unregister_event_listener(note)
