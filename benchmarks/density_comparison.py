"""Bits/dim of our residual flow and of normflows' (PyTorch): same images, preprocessing, parameters, machine and wall-clock.

    python benchmarks/density_comparison.py --workdir runs/fashion_mnist_density [--config configs/fashion_mnist_density.py]

The workdir is that of a finished training run of ours, or a folder of benchmarks/results; with --config that run is made first.
From its report come the data and their transform, the number of parameters, the training time and the test result. Then
normflows' residual flow is trained for as long on the images that ours saw, in the same order, and evaluated on the test images
under the same dequantisation noise, both by the unbiased estimator with 20 exact terms. Its clock stands still while it is
validated; ours ran on, and compiled.

normflows gets the architecture of Residual Flows (Chen et al. 2019), whose code it wraps: squeezed scales of ActNorm and
3x3-1x1-3x3 blocks with LipSwish, then dense blocks, and a Gaussian with a mean and scale for each dimension. As there, Adam at
1e-3 after a warm-up, gradients clipped, parameters averaged, Poisson(2) behind 2 exact terms in its memory-saving form; and, as
our runs, a cosine schedule to the end of its time and the parameters that were best on validation data. Options change it.
"""

import copy
import importlib.metadata
import itertools
import json
import math
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
from _record import ROOT, parser, show, write

from iresnet_jax import data
from iresnet_jax.bijections.transforms.dequantize import dequantize_bijection
from iresnet_jax.data.batches import batch_indices
from iresnet_jax.evaluation import environment
from iresnet_jax.models.density import DensitySpec
from iresnet_jax.runs.config import Config, parse
from iresnet_jax.runs.from_config import density_spec
from iresnet_jax.training.initialization import abstract_variables, num_parameters
from iresnet_jax.training.objectives.likelihood import evaluation_keys

try:
    import normflows as nf  # pyright: ignore[reportMissingImports]
    import torch  # pyright: ignore[reportMissingImports]
    from _pytorch import CONVERGED, POISSON, block, count_parameters, exact_log_prob, take_step
except ModuleNotFoundError as error:
    raise SystemExit(f"error: {error}: install the packages of the extra 'bench'") from None

PARAMETER_TOLERANCE = 0.1
LEAST_SIDE, MOST_SCALES = 4, 3
COEFF = 0.98  # largest operator norm of a layer
POWER_ITERATIONS = 5  # in a training step
BETAS, WARMUP_STEPS, CLIP_NORM, EMA_DECAY = (0.9, 0.99), 100, 1.0, 0.999
ACTNORM_EXAMPLES, EVAL_BATCH_SIZE, EXACT_DRAWS = 512, 100, 16


class Effort(NamedTuple):
    """How much is evaluated."""

    validations: int = 8
    validation_images: int = 1000
    test_images: int | None = None
    exact_images: int = 8


QUICK = Effort(2, 100, 200, 2)


class Ours(NamedTuple):
    """What a training run of ours left behind."""

    config: Config
    data: data.DataSet
    spec: DensitySpec
    num_parameters: int
    report: dict


def load_ours(workdir, data_dir):
    """Reads the report of a run.

    Raises:
        ValueError: If the run is not finished or not one of images.
    """
    path = workdir / "report.json"
    if not path.exists():
        raise ValueError(f"{workdir} has no report.json: let train.py finish, or run python -m iresnet_jax report")
    report = json.loads(path.read_text())
    config = parse(report["config"])
    if "bits_per_dim" not in report:
        raise ValueError(f"{workdir} is a run on {config.data.name}: the comparison needs one on images")
    dataset = data.load(config.data.name, data_dir or config.data.data_dir)
    spec = density_spec(config, dataset)
    return Ours(config, dataset, spec, num_parameters(abstract_variables(spec)["params"]), report)


class Inputs:
    """Images as both models see them: dequantised and transformed by our library."""

    def __init__(self, ours):
        self.images, self.spec, self._seed = ours.data.examples, ours.spec, ours.config.seed

        @jax.jit
        def preprocess(images, keys):
            u, cells, _ = dequantize_bijection(ours.spec.num_levels).forward_and_logdet(images, keys)
            x, log_det, _ = ours.spec.transform.bijection().forward_and_logdet(u, keys)
            return x, cells + log_det

        self._preprocess = preprocess

    def __call__(self, images, keys):
        """What the flow starts from, as (b, c, h, w), and the log-determinant of the preprocessing."""
        x, log_det = self._preprocess(images, keys)
        return torch.tensor(np.moveaxis(np.asarray(x), -1, 1)), torch.tensor(np.asarray(log_det))

    def train(self, step, batch_size):
        """The batch of a training step."""
        images = self.images["train"]
        batch = images[batch_indices(self._seed, step, batch_size, len(images))]
        return self(batch, jax.random.split(jax.random.fold_in(jax.random.key(self._seed), step), batch_size))

    def held_out(self, split, num, batch_size):
        """Batches of the first images of a split, under the noise of our evaluation's first dequantisation."""
        images = self.images[split][:num]
        for start in range(0, len(images), batch_size):
            indices = np.arange(start, min(start + batch_size, len(images)))
            yield self(images[indices], evaluation_keys(jax.random.key(self._seed), indices, 0, 0)[0])

    def bits(self, log_prob, log_det):
        """Bits/dim of images from the log-density of their transformed values."""
        return self.spec.in_units((log_prob.double() + log_det).numpy())


def build(image_shape, width, num_blocks, num_dense):
    """The residual flow of normflows.

    Args:
        image_shape: Height, width, channels.
        width: Channels or units of the hidden layers.
        num_blocks: Convolutional blocks of each scale.
        num_dense: Dense blocks behind all scales.
    """
    side, _, channels = image_shape
    flows = []  # in the order of the data's way

    for _ in range(MOST_SCALES):
        if side % 2 or side // 2 < LEAST_SIDE:
            break
        flows.append(nf.flows.Squeeze())
        side, channels = side // 2, 4 * channels
        for _ in range(num_blocks):
            net = nf.nets.LipschitzCNN(
                [channels, width, width, channels], [3, 1, 3], lipschitz_const=COEFF, max_lipschitz_iter=POWER_ITERATIONS
            )
            flows += block((channels, 1, 1), net, **POISSON)
    shape = (channels, side, side)
    dims = math.prod(shape)
    for _ in range(num_dense):
        net = nf.nets.LipschitzMLP([dims, width, dims], lipschitz_const=COEFF, max_lipschitz_iter=POWER_ITERATIONS)
        flows += block(shape, torch.nn.Sequential(torch.nn.Flatten(), net, torch.nn.Unflatten(1, shape)), **POISSON)
    return nf.NormalizingFlow(nf.distributions.DiagGaussian(shape), flows[::-1])


def build_matched(image_shape, num_parameters, *depth):
    """The model whose number of parameters comes closest, and its width.

    Raises:
        ValueError: If none comes within 10 %.
    """
    known = (16, 32, 64)
    counts = [count_parameters(build(image_shape, width, *depth)) for width in known]
    roots = np.roots(np.polyfit(known, counts, 2) - [0, 0, num_parameters])  # a layer from width to width is quadratic in it
    width = max(round(max(roots.real)), 1)
    torch.manual_seed(0)
    model = build(image_shape, width, *depth)
    if abs(count_parameters(model) / num_parameters - 1) > PARAMETER_TOLERANCE:
        raise ValueError(f"normflows' model has {count_parameters(model)} parameters at width {width}, ours {num_parameters}")
    return model, width


@torch.no_grad()
def average(averaged, current, num_averaged):
    """A moving average that forgets its start, for `torch.optim.swa_utils.AveragedModel`."""
    decay = min(EMA_DECAY, (1 + float(num_averaged)) / (10 + float(num_averaged)))
    torch._foreach_lerp_(averaged, current, 1 - decay)


def train(model, inputs, seconds, effort, batch_size, learning_rate):
    """Trains for some seconds, validations not counted; returns the average that was best on validation data, and the log."""
    model.train()
    model.log_prob(inputs.train(0, ACTNORM_EXAMPLES)[0])  # fits ActNorm and shapes the vectors of the power iterations
    nf.utils.update_lipschitz(model, CONVERGED)
    optimizer = torch.optim.Adam(model.parameters(), learning_rate, BETAS)
    averaged = torch.optim.swa_utils.AveragedModel(model, multi_avg_fn=average)
    best, log, elapsed = model, [], 0.0
    for step in itertools.count():
        if elapsed >= seconds * (len(log) + 1) / effort.validations:
            held_out = float(evaluate(averaged.module, inputs, "validation", effort.validation_images).mean())
            if held_out < min((entry["validation"] for entry in log), default=math.inf):
                best = copy.deepcopy(averaged.module)
            log.append({"minutes": elapsed / 60, "step": step, "validation": held_out})
            show(log[-1], "normflows")
            if len(log) == effort.validations:
                return best, log
        since = time.monotonic()
        decay = (1 + math.cos(math.pi * min(elapsed / seconds, 1))) / 2
        optimizer.param_groups[0]["lr"] = learning_rate * decay * min((step + 1) / WARMUP_STEPS, 1)
        x, num_dims = inputs.train(step, batch_size)[0], inputs.spec.flow.num_dims
        take_step(model, optimizer, x, num_dims=num_dims, clip_norm=CLIP_NORM, power_iterations=POWER_ITERATIONS)
        averaged.update_parameters(model)
        elapsed += time.monotonic() - since
    raise AssertionError("not reached")


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


def clustered_stderr(values, size):
    """The standard error of a mean whose examples share random numbers within batches of one size."""
    whole = values[: len(values) // size * size].reshape(-1, size).mean(axis=1)
    if len(whole) < 2:
        raise ValueError(f"a standard error needs two batches of {size} test images, got {len(values)} images")
    return float(whole.std(ddof=1) / math.sqrt(len(values) / size))


def main():
    options = parser(__doc__)
    options.add_argument("--workdir", type=Path, required=True, metavar="DIR", help="folder of a training run of ours")
    options.add_argument("--config", metavar="FILE", help="trains ours first, with this config, into the workdir")
    options.add_argument("--minutes", type=float, metavar="M", help="training time of normflows; by default that of ours")
    options.add_argument("--data_dir", metavar="DIR", help="folder of the data sets, if not that of the run")
    options.add_argument("--blocks", type=int, default=8, metavar="N", help="normflows' convolutional blocks of each scale")
    options.add_argument("--dense", type=int, default=4, metavar="N", help="normflows' dense blocks")
    options.add_argument("--batch_size", type=int, default=64, metavar="N", help="images in a step of normflows")
    options.add_argument("--learning_rate", type=float, default=1e-3, metavar="R", help="the largest of normflows")
    arguments = options.parse_args()
    effort = QUICK if arguments.quick else Effort()
    if arguments.config:
        command = [sys.executable, str(ROOT / "train.py"), f"--config={arguments.config}", f"--workdir={arguments.workdir}"]
        if status := subprocess.run(command, check=False).returncode:
            raise SystemExit(status)  # it has said why
    try:
        ours = load_ours(arguments.workdir, arguments.data_dir)
        model, width = build_matched(ours.data.event_shape, ours.num_parameters, arguments.blocks, arguments.dense)
    except (ValueError, OSError) as error:
        raise SystemExit(f"error: {error}") from None
    likelihood, times, there = (ours.report[part] for part in ("bits_per_dim", "train", "environment"))
    here = asdict(environment.describe())
    if any(here[fact] != there[fact] for fact in ("platform", "cpu_count")):
        print(f"note: our run was made elsewhere, on {there['platform']} with {there['cpu_count']} cores")
    seconds = times["total_seconds"] if arguments.minutes is None else 60 * arguments.minutes
    inputs = Inputs(ours)
    model, log = train(
        model, inputs, min(seconds, 60.0) if arguments.quick else seconds, effort, arguments.batch_size, arguments.learning_rate
    )
    values = evaluate(model, inputs, "test", effort.test_images)
    own = {
        "bits_per_dim": likelihood["mean"],
        "stderr": likelihood["stderr"],
        "num_parameters": ours.num_parameters,
        "training_minutes": times["total_seconds"] / 60,
        "steps": times["total_steps"],
        "steps_per_second": 1 / times["seconds_per_step"],
        "batch_size": ours.config.training.batch_size,
    }
    theirs = {
        "bits_per_dim": float(values.mean()),
        "stderr": clustered_stderr(values, EVAL_BATCH_SIZE),
        "num_parameters": count_parameters(model),
        "training_minutes": log[-1]["minutes"],
        "steps": log[-1]["step"],
        "steps_per_second": log[-1]["step"] / (60 * log[-1]["minutes"]),
        "batch_size": arguments.batch_size,
    }
    better = theirs["bits_per_dim"] - own["bits_per_dim"]  # ours is better where this is positive
    stderr = math.hypot(theirs["stderr"], own["stderr"])  # at least that of the difference, as the images are the same
    settings = {
        "data": ours.config.data.name,
        "preprocessing": asdict(ours.config.preprocessing),
        "test_images": len(values),
        "ours": {"model": asdict(ours.config.model), "optimizer": asdict(ours.config.optimizer), "environment": there},
        "normflows": {
            "versions": {name: importlib.metadata.version(name) for name in ("normflows", "torch")},
            "threads": torch.get_num_threads(),
            "width": width,
            "blocks": arguments.blocks,
            "dense": arguments.dense,
            "coeff": COEFF,
            "power_iterations": POWER_ITERATIONS,
            "learning_rate": arguments.learning_rate,
            "warmup_steps": WARMUP_STEPS,
            "clip_norm": CLIP_NORM,
            "ema_decay": EMA_DECAY,
        },
    }
    results = {
        "ours": own,
        "normflows": {**theirs, "validation": log, "exact": check(model, inputs, effort.exact_images)},
        "difference": {"bits_per_dim": better, "stderr": stderr},
    }
    show(results)
    name = ours.config.data.name.replace("/", "_").replace(":", "_")
    write(f"density_comparison_{name}", arguments, settings, results)


if __name__ == "__main__":
    main()
