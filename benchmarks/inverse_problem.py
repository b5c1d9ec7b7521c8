"""Are images reconstructed better by the inverse of a network than by total variation, and does its bound on noise hold?

    python benchmarks/inverse_problem.py --data digits [--noise .01 .05 .1] [--lipschitz .5 ... .999] [--workdir DIR] [--quick]
    python benchmarks/inverse_problem.py --data digits --forward-share 1  # F learns the blur, and no inverse is trained

Trains configs/deblurring.py for every noise and every L, and the same network without constraint from measurements to images.
Beside them stand Tikhonov (with the norm or the gradient as penalty) and total variation over images in [0, 1], whose weights
are chosen on validation images as L is. All methods see the same test measurements, and their reconstructions are projected
onto [0, 1]. Errors are |found - x| / |x|, means over test images. Target: with the best L an error of at most that of total
variation, and no reconstruction of perturbed data outside its certified bound. With --workdir the same command goes on from
where it stopped.
"""

import math
import os
import tempfile
from dataclasses import asdict
from pathlib import Path

import numpy as np
from _models import config_file, load, read_config
from _record import parser, show, write
from _variational import Spectra, minimize_total_variation, tikhonov

from iresnet_jax.evaluation import inverse_problem
from iresnet_jax.models.reconstructor import Reconstructor
from iresnet_jax.runs import machine, stored_programs
from iresnet_jax.runs.loop import load_data, train
from iresnet_jax.runs.metrics import read_metrics
from iresnet_jax.runs.model_from_config import reconstructor_spec
from iresnet_jax.training.initialization import abstract_variables, num_parameters

NOISES = (0.01, 0.05, 0.1)
LIPSCHITZ = (0.5, 0.8, 0.9, 0.95, 0.99, 0.999)  # as in the papers
NUM_VALIDATION, NUM_TEST = 200, 1000  # images, at most
WEIGHTS = 10.0 ** np.arange(-6, 0.6, 0.5)
FINER = 10.0 ** np.arange(-0.25, 0.3, 0.125)  # times the best of them
COARSE_STEPS, STEPS = 200, 1000  # of total variation
VANILLA = "vanilla"


def summarize(errors):
    """Mean and standard error."""
    return {"relative_error": float(errors.mean()), "stderr": float(errors.std(ddof=1) / math.sqrt(len(errors)))}


def relative_errors(found, x):
    """``|found - x| / |x|`` of every image."""
    return np.sqrt(((found - x) ** 2).sum(axis=(1, 2)) / (x**2).sum(axis=(1, 2)))


def images_of(config, data, num_validation, num_test):
    """Validation and test images in [0, 1] and their measurements, as training and `inverse_problem.evaluate` see them."""
    measurement, found = config.inverse_problem.measurement(), {}
    for split, num in (("validation", num_validation), ("test", num_test)):
        x = np.asarray(data.held_out(split, num), np.float32) / (data.num_levels - 1)
        y = measurement.held_out(x, config.seed, split)
        found[split] = x[..., 0].astype(np.float64), y[..., 0].astype(np.float64)
    return found


def without_learning(config, images, *, quick):
    """Tikhonov and total variation, their weights chosen on validation images, and test errors of the latter by image."""
    (x, y), (x_test, y_test) = images["validation"], images["test"]
    spectra = Spectra.of(x.shape[1], x.shape[2], config.inverse_problem.width)

    def best_of_tikhonov(weights):
        return min(
            (relative_errors(tikhonov(spectra, y, weight, penalty), x).mean(), weight, penalty)
            for weight in weights
            for penalty in ("norm", "gradient")
        )

    def best_variation(weights, steps):
        return min((relative_errors(minimize_total_variation(spectra, y, w, steps), x).mean(), w) for w in weights)

    weights, finer = (WEIGHTS[4::4], np.ones(1)) if quick else (WEIGHTS, FINER)
    coarse_steps, steps = (20, 50) if quick else (COARSE_STEPS, STEPS)
    error, weight, penalty = best_of_tikhonov(best_of_tikhonov(weights)[1] * finer)
    of_tikhonov = relative_errors(tikhonov(spectra, y_test, weight, penalty), x_test)
    found = {"tikhonov": {"validation": error, "weight": weight, "penalty": penalty, **summarize(of_tikhonov)}}
    error, weight = best_variation(best_variation(weights, coarse_steps)[1] * finer, steps)
    of_variation = relative_errors(minimize_total_variation(spectra, y_test, weight, steps), x_test)
    found["total_variation"] = {"validation": error, "weight": weight, **summarize(of_variation)}
    return found, of_variation


def trained(config, workdir, num_test):
    """One training, or what is left of it, and its errors on test images."""
    load_before = os.getloadavg()
    train(config, workdir)
    run, records = load(workdir), read_metrics(workdir)
    assert isinstance(run.model, Reconstructor)
    examples, measurement = run.test_examples()[:num_test], config.inverse_problem.measurement()
    effort = {"batch_size": config.evaluation.batch_size, "seed": config.seed}
    result, found = inverse_problem.evaluate(run.model, examples, measurement, **effort)
    validation = [record["relative_error"] for record in records if record["split"] == "validation"]
    seconds = records[-1]["wall_time_s"]  # of all commands that went on with it
    about = {"validation": min(validation), "step": run.step, "seconds": seconds, "load_before": load_before[0]}
    return {**about, **asdict(result)}, found.relative_error.astype(np.float64)


def best_of(by_lipschitz, errors, of_variation):
    """The L that is best on validation, beside total variation on the same test measurements."""
    lipschitz = min(by_lipschitz, key=lambda key: by_lipschitz[key]["validation"])
    mean, stderr = summarize(errors[lipschitz] - of_variation).values()
    is_reached = mean <= 0 and all(own["fraction_within_bound"] == 1 for own in by_lipschitz.values())
    found = {"lipschitz": lipschitz, "over_total_variation": mean, "stderr_of_difference": stderr}
    return {**found, "reached": bool(is_reached)}


def main():
    options = parser(__doc__)
    options.add_argument("--data", default="digits", help="a data set of configs/deblurring.py")
    options.add_argument("--noise", type=float, nargs="+", default=NOISES, help="fractions of the range from black to white")
    options.add_argument("--lipschitz", type=float, nargs="+", default=LIPSCHITZ, help="constants L of the whole network")
    options.add_argument("--forward-share", type=float, default=0.0, metavar="A", help="1 trains F itself and no inverse")
    options.add_argument("--workdir", type=Path, metavar="DIR", help="keeps the runs in folders of this one")
    arguments = options.parse_args()
    machine.compile_quickly()
    stored_programs.keep_compiled_programs()
    num_validation, num_test = (32, 32) if arguments.quick else (NUM_VALIDATION, NUM_TEST)
    noises = arguments.noise[:1] if arguments.quick else arguments.noise
    constants = arguments.lipschitz[:1] if arguments.quick else arguments.lipschitz
    few = ["training.total_steps=10", "training.eval_every_steps=10"] if arguments.quick else []

    def config_at(noise, lipschitz):
        constrained = f"model.coeff={lipschitz}", f"inverse_problem.forward_share={arguments.forward_share}"
        chosen = ("constraint.norms=none",) if lipschitz == VANILLA else constrained
        return read_config(config_file(f"deblurring:{arguments.data}"), f"inverse_problem.noise={noise}", *chosen, *few)

    any_config, results = config_at(noises[0], 0.9), {}
    data = load_data(any_config.data)
    kind = "inverse_problem" if arguments.forward_share == 0 else f"forward_share{arguments.forward_share:g}"
    settings = {
        "config": asdict(any_config),
        "parameters": num_parameters(abstract_variables(reconstructor_spec(any_config, data))["params"]),
        "num_perturbed": min(inverse_problem.NUM_PERTURBED, num_test),
    }
    with tempfile.TemporaryDirectory() as temporary:
        folder = (arguments.workdir or Path(temporary)) / f"{arguments.data}{arguments.forward_share or ''}"
        for noise in noises:
            images = images_of(config_at(noise, 0.9), data, num_validation, num_test)
            settings |= {f"num_{split}": len(x) for split, (x, _) in images.items()}
            fixed, of_variation = without_learning(config_at(noise, 0.9), images, quick=arguments.quick)
            found, errors = results.setdefault(noise, {**fixed, "lipschitz": {}}), {}
            for lipschitz in [*constants, VANILLA]:
                run_folder = folder / f"noise{noise}_{lipschitz}"
                own, errors[lipschitz] = trained(config_at(noise, lipschitz), run_folder, num_test)
                (found if lipschitz == VANILLA else found["lipschitz"])[lipschitz] = own
                show(own, f"noise {noise}, L = {lipschitz}")
            found["best"] = best_of(found["lipschitz"], errors, of_variation)
            show(found, f"noise {noise}")
            write(f"{kind}_{arguments.data}", arguments, settings, results, is_shown=True)


if __name__ == "__main__":
    main()
