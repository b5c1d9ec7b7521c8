"""Classification of CIFAR-10, sized for a CPU.

    python train.py --config=configs/cifar10_classification.py --workdir=runs/cifar10_classification

Variants after a colon: a number is the coefficient c in place of .9, such as :0.7; :vanilla is the
unconstrained twin. Each takes 100 minutes, whatever the machine.
"""

from iresnet_jax.runs.config import default_config, set_variant


def get_config(variant="0.9"):
    config = default_config()
    config.objective = "classification"
    config.data.name = "cifar10"
    # After 200 steps maxmin was 4 to 7 points of accuracy ahead of elu, with BatchNorm as well (no
    # records).
    block = {"kernel_sizes": (3, 1), "activation": "maxmin"}
    config.model.stages = (  # 16 x 16 with 16 channels, 8 x 8 with 64, 4 x 4 with 256
        {**block, "num_blocks": 4, "hidden": (80,), "squeeze": 2},
        {**block, "num_blocks": 4, "hidden": (168,), "squeeze": 2, "preactivation": True},
        {**block, "num_blocks": 3, "hidden": (80,), "squeeze": 2, "preactivation": True},
    )
    config.model.budget = "block"  # c bounds g, not each of its two layers
    set_variant(config, variant)
    config.classifier.update(
        {"pad_channels": 1, "mean": (0.4914, 0.4822, 0.4465), "std": (0.2470, 0.2435, 0.2616)}
    )
    config.classifier.label_smoothing = 0.1
    config.augmentation.update({"crop_padding": 4, "flip": True})
    config.optimizer.update(
        {
            "name": "muon",
            "momentum": 0.95,
            "nesterov": True,
            "learning_rate": 0.02,
            "weight_decay": 0.1,
        }
    )
    config.training.update(
        {"minutes": 100.0, "batch_size": 128, "ema_decay": 0.998, "eval_examples": 5000}
    )
    config.training.update({"eval_every_steps": 500, "log_every_steps": 100})
    return config
