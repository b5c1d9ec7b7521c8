"""Files that are written whole: whatever happens to the writer, a reader finds the old file or the new one."""

import contextlib
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yields a path to write to, and puts what was written in the place of ``path`` at the end of ``with``.

    If the body raises, ``path`` is as it was and nothing is left beside it.
    """
    incoming = path.with_name(path.name + ".incoming")
    try:
        yield incoming
        incoming.replace(path)
    finally:
        incoming.unlink(missing_ok=True)
