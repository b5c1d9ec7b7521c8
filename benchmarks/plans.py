"""Plans of all configs: does a training step fit a TPU machine, what does it exchange, how long does it compile here.

    python benchmarks/plans.py [--topology v5e:2x2] [--configs iresnet_density:cifar10 ...] [--quick]

Needs the extra ``tpu``. Batches are those of the configs. Plans that are in the record already are kept, each with its commit;
to make one anew, take it out of the record or write elsewhere with --output.
"""

import dataclasses
import json

from _models import config_file, read_config
from _record import RESULTS, made_with, parser, write

from iresnet_jax.runs.planning import plan, topologies

NAMES = (
    *("digits_density", "digits_hybrid", "mnist_density", "fashion_mnist_density", "toy_2d:moons"),
    *("digits_classification", "mnist_classification", "fashion_mnist_classification"),
    *("iresnet_density:mnist", "iresnet_density:cifar10"),
    *("residual_flow_density:mnist", "residual_flow_density:cifar10", "residual_flow_density:downsampled_imagenet/32x32"),
    *("iresnet_classification:mnist", "iresnet_classification:cifar10", "iresnet_classification:cifar10_released"),
    "iresnet_classification:cifar100",
)


def main():
    options = parser(__doc__)
    options.add_argument("--topology", default="v5e:2x2", help="TPU topology (v5e:2x2)")
    options.add_argument("--configs", nargs="+", default=NAMES, metavar="NAME", help="of configs/, with what follows a colon")
    options.add_argument("--largest-batch", action="store_true", help="find the largest batch that fits, too")
    arguments = options.parse_args()
    path = arguments.output or RESULTS / "plans.json"
    made = json.loads(path.read_text())["results"] if path.exists() and not arguments.quick else []
    done = {(one["config"], one["topology"]) for one in made}
    for name in ("digits_density",) if arguments.quick else arguments.configs:
        if (name, arguments.topology) not in done:
            machine = topologies.machine(arguments.topology)
            own = plan.make(read_config(config_file(name)), machine, find_largest=arguments.largest_batch)
            print(f"{name}: {own}\n", flush=True)
            made.append({"config": name, **dataclasses.asdict(own), **made_with(("jaxlib", "libtpu"))})
            write("plans", arguments, {}, made, is_shown=True)


if __name__ == "__main__":
    main()
