"""Residual Flows (Chen et al. 2019): LipSwish, c = .98, an unbiased log-determinant and an average
of the parameters.

    python train.py --config=configs/residual_flow_density.py:cifar10
    --workdir=runs/residual_flow_cifar10

Names: mnist (.970 bits/dim reported), cifar10 (3.28), downsampled_imagenet/32x32 (4.01). Three
scales of 16 blocks with 512 channels, of which 28 x 28 images have room for two, and four dense
blocks at the end. Made for accelerators: by its plan (docs/clusters.md) a step of 64 images of
CIFAR-10 takes 7.0 GB on each of four TPU v5e chips.
"""

from iresnet_jax.runs.config import check_name, default_config

REPORTED = {"mnist": 0.970, "cifar10": 3.28, "downsampled_imagenet/32x32": 4.01}
WIDTH, DENSE_WIDTH = 512, 128


def get_config(data="mnist"):
    check_name(data, REPORTED)
    config = default_config()
    config.data.name = data
    block = {
        "hidden": (WIDTH, WIDTH),
        "kernel_sizes": (3, 1, 3),
        "activation": "lipswish",
        "preactivation": True,
    }
    config.model.stages = (
        {**block, "num_blocks": 1, "preactivation": False, "squeeze": 2},
        {**block, "num_blocks": 15},
        *({**block, "num_blocks": 16, "squeeze": 2} for _ in range(1 if data == "mnist" else 2)),
        {
            "num_blocks": 4,
            "hidden": (DENSE_WIDTH,),
            "activation": "lipswish",
            "preactivation": True,
        },
    )
    config.model.coeff = 0.98
    config.constraint.num_steps = 5
    config.preprocessing.update({"transform": "logit", "alpha": 1e-6 if data == "mnist" else 0.05})
    config.logdet.update(
        {"kind": "roulette", "distribution": "poisson", "parameter": 2.0, "num_exact_terms": 2}
    )
    config.optimizer.update(
        {
            "name": "adam",
            "learning_rate": 1e-3,
            "b1": 0.9,
            "b2": 0.99,
            "schedule": "constant",
            "warmup_steps": 1000,
            "clip_norm": 1.0,
        }
    )
    config.training.update(
        {"total_steps": 250_000, "batch_size": 64, "ema_decay": 0.999, "eval_every_steps": 5_000}
    )
    config.references.values = (("Residual Flow (Chen et al. 2019)", REPORTED[data]),)
    return config
