"""Memory that stays with a process that trains: in large pages, held by the allocator, and collected less often.

On a CPU, XLA allocates the temporary arrays of every step again. By default the system finds and clears their memory at every
step, which costs much of its time, in small pages most. Accelerators see nothing of this.

Nothing but the standard library is imported here: `train.py` runs this file before it imports the package, as a command that
starts again would import JAX twice.
"""

import ctypes
import gc
import os
import sys
from pathlib import Path

_LARGE_PAGES = "glibc.malloc.hugetlb"
_RESTARTED = "IRESNET_JAX_RESTARTED"  # variable of a command that started itself again; secure binaries lose tunables
_PAGES_ARE_CHOSEN = Path("/sys/kernel/mm/transparent_hugepage/enabled")
_COLLECTIONS = 50_000, 20, 100  # thresholds of `gc`, for objects that imports and tracing make and that live on
_LARGEST = 2**31 - 1  # that a C int holds
# Parameters of glibc's mallopt and their values.
_SETTINGS = {
    -1: _LARGEST,  # M_TRIM_THRESHOLD: never return the end of the heap
    -2: 2**26,  # M_TOP_PAD: ask for that much more at a time
    -3: _LARGEST,  # M_MMAP_THRESHOLD: no mapping of their own for large arrays
}
_ONE_ARENA = {-8: 1}  # M_ARENA_MAX


def use_large_pages() -> None:
    """Starts this command again with large pages, where Linux gives them to programs that ask; returns where it does not.

    glibc's allocator asks for them if ``GLIBC_TUNABLES`` says so when a process starts. Call this first of all.
    """
    tunables = os.environ.get("GLIBC_TUNABLES", "")
    if _LARGE_PAGES in tunables or _RESTARTED in os.environ or not _can_ask_for_large_pages() or sys.gettrace() is not None:
        return
    asked = ":".join(filter(None, [tunables, f"{_LARGE_PAGES}=1"]))
    try:
        os.execve(sys.executable, sys.orig_argv, {**os.environ, "GLIBC_TUNABLES": asked, _RESTARTED: "1"})
    except OSError:  # slower, and no reason to fail
        return


def _can_ask_for_large_pages() -> bool:
    try:
        return os.confstr("CS_GNU_LIBC_VERSION") is not None and "[madvise]" in _PAGES_ARE_CHOSEN.read_text()
    except (AttributeError, ValueError, OSError):  # another system or C library
        return False


def collect_garbage_rarely() -> None:
    """Lets Python look for garbage after 50,000 new objects; by default it looks so often that tracing takes longer."""
    gc.set_threshold(*_COLLECTIONS)


def keep_freed_memory() -> bool:
    """Makes glibc's allocator hold on to memory that is freed; call it before JAX starts its threads.

    An arena of a thread holds arrays of less than 64 MiB, and larger ones are returned all the same; only the first thread's
    has no limit. Where there is one core, all threads share it. On several, compilation would take longer for it.

    Returns:
        Whether the C library could be told so: True on Linux with glibc.
    """
    settings = _SETTINGS | (_ONE_ARENA if num_cores() == 1 else {})
    return all([_glibc("mallopt", parameter, value) for parameter, value in settings.items()])


def return_freed_memory() -> bool:
    """Returns what is freed to the system once, such as a compiler's memory before the first step; see `keep_freed_memory`.

    Returns:
        Whether the C library could be told so.
    """
    return _glibc("malloc_trim", 0)


def _glibc(function: str, *arguments: int) -> bool:
    """Whether the C library has a function of glibc's allocator, which says that it did what it was called for."""
    try:
        return sys.platform.startswith("linux") and getattr(ctypes.CDLL(None), function)(*arguments) == 1
    except (AttributeError, OSError):  # another C library
        return False


def num_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
