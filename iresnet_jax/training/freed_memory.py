"""Memory that a training step frees is kept for the next one, instead of going back to the system page by page."""

import ctypes
import sys

_LARGEST = 2**31 - 1  # that a C int holds
# Parameters of glibc's mallopt and their values.
_SETTINGS = {
    -8: 1,  # M_ARENA_MAX: the arenas of other threads than the first cannot grow beyond 64 MiB
    -1: _LARGEST,  # M_TRIM_THRESHOLD: never return the end of the heap
    -2: 2**28,  # M_TOP_PAD: ask for that much more at a time
    -3: _LARGEST,  # M_MMAP_THRESHOLD: no mapping of their own for large arrays
}


def keep_freed_memory() -> bool:
    """Makes glibc's allocator hold on to memory; call it before JAX starts its threads.

    XLA allocates the temporary arrays of every step anew on a CPU. By default each is a mapping of its own, whose pages the
    system finds and clears at every step.

    Returns:
        Whether the C library could be told so: True on Linux with glibc.
    """
    if not sys.platform.startswith("linux"):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError):  # another C library
        return False
    return all([mallopt(parameter, value) == 1 for parameter, value in _SETTINGS.items()])
