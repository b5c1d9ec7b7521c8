"""How well a trained model's scores tell other images from its test images: areas under the ROC curve.

    python benchmarks/ood.py --workdir runs/digits_classification [--against rotated noise] [--quick]

The scores, each with its definition, are those of `iresnet_jax.evaluation.ood`. The others are "rotated", the test images by a
quarter turn, "noise", or the test images of any data set by its name, brought to the model's size.
"""

from dataclasses import asdict
from pathlib import Path

from _record import parser, table, write

from iresnet_jax.evaluation import ood, trained


def main():
    options = parser(__doc__)
    options.add_argument("--workdir", type=Path, required=True, metavar="DIR", help="folder of a training run")
    options.add_argument("--against", nargs="+", default=list(ood.OTHERS), metavar="NAME", help="what to tell apart")
    arguments = options.parse_args()
    loaded = trained.load(arguments.workdir)
    num = 64 if arguments.quick else ood.NUM_EXAMPLES
    how = (loaded.config.evaluation, loaded.config.seed)
    options = {"num": num, "data_dir": loaded.config.data.data_dir}
    results = [ood.compare(loaded, loaded.source, other, *how, **options) for other in arguments.against]
    names = list(results[0].scores)
    rows = [(result.other, *(f"{result.scores[name].auroc:.4f}" for name in names)) for result in results]
    print(table(rows, ("against", *names)))
    for name in names:
        print(f"{name}: {ood.DEFINITIONS[name]}")
    settings = {"data": loaded.config.data.name, "step": loaded.step}
    name = f"ood_{loaded.config.data.name}_{loaded.config.objective}"
    write(name, arguments, settings, [asdict(result) for result in results])


if __name__ == "__main__":
    main()
