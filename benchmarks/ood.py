"""How well a trained model's scores tell other images from its test images: areas under the ROC curve.

    python benchmarks/ood.py --workdir runs/digits_classification [--against rotated noise] [--quick]

The scores, each with its definition, are those of `iresnet_jax.evaluation.ood`. The others are "rotated", the test images by a
quarter turn, "noise", or the test images of any data set by its name, brought to the model's size.
"""

from dataclasses import asdict

from _models import load, model_parser
from _record import write

from iresnet_jax.evaluation import ood


def main():
    options = model_parser(__doc__)
    options.add_argument("--against", nargs="+", default=list(ood.OTHERS), metavar="NAME", help="what to tell apart")
    arguments = options.parse_args()
    run = load(arguments.workdir)
    config, num = run.config, 64 if arguments.quick else ood.NUM_EXAMPLES

    def compare(other):
        folder = config.data.data_dir
        return asdict(ood.compare(run.model, run.data, other, config.evaluation, config.seed, num=num, data_dir=folder))

    results = [compare(other) for other in arguments.against]
    settings = {"data": config.data.name, "step": run.step}
    write(f"ood_{config.data.name}_{config.objective}", arguments, settings, results)


if __name__ == "__main__":
    main()
