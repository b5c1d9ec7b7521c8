"""Density of Fashion-MNIST as it is: 28 x 28 x 1, 256 grey levels, 55,000 images for training and
10,000 for the test.

    python train.py --config=configs/fashion_mnist_density.py --workdir=runs/fashion_mnist_density

Test 2.915 +- .008 bits/dim after an hour of two cores, 10,789 steps
(benchmarks/results/fashion_mnist_density). Validation was at 2.948, 2.930, 2.903 and 2.887 after
4000, 6000, 8000 and 10,000 of them.
"""

from iresnet_jax.runs.config import default_config


def get_config():
    config = default_config()
    config.data.name = "fashion_mnist"
    # The network of mnist_density.py.
    convolutional = {
        "kernel_sizes": (3, 3),
        "activation": "clipswish",
        "squeeze": 2,
        "positional_bias": True,
    }
    config.model.stages = (
        {**convolutional, "num_blocks": 10, "hidden": (48,)},
        {**convolutional, "num_blocks": 6, "hidden": (64,)},
        {"num_blocks": 6, "hidden": (64,), "activation": "clipswish"},
    )
    config.model.update({"coeff": 0.95, "prior": "logistic", "sharpness": 1.0})
    config.preprocessing.update({"transform": "equalize", "alpha": 1e-6})
    config.logdet.update({"kind": "krylov", "num_terms": 6})
    config.optimizer.update(
        {"name": "muon", "momentum": 0.95, "nesterov": True, "weight_decay": 0.05}
    )
    config.optimizer.update({"learning_rate": 0.02, "warmup_steps": 200})
    config.training.update(
        {"minutes": 60.0, "batch_size": 32, "eval_every_steps": 2000, "eval_examples": 512}
    )
    # 10,000 images: neither contributes much
    config.evaluation.update({"num_dequantisations": 1, "num_probe_draws": 2})
    return config
