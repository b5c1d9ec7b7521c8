"""What an activation takes that overwrites its operand, against one that does not, by the compiler's emitters of fusions.

    python benchmarks/in_place.py [--quick]

ELU of a batch of 16 images of 16 x 16 pixels and 128 channels, on one core, a process for each of jaxlib 0.10's two emitters.
"""

from importlib.metadata import version

import jax
from _processes import core_counts, workers
from _record import Timing, interleave, parser, summarize, write

from iresnet_jax.maths.activations import elu

SHAPE = (16, 16, 16, 128)
FLAGS = {
    "older emitters": "--xla_backend_optimization_level=1 --xla_cpu_use_fusion_emitters=false",
    "newer emitters": "--xla_backend_optimization_level=1 --xla_cpu_use_fusion_emitters=true",
}
BASELINE = "apart"


class Activation:
    """ELU on a copy and in place, in a process with some flags."""

    def measure(self, turns):
        """Seconds of either."""
        functions = {}
        for name, donated in ((BASELINE, ()), ("in place", (0,))):
            apply = jax.jit(elu, donate_argnums=donated)
            state = {"x": jax.random.normal(jax.random.key(0), SHAPE)}
            functions[name] = lambda apply=apply, state=state: state.update(x=jax.block_until_ready(apply(state["x"])))
        return {name: timing.seconds for name, timing in interleave(functions, turns=turns).items()}


def main():
    arguments = parser(__doc__).parse_args()
    if not version("jaxlib").startswith("0.10."):
        raise SystemExit("error: jaxlib 0.10 alone has both emitters: install it to compare them")
    results = {}
    with workers() as start:
        for emitters, flags in FLAGS.items():
            worker = start(core_counts()[1], "in_place", "Activation", {}, {"XLA_FLAGS": flags})
            seconds = worker.ask("measure", turns=10 if arguments.quick else 300)
            results[emitters] = summarize({name: Timing(tuple(own)) for name, own in seconds.items()}, BASELINE)
    write("in_place", arguments, {"shape": SHAPE, "flags": FLAGS}, results)


if __name__ == "__main__":
    main()
