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
from _models import read_config
from _record import parser, table, write

from iresnet_jax.bijections.residual import Solver
from iresnet_jax.evaluation import likelihood
from iresnet_jax.evaluation.inversion import REFINED_ATOL
from iresnet_jax.maths.inverse.fixed_point import example_norm
from iresnet_jax.models.density import Density
from iresnet_jax.runs import loop, trained_run

NUM_INVERTED, NUM_ENCODED = 128, 256  # test examples


def train(config, folder, *, bfloat16, seed):
    """The trained run."""
    config = replace(config, seed=seed, training=replace(config.training, bfloat16=bfloat16))
    loop.train(config, folder)
    return trained_run.load(folder)


def log_probs(run, model):
    """Log-likelihood of each test example in nats."""
    return likelihood.measure(model, run.test_examples(), run.config.evaluation, run.config.seed).log_prob


def in_bits(nats, spec):
    """Mean and standard error in the units of the model, lower is better."""
    values = -nats * spec.unit_of_a_nat
    return {"mean": float(values.mean()), "stderr": float(values.std(ddof=1) / math.sqrt(len(values)))}


def inverse_errors(model, examples):
    """True errors of decoded latents in float32, and their guaranteed bounds."""
    z = jax.jit(lambda model: model.encode(examples))(model)
    x, info = jax.jit(lambda model, z: model.flow().inverse(z))(model, z)
    with jax.enable_x64(True):
        refined = model.with_(solver=Solver(atol=REFINED_ATOL, refine=True))
        truth, _ = jax.jit(lambda model, z: model.flow().inverse(z.astype(jnp.float64)))(refined, z)
        errors = np.asarray(example_norm(x.astype(jnp.float64) - truth))
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

    key = jax.random.key(0)
    log_prob, log_det, u, z = there(model, key)
    fast_log_prob, fast_log_det, _, fast_z = there(model.with_(bfloat16=True), key)
    back, _ = jax.jit(lambda model, z: model.flow().inverse(z))(model, fast_z)
    unit = model.spec.unit_of_a_nat
    return {
        "latents_relative": float((example_norm(fast_z - z) / example_norm(z)).max()),
        "log_det_mean": float(unit * (fast_log_det - log_det).mean()),
        "log_det_rms": float(unit * jnp.sqrt(jnp.mean((fast_log_det - log_det) ** 2))),
        "loss_mean": float(-unit * (fast_log_prob - log_prob).mean()),
        "round_trip_largest": float(jnp.abs(back - u).max()),
        "max_lipschitz": model.certificate().max_block,
        "max_lipschitz_bfloat16": model.with_(bfloat16=True).certificate().max_block,
    }


def main():
    options = parser(__doc__)
    options.add_argument("--config", type=Path, default=Path("configs/digits_density.py"), metavar="FILE")
    options.add_argument("--seeds", type=int, default=1)
    arguments = options.parse_args()
    config = read_config(arguments.config)
    if arguments.quick:
        config = replace(config, training=replace(config.training, total_steps=100))
    results = []
    for seed in range(arguments.seeds):
        with tempfile.TemporaryDirectory() as folder:
            runs = {
                name: train(config, Path(folder) / name, bfloat16=name == "bfloat16", seed=seed)
                for name in ("float32", "bfloat16")
            }
            values = {name: log_probs(run, run.model) for name, run in runs.items()}
            model, examples = runs["float32"].model, runs["float32"].test_examples()
            if not isinstance(model, Density):
                raise SystemExit(f"error: {arguments.config} is no density")
            spec = model.spec
            results.append(
                {
                    "seed": seed,
                    "unit": spec.unit,
                    "test": {name: in_bits(nats, spec) for name, nats in values.items()},
                    "bfloat16_minus_float32": in_bits(values["bfloat16"] - values["float32"], spec),
                    "inverse": {name: inverse_errors(run.model, examples[:NUM_INVERTED]) for name, run in runs.items()},
                    "run_in_bfloat16": run_in_bfloat16(model, examples[:NUM_ENCODED]),
                }
            )
    for result in results:
        rows = [
            (
                name,
                f"{test['mean']:.4f} ± {test['stderr']:.4f}",
                *(f"{value:.3g}" for value in result["inverse"][name].values()),
            )
            for name, test in result["test"].items()
        ]
        print(table(rows, ("trained in", result["unit"], *result["inverse"]["float32"])))
        difference = result["bfloat16_minus_float32"]
        print(f"bfloat16 - float32: {difference['mean']:+.4f} ± {difference['stderr']:.4f} {result['unit']}")
        print(f"the float32 model run in bfloat16: {result['run_in_bfloat16']}")
    settings = {"config": str(arguments.config), "seeds": arguments.seeds}
    write(f"bfloat16_{arguments.config.stem}", arguments, settings, results)


if __name__ == "__main__":
    main()
