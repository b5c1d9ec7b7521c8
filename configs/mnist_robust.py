"""Classification of images with certified radii, by an invertible network that never stretches, sized for a CPU.

    python train.py --config=configs/mnist_robust.py --workdir=runs/mnist_robust

Every block is a gradient step of a convex potential with eigenvalues in [mu, 1], mu = .05, so ``Lip(F) <= 1`` at any depth.
Test 96.2 % right, 61.1 % verified at 1.58 after 27 minutes of one core (benchmarks/results/mnist_robust).

Variants after a colon: :1.58 (the default) and :0.3 are radii in pixels of [0, 1] that training aims at; :fashion_mnist and
:cifar10 aim at 36/255 on those data. `report` has the accuracy that is verified and the one under attack at `evaluation.radii`.
"""

from iresnet_jax.runs.config import check_name, default_config

RADII = {"1.58": (0.3, 0.5, 1.0, 1.58, 2.0), "0.3": (0.1, 0.3, 0.5, 1.0, 1.58)}  # of reports
TRAIN_EXAMPLES, EPOCHS, BATCH_SIZE = 55_000, 12, 256


def get_config(variant="1.58"):
    check_name(variant, (*RADII, "fashion_mnist", "cifar10"))
    config = default_config()
    config.objective = "classification"
    config.data.name = "mnist" if variant in RADII else variant
    config.model.stages = ({"num_blocks": 12, "hidden": (512,), "activation": "relu", "kind": "potential", "actnorm": False},)
    config.model.coeff = 0.95  # 1 - mu
    margin = float(variant) if variant in RADII else 36 / 255
    config.classifier.update({"mean": (0.0,), "std": (1.0,), "head": "linear", "margin": margin, "temperature": 0.25})
    config.optimizer.update({"name": "muon", "momentum": 0.95, "nesterov": True, "weight_decay": 0.05})
    config.optimizer.update({"learning_rate": 1e-2, "warmup_steps": 100, "b2": 0.999, "clip_norm": 0.0})
    epoch = TRAIN_EXAMPLES // BATCH_SIZE
    config.training.update({"total_steps": EPOCHS * epoch, "batch_size": BATCH_SIZE, "eval_every_steps": epoch})
    config.training.update({"ema_decay": 0.995, "eval_examples": 5000, "log_every_steps": 50})
    config.evaluation.radii = RADII.get(variant, (36 / 255, 72 / 255, 108 / 255))
    return config
