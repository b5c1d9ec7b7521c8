"""The papers' figures and tables, drawn from kept models, from records, or from networks that are
trained here.

    python docs/figures.py                          # every figure, to docs/figures/NAME.svg
    python docs/figures.py inverses logdets tables  # these; tables are printed, as Markdown

A figure is a function without required arguments, which stands in `FIGURES`; its docstring is its
caption. Curves differ in dash and marker, so they can be told apart without colour.
"""

import argparse
import dataclasses
import functools
import itertools
import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import matplotlib as mpl
import numpy as np
import optax
from jaxtyping import Array, Float
from matplotlib.axes import Axes
from matplotlib.figure import Figure

import iresnet_jax as ir
from iresnet_jax import data
from iresnet_jax.branches.branch import Branch
from iresnet_jax.data.toys import TOYS
from iresnet_jax.evaluation.classification import fraction_interval
from iresnet_jax.maths.logdet_estimator import LogdetEstimator
from iresnet_jax.maths.logdet_series import truncation_bound
from iresnet_jax.models.classifier import cross_entropy
from iresnet_jax.models.flow import branch_inputs

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
KEPT = RESULTS / "digits_density" / "model.npz"
WIDTH = 8.0  # inches
CURVES: tuple[dict[str, Any], ...] = (
    {"color": "#1f4e8c", "linestyle": "-", "marker": "o"},
    {"color": "#de7c22", "linestyle": (0, (5, 2)), "marker": "s"},
    {"color": "#b0479b", "linestyle": (0, (1, 1.5)), "marker": "^"},
)


# --- figures --------------------------------------------------------------------------------------


def trajectories(*, num_blocks: int = 20, steps: int = 4000) -> Figure:
    """Paths of points through an ordinary and an invertible residual network (Behrmann et al. 2019,
    Fig. 1).

    Both start from the same weights and are fitted to the same noisy examples of ``x -> x^3`` at
    half of their depth and of ``x -> x`` at its end, the dashes. Orange crosses are where
    neighbouring paths cross: the ordinary network makes them where it follows the noise, and then
    no inverse can tell its inputs apart. A block of the invertible network shrinks a distance by at
    most the factor ``1 - Lip(g)``, so its paths keep their order.
    """
    x = jnp.linspace(-2.0, 2.0, 48)[:, None]
    key_weights, key_noise, key_training = jax.random.split(jax.random.key(0), 3)
    halfway, end = jnp.stack([x**3, x]) + 0.5 * jax.random.normal(key_noise, (2, *x.shape))
    stage = ir.StageSpec(num_blocks, (16, 16), actnorm=False)
    start = ir.Density.init(
        key_weights,
        np.asarray(x),
        stages=[stage],
        transform=ir.Identity(),
        last_scale=0.3,
        sharpness=0.0,
    )

    def error(branch: Branch) -> Array:
        path = path_through(branch, x)
        return jnp.mean((path[num_blocks // 2] - halfway) ** 2 + (path[-1] - end) ** 2)

    def error_of_model(model: ir.Density, batch: None, key: Array) -> Array:
        del batch, key
        return error(model.weights["stage0"].branch)

    invertible = (
        ir.train(start, error_of_model, steps=steps, key=key_training, progress=False)
        .weights["stage0"]
        .branch
    )
    ordinary = minimised(error, start.weights["stage0"].branch, steps)

    figure = Figure((WIDTH, 3.8), layout="constrained")
    for axes, (name, branch) in zip(
        figure.subplots(1, 2, sharey=True),
        {"ordinary": ordinary, "invertible": invertible}.items(),
        strict=True,
    ):
        positions = np.asarray(path_through(branch, jnp.linspace(-2.0, 2.0, 121)[:, None]))[..., 0]
        drawn = positions[0, ::4]
        axes.plot(positions[:, ::4], color=CURVES[0]["color"], linewidth=0.7)
        for depth, image in ((num_blocks / 2, drawn**3), (num_blocks, drawn)):
            axes.plot(
                np.full(len(drawn), depth),
                image,
                color="black",
                linestyle="none",
                marker="_",
                markersize=5,
            )
        order = np.sign(np.diff(positions, axis=1))
        before, where = np.nonzero(order[1:] != order[:-1])
        middle = (positions[before, where] + positions[before + 1, where]) / 2
        axes.plot(
            before + 0.5,
            middle,
            color=CURVES[1]["color"],
            linestyle="none",
            marker="x",
            markersize=4,
        )
        label(
            axes,
            "blocks",
            "position" if name == "ordinary" else "",
            f"{name}: {len(before)} crossings",
        )
    return figure


def path_through(branch: Branch, x: Float[Array, "n 1"]) -> Float[Array, "k n 1"]:
    """Positions of points at the start and after each block ``x + g(x)``; the branches are
    stacked over blocks.
    """

    def step(x: Array, branch: Branch) -> tuple[Array, Array]:
        x = x + branch(x)
        return x, x

    return jnp.concatenate([x[None], jax.lax.scan(step, x, branch)[1]])


def minimised(loss: Any, branch: Branch, steps: int) -> Branch:
    """The branches with the weights that Adam ends at, without any constraint."""
    optimizer = optax.chain(
        optax.clip_by_global_norm(1.0), optax.adam(optax.cosine_decay_schedule(5e-3, steps))
    )

    def with_weights(weights: Any) -> Branch:
        return Branch(branch.spec, weights)

    @jax.jit
    def run(weights: Any) -> Any:
        def step(state: Any, _: None) -> tuple[Any, None]:
            weights, moments = state
            updates, moments = optimizer.update(
                jax.grad(lambda w: loss(with_weights(w)))(weights), moments, weights
            )
            return (optax.apply_updates(weights, updates), moments), None

        return jax.lax.scan(step, (weights, optimizer.init(weights)), length=steps)[0][0]

    return with_weights(run(branch.weights))


def densities(*, steps: int = 2000) -> Figure:
    """Densities of the plane below histograms of their data (Behrmann et al. 2019, Fig. 4).

    Below each are the negative log-likelihood of 10,000 further points with one standard error, and
    the entropy of the data, which no density can pass: the gap is largest for rings, which lie
    around each other.
    """
    side, columns = 128, 4
    figure = Figure((WIDTH, 8.7), layout="constrained")
    grid = figure.subplots(2 * (-(-len(TOYS) // columns)), columns, squeeze=False)
    for i, toy in enumerate(TOYS.values()):
        train, test = (
            np.asarray(toy.sample(jax.random.key(seed), num))
            for seed, num in ((0, 50_000), (1, 10_000))
        )
        start = ir.Density.init(
            jax.random.key(2),
            train[:1024],
            stages=[ir.StageSpec(8, (32, 32), activation="clipswish")],
            transform=ir.Identity(),
        )
        model = ir.train(
            start,
            negative_log_likelihood,
            train,
            batch_size=256,
            steps=steps,
            key=jax.random.key(3),
            progress=False,
        )
        reach = 1.1 * np.abs(test).max()
        ticks = ((np.arange(side) + 0.5) / side * 2 - 1) * reach
        points = np.stack(np.meshgrid(ticks, ticks), axis=-1).reshape(-1, 2).astype(np.float32)
        log_prob = jax.jit(lambda model, x: model.log_prob(x))
        density = np.exp(np.asarray(log_prob(model, points)).reshape(side, side))
        counts = np.histogram2d(
            test[:, 1], test[:, 0], bins=side // 2, range=[[-reach, reach]] * 2
        )[0]
        above, below = grid[2 * (i // columns) : 2 * (i // columns) + 2, i % columns]
        for axes, values in ((above, counts), (below, density)):
            axes.imshow(
                values,
                origin="lower",
                cmap="Greys",
                vmin=0.0,
                vmax=np.quantile(values, 0.995),
                interpolation="none",
            )
            axes.set_axis_off()
        nll = -np.asarray(log_prob(model, test), np.float64)
        stderr = nll.std(ddof=1) / math.sqrt(len(nll))
        above.set_title(toy.name, size=8)
        below.set_title(f"{nll.mean():.3f} ± {stderr:.3f} nats, entropy {toy.entropy:.3f}", size=7)
    return figure


def negative_log_likelihood(model: ir.Density, batch: Array, key: Array) -> Array:
    """Mean negative log-likelihood in nats."""
    return -model.log_prob(batch, key).mean()


def reconstructions(*, steps: int = 600) -> Figure:
    """Test images, and what the features of a classifier give back by at most 100 steps of Banach
    iteration a block.

    Both classifiers start from the same weights (Behrmann et al. 2019, Fig. 2). With the constraint
    every block has a certified inverse. Without it the bounds of the branches are above 1, no
    inverse is promised, and other images come back.
    """
    digits = data.load("digits")
    assert digits.num_classes is not None
    assert digits.num_levels is not None
    train, test = ((digits.examples[split], digits.labels[split]) for split in ("train", "test"))
    stage = functools.partial(ir.StageSpec, 4, (64, 64), (3, 1, 3), squeeze=2)
    stages = [stage(), stage(preactivation=True)]
    init = functools.partial(
        ir.Classifier.init, num_classes=digits.num_classes, num_levels=digits.num_levels
    )
    start = init(jax.random.key(0), train[0][:512], stages=stages, pad_channels=3)
    start = start.with_(solver=ir.Solver(max_evals=100, memory=0))
    free = start.with_(spec=dataclasses.replace(start.spec, constrained=False))

    figure = Figure((WIDTH, 3.4), layout="constrained")
    top, *others = figure.subplots(3, 1)
    scale = digits.num_levels - 1
    strip(top, test[0][:12] / scale, "image", "")
    for axes, (name, model) in zip(
        others, {"with the constraint": start, "without": free}.items(), strict=True
    ):
        model = ir.train(
            model,
            error_of_classes,
            train,
            batch_size=64,
            steps=steps,
            key=jax.random.key(1),
            progress=False,
        )
        wrong = np.asarray(model.logits(test[0])).argmax(axis=-1) != test[1]
        back = np.asarray(model.decode(model.encode(test[0]))[0])
        error = np.linalg.norm((back - test[0] / scale).reshape(len(back), -1), axis=1)
        error /= np.linalg.norm(test[0].reshape(len(back), -1) / scale, axis=1)
        bound = model.certificate().max_block
        said = (
            f"test error {wrong.mean():.1%}, Lip(g) at most {bound:.3g}, mean relative error "
            f"{error.mean():.2g}"
        )
        strip(axes, back[:12], name, said)
    return figure


def error_of_classes(model: ir.Classifier, batch: tuple[Array, Array], key: Array) -> Array:
    """Mean cross-entropy."""
    del key
    return cross_entropy(model.logits(batch[0]), batch[1]).mean()


def inverses() -> Figure:
    """Error of a block's inverse against evaluations of its branch ``g``.

    The black line is what the Lipschitz constant ``L`` alone guarantees: Banach iteration ``x_{n+1}
    = y - g(x_n)`` from ``x_0 = y`` satisfies ``|x_n - x*| <= L^n / (1 - L) |x_1 - x_0|`` (Behrmann
    et al. 2019, Lemma 2). Measured errors fall faster, Anderson's method needs fewer evaluations,
    and the bound that the solver states from its residual, thin, is close to the error.
    """
    evaluations = (1, 2, 3, 4, 6, 8, 11, 15, 20, 30, 45, 70)
    figure = Figure((WIDTH, 3.6), layout="constrained")
    axes = figure.add_subplot()
    with jax.enable_x64():
        name, branch, x = loosest_block(32)
        bound = float(branch.lipschitz_bound)

        @functools.partial(jax.jit, static_argnames=("num", "memory"))
        def inverse(branch: Branch, num: int, memory: int) -> tuple[Array, Array]:
            y = x + branch(x)
            found, info = ir.invert_residual(
                branch, y, lipschitz_bound=bound, atol=1e-15, max_evals=num, memory=memory
            )
            return euclidean(found - x).max(), info.error_bound.max()

        for which, (solver, memory) in enumerate({"Banach": 0, "Anderson, 4 steps": 4}.items()):
            error, stated = np.transpose([inverse(branch, num, memory) for num in evaluations])
            curve(axes, which, evaluations, error, solver)
            curve(
                axes,
                which,
                evaluations,
                stated,
                f"{solver}: bound of the solver",
                marker=None,
                linewidth=0.8,
            )
        first = float(euclidean(branch(x + branch(x))).max())
    # the last evaluation measures the residual
    rate = [bound ** (num - 1) / (1 - bound) * first for num in evaluations]
    axes.plot(
        evaluations,
        rate,
        "k",
        linewidth=1.4,
        label=f"guaranteed: $L^n |x_1 - x_0| / (1 - L)$, $L$ = {bound:.3f}",
    )
    axes.set_yscale("log")
    label(axes, "evaluations of the branch", "largest Euclidean error", name)
    return figure


def logdets(*, num_draws: int = 100) -> Figure:
    """Bias and spread of three estimators of the log-determinant of a block, against products with
    the Jacobian.

    The power series loses a constant factor of its bias a term and Krylov subspaces lose more; the
    thin lines, the bounds of what is left out, stay above. The roulette (Chen et al. 2019) has no
    bias: its points are noise within two standard errors. Biases are mean differences to the same
    estimator with negligible truncation, for the same probes, so their noise is small. On the right
    the standard deviation falls as one over the root of the probes for all three: more products do
    not reduce it.
    """
    negligible, num_products = 1e-9, 5  # nats; products at which probes are compared
    products, probes = (2, 3, 4, 5, 6, 8, 10, 12, 16, 20), (1, 2, 4, 8, 16)
    figure = Figure((WIDTH, 3.4), layout="constrained")
    left, right = figure.subplots(1, 2)
    with jax.enable_x64():
        name, branch, x = loosest_block(8)
        size, bound = math.prod(x.shape[1:]), float(branch.lipschitz_bound)
        enough = next(
            n for n in itertools.count(1) if truncation_bound(size, bound, n) < negligible
        )
        keys = jax.random.split(jax.random.key(0), (num_draws, len(x)))

        @functools.partial(jax.jit, static_argnames="estimator")
        def draws(branch: Branch, estimator: LogdetEstimator) -> tuple[Array, Array]:
            """Estimates and bounds of what they leave out, a row a draw; the same keys give the
            same probes.
            """

            def once(keys: Array) -> tuple[Array, Array]:
                value, info = estimator(branch, x, keys, lipschitz_bound=branch.lipschitz_bound)
                return value, info.truncation_bound

            return jax.lax.map(once, keys)

        estimators = {
            "series": lambda n, p: ir.SeriesLogdet(n, num_probes=p),
            # n products on average
            "roulette": lambda n, p: ir.RouletteLogdet("poisson", 2.0, max(n - 2, 0), num_probes=p),
            "Krylov": lambda n, p: ir.KrylovLogdet(min(n, size), num_probes=p),
        }
        for which, (kind, make) in enumerate(estimators.items()):
            whole, _ = draws(branch, make(enough, 1))
            bias, error, left_out = [], [], []
            for n in products:
                values, truncated = draws(branch, make(n, 1))
                missing = np.asarray(values - whole)
                bias.append(abs(missing.mean()))
                error.append(2 * missing.std(ddof=1) / math.sqrt(missing.size))
                left_out.append(float(truncated.mean()))
            curve(left, which, products, bias, kind)
            left.errorbar(
                products,
                bias,
                error,
                color=CURVES[which]["color"],
                linestyle="none",
                linewidth=0.8,
                capsize=2,
            )
            # the caption says what thin lines are; the legend leaves out names that begin with _
            curve(left, which, products, left_out, "_bound", marker=None, linewidth=0.8)
            estimates = [np.asarray(draws(branch, make(num_products, p))[0]) for p in probes]
            spread = [float(np.sqrt(values.var(axis=0, ddof=1).mean())) for values in estimates]
            curve(right, which, probes, spread, kind)
            if kind == "series":
                right.plot(
                    probes,
                    spread[0] / np.sqrt(probes),
                    "grey",
                    linewidth=0.8,
                    label="1 / root of the probes",
                )
    left.set(yscale="log", ylim=(negligible, None))
    right.set(xscale="log", yscale="log")
    right.set_xticks(probes, [str(p) for p in probes])
    right.set_xticks([], minor=True)
    label(left, "products with the Jacobian", "|bias| [nats]", f"{name}, 1 probe")
    label(right, "probes", "standard deviation [nats]", f"{num_products} products")
    return figure


def coefficients() -> Figure:
    """Test error of classifiers against the largest norm of a layer (Behrmann et al. 2019, Table
    2), with 95 % intervals.

    Rightmost is the same network without a constraint. The networks of the published numbers are
    larger.
    """
    figure = Figure((WIDTH, 3.2), layout="constrained")
    paths = sorted(RESULTS.glob("lipschitz_sweep_*.json"))
    for which, (axes, path) in enumerate(zip(figure.subplots(1, len(paths)), paths, strict=True)):
        rows = {row["model"]: row for row in rows_of_sweep(path)}
        places = {
            name: 1.0 if name == "no constraint" else float(name[4:])
            for name in rows
            if name != "BatchNorm"
        }
        names = sorted(places, key=lambda name: places[name])
        x, y = [places[name] for name in names], np.array([rows[name]["value"] for name in names])
        low, high = np.transpose([rows[name]["interval"] for name in names])
        curve(axes, 0, x, y, "here")
        axes.errorbar(
            x,
            y,
            [y - low, high - y],
            color=CURVES[0]["color"],
            linestyle="none",
            linewidth=0.8,
            capsize=2,
        )
        published = {
            places[name]: PUBLISHED[rows[name]["key"]]
            for name in names
            if rows[name]["key"] in PUBLISHED
        }
        if published:
            curve(axes, 1, list(published), list(published.values()), "published")
        axes.set_xticks(x, ["none" if place == 1 else f"{place:g}" for place in x])
        axes.set_ylim(0, None)
        label(
            axes,
            "coefficient",
            "" if which else "test error [%]",
            path.stem.split("_", 2)[2].removesuffix("_classification"),
        )
    return figure


def tables() -> str:
    """Numbers of all records and reports, with 95 % intervals, beside published ones.

    The published bits/dim of MNIST are of images padded to 32 x 32 x 3, and the images of CIFAR-10
    are JPEG copies. Published errors of classes are quoted second-hand: look them up in the paper
    before you cite them.
    """
    rows = [
        row
        for path in sorted(RESULTS.glob("lipschitz_sweep_*.json"))
        for row in rows_of_sweep(path)
    ]
    rows += [row for path in sorted(RESULTS.glob("**/report.json")) for row in rows_of_report(path)]
    lines = [
        "| data | model | value | 95 % interval | published | minutes | machine |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        low, high = row["interval"]
        interval = f"{low:.3f} to {high:.3f}" if math.isfinite(low) else ""
        minutes = "" if row["seconds"] is None else f"{row['seconds'] / 60:.3g}"
        cells = (
            row["key"][0],
            row["model"],
            f"{row['value']:.3f} {row['unit']}",
            interval,
            row["published"],
            minutes,
            row["machine"],
        )
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


# Functions that make a figure, or a table as Markdown.
FIGURES = {
    f.__name__: f
    for f in (trajectories, densities, reconstructions, inverses, logdets, coefficients, tables)
}


# --- records --------------------------------------------------------------------------------------

# % error on MNIST by coefficient, Behrmann et al. 2019, Table 2, quoted second-hand.
PUBLISHED = {
    ("mnist_classification", variant): error
    for variant, error in {
        "vanilla": 0.38,
        "0.9": 0.40,
        "0.8": 0.42,
        "0.7": 0.40,
        "0.6": 0.42,
        "0.5": 0.86,
    }.items()
}
VARIANTS = {"batchnorm": "BatchNorm", "vanilla": "no constraint", "none": "no constraint"}


def rows_of_sweep(path: Path) -> Iterator[dict[str, Any]]:
    """A row for each coefficient of a record of classifiers, the mean over its seeds."""
    record = json.loads(path.read_text())
    name = record["benchmark"].removeprefix("lipschitz_sweep_")
    for variant in dict.fromkeys(run["variant"] for run in record["results"]):
        runs = [run for run in record["results"] if run["variant"] == variant]
        num, error = runs[0]["num_examples"], sum(run["error"] for run in runs) / len(runs)
        yield {
            "key": (name, variant),
            "model": VARIANTS.get(variant, f"c = {variant}"),
            "value": 100 * error,
            "unit": "% error",
            # seeds share their images
            "interval": 100 * np.array(fraction_interval(round(error * num), num)),
            "published": f"{PUBLISHED[name, variant]:.2f}" if (name, variant) in PUBLISHED else "",
            "seconds": sum(run["total_seconds"] for run in runs) / len(runs),
            "machine": machine(record["environment"]),
        }


def rows_of_report(path: Path) -> Iterator[dict[str, Any]]:
    """The likelihood of a report; of a classifier its test error."""
    report = json.loads(path.read_text())
    published = dict(report["config"].get("references", {}).get("values", ()))
    known = {
        "key": (path.parent.name, ""),
        "model": "",
        "published": "; ".join(f"{name} {value:g}" for name, value in published.items()),
        "seconds": report["train"].get("total_seconds"),
        "machine": machine(report["environment"]),
    }
    for key, unit in (("bits_per_dim", "bits/dim"), ("nll", "nats")):
        if found := report.get(key):
            mean, stderr = (
                math.nan if found[name] is None else found[name] for name in ("mean", "stderr")
            )
            yield {
                **known,
                "value": mean,
                "unit": unit,
                "interval": (mean - 1.96 * stderr, mean + 1.96 * stderr),
            }
            return
    if found := report.get("classification"):
        yield {
            **known,
            "value": 100 * found["error"],
            "unit": "% error",
            "interval": 100 * np.array(found["interval"]),
        }


def machine(environment: dict[str, Any]) -> str:
    """Such as "2 cores of AMD EPYC" or "1 x NVIDIA H100"."""
    if environment["backend"] != "cpu":
        return environment["devices"]
    num = environment["cpu_count"]
    processor = f" of {environment['processor']}" if "processor" in environment else ""
    return f"{num} core{'s' if num > 1 else ''}{processor}"


# --- what figures share ---------------------------------------------------------------------------


def loosest_block(num_examples: int) -> tuple[str, Branch, Array]:
    """Name, branch and inputs of the kept model's block with the largest certified bound, in
    float64; under ``enable_x64``.
    """
    model = ir.load(KEPT)
    bounds = {
        (name, k): float(bound)
        for name, own in model.bounds().items()
        for k, bound in enumerate(own.lipschitz)
    }
    name, k = max(bounds, key=lambda place: bounds[place])
    weights, x = jax.tree.map(
        in_float64,
        (model.weights, model.preprocess(data.load("digits").examples["test"][:num_examples])),
    )
    inputs = jax.jit(branch_inputs, static_argnums=0)(model.spec.flow, weights, x)
    branch = jax.tree.map(lambda leaf: leaf[k], weights[name].branch)
    branch = dataclasses.replace(branch, lipschitz_bound=jnp.asarray(bounds[name, k]))
    return f"{name}/block{k:02d}", branch, inputs[name][k]


def in_float64(leaf: Any) -> Array:
    """An array of floating-point numbers in float64, others as they are."""
    leaf = jnp.asarray(leaf)
    return leaf.astype(jnp.float64) if jnp.issubdtype(leaf.dtype, jnp.floating) else leaf


def euclidean(x: Float[Array, "b ..."]) -> Float[Array, " b"]:
    """Norms of examples."""
    return jnp.linalg.norm(x.reshape(len(x), -1), axis=1)


def curve(axes: Axes, which: int, x: Sequence[float], y: Any, name: str, **options: Any) -> None:
    """Draws a curve in the style of its number in `CURVES`."""
    axes.plot(x, y, label=name, **{**CURVES[which], "linewidth": 1.4, "markersize": 4, **options})


def label(axes: Axes, x: str, y: str, title: str) -> None:
    """Labels axes, and adds a legend if something has a name."""
    axes.set_xlabel(x, size=9)
    axes.set_ylabel(y, size=9)
    axes.set_title(title, size=9, loc="left")
    axes.tick_params(which="both", labelsize=8)
    axes.grid(visible=True, alpha=0.2)
    axes.spines[["top", "right"]].set_visible(False)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(frameon=False, fontsize=8)


def strip(axes: Axes, images: Float[np.ndarray, "n h w 1"], name: str, said: str) -> None:
    """Draws grey images in [0, 1] side by side; what is outside is clipped, what is not finite
    is black.
    """
    seen = np.clip(np.nan_to_num(images[..., 0], posinf=0.0, neginf=0.0), 0.0, 1.0)
    axes.imshow(
        np.concatenate(list(np.pad(seen, ((0, 0), (0, 0), (0, 1)), constant_values=1.0)), axis=1),
        cmap="gray",
    )
    axes.set_axis_off()
    axes.set_title(f"{name}: {said}" if said else name, size=8, loc="left")


def main(arguments: Sequence[str] | None = None) -> None:
    """Makes the figures that the command line names."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "names", nargs="*", metavar="NAME", help=f"of {', '.join(FIGURES)}; all by default"
    )
    parser.add_argument(
        "--output", type=Path, default=ROOT / "docs" / "figures", help="folder of the files"
    )
    given = parser.parse_args(arguments)
    if unknown := set(given.names) - FIGURES.keys():
        parser.error(
            f"there is no figure {', '.join(sorted(unknown))}: choose of {', '.join(FIGURES)}"
        )
    given.output.mkdir(parents=True, exist_ok=True)
    for name in given.names or FIGURES:
        made = FIGURES[name]()
        if isinstance(made, str):
            print(made)
            continue
        with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": "iresnet_jax"}):
            made.savefig(given.output / f"{name}.svg", dpi=160, metadata={"Date": None})


if __name__ == "__main__":
    main()
