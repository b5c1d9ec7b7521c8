"""Makes lowering of programs to StableHLO cheaper, and arrays without programs: both save processor time of the tests."""

import contextlib
import functools

import jax
import numpy as np
import pytest
from jax._src import source_info_util
from jax._src.interpreters import mlir
from jax._src.lax import lax

EXACT = {(np.dtype(a), np.dtype(b)) for a, b in (("float32", "float32"), ("float32", "float64"), ("float64", "float64"))}


@contextlib.contextmanager
def in_one_context():
    """Lowers all programs in one MLIR context; JAX makes one a program. It holds on to their attributes until it ends.

    Operations keep the names that profiles read, and not the lines of code that they come from: JAX would look at the stack for
    each. Outside of programs, arrays from NumPy, more precise copies and arrays of one number are made without one, which JAX
    0.10 compiles for each shape.
    """
    with pytest.MonkeyPatch.context() as patch:  # of what JAX's public interface does not have
        if make := getattr(mlir, "make_ir_context", None):
            patch.setattr(mlir, "make_ir_context", functools.cache(make))
        if locate := getattr(mlir, "source_info_to_location", None):
            patch.setattr(mlir, "source_info_to_location", lambda *arguments: locate(*arguments[:-1], None))
        if context := getattr(source_info_util, "_source_info_context", None):
            patch.setattr(source_info_util, "current", lambda: context.context)
        for name, made in (("stage_p", _staged), ("convert_element_type_p", _converted), ("broadcast_in_dim_p", _filled)):
            if primitive := getattr(lax, name, None):
                patch.setattr(primitive, "impl", functools.partial(made, primitive.impl))
        yield


_put = functools.partial(jax.device_put, may_alias=False)


def _staged(compiled, x):
    return _put(x) if isinstance(x, np.ndarray) else compiled(x)


def _converted(compiled, x, **to):
    is_exact = _is_plain(x) and (x.dtype, to["new_dtype"]) in EXACT and not to["weak_type"] and to["sharding"] is None
    return _put(np.array(x, to["new_dtype"])) if is_exact else compiled(x, **to)


def _filled(compiled, x, **to):
    is_one = _is_plain(x) and np.ndim(x) == 0 and to["sharding"] is None
    return _put(np.full(to["shape"], x)) if is_one else compiled(x, **to)


def _is_plain(x):
    """Whether an array is one of NumPy, or on the first device without having been put there, and its dtype is one of NumPy."""
    is_here = isinstance(x, np.ndarray) or (isinstance(x, jax.Array) and not x.committed and not getattr(x, "weak_type", True))
    return is_here and x.dtype in (np.float32, np.float64, np.int32, np.uint32, np.bool_)
