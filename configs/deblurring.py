"""Reconstruction of blurred and noisy images by the inverse of a network (Arndt et al. 2023, 2024), a data set after the colon.

    python train.py --config=configs/deblurring.py:digits --workdir=runs/deblurring_digits
    python train.py --config=configs/deblurring.py:fashion_mnist --config.model.coeff=0.99 --config.inverse_problem.noise=0.01

Noise is amplified at most 1 / (1 - L) times, L = config.model.coeff. --config.inverse_problem.forward_share=1 trains F alone,
which makes L the regularisation parameter: the less noise, the larger the best one. --config.constraint.norms=none trains an
ordinary network from measurements to images instead.
"""

from iresnet_jax.runs.config import check_name, default_config

WIDTHS = {"digits": 1.0, "mnist": 1.5, "fashion_mnist": 1.5}  # of the blur, in pixels


def get_config(data="digits"):
    check_name(data, WIDTHS)
    config = default_config()
    config.objective = "inversion"
    config.data.name = data
    block = {"kernel_sizes": (3, 1, 3), "activation": "elu", "squeeze": 2, "positional_bias": data == "digits"}
    config.model.stages = ({**block, "num_blocks": 4, "hidden": (64, 64)},)
    config.model.update({"coeff": 0.95, "budget": "network"})
    config.inverse_problem.update({"width": WIDTHS[data], "noise": 0.05})
    config.optimizer.update({"learning_rate": 3e-3, "clip_norm": 0.0})
    # A block's inverse is a loop, which gains nothing from blocks that are written out, and they take long to compile.
    config.training.update({"total_steps": 2000, "batch_size": 64, "ema_decay": 0.99, "log_every_steps": 100, "blocks": "scan"})
    if data != "digits":  # 12 times as many pixels
        config.training.update({"total_steps": 5000, "batch_size": 32, "eval_examples": 512})
    return config
