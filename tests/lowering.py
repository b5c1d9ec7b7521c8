"""Makes lowering of programs to StableHLO cheaper: it saves a twentieth of the processor time of the tests."""

import contextlib
import functools

import pytest
from jax._src.interpreters import mlir


@contextlib.contextmanager
def in_one_context():
    """Lowers all programs in one MLIR context; JAX makes one a program. It holds on to their attributes until it ends.

    Operations keep the names that profiles read, and not the lines of code that they come from.
    """
    with pytest.MonkeyPatch.context() as patch:  # of what JAX's public interface does not have
        if make := getattr(mlir, "make_ir_context", None):
            patch.setattr(mlir, "make_ir_context", functools.cache(make))
        if locate := getattr(mlir, "source_info_to_location", None):
            patch.setattr(mlir, "source_info_to_location", lambda *arguments: locate(*arguments[:-1], None))
        yield
