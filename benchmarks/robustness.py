"""How robust trained classifiers are: verified accuracy against the radius, and what an attack leaves of it.

    python benchmarks/robustness.py --workdir benchmarks/results/mnist_classification [--num N] [--forms K] [--quick]

Radii are 2-norms of perturbations of pixels on the scale of [0, 1], which they may leave. Each image has the certified radius
that follows from the Lipschitz constant of the whole network, and the one that gradients and curvatures at the image give as
well. Projected gradient descent attacks every image at every radius, from several starts, and each image at .999 of its
certified radius: a certificate that breaks is counted there.
"""

import time

import jax
import numpy as np
from _models import add_workdir
from _record import parser, table, write

from iresnet_jax import certify
from iresnet_jax.evaluation import robustness
from iresnet_jax.evaluation.robustness import Attack
from iresnet_jax.json_dataclasses import to_plain
from iresnet_jax.models.classifier import Classifier
from iresnet_jax.report import style
from iresnet_jax.runs.trained_run import load

RADII = tuple(float(r) for r in np.geomspace(1e-5, 3, 12).round(7))
AT = 0.999  # of its certified radius an image is attacked


def broken_at_their_radii(model, images, certified, attack):
    """How many images change their class within their own certified radius."""
    count = 0
    for i in np.flatnonzero(certified.radius > 0):
        keys = jax.random.key(i)[None]
        count += int(
            robustness.attacked(
                model, images[i : i + 1], certified.predicted[i : i + 1], AT * certified.radius[i], keys, attack
            )[0]
        )
    return count


def picture(result, certified, labels, path):
    """Verified accuracy by either radius, and accuracy under attack."""
    figure = style.figure(width=6.0, height=3.6)
    axes = figure.subplots()
    right = certified.predicted == labels
    grid = np.geomspace(RADII[0], RADII[-1], 400)
    for name, own, color in (
        ("verified", certified.radius, style.BLUE),
        ("by Lip(F) alone", certified.global_radius, style.PLUM),
    ):
        axes.plot(grid, [100 * np.mean(right & (own >= r)) for r in grid], color=color, label=name)
    axes.plot(
        [row.radius for row in result.at], [100 * row.attacked for row in result.at], "o", color=style.ORANGE, label="attacked"
    )
    axes.set_xscale("log")
    axes.set_ylim(0, 102)
    style.label(axes, "2-norm of the perturbation", "accuracy [%]")
    style.legend(axes)
    figure.savefig(path, dpi=150)


def main():
    options = parser(__doc__)
    add_workdir(options)
    options.add_argument("--num", type=int, default=100, metavar="N", help="test images, from the first")
    options.add_argument(
        "--forms", type=int, default=None, metavar="K", help="classes with a quadratic form, see certify.radius"
    )
    arguments = options.parse_args()
    run, num = load(arguments.workdir), 4 if arguments.quick else arguments.num
    if not isinstance(run.model, Classifier):
        raise SystemExit(f"{arguments.workdir} holds a density: radii are certified for classifiers")
    images, labels = run.test_examples()[:num], run.data.labels["test"][:num]
    attack = Attack(num_steps=5) if arguments.quick else Attack()
    begin = time.perf_counter()
    certified = certify.radius(run.model, images, num_forms=arguments.forms)
    seconds = (time.perf_counter() - begin) / num
    result = robustness.evaluate(run.model, images, labels, radii=RADII, attack=attack, certified=certified)
    own = broken_at_their_radii(run.model, images, certified, attack)
    gains = certified.radius / np.maximum(certified.global_radius, 1e-300)
    print(result)
    header = ("median radius", "by Lip(F) alone", "ratio", "broken at their radii", "s an image")
    ratio = float(np.median(gains))
    print(
        table(
            [(f"{result.median_radius:.3g}", f"{result.median_global_radius:.3g}", f"{ratio:.3g}", own, f"{seconds:.2g}")],
            header,
        )
    )
    results = {
        **to_plain(result),
        "median_ratio": ratio,
        "broken_at_their_radii": own,
        "seconds_per_image": seconds,
        "radii": certified.radius.tolist(),
        "global_radii": certified.global_radius.tolist(),
        "right": (certified.predicted == labels).tolist(),
    }
    settings = {"workdir": str(arguments.workdir), "num": num, "forms": arguments.forms, "attack": to_plain(attack), "at": AT}
    if written := write(f"robustness_{arguments.workdir.name}", arguments, settings, results):
        picture(result, certified, labels, written.with_suffix(".png"))


if __name__ == "__main__":
    main()
