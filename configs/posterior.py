"""Posteriors of simulators, one after the colon, whose truth is known.

    python train.py --config=configs/posterior.py:sbi_two_moons --workdir=runs/sbi_two_moons

Names: linear_gaussian (10-D, Gaussian) and sbi_two_moons (2-D, two crescents a hundredth wide), tasks T.1 and T.8 of the SBI
benchmark (Lueckmann et al. 2021). Simulations are endless: every step sees new ones. Each report shows the divergence from the
true posterior and how well a classifier tells samples of the model from true ones (C2ST; .5 is indistinguishable).
"""

from iresnet_jax.data.simulators import SIMULATORS
from iresnet_jax.runs.config import check_name, default_config, estimator_settings


def get_config(simulator="sbi_two_moons"):
    check_name(simulator, SIMULATORS)
    config = default_config()
    config.data.name = simulator
    config.model.coeff = 0.97
    config.logdet.kind = "exact"  # few dimensions: the whole Jacobian is cheaper than a series
    config.optimizer.update({"name": "muon", "learning_rate": 1e-2, "momentum": 0.95, "nesterov": True})
    config.training.update({"log_every_steps": 50, "eval_examples": 10_000})
    config.evaluation.update({"batch_size": 2000, "num_dequantisations": 1, "num_probe_draws": 1})
    config.evaluation.logdet = estimator_settings(kind="exact")
    # The crescents lie at linear functions of parameters and observation, which a logit of the prior's box would bend: it left
    # twice the divergence.
    config.preprocessing.transform = "standardize"
    if simulator == "linear_gaussian":
        config.model.stages = ({"num_blocks": 2, "hidden": (32,), "activation": "clipswish"},)
        config.model.last_scale = 0.1
        config.training.update({"total_steps": 2000, "batch_size": 256, "eval_every_steps": 500})
        config.evaluation.num_posteriors = 1  # the classifier of 10-D samples takes ten times as long
    else:
        config.model.stages = ({"num_blocks": 20, "hidden": (64,), "activation": "clipswish"},)
        config.constraint.num_steps = 2
        config.training.update({"total_steps": 30_000, "minutes": 4.5, "batch_size": 512})
    return config
