"""A report with every part, no two numbers of which look alike."""

import dataclasses

from iresnet_jax.evaluation.accuracy import Classification, Mistake
from iresnet_jax.evaluation.calibration import Calibration, RankTest
from iresnet_jax.evaluation.environment import Environment
from iresnet_jax.evaluation.inversion import Inversion, RoundTrips
from iresnet_jax.evaluation.likelihood import Estimate, Likelihood
from iresnet_jax.evaluation.points import Entry, Points, Unlikely
from iresnet_jax.evaluation.samples import SampleConvergence
from iresnet_jax.models.certificate import Certificate, Constant
from iresnet_jax.report.contents import Report, TrainingTimes


def block(name, *, estimate=0.7012, bound=0.7243):
    layers = (Constant("conv_in", 0.9117, 0.8913, 0.9008), Constant("conv_out", None, 0.7867, 0.8041))
    return Constant(name, 0.8312, estimate, bound, layers)


LIKELIHOOD = Likelihood(
    mean=1.062314,
    stderr=0.00213,
    stderr_data=0.00202,
    stderr_probes=0.00055,
    stderr_dequantisation=0.00038,
    unit="bits/dim",
    estimator="power series of 20 terms",
    unbiased=True,
    truncation_bound=3.14e-4,
    num_examples=9973,
    num_dequantisations=53,
    num_probes=37,
)
EXACT = dataclasses.replace(
    LIKELIHOOD,
    stderr_probes=0.0,
    estimator="exact log-determinant",
    truncation_bound=0.0,
    estimate=Estimate("roulette of 7 terms", unbiased=True, mean=1.0651, difference=0.00123, z=1.27),
)
POINTS = dataclasses.replace(
    LIKELIHOOD, mean=2.8714, stderr=0.0061, stderr_dequantisation=0.0, unit="nats", truncation_bound=0.0, entropy_floor=2.8321
)
TRIPS = RoundTrips(
    max_abs_error=4.56e-14,
    max_euclidean_error=5.27e-14,
    max_error_bound=7.63e-13,
    fraction_within_bound=1.0,
    fraction_converged=1.0,
    fraction_recovered=1.0,
    mean_evals=35.79,
)
INVERSE = Inversion(
    max_abs_error=3.42e-6,
    max_euclidean_error=8.12e-6,
    max_error_bound=1.94e-5,
    fraction_within_bound=1.0,
    fraction_converged=1.0,
    fraction_recovered=1.0,
    mean_evals=23.44,
    num_examples=512,
    refined=TRIPS,
    max_grey_level_error=0.00087,
    max_padding_residual=6.37e-7,
)
CERTIFICATE = Certificate(
    coeff=0.9117, budget="layer", blocks=(block("block_0"), block("block_1", estimate=0.6543)), forward=2.974, inverse=13.16
)
CLASSIFICATION = Classification(
    error=0.0471,
    interval=(0.0389, 0.0568),
    confidence=0.95,
    num_errors=157,
    num_examples=3333,
    loss=0.1739,
    confusion=((3, 1), (0, 2)),
    mistakes=(Mistake(index=1, label=0, prediction=1, probability=0.6),),
)
CALIBRATION = Calibration(
    tuple(RankTest(name, (23, 31, 27), p, 0.62, 0.513) for name, p in (("entry 0", 0.0812), ("log p", 0.4417))), 81, 77
)
UNLIKELY = Unlikely(row=6173, log_prob=-27.31, entries=(Entry(14, 8.46, 5.83), Entry(9, -3.19, -4.27)))
REPORT = Report(
    train=TrainingTimes(
        steps=4321, total_steps=4444, seconds_per_step=0.1832, compile_seconds=48.21, total_seconds=7384.0, limit_seconds=7500.0
    ),
    environment=Environment(
        devices="2 x cpu",
        backend="cpu",
        matmul_precision="default",
        cpu_count=2,
        platform="Linux-6.1",
        python="3.11.7",
        iresnet_jax=None,
        jax="0.10.2",
        jaxlib="0.10.3",
        flax="0.12.8",
        optax="0.2.8",
        numpy="2.4.6",
        date="2026-11-26",
        commit="3f9c2ab",
    ),
    config={"seed": 29, "model": {"widths": (61, 67), "head": {"kind": "none"}}},
    likelihood=LIKELIHOOD,
    points=Points("points.npy", (UNLIKELY,)),
    calibration=CALIBRATION,
    classification=CLASSIFICATION,
    samples=SampleConvergence(num=64, fraction_converged=1.0, max_error_bound=1e-5),
    samples_by_class=SampleConvergence(num=80, fraction_converged=1.0, max_error_bound=1e-5),
    inverse=INVERSE,
    lipschitz=CERTIFICATE,
)


def changed(part, report=REPORT, **values):
    """The report with one part's fields replaced."""
    return dataclasses.replace(report, **{part: dataclasses.replace(getattr(report, part), **values)})
