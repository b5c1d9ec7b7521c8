"""Tests run on two simulated devices; shapes are checked, implicit broadcasting is an error."""

import gc
import os
import signal
from importlib.metadata import version
from pathlib import Path

import numpy as np  # noqa: F401 (loads its BLAS)
import pytest
import threadpoolctl

gc.set_threshold(50_000, 20, 100)

# Before jax starts. What tests compile runs for milliseconds: code is not optimised.
FLAGS = ["--xla_force_host_platform_device_count=2", "--xla_backend_optimization_level=0"]
FLAGS += ["--xla_llvm_disable_expensive_passes=true"]  # a twentieth less
FLAGS += ["--xla_cpu_parallel_codegen_split_count=1"]  # fewer memory maps, see `forget_programs`
# compiles in half the time; later versions do not know the flag
if version("jaxlib").startswith("0.10."):
    FLAGS += ["--xla_cpu_use_fusion_emitters=false"]
os.environ["XLA_FLAGS"] = " ".join([os.environ.get("XLA_FLAGS", ""), *FLAGS])
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("GLIBC_TUNABLES", "glibc.malloc.hugetlb=1")
# A second thread would take a core from the other test process.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
threadpoolctl.threadpool_limits(int(os.environ["OPENBLAS_NUM_THREADS"]), user_api="blas")

# A job in the background ignores Ctrl-C, and so would the processes that tests interrupt.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_configure(config):
    """Prepares a process that runs tests; one that only hands them out would be slow to."""
    if config.getoption("numprocesses", None) and not hasattr(config, "workerinput"):
        return
    from jaxtyping import install_import_hook

    # shape annotations are executed, not just read
    install_import_hook("iresnet_jax", "beartype.beartype")

    import hypothesis
    import jax

    jax.config.update("jax_numpy_rank_promotion", "raise")
    hypothesis.settings.register_profile(
        "default", deadline=None, derandomize=True, max_examples=25
    )
    hypothesis.settings.load_profile("default")


def pytest_collection_modifyitems(items):
    """Files whose few tests take long come first: at the end, one process would wait."""
    long = ("test_docs.py", "test_notebooks.py", "test_hosts.py", "test_fitting.py")
    items.sort(key=lambda item: item.path.name not in long)


@pytest.hookimpl(trylast=True)
def pytest_unconfigure(config):
    """Ends a process of xdist: to drop what it compiled would take five seconds."""
    if hasattr(config, "workerinput"):
        os._exit(0)


@pytest.fixture(scope="session", autouse=True)
def shared_compilations(tmp_path_factory):
    """Keeps programs that compile for long on disk, for all processes of one pytest."""
    import jax  # late, or the process that hands out the tests would import it too
    import tiny_runs as runs
    from jax.experimental.compilation_cache import compilation_cache

    settings = {
        "jax_compilation_cache_dir": os.environ.get("JAX_COMPILATION_CACHE_DIR")
        or str(runs.shared(tmp_path_factory) / "compiled"),
        "jax_persistent_cache_min_compile_time_secs": 0.1,
        # of every operation, in programs that nobody reads
        "jax_include_full_tracebacks_in_locations": False,
    }
    with pytest.MonkeyPatch.context() as patch:
        for name, value in settings.items():
            jax.config.update(name, value)
            patch.setenv(name.upper(), str(value))
        # programs compiled while tests were collected have fixed the settings
        compilation_cache.reset_cache()
        yield


@pytest.fixture(scope="module", autouse=True)
def forget_programs():
    """Drops compiled programs before memory maps run out, of which Linux allows 65,530."""
    yield
    import jax

    maps = Path("/proc/self/maps")
    if not maps.exists() or maps.read_bytes().count(b"\n") > 44_000:
        jax.clear_caches()


@pytest.fixture
def undrawn(monkeypatch):
    """Short reports, whose figures are made and not drawn; evaluation/test_report.py draws them."""
    import tiny_runs as runs

    runs.shorten_reports(monkeypatch)


@pytest.fixture
def unchecked_annotations():
    """Annotations are read and not executed, as for users."""
    import jaxtyping

    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.fixture
def x64():
    """Runs one test in float64."""
    import jax

    with jax.enable_x64(True):
        yield
