"""The environment of a result: versions, devices, commit."""

import datetime
import importlib.metadata
import platform
import subprocess
from dataclasses import dataclass
from pathlib import Path

import jax

from iresnet_jax.runs.allocator import num_cores
from iresnet_jax.runs.machine import device_summary


@dataclass(frozen=True)
class Environment:
    """The environment of a result: devices, versions, date and, in a checkout, the commit; None where unknown."""

    devices: str
    backend: str
    matmul_precision: str
    cpu_count: int | None
    platform: str
    python: str
    iresnet_jax: str | None
    jax: str | None
    jaxlib: str | None
    flax: str | None
    optax: str | None
    numpy: str | None
    date: str
    commit: str | None


def describe() -> Environment:
    """The environment of this process."""
    return Environment(
        devices=device_summary(),
        backend=jax.default_backend(),
        matmul_precision=getattr(jax.config, "jax_default_matmul_precision", None) or "default",
        cpu_count=num_cores(),
        platform=platform.platform(),
        python=platform.python_version(),
        **{name: _version(name) for name in ("iresnet_jax", "jax", "jaxlib", "flax", "optax", "numpy")},
        date=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        commit=_commit(),
    )


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:  # run from a checkout that is not installed
        return None


def _commit() -> str | None:
    """Commit of the checkout that holds this package, marked if its files differ from it."""
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return None
    command = ["git", "-C", str(root), "describe", "--always", "--exclude=*", "--abbrev=12", "--dirty= with changes"]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):  # no git, or no commit yet
        return None
