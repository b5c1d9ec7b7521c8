"""Density of scikit-learn's 8x8 digits (17 grey levels).

python train.py --config=configs/digits_density.py --workdir=runs/digits_density
"""

from iresnet_jax.training.config import default_config


def get_config():
    config = default_config()
    return config
