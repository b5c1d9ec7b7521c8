"""Which kind of branch gives the best density at equal budget of the constant, number of parameters and time?

    python benchmarks/branches.py [--kinds feedforward sandwich] [--data digits checkerboard rings] [--quick]

Densities by configs/digits_density.py and configs/toy_2d.py, but for their branches. Every block has the same largest
certified Lipschitz constant. The hidden widths of each stage are scaled until its branches have about as many parameters as
those of the config. All train for the same minutes, compilation included, and are measured in the state of their best
validation, with exact log-determinants. Differences are those from the kind that was first, seed by seed. Each run is saved as
soon as it is there, and the same command resumes.
"""

import functools
import itertools
import math
import statistics
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
from _models import config_file, read_config
from _record import parser, resume

from iresnet_jax.evaluation import likelihood
from iresnet_jax.models.architecture import FlowSpec, StageSpec
from iresnet_jax.models.density import Density
from iresnet_jax.runs import loop
from iresnet_jax.runs.config import Config
from iresnet_jax.runs.metrics import read_metrics
from iresnet_jax.runs.model_from_config import model_spec
from iresnet_jax.runs.trained_run import load

# Branches of the stages, in place of those of the configs.
KINDS: dict[str, dict[str, Any]] = {
    "feedforward": {"kind": "feedforward", "activation": "clipswish"},
    "feedforward_elu": {"kind": "feedforward", "activation": "elu"},
    "sandwich": {"kind": "sandwich", "activation": "softplus4"},
    "sandwich_elu": {"kind": "sandwich", "activation": "elu"},
}
CONFIGS = {"digits": "digits_density", "checkerboard": "toy_2d:checkerboard", "rings": "toy_2d:rings"}
COEFF = 0.9  # of every block
EQUAL = 0.1  # relative difference of parameters, and of times
PERCENT = range(10, 301, 2)  # of the hidden widths
NO_LIMIT = 10**6  # updates, where time is the limit
VERSIONS = ("iresnet_jax", "jax")
QUICK = ("training.total_steps=4", "training.minutes=0.0", "training.blocks=scan", "training.eval_examples=200")


def num_parameters(flow: FlowSpec, place: int) -> int:
    """Parameters of the branches of a stage."""
    shapes = jax.eval_shape(flow.layout[place].initial_weights, jax.random.key(0))
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes))


def with_branches(flow: FlowSpec, kind: str) -> tuple[StageSpec, ...]:
    """The stages with branches of a kind, each of the width whose number of parameters is nearest to what it was.

    Raises:
        ValueError: If one is not within 10 % of it.
    """
    chosen = []
    for place, stage in enumerate(flow.stages):
        target, stages = num_parameters(flow, place), {}
        for percent in PERCENT:
            hidden = tuple(max(round(width * percent / 100), 1) for width in stage.hidden)
            changed = replace(stage, hidden=hidden, **KINDS[kind])
            every = (*flow.stages[:place], changed, *flow.stages[place + 1 :])
            stages[changed] = abs(num_parameters(replace(flow, stages=every), place) / target - 1)
        best = min(stages, key=stages.__getitem__)
        if stages[best] > EQUAL:
            raise ValueError(f"no width of {kind} has the parameters of stage {place} within {EQUAL:.0%}")
        chosen.append(best)
    return tuple(chosen)


def settings_of(data: str, kind: str, seed: int, minutes: float, *, quick: bool) -> Config:
    """The config of a run."""
    overrides = (f"seed={seed}", "model.budget=block", f"model.coeff={COEFF}")
    limits = QUICK if quick else (f"training.minutes={minutes}", f"training.total_steps={NO_LIMIT}")
    config = read_config(config_file(CONFIGS[data]), *overrides, *limits)
    flow = model_spec(config, loop.load_data(config.data)).flow
    return replace(config, model=replace(config.model, stages=with_branches(flow, kind)))


def measure(data: str, kind: str, seed: int, minutes: float, *, quick: bool) -> dict[str, Any]:
    """Trains a density and measures it: loss in bits/dim or nats, and what should be equal."""
    config = settings_of(data, kind, seed, minutes, quick=quick)
    with tempfile.TemporaryDirectory() as folder:
        loop.train(config, Path(folder), say=print)
        run, records = load(Path(folder)), read_metrics(Path(folder))
    evaluation = replace(config.evaluation, logdet=replace(config.evaluation.logdet, kind="exact"))
    examples, model = run.test_examples()[:50] if quick else run.test_examples(), run.model
    assert isinstance(model, Density)
    found, certificate, flow = likelihood.measure(model, examples, evaluation, seed), model.certificate(), model.spec.flow
    return {
        "branches": KINDS[kind],
        "loss": -float(found.log_prob.mean()) * model.spec.unit_of_a_nat,
        "largest_constant": certificate.max_block,
        "certified": certificate.certified,
        "parameters": sum(num_parameters(flow, place) for place in range(len(flow.stages))),
        "hidden": [list(stage.hidden) for stage in flow.stages],
        "steps": records[-1]["step"],
        "best_step": run.step,
        "seconds": records[-1]["wall_time_s"],
    }


def summarize(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Mean losses of each kind, and by how much they differ from those of the first; whether all else was equal."""
    summary: dict[str, Any] = {}
    kinds = list(dict.fromkeys(run["kind"] for run in runs))
    for data in CONFIGS:
        of = {(run["kind"], run["seed"]): run for run in runs if run["data"] == data}
        for kind in kinds:
            pairs = [(run, of[kinds[0], seed]) for (own, seed), run in of.items() if own == kind and (kinds[0], seed) in of]
            if pairs:
                differences = [run["loss"] - first["loss"] for run, first in pairs]
                ratios = [run[what] / first[what] for run, first in pairs for what in ("parameters", "seconds")]
                summary.setdefault(data, {})[kind] = {
                    "loss": statistics.mean(run["loss"] for run, _ in pairs),
                    "difference": statistics.mean(differences),
                    "differences": differences,
                    "equal": all(abs(ratio - 1) <= EQUAL for ratio in ratios),
                }
    return summary


def main():
    options = parser(__doc__)
    options.add_argument("--kinds", nargs="+", choices=KINDS, default=["feedforward", "sandwich"])
    options.add_argument("--data", nargs="+", choices=CONFIGS, default=list(CONFIGS))
    options.add_argument("--seeds", type=int, default=3, metavar="N", help="trainings of each")
    options.add_argument("--minutes", type=float, default=2.0, metavar="M", help="of each training")
    arguments = options.parse_args()
    quick, data = arguments.quick, arguments.data[: 1 if arguments.quick else None]
    settings = {"coeff": COEFF, "configs": CONFIGS, "kinds": KINDS, "minutes": arguments.minutes}
    runs = itertools.product(range(1 if quick else arguments.seeds), data, arguments.kinds)
    identities = ({"data": name, "kind": kind, "seed": seed} for seed, name, kind in runs)
    measured = functools.partial(measure, minutes=arguments.minutes, quick=quick)
    resume("branches", arguments, settings, identities, measured, summarize, VERSIONS)


if __name__ == "__main__":
    main()
