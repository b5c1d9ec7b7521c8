"""Classification of MNIST, sized for a CPU.

    python train.py --config=configs/mnist_classification.py --workdir=runs/mnist_classification

Variants after a colon: a number is the coefficient c in place of .9, such as :0.7; :vanilla is the unconstrained twin, and
:batchnorm an ordinary residual network with BatchNorm in its branches.

At c = .9 49 of 10,000 test images are wrong, .49 %, after 27 minutes on one core (benchmarks/results/mnist_classification), and
45 of the unconstrained twin. The paper reports .40 % and .38 %, of a network of 21 blocks.
"""

from iresnet_jax.runs.config import default_config, set_variant


def get_config(variant="0.9"):
    config = default_config()
    config.objective = "classification"
    config.data.name = "mnist"
    block = {"kernel_sizes": (3, 3), "activation": "elu"}
    config.model.stages = (  # 14 x 14 with 24 channels, then 7 x 7 with 96
        {**block, "num_blocks": 2, "hidden": (32,), "squeeze": 2},
        {**block, "num_blocks": 4, "hidden": (64,), "squeeze": 2, "preactivation": True},
    )
    set_variant(config, variant)
    config.classifier.update({"pad_channels": 5, "mean": (0.1307,), "std": (0.3081,), "label_smoothing": 0.1})
    config.augmentation.crop_padding = 2
    config.optimizer.update({"name": "muon", "momentum": 0.95, "nesterov": True, "learning_rate": 0.02, "weight_decay": 0.1})
    config.training.update({"minutes": 12.0, "batch_size": 128, "eval_every_steps": 500, "log_every_steps": 100})
    config.training.update({"ema_decay": 0.998, "eval_examples": 5000})
    config.references.values = (("i-ResNet, c = .9 (Behrmann et al. 2019), % error", 0.40),)
    return config
