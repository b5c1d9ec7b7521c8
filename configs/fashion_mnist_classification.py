"""Classification of Fashion-MNIST, sized for a CPU.

    python train.py --config=configs/fashion_mnist_classification.py
    --workdir=runs/fashion_mnist_classification

Variants after a colon: a number is the coefficient c in place of .9, such as :0.7; :vanilla is the
unconstrained twin, at a learning rate of its own.

At c = .9 770 of 10,000 test images are wrong, 7.70 %
(benchmarks/results/fashion_mnist_classification), and 766 of the unconstrained twin. Their
trainings took 137 and 98 minutes on one core that they shared with other work for most of the time.
"""

from iresnet_jax.runs.config import default_config, set_variant

TRAIN_EXAMPLES, EPOCHS, BATCH_SIZE = 55_000, 12, 128


def get_config(variant="0.9"):
    config = default_config()
    config.objective = "classification"
    config.data.name = "fashion_mnist"
    block = {"kernel_sizes": (3, 3), "activation": "elu"}
    # 14 x 14 with 16 channels, then 7 x 7 with 64
    config.model.stages = (
        {**block, "num_blocks": 8, "hidden": (32,), "squeeze": 2},
        {**block, "num_blocks": 14, "hidden": (32,), "squeeze": 2, "preactivation": True},
    )
    set_variant(config, variant)
    config.classifier.update(
        {"pad_channels": 3, "mean": (0.2860,), "std": (0.3530,), "label_smoothing": 0.1}
    )
    config.augmentation.update({"crop_padding": 2, "flip": True})
    # Without the constraint a rate of .1 learns faster than .3, which makes averages of the
    # parameters useless.
    rate = 0.3 if config.constraint.norms != "none" else 0.1
    config.optimizer.update(
        {
            "name": "sgd",
            "learning_rate": rate,
            "nesterov": True,
            "weight_decay": 5e-4,
            "clip_norm": 0.0,
        }
    )
    epoch = TRAIN_EXAMPLES // BATCH_SIZE
    config.training.update(
        {"total_steps": EPOCHS * epoch, "batch_size": BATCH_SIZE, "eval_every_steps": 2 * epoch}
    )
    config.training.update({"ema_decay": 0.998, "eval_examples": 5000, "log_every_steps": 100})
    return config
