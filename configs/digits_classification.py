"""Classification of scikit-learn's 8x8 handwritten digits: 1257 training images.

    python train.py --config=configs/digits_classification.py --workdir=runs/digits_classification

Variants after a colon: a number is the coefficient c in place of .9, such as :0.7; :vanilla is the
unconstrained twin.

At c = .9 4 of 360 test digits are wrong, 1.11 %, after 75 s on 2 cores
(benchmarks/results/digits_classification).
"""

from iresnet_jax.runs.config import default_config, set_variant


def get_config(variant="0.9"):
    config = default_config()
    config.objective = "classification"
    block = {"hidden": (64, 64), "kernel_sizes": (3, 1, 3), "activation": "elu"}
    config.model.stages = (
        {**block, "num_blocks": 4, "squeeze": 2},
        {**block, "num_blocks": 4, "squeeze": 2, "preactivation": True},
    )
    set_variant(config, variant)
    config.classifier.update(
        {"pad_channels": 3, "mean": (0.305,), "std": (0.376,), "label_smoothing": 0.1}
    )
    config.augmentation.crop_padding = 1
    config.optimizer.update(
        {
            "name": "sgd",
            "learning_rate": 0.1,
            "nesterov": True,
            "weight_decay": 1e-3,
            "clip_norm": 0.0,
        }
    )
    config.training.update({"total_steps": 1500, "batch_size": 64, "ema_decay": 0.99})
    # 180 validation images cannot tell checkpoints apart: the only checkpoint is that of the last
    # step.
    config.training.update({"log_every_steps": 100, "eval_every_steps": 1500})
    return config
