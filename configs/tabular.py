"""Density of vectors in a file, such as a table of measurements: ``npy:``, ``npz:`` or ``csv:``.

    python train.py --config=configs/tabular.py --config.data.name=csv:measurements.csv
    --workdir=runs/measurements

Rows are split into training, validation and test by fraction, or by file (``csv:FOLDER`` with
train.csv, validation.csv and test.csv). Columns that begin with ``context`` are what the density is
conditional on. `iresnet_jax.fit` chooses such settings by itself.
"""

from iresnet_jax.runs.config import default_config


def get_config():
    config = default_config()
    config.data.name = "npy:data.npy"
    config.model.stages = ({"num_blocks": 10, "hidden": (128,), "activation": "clipswish"},)
    config.model.coeff = 0.97
    config.preprocessing.transform = "whiten"
    config.logdet.update({"kind": "krylov", "num_terms": 6})
    config.optimizer.update(
        {
            "name": "muon",
            "momentum": 0.95,
            "nesterov": True,
            "learning_rate": 1e-2,
            "warmup_steps": 200,
        }
    )
    config.training.update(
        {
            "total_steps": 4000,
            "batch_size": 256,
            "eval_every_steps": 200,
            "patience": 6,
            "blocks": "scan",
        }
    )
    config.evaluation.logdet.update({"kind": "krylov", "num_terms": 8})
    return config
