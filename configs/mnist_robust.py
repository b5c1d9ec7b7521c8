"""Classification of images with certified radii, by an invertible network that never stretches,
sized for a CPU.

    python train.py --config=configs/mnist_robust.py --workdir=runs/mnist_robust

Every block is a gradient step of a convex potential with eigenvalues in [mu, 1], mu = .545, so
``Lip(F) <= 1`` at any depth and ``Lip(F^-1) <= mu^-16 = 1.7e4``: rounding in single precision,
magnified by that, stays below what a grey level can show. On CIFAR-10 rounding is far from the
bound, and mu = .45 leaves the steps longer. Test 95.2 % right, 57.0 % verified at 1.58 after 44
minutes of one core (benchmarks/results/mnist_robust).

Variants after a colon: :1.58 (the default) and :0.3 are radii in pixels of [0, 1] that training
aims at, :0.3 by 8 blocks of width 128 and mu = .3; :fashion_mnist and :cifar10 aim at 36/255 on
those data. `report` has the accuracy that is verified and the one under
attack at `evaluation.radii`.
"""

from iresnet_jax.runs.config import check_name, default_config

COMMON = 36 / 255  # radius of most published comparisons on colour images
VARIANTS = {  # data, radius of training, blocks, width, 1 - mu, epochs, radii of reports
    "1.58": ("mnist", 1.58, 16, 512, 0.455, 16, (0.3, 0.5, 1.0, 1.58, 2.0)),
    "0.3": ("mnist", 0.3, 8, 128, 0.7, 30, (0.1, 0.3, 0.5, 1.0, 1.58)),
    "fashion_mnist": ("fashion_mnist", COMMON, 16, 512, 0.455, 8, (COMMON, 2 * COMMON, 3 * COMMON)),
    "cifar10": ("cifar10", COMMON, 16, 512, 0.55, 4, (COMMON, 2 * COMMON, 3 * COMMON)),
}
BATCH_SIZE = 256
EPOCH = 55_000 // BATCH_SIZE  # updates, of MNIST's images for training also on other data


def get_config(variant="1.58"):
    check_name(variant, VARIANTS)
    data, margin, num_blocks, width, step, num_epochs, radii = VARIANTS[variant]
    config = default_config()
    config.objective = "classification"
    config.data.name = data
    config.model.stages = (
        {
            "num_blocks": num_blocks,
            "hidden": (width,),
            "activation": "relu",
            "kind": "potential",
            "actnorm": False,
        },
    )
    config.model.coeff = step
    config.classifier.update(
        {"mean": (0.0,), "std": (1.0,), "head": "linear", "margin": margin, "temperature": 0.25}
    )
    config.optimizer.update(
        {"name": "muon", "momentum": 0.95, "nesterov": True, "weight_decay": 0.05}
    )
    config.optimizer.update(
        {"learning_rate": 1e-2, "warmup_steps": 100, "b2": 0.999, "clip_norm": 0.0}
    )
    config.training.update(
        {"total_steps": num_epochs * EPOCH, "batch_size": BATCH_SIZE, "eval_every_steps": EPOCH}
    )
    config.training.update({"ema_decay": 0.995, "eval_examples": 5000, "log_every_steps": 50})
    config.evaluation.radii = radii
    return config
