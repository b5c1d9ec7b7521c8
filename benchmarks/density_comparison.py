"""Bits/dim of our residual flow and of flows of normflows (PyTorch): same images, preprocessing, parameters, machine and time.

    python benchmarks/density_comparison.py --workdir runs/fashion_mnist_density [--models residual glow]

README.md says what is equal. "residual" has the architecture of Residual Flows (Chen et al. 2019), whose code normflows wraps:
squeezed scales of ActNorm and 3x3-1x1-3x3 blocks with LipSwish, then dense blocks, and a Gaussian with a mean and scale for
each dimension; Poisson(2) behind 2 exact terms in its memory-saving form. "glow" has Glow's (Kingma and Dhariwal 2018): at each
scale steps of ActNorm, a 1x1 convolution and an affine coupling by a 3x3-1x1-3x3 network, and half of the channels leave as
latents behind all scales but the last. Both are trained as Residual Flows are: Adam at 1e-3 after a warm-up, gradients clipped,
parameters averaged; and, as our runs, by a cosine schedule to the end of their time, with the parameters that were best on
validation data.
"""

import copy
import importlib.metadata
import itertools
import json
import math
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import jax
import numpy as np
from _record import parser, show, write

from iresnet_jax.bijections.transforms.dequantize import dequantize_bijection
from iresnet_jax.data.batches import batch_indices
from iresnet_jax.runs.config import parse
from iresnet_jax.runs.loop import load_data
from iresnet_jax.runs.model_from_config import density_spec
from iresnet_jax.training.initialization import abstract_variables, num_parameters
from iresnet_jax.training.objectives.density import evaluation_keys

try:
    import normflows as nf  # pyright: ignore[reportMissingImports]
    import torch  # pyright: ignore[reportMissingImports]
    from _pytorch import CONVERGED, POISSON, MultiscaleFlow, block, count_parameters, exact_log_prob, take_step
except ModuleNotFoundError as error:
    raise SystemExit(f"error: {error}: install the packages of the extra 'bench'") from None

PARAMETER_TOLERANCE = 0.1
LEAST_SIDE, MOST_SCALES = 4, 3
RESIDUAL = {"blocks": 8, "dense": 4, "coeff": 0.98, "power_iterations": 5}  # blocks of each scale, norm of a layer
GLOW = {"blocks": 16}  # steps of each scale
TRAINING = {"learning_rate": 1e-3, "warmup_steps": 100, "clip_norm": 1.0, "ema_decay": 0.999}
BATCH_SIZE, BETAS = 64, (0.9, 0.99)
ACTNORM_EXAMPLES, EVAL_BATCH_SIZE, EXACT_DRAWS = 512, 100, 16
EFFORT, QUICK = (8, 1000, None, 8), (2, 100, 200, 2)  # validations; images to validate, to test, with exact log-determinants


class Inputs:
    """Images of a config's data as both models see them: dequantised and transformed by our library."""

    def __init__(self, config):
        dataset = load_data(config.data)
        self._data, self.spec, self._seed = dataset, density_spec(config, dataset), config.seed

        @jax.jit
        def preprocess(images, keys):
            u, cells, _ = dequantize_bijection(self.spec.num_levels or 0).forward_and_logdet(images, keys)
            x, log_det, _ = self.spec.transform.bijection().forward_and_logdet(u, keys)
            return x, cells + log_det

        self._preprocess = preprocess

    def __call__(self, images, keys):
        """What the flow starts from, as (b, c, h, w), and the log-determinant of the preprocessing."""
        x, log_det = self._preprocess(images, keys)
        return torch.tensor(np.moveaxis(np.asarray(x), -1, 1)), torch.tensor(np.asarray(log_det))

    def train(self, step, batch_size):
        """The batch of a training step."""
        images = self._data.examples["train"]
        batch = images[batch_indices(self._seed, step, batch_size, len(images))]
        return self(batch, jax.random.split(jax.random.fold_in(jax.random.key(self._seed), step), batch_size))[0]

    def held_out(self, split, num, batch_size):
        """Batches of the images that we hold out, under the noise of our evaluation's first dequantisation."""
        images = self._data.held_out(split, num)
        for start in range(0, len(images), batch_size):
            indices = np.arange(start, min(start + batch_size, len(images)))
            yield self(images[indices], evaluation_keys(jax.random.key(self._seed), indices, 0, 0)[0])

    def bits(self, log_prob, log_det):
        """Bits/dim of images from the log-density of their transformed values."""
        return self.spec.in_units((log_prob.double() + log_det).numpy())


def scales(image_shape):
    """Sides of the images behind each squeeze."""
    side, found = image_shape[0], []
    while len(found) < MOST_SCALES and side % 2 == 0 and side // 2 >= LEAST_SIDE:
        side //= 2
        found.append(side)
    return found


def build_residual(image_shape, width):
    """The residual flow of normflows whose hidden layers have so many channels or units."""
    channels, sides = image_shape[-1], scales(image_shape)
    flows = []  # in the order of the data's way
    settings = {"lipschitz_const": RESIDUAL["coeff"], "max_lipschitz_iter": RESIDUAL["power_iterations"]}
    for _ in sides:
        flows.append(nf.flows.Squeeze())
        channels *= 4
        for _ in range(RESIDUAL["blocks"]):
            net = nf.nets.LipschitzCNN([channels, width, width, channels], [3, 1, 3], **settings)
            flows += block((channels, 1, 1), net, **POISSON)
    side = sides[-1] if sides else image_shape[0]
    shape = (channels, side, side)
    for _ in range(RESIDUAL["dense"]):
        net = nf.nets.LipschitzMLP([math.prod(shape), width, math.prod(shape)], **settings)
        flows += block(shape, torch.nn.Sequential(torch.nn.Flatten(), net, torch.nn.Unflatten(1, shape)), **POISSON)
    return nf.NormalizingFlow(nf.distributions.DiagGaussian(shape), flows[::-1])


def build_glow(image_shape, width):
    """The Glow of normflows whose coupling networks have so many channels."""
    channels, sides = image_shape[-1], scales(image_shape)
    priors, levels = [], []  # in the order of the data's way
    for side in sides:
        channels *= 4
        steps = [nf.flows.GlowBlock(channels, width) for _ in range(GLOW["blocks"])]
        levels.append([*steps, nf.flows.Squeeze()])
        channels //= 1 if side == sides[-1] else 2
        priors.append(nf.distributions.DiagGaussian((channels, side, side)))
    merges = [nf.flows.Merge() for _ in levels[1:]]
    return MultiscaleFlow(priors[::-1], levels[::-1], merges, class_cond=False)


BUILD = {"residual": build_residual, "glow": build_glow}


def build_matched(build, image_shape, num_parameters):
    """The model whose number of parameters comes closest, and its width; ``SystemExit`` if none comes within 10 %."""
    known = (16, 32, 64)
    counts = [count_parameters(build(image_shape, width)) for width in known]
    roots = np.roots(np.polyfit(known, counts, 2) - [0, 0, num_parameters])  # a layer from width to width is quadratic in it
    width = max(round(max(roots.real)), 1)
    torch.manual_seed(0)
    model = build(image_shape, width)
    if abs(count_parameters(model) / num_parameters - 1) > PARAMETER_TOLERANCE:
        raise SystemExit(
            f"error: normflows' model has {count_parameters(model)} parameters at width {width}, ours {num_parameters}"
        )
    return model, width


@torch.no_grad()
def average(averaged, current, num_averaged):
    """A moving average that forgets its start, for `torch.optim.swa_utils.AveragedModel`."""
    decay = min(TRAINING["ema_decay"], (1 + float(num_averaged)) / (10 + float(num_averaged)))
    torch._foreach_lerp_(averaged, current, 1 - decay)


def train(model, inputs, seconds, num_validations, validate):
    """Trains for some seconds, validations not counted; returns the average that was best on validation data, and the log."""
    model.train()
    model.log_prob(inputs.train(0, ACTNORM_EXAMPLES))  # fits ActNorm and shapes the vectors of the power iterations
    nf.utils.update_lipschitz(model, CONVERGED)
    optimizer = torch.optim.Adam(model.parameters(), TRAINING["learning_rate"], BETAS)
    averaged = torch.optim.swa_utils.AveragedModel(model, multi_avg_fn=average)
    settings = {"clip_norm": TRAINING["clip_norm"], "power_iterations": RESIDUAL["power_iterations"]}
    settings["num_dims"] = inputs.spec.flow.num_dims
    best, log, elapsed, steps = model, [], 0.0, itertools.count()
    while len(log) < num_validations:
        step, since = next(steps), time.monotonic()
        decay = (1 + math.cos(math.pi * min(elapsed / seconds, 1))) / 2
        optimizer.param_groups[0]["lr"] = TRAINING["learning_rate"] * decay * min((step + 1) / TRAINING["warmup_steps"], 1)
        take_step(model, optimizer, inputs.train(step, BATCH_SIZE), **settings)
        averaged.update_parameters(model)
        elapsed += time.monotonic() - since
        if elapsed >= seconds * (len(log) + 1) / num_validations:
            held_out = validate(averaged.module)
            if held_out < min((entry["validation"] for entry in log), default=math.inf):
                best = copy.deepcopy(averaged.module)
            log.append({"minutes": elapsed / 60, "step": step + 1, "validation": held_out})
            show(log[-1])
    return best, log


def evaluate(model, inputs, split, num):
    """Bits/dim of the first images of a split, all of them under converged norms; unbiased."""
    model.eval()
    nf.utils.update_lipschitz(model, CONVERGED)
    with torch.no_grad():
        batches = inputs.held_out(split, num, EVAL_BATCH_SIZE)
        return np.concatenate([inputs.bits(model.log_prob(x), log_det) for x, log_det in batches])


def check(model, inputs, num):
    """How far the estimate lies from the exact likelihood on a few test images, in bits/dim and in standard errors."""
    x, log_det = next(inputs.held_out("test", num, num))
    exact = torch.tensor(exact_log_prob(copy.deepcopy(model).double(), x))
    with torch.no_grad():
        draws = [inputs.bits(model.log_prob(x), log_det).mean() for _ in range(EXACT_DRAWS)]
    difference = np.mean(draws) - inputs.bits(exact, log_det).mean()
    stderr = np.std(draws, ddof=1) / math.sqrt(len(draws))
    return {"num_examples": len(x), "difference": float(difference), "z": float(difference / stderr)}


def compared(kind, inputs, num_parameters, seconds, effort):
    """Trains a flow of normflows and measures it on the test images; also returns its width."""
    validations, num_validation, num_test, num_exact = effort
    model, width = build_matched(BUILD[kind], inputs.spec.flow.event_shape, num_parameters)

    def validate(model):
        return float(evaluate(model, inputs, "validation", num_validation).mean())

    print(kind, flush=True)
    model, log = train(model, inputs, seconds, validations, validate)
    values = evaluate(model, inputs, "test", num_test)
    clusters = values[: len(values) // EVAL_BATCH_SIZE * EVAL_BATCH_SIZE].reshape(-1, EVAL_BATCH_SIZE).mean(axis=1)
    found: dict[str, Any] = {
        "bits_per_dim": float(values.mean()),
        "stderr": float(clusters.std(ddof=1) / math.sqrt(len(clusters))),  # images of a batch share random numbers
        "test_images": len(values),
        "num_parameters": count_parameters(model),
        "training_minutes": log[-1]["minutes"],
        "steps": log[-1]["step"],
        "steps_per_second": log[-1]["step"] / (60 * log[-1]["minutes"]),
        "batch_size": BATCH_SIZE,
        "validation": log,
    }
    if kind == "residual":
        found["exact"] = check(model, inputs, num_exact)
    return found, width


def main():
    options = parser(__doc__)
    options.add_argument("--workdir", type=Path, required=True, metavar="DIR", help="folder of a training run of ours")
    options.add_argument("--minutes", type=float, metavar="M", help="training time of each flow; by default that of ours")
    options.add_argument("--models", nargs="+", choices=BUILD, default=list(BUILD), help="flows of normflows (all)")
    arguments = options.parse_args()
    try:
        report = json.loads((arguments.workdir / "report.json").read_text())
        config, likelihood, times, there = (
            parse(report["config"]),
            report["bits_per_dim"],
            report["train"],
            report["environment"],
        )
        inputs = Inputs(config)
    except (KeyError, ValueError, OSError) as error:
        raise SystemExit(f"error: {arguments.workdir} has no report of a density of images: {error}") from None
    seconds = times["total_seconds"] if arguments.minutes is None else 60 * arguments.minutes
    results = {
        "ours": {
            "bits_per_dim": likelihood["mean"],
            "stderr": likelihood["stderr"],
            "num_parameters": num_parameters(abstract_variables(inputs.spec)["params"]),
            "training_minutes": times["total_seconds"] / 60,
            "steps": times["total_steps"],
            "steps_per_second": 1 / times["seconds_per_step"],
            "batch_size": config.training.batch_size,
        }
    }
    widths = {}
    for kind in arguments.models:
        shorter = (min(seconds, 60.0), QUICK) if arguments.quick else (seconds, EFFORT)
        found, widths[kind] = compared(kind, inputs, results["ours"]["num_parameters"], *shorter)
        results[kind] = found | {
            "above_ours": found["bits_per_dim"] - likelihood["mean"],
            "above_ours_stderr": math.hypot(found["stderr"], likelihood["stderr"]),  # at least, as the images are the same
        }
    settings = {
        "data": config.data.name,
        "preprocessing": asdict(config.preprocessing),
        "ours": {"model": asdict(config.model), "optimizer": asdict(config.optimizer), "environment": there},
        "normflows": {
            "versions": {name: importlib.metadata.version(name) for name in ("normflows", "torch")},
            "threads": torch.get_num_threads(),
            "widths": widths,
            "residual": RESIDUAL,
            "glow": GLOW,
            **TRAINING,
        },
    }
    write(f"density_comparison_{config.data.name.split(':')[0]}", arguments, settings, results)


if __name__ == "__main__":
    main()
