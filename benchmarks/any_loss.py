"""Do the README's ten lines of `ir.train` give as good a density as `ir.fit` in the same time?

    python benchmarks/any_loss.py [--seeds 3] [--quick]

Arrays of two columns with known density (`_synthetic`), 5000 rows each. The ten lines have 4000 steps; then `fit` has the time
that they took, compilation of both included, and a tenth of the rows to validate. Each trains in a process of its own, with no
program in JAX's cache. Target: at most .05 nats below `fit` on 10,000 test rows. Ratios above 1 are `fit`'s seconds beside
those of the ten lines.
"""

import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence

import numpy as np
from _record import parser, show, write
from _synthetic import SYNTHETIC

NAMES = ("separated", "square", "checkerboard")
ROWS, TEST, STEPS, TARGET = 5000, 10_000, 4000, 0.05

PROGRAM = """
import sys, time
began = time.monotonic()
import jax, numpy as np, optax
import iresnet_jax as ir

what, file, steps, seed, minutes = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4]), float(sys.argv[5])
x = np.load(file)
if what == "fit":
    model = ir.fit(x, key=jax.random.key(seed), minutes=minutes, progress=False)
else:
    model = ir.Density.init(jax.random.key(seed), x[:256], stages=[ir.StageSpec(6, (64,), activation="clipswish")])

    def loss(model, batch, key):
        return -model.log_prob(batch, key).mean()

    model = ir.train(model, loss, x, optimizer=optax.adam(3e-3), steps=steps, key=jax.random.key(seed + 1), progress=False)
seconds = time.monotonic() - began
test = np.load(file.replace("train", "test"))
print(seconds, float(np.mean(model.with_(estimator=ir.ExactLogdet()).log_prob(test))), model.certificate().certified)
"""


def run(what: str, file: str, seed: int, minutes: float, steps: int) -> dict[str, float | bool]:
    """Trains in a process of its own: seconds from its start to the model, and nats on test rows."""
    with tempfile.TemporaryDirectory() as cache:
        command: Sequence[str] = (sys.executable, "-c", PROGRAM, what, file, str(steps), str(seed), str(minutes))
        environment = {**os.environ, "JAX_COMPILATION_CACHE_DIR": cache}
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment)
    seconds, log_prob, certified = done.stdout.split()[-3:]
    return {"seconds": float(seconds), "log_prob": float(log_prob), "certified": certified == "True"}


def main():
    options = parser(__doc__)
    options.add_argument("--seeds", type=int, default=3, metavar="N", help="draws of the rows and of the weights")
    arguments = options.parse_args()
    names, seeds, steps = (NAMES[:1], 1, 20) if arguments.quick else (NAMES, arguments.seeds, STEPS)
    results = {}
    with tempfile.TemporaryDirectory() as folder:
        for name in names:
            for seed in range(seeds):
                rng, file = np.random.default_rng(seed), f"{folder}/train_{name}_{seed}.npy"
                np.save(file, SYNTHETIC[name].sample(rng, ROWS))
                test = SYNTHETIC[name].sample(rng, TEST)
                np.save(file.replace("train", "test"), test)
                ours = run("train", file, seed, 0.0, steps)
                fitted = run("fit", file, seed, ours["seconds"] / 60, steps)
                results[f"{name}/{seed}"] = {
                    "ten_lines": ours,
                    "fit": fitted,
                    "truth": float(np.mean(SYNTHETIC[name].log_prob(test))),
                    "ten_lines_minus_fit": ours["log_prob"] - fitted["log_prob"],
                    "seconds_ratio": fitted["seconds"] / ours["seconds"],
                    "reached": ours["log_prob"] >= fitted["log_prob"] - TARGET,
                }
                show(results[f"{name}/{seed}"], f"{name}/{seed}")
    write("any_loss", arguments, {"rows": ROWS, "test": TEST, "steps": steps, "target_nats": TARGET}, results, is_shown=True)


if __name__ == "__main__":
    main()
