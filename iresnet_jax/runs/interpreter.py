"""What the interpreter of a command needs before all else: memory in large pages, and garbage collected less often.

Nothing but the standard library is imported here: `train.py` runs this file before it imports the package, as a command that
starts again would import JAX twice.
"""

import gc
import os
import sys
from pathlib import Path

_LARGE_PAGES = "glibc.malloc.hugetlb"
_PAGES_ARE_CHOSEN = Path("/sys/kernel/mm/transparent_hugepage/enabled")
_COLLECTIONS = 50_000, 20, 100  # thresholds of `gc`, for objects that imports and tracing make and that live on


def prepare() -> None:
    """Asks for large pages, which may start the command again, and collects garbage rarely."""
    use_large_pages()
    collect_garbage_rarely()


def use_large_pages() -> None:
    """Starts this command again with large pages, where Linux gives them to programs that ask; returns where it does not.

    glibc's allocator asks for them if ``GLIBC_TUNABLES`` says so when a process starts. Call this first of all.
    """
    tunables = os.environ.get("GLIBC_TUNABLES", "")
    if _LARGE_PAGES in tunables or not _can_ask_for_large_pages() or sys.gettrace() is not None:
        return
    asked = ":".join(filter(None, [tunables, f"{_LARGE_PAGES}=1"]))
    try:
        os.execve(sys.executable, sys.orig_argv, {**os.environ, "GLIBC_TUNABLES": asked})
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
