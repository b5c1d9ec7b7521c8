"""What an activation takes that overwrites its operand, against one that does not, by the compiler's emitters of fusions.

    python benchmarks/in_place.py [--quick]

ELU of a batch of 16 images of 16 x 16 pixels and 128 channels, on one core, a process for each of jaxlib 0.10's two emitters.
"""

import json
import os
import subprocess
import sys
from importlib.metadata import version

from _record import Timing, describe, interleave, parser, summarize, write

SHAPE = (16, 16, 16, 128)
FLAGS = {
    "older emitters": "--xla_backend_optimization_level=1 --xla_cpu_use_fusion_emitters=false",
    "newer emitters": "--xla_backend_optimization_level=1 --xla_cpu_use_fusion_emitters=true",
}
BASELINE, IN_PLACE = "apart", "in place"


def measure(turns):
    """Prints the timings of this process, pinned to one core."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, [min(os.sched_getaffinity(0))])
    import jax

    from iresnet_jax.maths.activations import elu

    functions = {}
    for name, donated in ((BASELINE, ()), (IN_PLACE, (0,))):
        apply = jax.jit(elu, donate_argnums=donated)
        state = {"x": jax.random.normal(jax.random.key(0), SHAPE)}
        functions[name] = lambda apply=apply, state=state: state.update(x=jax.block_until_ready(apply(state["x"])))
    print(json.dumps({name: timing.seconds for name, timing in interleave(functions, turns=turns).items()}))


def main():
    options = parser(__doc__)
    options.add_argument("--measure", type=int, metavar="TURNS", help="what a process for one emitter is told")
    arguments = options.parse_args()
    if arguments.measure:
        measure(arguments.measure)
        return
    if not version("jaxlib").startswith("0.10."):
        raise SystemExit("error: jaxlib 0.10 alone has both emitters: install it to compare them")
    results = {}
    for emitters, flags in FLAGS.items():
        command = [sys.executable, __file__, "--measure", "10" if arguments.quick else "300"]
        environment = {**os.environ, "XLA_FLAGS": flags}
        done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
        timings = {name: Timing(tuple(seconds)) for name, seconds in json.loads(done.stdout).items()}
        print(f"{emitters}: {describe(timings, BASELINE)}")
        results[emitters] = summarize(timings, BASELINE)
    write("in_place", arguments, {"shape": SHAPE, "flags": FLAGS}, results)


if __name__ == "__main__":
    main()
