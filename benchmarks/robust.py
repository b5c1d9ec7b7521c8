"""Does a provably robust classifier keep its promises, and what does its inverse cost?

    python benchmarks/robust.py --workdir DIR [--twin] [--quick]

DIR holds a run of ``configs/mnist_robust.py``. All test images are verified at the radius that
training aimed at, and brought back from their features; 1000 are attacked within .999 of their own
radius by 200 steps of projected gradient descent from 10 random starts; the inverses of 8 are
certified.

The blocks are ``x + g(x)`` with ``g(x) = -K^T phi(K x)`` and ``|K|^2 <= L < 1``. With --twin a
network of ``x + (2 / L) g(x)``, the longest step that never stretches (Meunier et al. 2022), is
trained by the settings of the run: data, loss, optimizer, batches, updates, average of parameters.
It has no inverse.
"""

from dataclasses import asdict

import jax
import jax.numpy as jnp
import numpy as np
import optax
from _models import load_kind, model_parser
from _record import write

import iresnet_jax as ir
from iresnet_jax.evaluation.classification import INSIDE, NUM_CHECKED, Accuracy, least_margins
from iresnet_jax.evaluation.round_trips import reconstruct
from iresnet_jax.models.classifier import apply_head, cross_entropy, distances
from iresnet_jax.models.flow import blocks_of
from iresnet_jax.training.objectives import Margin
from iresnet_jax.training.optimizers import make_optimizer, make_schedule

ATTACK = (200, 10)  # steps and random starts
NUM_CERTIFIED = 8  # inverses


def twin_logits(model, images):
    """Logits of the network whose steps are ``2 / L`` times as long."""
    (stage,), step = model.spec.flow.layout, 2 / model.spec.flow.coeff
    x = ir.chain(stage.reshapes).forward(model.preprocess(images))
    blocks = blocks_of(model.spec.flow, model.weights)[stage.name]
    x, _ = jax.lax.scan(lambda x, block: (x + step * block.branch(x), None), x, blocks)
    return apply_head(model.head, {}, x)


def trained_twin(run, num_steps):
    """The twin, trained as the run was."""
    config, spec, images = run.config, run.model.spec, run.data.examples["train"]
    margin = Margin(config.classifier.margin, config.classifier.temperature)

    def loss(model, batch, key):
        images, labels = batch
        return cross_entropy(margin.apply(model, twin_logits(model, images), labels), labels).mean()

    schedule = make_schedule(config.optimizer, num_steps)
    model = ir.Classifier.init(
        jax.random.key(config.seed),
        images[: config.training.actnorm_examples],
        spec.num_classes,
        stages=config.model.stages,
        coeff=config.model.coeff,
        mean=spec.mean,
        std=spec.std,
        head=spec.head,
    )
    return ir.train(
        model,
        loss,
        (images, run.data.labels["train"]),
        key=jax.random.key(config.seed),
        steps=num_steps,
        batch_size=config.training.batch_size,
        optimizer=optax.chain(make_optimizer(config.optimizer), optax.scale_by_schedule(schedule)),
        ema_decay=config.training.ema_decay,
    )


def twin_radii(model, images, labels):
    """Radii of the twin in float32, 0 where it is wrong."""

    @jax.jit
    def radii(model, images, labels):
        logits, is_own = (
            twin_logits(model, images),
            jax.nn.one_hot(labels, model.spec.num_classes) > 0,
        )
        margins = jnp.take_along_axis(logits, labels[:, None], 1) - logits
        sizes = min(model.spec.std) * margins / jnp.where(is_own, 1, distances(model.head)[labels])
        return jnp.where(is_own, jnp.inf, sizes).min(axis=1)

    parts = [slice(i, i + 1000) for i in range(0, len(images), 1000)]
    return np.maximum(
        np.concatenate([radii(model, images[part], labels[part]) for part in parts]), 0
    )


def accuracies(radii, radius):
    """Shares of images that are right, and verified at a radius."""
    clean, verified = Accuracy.of(radii > 0), Accuracy.of(radii >= radius)
    return {
        "clean": asdict(clean),
        "verified": asdict(verified),
        "median_radius": float(np.median(radii)),
    }


def main():
    options = model_parser(__doc__)
    options.add_argument(
        "--twin", action="store_true", help="also train and verify the network without an inverse"
    )
    arguments = options.parse_args()
    run, model = load_kind(arguments.workdir, ir.Classifier)
    config, attack, num_steps = run.config, ATTACK, run.config.training.total_steps
    images, labels = run.test_data().x, np.asarray(run.data.labels["test"])
    if arguments.quick:
        images, labels, attack, num_steps = images[:100], labels[:100], (10, 1), 50

    radius, size = config.classifier.margin, config.evaluation.batch_size
    found = ir.certify.radius(model, images)
    own, first = np.where(found.predicted == labels, found.radius, 0), slice(0, NUM_CHECKED)
    inside = INSIDE * found.radius[first]
    margins = least_margins(
        model, images[first], found.predicted[first], inside, attack, config.seed, size
    )
    results = {
        "invertible": accuracies(own, radius),
        "attacks_within_own_radius": {"num": len(margins), "broken": int((margins < 0).sum())},
        "inverse": asdict(
            reconstruct(model, images, size, config.seed, num_certified=NUM_CERTIFIED)[2]
        ),
    }
    if arguments.twin:
        twins = twin_radii(trained_twin(run, num_steps), images, labels)
        lost = 100 * float((twins >= radius).mean() - (own >= radius).mean())
        results |= {"twin": {**accuracies(twins, radius), "points_of_verified_lost": lost}}
    settings = {
        "radius": radius,
        "steps": num_steps,
        "attack": dict(zip(("steps", "starts"), attack, strict=True)),
    }
    write(f"robust_{config.data.name}_{radius:.3g}", arguments, settings, results)


if __name__ == "__main__":
    main()
