"""Uses an installed package as its user does: ``python check_installed.py MODEL.npz``, in an
environment without extras.
"""

import importlib.util
import sys
from importlib import metadata
from pathlib import Path

import jax
import jax.numpy as jnp

import iresnet_jax as ir

folder = Path(ir.__file__).parent
assert "site-packages" in folder.parts, f"this is not the installed package: {folder}"
assert importlib.util.find_spec("sklearn") is None, "the environment has more than the core needs"
for name in ("py.typed", "evaluation/page.html.jinja"):
    assert (folder / name).is_file(), f"the wheel has no {name}"

model = ir.load(sys.argv[1])
images = jnp.zeros((2, *model.spec.flow.event_shape), jnp.int32)
log_prob = jax.jit(ir.Density.log_prob)(model, images, jax.random.key(0))
assert jnp.isfinite(log_prob).all()
assert model.certificate().certified
print(f"iresnet_jax {metadata.version('iresnet_jax')}: log-likelihoods {log_prob}")
