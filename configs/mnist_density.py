"""Density of MNIST as it is: 28 x 28 x 1, 256 grey levels, 55,000 images for training and 10,000 for the test.

    python train.py --config=configs/mnist_density.py --workdir=runs/mnist_density

Test 1.115 +- .003 bits/dim after an hour on 2 cores (benchmarks/results/mnist_density, whose clock also counts 10 minutes in
which the process was stopped). The paper reports 1.06, Residual Flows .970.
"""

from iresnet_jax.training.config import default_config, estimator_settings


def get_config():
    config = default_config()
    config.data.name = "mnist"
    convolutional = {"kernel_sizes": (3, 3), "activation": "clipswish", "squeeze": 2, "positional_bias": True}
    config.model.stages = (
        {**convolutional, "num_blocks": 10, "hidden": (48,)},
        {**convolutional, "num_blocks": 6, "hidden": (64,)},
        {"num_blocks": 4, "hidden": (64,), "activation": "clipswish"},
    )
    config.model.coeff = 0.95
    config.model.prior = "logistic"
    config.preprocessing.update({"transform": "equalize", "alpha": 1e-6})
    # Blocks contract as much as they may. At c = .97 a series of 8 terms trained what it cut off, see benchmarks/README.md.
    config.logdet = estimator_settings(kind="krylov", num_terms=6)
    config.optimizer.update({"name": "adamw", "learning_rate": 3e-3, "weight_decay": 0.05, "warmup_steps": 200})
    config.training.update({"total_steps": 12_000, "batch_size": 32, "eval_every_steps": 2000, "eval_examples": 1024})
    config.evaluation.update({"num_dequantisations": 1, "num_probe_draws": 2})  # 10,000 images: neither contributes much
    config.references.values = (("i-ResNet (Behrmann et al. 2019)", 1.06), ("Residual Flow (Chen et al. 2019)", 0.970))
    return config
