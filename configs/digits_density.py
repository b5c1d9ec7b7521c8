"""Density of scikit-learn's 8x8 handwritten digits: 17 grey levels, 1257 training images.

    python train.py --config=configs/digits_density.py --workdir=runs/digits_density

Test 1.798 +- .012 bits/dim after 73 seconds on 2 cores, and some 10 until the first step
(benchmarks/results/digits_density).

With :variational behind it the noise of dequantisation is trained, too: test 1.735 +- .013
bits/dim, and 1.686 by the bound of 64 weighted draws, after 171 seconds
(benchmarks/results/digits_density_variational).
"""

from iresnet_jax.data.augment import TRANSFORMATIONS
from iresnet_jax.runs.config import check_name, default_config


def get_config(noise="uniform"):
    check_name(noise, ("uniform", "variational"))
    config = default_config()
    config.model.stages = (
        # Convolutions on 2x2 patches find strokes anywhere; a bias for each position tells them
        # where the border is.
        {
            "num_blocks": 8,
            "hidden": (48,),
            "kernel_sizes": (3, 3),
            "activation": "clipswish",
            "squeeze": 2,
            "positional_bias": True,
        },
        {"num_blocks": 4, "hidden": (64,), "activation": "clipswish"},
    )
    config.model.update({"coeff": 0.9, "budget": "block", "prior": "logistic", "sharpness": 1.0})
    # Validation was at 1.854 bits/dim, with transform = logit at 1.885, before images were
    # transformed.
    config.preprocessing.update({"transform": "equalize", "alpha": 1e-6, "entrywise": True})
    # The noise of estimated traces seems to regularise: of the logit validation was at 1.885, and
    # at 1.911 with exact_trace.
    config.logdet.update({"kind": "krylov", "num_terms": 4, "exact_trace": False})
    # Without transformations the model learns 1257 images by heart: validation is at 1.83 and gets
    # worse after 5500 steps. With all of them it is at 1.807 after 4000, by Muon at 1.788.
    config.augmentation.transformations = tuple(TRANSFORMATIONS)
    config.optimizer.update(
        {
            "name": "muon",
            "momentum": 0.95,
            "nesterov": True,
            "learning_rate": 0.03,
            "weight_decay": 0.05,
        }
    )
    config.training.update(
        {"total_steps": 2800, "batch_size": 64, "log_every_steps": 100, "eval_every_steps": 1000}
    )
    # steps take 11 % longer than unrolled ones, and the first one comes 8 s earlier
    config.training.blocks = "scan"
    if noise == "variational":
        config.model.dequantization = noise
        config.training.total_steps = 4000
        config.evaluation.num_importance_draws = 64
    return config
