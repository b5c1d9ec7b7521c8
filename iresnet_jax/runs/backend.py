"""What a run demands of JAX in this process."""

import jax
import jax.numpy as jnp


def prepare_backend(matmul_precision: str) -> None:
    """Sets the precision of matrix products and convolutions in this process, on accelerators.

    Their default there has 11 bits or fewer: an inverse could not be better than 1e-3, nor norms be trusted.

    Raises:
        ValueError: If JAX makes float64 of everything, in which runs are neither trained nor read.
    """
    if jnp.result_type(float) == jnp.float64:
        raise ValueError("runs are trained and read in float32: unset JAX_ENABLE_X64, or call this outside of jax.enable_x64")
    if jax.default_backend() != "cpu":
        jax.config.update("jax_default_matmul_precision", matmul_precision)


def device_summary() -> str:
    """The devices of a run, such as ``2 x cpu`` or ``4 processes of 8 x NVIDIA H100``."""
    devices, count = jax.local_devices(), jax.process_count()
    own = f"{len(devices)} x {devices[0].device_kind}"
    return own if count == 1 else f"{count} processes of {own}"
