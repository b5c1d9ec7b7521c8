"""Compiled programs that outlive the process: JAX's persistent compilation cache, switched on.

The first step of a run waits for its program to be compiled. The next run of the same architecture finds the program on disk.
Settings of JAX take precedence: ``JAX_COMPILATION_CACHE_DIR`` names another folder, ``JAX_ENABLE_COMPILATION_CACHE=false``
switches the cache off.
"""

import contextlib
import hashlib
import os
import platform
import re
from pathlib import Path
from typing import Any

import jax
from jax.experimental.compilation_cache import compilation_cache

from iresnet_jax.data.cache import user_folder

MOST_BYTES = 2**30  # of all programs when a process starts; those that were not used for longest are removed
LEAST_S = 0.03  # time of compilation below which a program is not kept, as looking for one takes time, too


def keep_compiled_programs() -> Path | None:
    """Keeps what this process compiles from now on, and looks there first.

    Returns:
        The folder, under the user's cache folder; None if JAX's own settings hold, or the folder cannot be written.
    """
    settings: Any = jax.config  # whose fields type checkers cannot see
    if settings.jax_compilation_cache_dir is not None or not settings.jax_enable_compilation_cache:
        return None
    folder = user_folder() / "programs" / _processor()
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)  # who can write there can have code run here
    except OSError:
        return None
    if not os.access(folder, os.W_OK):
        return None
    _remove_oldest(folder)
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", LEAST_S)
    compilation_cache.reset_cache()  # which programs that were compiled before have fixed
    return folder


def _remove_oldest(folder: Path) -> None:
    """Removes programs until the others take at most `MOST_BYTES`. JAX would look at every file before it writes one."""
    programs = []
    for path in folder.glob("*-cache"):
        with contextlib.suppress(OSError):  # another process has removed it
            found = path.stat()
            programs.append((max(found.st_atime, found.st_mtime), found.st_size, path))
    total = sum(size for _, size, _ in programs)
    for _, size, path in sorted(programs):
        if total <= MOST_BYTES:
            return
        with contextlib.suppress(OSError):
            path.unlink()
        total -= size


def _processor() -> str:
    """A name for processors that can run each other's programs: homes are shared by unlike machines."""
    try:
        flags = re.search(r"^(?:flags|Features)\s*:(.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:  # not Linux
        flags = None
    known = flags[1] if flags else platform.processor()
    return f"{platform.machine()}-{hashlib.sha256(known.encode()).hexdigest()[:8]}"
