"""How close do flows with prescribed constants come to a step, and do their certificates keep them
(Wang et al. 2024)?

    python benchmarks/bilipschitz.py [--minutes 10] [--seeds 1] [--models maxmin relu]

Flows with constants ``(mu, nu) = (.1, 10)`` are fitted to the step from -2 to 2 at 0 on [-2, 2]:
1000 uniform training points, 500 points of a grid for the test, and half the mean squared error as
the loss, all as in the paper. The best function within the constants has slope ``nu`` up to ``(4 -
2 mu)/(2 nu - mu)`` and slope ``mu`` beyond. Beside the test loss a record has the smallest and
largest slope on a fine grid and the certificate's bounds, between which they must lie.
"""

import math
import time

import jax
import jax.numpy as jnp
import numpy as np
from _record import parser, write

import iresnet_jax as ir

MU, NU, END = 0.1, 10.0, 2.0
NUM_TRAIN, NUM_TEST, NUM_SLOPES = 1000, 500, 20_001
PUBLISHED = {"BiLipNet": 0.0685, "i-DenseNet": 0.2091, "i-ResNet": 0.2090}  # Wang et al. 2024
MODELS = {  # about 16,000 parameters each, as the paper's networks
    "maxmin": [ir.StageSpec(1, (72, 72, 72, 72), activation="maxmin")],
    "relu": [ir.StageSpec(3, (72, 72), activation="relu")],
}


def step(x):
    """The function to fit."""
    return np.where(x >= 0, END, -END).astype(np.float32)


def best(x):
    """The best function of constants ``(MU, NU)``, on the whole of [-2, 2]."""
    corner = (2 * END - END * MU) / (2 * NU - MU)
    return np.sign(x) * (
        NU * np.minimum(np.abs(x), corner) + MU * np.maximum(np.abs(x) - corner, 0)
    )


def loss(model, batch, key):
    """Half the mean squared error."""
    del key
    x, y = batch
    return jnp.mean(jnp.square(model.encode(x) - y)) / 2


def fitted(name, seed, minutes):
    """A model that was trained for some minutes, with the test loss on its way."""
    x = np.random.default_rng(seed).uniform(-END, END, (NUM_TRAIN, 1)).astype(np.float32)
    grid = np.linspace(-END, END, NUM_TEST, dtype=np.float32)[:, None]
    key_weights, key_training = jax.random.split(jax.random.key(seed))
    model = ir.Density.init(
        key_weights, x, stages=MODELS[name], constants=(MU, NU), transform=ir.Identity()
    )
    test_loss, curve, began = (
        jax.jit(lambda model: loss(model, (grid, step(grid)), None)),
        [],
        time.perf_counter(),
    )

    def follow(num_steps, model, metrics):
        del metrics
        curve.append((num_steps, round(time.perf_counter() - began, 2), float(test_loss(model))))

    settings = {"minutes": minutes, "batch_size": 100, "every": 500, "progress": False}
    return ir.train(model, loss, (x, step(x)), key=key_training, callback=follow, **settings), curve


def measured(name, seed, minutes):
    """The numbers of one run."""
    model, curve = fitted(name, seed, minutes)
    grid = np.linspace(-END, END, NUM_TEST, dtype=np.float32)[:, None]
    x = np.linspace(-END, END, NUM_SLOPES)[:, None]
    with jax.enable_x64():
        double = jax.tree.map(lambda a: jnp.asarray(a, jnp.float64), model).with_(
            solver=ir.Solver(atol=1e-12)
        )
        slopes = np.diff(np.asarray(double.encode(jnp.asarray(x)))[:, 0]) / np.diff(x[:, 0])
    certificate = model.certificate()
    return {
        "model": name,
        "seed": seed,
        "loss": float(loss(model, (jnp.asarray(grid), step(grid)), None)),
        "slopes": [float(slopes.min()), float(slopes.max())],
        "certified": [1 / certificate.inverse, certificate.forward],
        "keeps_its_certificate": bool(
            1 / certificate.inverse <= slopes.min() and slopes.max() <= certificate.forward
        ),
        "parameters": int(
            sum(leaf.size for leaf in jax.tree.leaves(model.weights["stage0"].branch.weights))
        ),
        "curve": curve[::10],  # updates, seconds, test loss
    }


def main():
    made = parser(__doc__)
    made.add_argument("--minutes", type=float, default=10.0, help="of training, each model")
    made.add_argument("--seeds", type=int, default=1, help="runs of each model")
    made.add_argument(
        "--models",
        nargs="+",
        choices=MODELS,
        default=list(MODELS),
        metavar="NAME",
        help=", ".join(MODELS),
    )
    arguments = made.parse_args()
    minutes, seeds = (0.1, 1) if arguments.quick else (arguments.minutes, arguments.seeds)
    runs = []
    for seed in range(seeds):
        for name in arguments.models:
            runs.append(measured(name, seed, minutes))
            print({key: value for key, value in runs[-1].items() if key != "curve"}, flush=True)
    grid = np.linspace(-END, END, NUM_TEST)
    results = {
        "best_possible": float(np.mean(np.square(best(grid) - step(grid))) / 2),
        "published": PUBLISHED,
        "median": {
            name: float(np.median([run["loss"] for run in runs if run["model"] == name]))
            for name in arguments.models
        },
        "runs": runs,
    }
    assert all(math.isfinite(run["loss"]) for run in runs)
    settings = {"minutes": minutes, "seeds": seeds, "constants": [MU, NU]}
    write("bilipschitz", arguments, settings, results, is_shown=True)


if __name__ == "__main__":
    main()
