"""How robust trained classifiers are: verified accuracy against the radius, and what an attack leaves of it.

    python benchmarks/robustness.py --workdir benchmarks/results/mnist_classification [--num N] [--quick]

Radii are 2-norms of perturbations of pixels on the scale of [0, 1], which they may leave. Each image has the certified radius
that follows from the Lipschitz constant of the whole network, and the one that gradients and curvatures at the image give as
well. Projected gradient descent attacks every image at every radius, from several starts, and each image at .999 of its
certified radius: a certificate that breaks is counted there.
"""

import jax
import numpy as np
from _models import load_kind, model_parser
from _record import write

from iresnet_jax import certify
from iresnet_jax.checked_dataclasses import to_plain
from iresnet_jax.evaluation import robustness
from iresnet_jax.models.classifier import Classifier

RADII = tuple(float(r) for r in np.geomspace(1e-5, 3, 12).round(7))
AT = 0.999  # of its certified radius an image is attacked


def broken_at_their_radii(model, images, certified, attack):
    """How many images change their class within their own certified radius."""
    count = 0
    for i in np.flatnonzero(certified.radius > 0):
        one, keys = slice(i, i + 1), jax.random.key(i)[None]
        found = robustness.attacked(model, images[one], certified.predicted[one], AT * certified.radius[i], keys, attack)
        count += int(found[0])
    return count


def main():
    options = model_parser(__doc__)
    options.add_argument("--num", type=int, default=100, metavar="N", help="test images, from the first")
    arguments = options.parse_args()
    (run, model), num = load_kind(arguments.workdir, Classifier), 4 if arguments.quick else arguments.num
    images, labels = run.test_examples()[:num], run.data.labels["test"][:num]
    attack = robustness.Attack(num_steps=5) if arguments.quick else robustness.Attack()
    certified = certify.radius(model, images)
    results = {
        **to_plain(robustness.evaluate(model, images, labels, radii=RADII, attack=attack, certified=certified)),
        "median_ratio": float(np.median(certified.radius / np.maximum(certified.global_radius, 1e-300))),
        "broken_at_their_radii": broken_at_their_radii(model, images, certified, attack),
        "radii": certified.radius.tolist(),
        "global_radii": certified.global_radius.tolist(),
        "right": (certified.predicted == labels).tolist(),
    }
    settings = {"workdir": str(arguments.workdir), "num": num, "attack": to_plain(attack), "at": AT}
    write(f"robustness_{arguments.workdir.name}", arguments, settings, results)


if __name__ == "__main__":
    main()
