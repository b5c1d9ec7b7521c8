"""Makes lowering of programs to StableHLO cheaper, which is a fifth of what a small program costs."""

import contextlib
import functools

import pytest
from jax._src.interpreters import mlir


@contextlib.contextmanager
def in_one_context():
    """Lowers all programs in one MLIR context; JAX makes one a program. It holds on to their attributes until it ends."""
    with pytest.MonkeyPatch.context() as patch:
        if make := getattr(mlir, "make_ir_context", None):  # not of JAX's public interface
            patch.setattr(mlir, "make_ir_context", functools.cache(make))
        yield
