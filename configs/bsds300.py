"""Density of 8 x 8 patches of natural photographs, BSDS300 (Papamakarios et al. 2017).

    python train.py --config=configs/bsds300.py --config.data.name=npy:FOLDER --workdir=runs/bsds300

FOLDER holds train.npy, validation.npy and test.npy, arrays of shape (n, 63), as in
BSDS300/BSDS300.hdf5 of https://zenodo.org/record/1161203 (data.tar.gz). Patches differ in contrast
by orders of magnitude and in their edges, which a mixture of 32 normal distributions has from the
start.

Test -156.73 +- .14 nats after 96,000 steps, 62 minutes of one core, 146 of two
(benchmarks/results/bsds300). The patches were cut anew from the same photographs, on which a normal
distribution has .32 nats less, and their mirror images were added to the training data:

    patches = np.concatenate([train, -train.sum(1, keepdims=True)], 1).reshape(-1, 8, 8)
    mirrored = patches[:, :, ::-1].reshape(-1, 64)[:, :63]
    np.save("bsds300/train.npy", np.concatenate([train, mirrored]))
"""

from iresnet_jax.runs.config import default_config


def get_config():
    config = default_config()
    config.data.name = "npy:bsds300"
    config.model.update(
        {
            "coeff": 0.97,
            "prior": "mixture",
            "prior_components": 32,
            "last_scale": 0.01,
            "sharpness": 3.0,
        }
    )
    config.model.stages = ({"num_blocks": 20, "hidden": (256,), "activation": "clipswish"},)
    config.preprocessing.transform = "whiten"
    config.logdet.update({"kind": "krylov", "num_terms": 4})
    config.optimizer.update(
        {"name": "muon", "momentum": 0.95, "nesterov": True, "weight_decay": 0.05}
    )
    config.optimizer.update({"learning_rate": 0.01, "warmup_steps": 500})
    config.training.update(
        {"total_steps": 100_000, "batch_size": 256, "eval_examples": 2000, "blocks": "unroll"}
    )
    config.training.update({"actnorm_examples": 20_000, "eval_every_steps": 2000})
    config.evaluation.logdet.update({"kind": "krylov", "num_terms": 12})
    config.references.values = (
        *(
            ("normal distribution", -96.67),
            ("RealNVP", -153.28),
            ("MAF", -155.69),
            ("MAF MoG", -156.36),
        ),
        *(("FFJORD", -157.40), ("neural spline flow", -157.54)),
    )
    return config
