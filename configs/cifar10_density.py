"""Density of CIFAR-10, 32 x 32 x 3 and 256 levels of each colour, sized for a CPU.

    python train.py --config=configs/cifar10_density.py --workdir=runs/cifar10_density

JPEG copies of its images, whose bits/dim compare with no published ones: test 3.017 +- .004
bits/dim after 60 minutes of one core, 3402 steps (benchmarks/results/cifar10_density). Validation
was at 3.432, 3.163 and 3.039 after 1000, 2000 and all.
"""

from iresnet_jax.runs.config import default_config


def get_config():
    config = default_config()
    config.data.name = "cifar10"
    convolutional = {
        "kernel_sizes": (3, 3),
        "activation": "clipswish",
        "squeeze": 2,
        "positional_bias": True,
    }
    config.model.stages = (
        {**convolutional, "num_blocks": 8, "hidden": (32,)},
        {**convolutional, "num_blocks": 6, "hidden": (64,)},
        {"num_blocks": 4, "hidden": (16,), "activation": "clipswish"},
    )
    config.model.update({"coeff": 0.95, "prior": "logistic", "sharpness": 1.0})
    config.preprocessing.update({"transform": "equalize", "alpha": 1e-6})
    config.logdet.update({"kind": "krylov", "num_terms": 6})
    config.optimizer.update(
        {"name": "muon", "momentum": 0.95, "nesterov": True, "weight_decay": 0.05}
    )
    config.optimizer.update({"learning_rate": 0.02, "warmup_steps": 200})
    config.training.update(
        {"minutes": 60.0, "batch_size": 32, "eval_every_steps": 1000, "eval_examples": 512}
    )
    # half the time of 20, and unbiased
    config.evaluation.logdet.update({"kind": "roulette", "num_exact_terms": 10})
    # 10,000 images: neither contributes much
    config.evaluation.update({"num_dequantisations": 1, "num_probe_draws": 2})
    return config
