"""What branches in bfloat16 cost: a density trained with them beside one trained in float32, and a trained one run in them.

    python benchmarks/bfloat16.py [--config configs/digits_density.py] [--seeds 1] [--quick]

Everything but steps of training, and what is named so, runs in float32. Likelihoods compare example by example, under the same
noise, by exact log-determinants where the dimension allows. The true error of an inverse is its distance to float64's.
"""

import math
import tempfile
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from _models import decode, encode, load_kind, norms, read_config
from _record import parser, write

from iresnet_jax.bijections.residual import Solver
from iresnet_jax.evaluation import likelihood
from iresnet_jax.models.density import Density
from iresnet_jax.runs import loop

NUM_INVERTED, NUM_ENCODED = 128, 256  # test examples
ATOL = 1e-13  # of the exact inverse, in float64


def in_bits(nats, spec):
    """Mean and standard error in the units of the model, lower is better."""
    values = -nats * spec.unit_of_a_nat
    return {"mean": float(values.mean()), "stderr": float(values.std(ddof=1) / math.sqrt(len(values)))}


def inverse_errors(model, examples):
    """True errors of decoded latents in float32, and their guaranteed bounds."""
    z = encode(model, jax.jit(model.preprocess)(examples))
    x, info = decode(model, z)
    with jax.enable_x64(True):
        truth, _ = decode(model.with_(solver=Solver(atol=ATOL, refine=True)), z.astype(jnp.float64))
        errors = norms(np.asarray(x, np.float64) - truth)
    bounds = np.asarray(info.error_bound)
    return {
        "largest_error": float(errors.max()),
        "smallest_bound_over_error": float((bounds / np.maximum(errors, 1e-30)).min()),
        "fraction_within_bound": float((errors <= bounds).mean()),
        "converged": float(np.asarray(info.converged).mean()),
    }


def run_in_bfloat16(model, examples):
    """What bfloat16 does to a trained model: to latents, log-determinants, and to a round trip."""

    @jax.jit
    def there(model, key):
        terms = model.terms(examples, key, key)
        u = model.preprocess(examples)
        return terms.log_prob, terms.log_det, u, model.flow().forward(u)

    key, fast = jax.random.key(0), model.with_(bfloat16=True)
    log_prob, log_det, u, z = there(model, key)
    fast_log_prob, fast_log_det, _, fast_z = there(fast, key)
    unit = model.spec.unit_of_a_nat
    return {
        "latents_relative": float((norms(fast_z - z) / norms(z)).max()),
        "log_det_mean": float(unit * (fast_log_det - log_det).mean()),
        "log_det_rms": float(unit * jnp.sqrt(jnp.mean((fast_log_det - log_det) ** 2))),
        "loss_mean": float(-unit * (fast_log_prob - log_prob).mean()),
        "round_trip_largest": float(jnp.abs(decode(model, fast_z)[0] - u).max()),
        "max_lipschitz": model.certificate().max_block,
        "max_lipschitz_bfloat16": fast.certificate().max_block,
    }


def measure(config, folder, seed):
    """Both trainings of a seed."""
    models, nats = {}, {}
    for name in ("float32", "bfloat16"):
        own = replace(config, seed=seed, training=replace(config.training, bfloat16=name == "bfloat16"))
        loop.train(own, folder / name)
        run, models[name] = load_kind(folder / name, Density)
        examples = run.test_examples()
        nats[name] = likelihood.measure(models[name], examples, config.evaluation, seed).log_prob
    spec = models["float32"].spec
    return {
        "seed": seed,
        "unit": spec.unit,
        "test": {name: in_bits(values, spec) for name, values in nats.items()},
        "bfloat16_minus_float32": in_bits(nats["bfloat16"] - nats["float32"], spec),
        "inverse": {name: inverse_errors(model, examples[:NUM_INVERTED]) for name, model in models.items()},
        "run_in_bfloat16": run_in_bfloat16(models["float32"], examples[:NUM_ENCODED]),
    }


def main():
    options = parser(__doc__)
    options.add_argument("--config", type=Path, default=Path("configs/digits_density.py"), metavar="FILE")
    options.add_argument("--seeds", type=int, default=1)
    arguments = options.parse_args()
    config = read_config(arguments.config, *(["training.total_steps=100"] if arguments.quick else []))
    results = []
    for seed in range(arguments.seeds):
        with tempfile.TemporaryDirectory() as folder:
            results.append(measure(config, Path(folder), seed))
    settings = {"config": str(arguments.config), "seeds": arguments.seeds}
    write(f"bfloat16_{arguments.config.stem}", arguments, settings, results)


if __name__ == "__main__":
    main()
