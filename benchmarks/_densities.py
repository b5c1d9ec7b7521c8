"""Densities that are compared: `fit` with its defaults, and those of scikit-learn, flowjax and
normflows.

Each takes a `Table`, a seed and minutes, and gives a `Fitted`. All but gmm_bic are fitted to the
training examples alone; validation examples choose hyper-parameters and end the training.
Log-determinants on test examples are exact.

- "ours" is ``fit(train, validation=validation, minutes=...)``; its time includes compilation and
  validation.
- "flowjax" is a `coupling_flow` with rational-quadratic splines of 8 knots on [-4, 4]. "normflows"
  are LipschitzMLP blocks with two hidden layers behind ActNorm, as in its documentation, as many as
  a network of `fit` has. Both get Adam at 1e-3 after a warm-up of 100 steps, a cosine to the end of
  their time, gradients clipped at norm 1, batches of 256, or of 64, and the parameters that were
  best on validation examples. Their clock stands still while they are validated, and while flowjax
  is compiled. Training that has doubled its number of steps, and 1000 on top, without an
  improvement has overfitted and ends.
- "flowjax_whitened", "normflows_whitened" are given what `fit` gives itself: a linear map that
  whitens the training examples.
- "gmm" is `GaussianMixture`; number of components, type of the covariances and reg_covar by
  validation, on fewer than 2000 examples all together up to 8 components, otherwise reg_covar of
  full covariances at 4 components; then more components until the minutes are used up. The last fit
  is not interrupted.
- "gmm_bic" is one of full covariances, whose number of components is chosen by the Bayesian
  information criterion, fitted to validation examples as well: they choose nothing, and what it has
  on them is no score.
- "kde" is a Gaussian `KernelDensity`; the bandwidth, and whether the data are whitened first, by
  validation, on at most 400 examples. Its tree is one leaf: with its default tree, scikit-learn 1.9
  takes ten times as long in 63 dimensions, and rounding in the tree's bounds makes outliers
  likelier than they are, by up to 368 nats.
"""

import copy
import functools
import itertools
import math
import time
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from _tables import Table
from sklearn.exceptions import ConvergenceWarning
from sklearn.mixture import GaussianMixture
from sklearn.neighbors import KernelDensity

import iresnet_jax as ir
from iresnet_jax.models.flow import as_params
from iresnet_jax.models.free import num_parameters

MANY = 2000  # training examples from which flows get the larger of two sizes and batches
LEARNING_RATE, WARMUP_STEPS, CLIP_NORM = 1e-3, 100, 1.0
FIRST_VALIDATION, LATER_VALIDATIONS = 10, 1.05  # steps; growth of their number until the next one
OVERFITTED, ATTEMPTS = 2, 1000  # training ends after OVERFITTED * best step + ATTEMPTS
VALIDATED = 1000  # most examples in a validation of a flow
EVAL_BATCH_SIZE = 500

FLOWJAX = {
    "knots": 8,
    "interval": 4,
    "flow_layers": 8,
    "nn_depth": 1,
    "nn_width": {"many": 128, "few": 50},
}
NORMFLOWS = {
    "blocks": {"many": 20, "few": 4},
    "width": {"many": 128, "few": 32},
    "hidden_layers": 2,
    "lipschitz_const": 0.98,
}
POWER_ITERATIONS = 5  # in a training step of normflows

COVARIANCES, REG_COVAR = ("full", "tied", "diag", "spherical"), (1e-6, 1e-4, 1e-2, 1e-1)
FIRST_MIXTURES = {
    "few": ((1, 2, 3, 4, 6, 8), COVARIANCES, REG_COVAR),
    "many": ((4,), ("full",), REG_COVAR),
}
MORE_COMPONENTS = (1.5, 2, 3, 4, 8, 16, 32, 64)  # times those of the best of the first
BIC_COMPONENTS = (1, 2, 3, 4, 5, 6, 8, 10, 12, 16, 20, 24, 32)
# the latter in powers of 2
BANDWIDTHS, REFINEMENTS = tuple(0.05 * 2.0**k for k in range(7)), (0.5, 0.25)
KDE_VALIDATED = 400


class Fitted(NamedTuple):
    """A density that was fitted.

    Attributes:
        log_prob: Log-density in nats of standardised examples ``(n, d)``.
        num_parameters: Numbers that were fitted; of a kernel density all numbers of the examples.
        details: What was chosen or how long it took, for the record.
    """

    log_prob: Callable[[np.ndarray], np.ndarray]
    num_parameters: int
    details: dict[str, Any]


def ours(table: Table, seed: int, minutes: float) -> Fitted:
    """`fit` with its defaults, of whole numbers as they are."""
    train, validation, test = table.raw or (table.train, table.validation, table.test)
    options = {
        "validation": validation,
        "bounds": table.bounds,
        "minutes": minutes,
        "progress": False,
    }
    model = ir.fit(train, key=jax.random.key(seed), **options)
    assert isinstance(model, ir.Density)
    assert model.history is not None
    exact, log_prob = (
        model.with_(estimator=ir.ExactLogdet(), history=None),
        jax.jit(lambda model, x: model.log_prob(x)),
    )
    details = {
        "steps": int(np.max(model.history.train.get("step", 0))),
        "best_step": model.history.step,
    }  # 0 of kernels
    details["certified"] = model.certificate().certified
    details |= {
        "attempts": [list(attempt) for attempt in model.history.attempts],
        "ended": model.history.ended,
    }
    count = num_parameters((as_params(model.weights), model.prior))

    def of_table(x):
        if table.raw is None:
            return in_batches(lambda batch: log_prob(exact, batch), x)
        own = validation if len(x) < len(test) else test  # of which `x` are the standardised rows
        return (
            in_batches(lambda batch: log_prob(exact, batch), own[: len(x)].astype(np.float32))
            - table.log_det
        )

    return Fitted(of_table, count, details)


def flowjax(table: Table, seed: int, minutes: float) -> Fitted:
    """The coupling flow of flowjax with rational-quadratic splines."""
    import equinox as eqx  # pyright: ignore[reportMissingImports]

    params, flow_of, optimizer = spline_flow(
        table.train.shape[1], seed, FLOWJAX["nn_width"][_size(table)]
    )

    @eqx.filter_jit
    def log_prob(params, x):
        return flow_of(params).log_prob(x)

    @eqx.filter_jit
    def update(params, state, x, rate):
        gradient = eqx.filter_grad(lambda params: -log_prob(params, x).mean())(params)
        change, state = optimizer.update(gradient, state)
        return eqx.apply_updates(params, jax.tree.map(lambda leaf: -rate * leaf, change)), state

    state, batches = optimizer.init(params), _batches(table, seed)

    def take_step(rate):
        nonlocal params, state
        # a Python number would be a constant of the program, which every step would compile
        rate = jnp.float32(rate)
        params, state = jax.block_until_ready(update(params, state, next(batches), rate))

    def validate():
        return float(log_prob(params, table.validation[:VALIDATED]).mean())

    validate()  # which compiles, as the next line does
    jax.block_until_ready(update(params, state, next(batches), jnp.float32(0)))
    best, steps = train(take_step, validate, lambda: params, 60 * minutes)
    return Fitted(
        lambda x: in_batches(lambda batch: log_prob(best, batch), x), num_parameters(params), steps
    )


def spline_flow(num_dims: int, seed: int, nn_width: int) -> tuple[Any, Callable[[Any], Any], Any]:
    """Parameters of flowjax's coupling flow with rational-quadratic splines, the flow of
    parameters, and its optimiser.
    """
    import equinox as eqx  # pyright: ignore[reportMissingImports]
    import optax
    import paramax  # pyright: ignore[reportMissingImports]
    from flowjax.bijections import RationalQuadraticSpline  # pyright: ignore[reportMissingImports]
    from flowjax.distributions import Normal  # pyright: ignore[reportMissingImports]
    from flowjax.flows import coupling_flow  # pyright: ignore[reportMissingImports]

    flow = coupling_flow(
        jax.random.key(seed),
        base_dist=Normal(jnp.zeros(num_dims)),
        transformer=RationalQuadraticSpline(knots=FLOWJAX["knots"], interval=FLOWJAX["interval"]),
        **{name: FLOWJAX[name] for name in ("flow_layers", "nn_depth")},
        nn_width=nn_width,
    )
    params, static = eqx.partition(
        flow, eqx.is_inexact_array, is_leaf=lambda leaf: isinstance(leaf, paramax.NonTrainable)
    )
    optimizer = optax.chain(optax.clip_by_global_norm(CLIP_NORM), optax.scale_by_adam())
    return params, lambda params: paramax.unwrap(eqx.combine(params, static)), optimizer


def normflows(table: Table, seed: int, minutes: float) -> Fitted:
    """The residual flow of normflows."""
    import normflows as nf  # pyright: ignore[reportMissingImports]
    import torch  # pyright: ignore[reportMissingImports]
    from _pytorch import CONVERGED, block, count_parameters, exact_log_prob, take_step

    torch.manual_seed(seed)
    dims, size = table.train.shape[1], _size(table)
    widths = [dims, *NORMFLOWS["hidden_layers"] * [NORMFLOWS["width"][size]], dims]
    settings = {
        "lipschitz_const": NORMFLOWS["lipschitz_const"],
        "max_lipschitz_iter": POWER_ITERATIONS,
    }
    nets = [
        nf.nets.LipschitzMLP(widths, **settings, init_zeros=True)
        for _ in range(NORMFLOWS["blocks"][size])
    ]
    # in the order of the data's way
    flows = [layer for net in nets for layer in block(dims, net, n_dist="poisson")]
    model = nf.NormalizingFlow(nf.distributions.DiagGaussian(dims), flows[::-1])
    # fits ActNorm and shapes the vectors of the power iterations
    model.log_prob(torch.tensor(table.train[:1024]))
    nf.utils.update_lipschitz(model, CONVERGED)
    optimizer, batches = torch.optim.Adam(model.parameters(), LEARNING_RATE), _batches(table, seed)
    log_prob = functools.partial(exact_log_prob, model)

    def train_step(rate):
        optimizer.param_groups[0]["lr"] = rate
        model.train()
        x = torch.tensor(next(batches))
        take_step(model, optimizer, x, clip_norm=CLIP_NORM, power_iterations=POWER_ITERATIONS)

    def validate():
        nf.utils.update_lipschitz(model, CONVERGED)
        return in_batches(log_prob, table.validation[:VALIDATED]).mean()

    best, steps = train(
        train_step, validate, lambda: copy.deepcopy(model.state_dict()), 60 * minutes
    )
    model.load_state_dict(best)
    model.double()
    nf.utils.update_lipschitz(model, CONVERGED)
    return Fitted(functools.partial(in_batches, log_prob), count_parameters(model), steps)


def train(
    take_step: Callable[[float], None],
    validate: Callable[[], float],
    snapshot: Callable[[], Any],
    seconds: float,
) -> tuple[Any, dict[str, Any]]:
    """Trains a flow of others for some seconds, its validations not counted.

    Args:
        take_step: Updates the parameters at a learning rate, which reaches zero at the end.
        validate: Mean log-density of validation examples.
        snapshot: The parameters as they are.
        seconds: Time.

    Returns:
        The parameters that were best on validation examples, and how long it took.
    """
    best, best_value, best_step, step, due, used = (
        snapshot(),
        -math.inf,
        0,
        0,
        FIRST_VALIDATION,
        0.0,
    )
    is_over = False
    while not is_over:
        began = time.monotonic()
        decay = (1 + math.cos(math.pi * min(used / seconds, 1))) / 2
        take_step(LEARNING_RATE * decay * min((step + 1) / WARMUP_STEPS, 1))
        step, used = step + 1, used + time.monotonic() - began
        is_over = used >= seconds or step >= OVERFITTED * best_step + ATTEMPTS
        if step >= due or is_over:
            due = max(step + FIRST_VALIDATION, int(step * LATER_VALIDATIONS))
            if (value := validate()) > best_value:
                best, best_value, best_step = snapshot(), value, step
    return best, {"steps": step, "best_step": best_step, "training_seconds": used}


def gmm(table: Table, seed: int, minutes: float) -> Fitted:
    """scikit-learn's Gaussian mixture that is best on validation examples."""
    began, train, held_out = (
        time.monotonic(),
        table.train.astype(np.float64),
        table.validation.astype(np.float64),
    )
    scores: dict[tuple[int, str, float], float] = {}
    mixtures: dict[tuple[int, str, float], GaussianMixture] = {}

    def attempt(*case):
        components, kind, floor = case
        mixtures[case] = GaussianMixture(
            components, covariance_type=kind, reg_covar=floor, random_state=seed
        )
        try:
            with warnings.catch_warnings(action="ignore", category=ConvergenceWarning):
                scores[case] = float(mixtures[case].fit(train).score(held_out))
        except ValueError:  # a component has collapsed: reg_covar is too small for it
            scores[case] = -math.inf

    def is_time_left():
        return not scores or time.monotonic() - began <= 60 * minutes

    for case in itertools.takewhile(
        lambda _: is_time_left(), itertools.product(*FIRST_MIXTURES[_size(table)])
    ):
        attempt(*case)
    components, kind, floor = max(scores, key=scores.__getitem__)
    for factor in MORE_COMPONENTS:
        if factor * components <= len(train) // 4 and is_time_left():
            attempt(round(factor * components), kind, floor)
    components, kind, floor = case = max(scores, key=scores.__getitem__)
    best = mixtures[case]
    chosen = {
        "n_components": components,
        "covariance_type": kind,
        "reg_covar": floor,
        "converged": bool(best.converged_),
    }
    details = {
        **chosen,
        "tried": [
            [*case, score if math.isfinite(score) else None] for case, score in scores.items()
        ],
    }
    return Fitted(
        lambda x: best.score_samples(x.astype(np.float64)), int(best._n_parameters()), details
    )


def gmm_bic(table: Table, seed: int, minutes: float) -> Fitted:
    """scikit-learn's mixture of full covariances that the Bayesian information criterion wants,
    of all rows that there are.
    """
    del minutes  # it takes the time it takes
    x = np.concatenate([table.train, table.validation]).astype(np.float64)
    with warnings.catch_warnings(action="ignore", category=ConvergenceWarning):
        counts = [num for num in BIC_COMPONENTS if num <= max(len(x) // 10, 1)]
        fitted = [GaussianMixture(num, random_state=seed, n_init=2).fit(x) for num in counts]
    best = min(fitted, key=lambda mixture: mixture.bic(x))
    return Fitted(
        lambda x: best.score_samples(x.astype(np.float64)),
        int(best._n_parameters()),
        {"n_components": best.n_components},
    )


def kde(table: Table, seed: int, minutes: float) -> Fitted:
    """scikit-learn's kernel density whose bandwidth is best on validation examples."""
    del seed, minutes  # nothing is random, and it takes the time it takes
    inputs = {False: (lambda x: x, 0.0), True: whitening(table.train)}
    scores: dict[tuple[bool, float], float] = {}

    def density(is_whitened, bandwidth):
        change, log_det = inputs[is_whitened]
        fitted = KernelDensity(bandwidth=bandwidth, leaf_size=len(table.train)).fit(
            change(table.train)
        )
        return lambda x: fitted.score_samples(change(x)) + log_det

    def attempt(*case):
        scores[case] = float(density(*case)(table.validation[:KDE_VALIDATED]).mean())

    for is_whitened in inputs:
        for bandwidth in BANDWIDTHS:
            attempt(is_whitened, bandwidth)
        for power in REFINEMENTS:
            _, middle = max(
                (case for case in scores if case[0] == is_whitened), key=scores.__getitem__
            )
            attempt(is_whitened, middle * 2**-power)
            attempt(is_whitened, middle * 2**power)
    best = max(scores, key=scores.__getitem__)
    return Fitted(density(*best), table.train.size, {"bandwidth": best[1], "whitened": best[0]})


def whitening(train: np.ndarray) -> tuple[Callable[[np.ndarray], np.ndarray], float]:
    """A linear map after which examples have mean zero and the unit matrix as covariance, and
    its log-determinant.
    """
    mean = train.mean(axis=0, dtype=np.float64)
    variances, axes = np.linalg.eigh(np.cov(train, rowvar=False, dtype=np.float64))
    matrix = axes / np.sqrt(variances)
    return lambda x: ((x - mean) @ matrix).astype(np.float32), -0.5 * float(np.log(variances).sum())


def whitened(fit: Callable[[Table, int, float], Fitted]) -> Callable[[Table, int, float], Fitted]:
    """The same density of whitened examples, as a density of the examples."""

    def fit_whitened(table, seed, minutes):
        change, log_det = whitening(table.train)
        own = table._replace(train=change(table.train), validation=change(table.validation))
        fitted = fit(own, seed, minutes)
        return fitted._replace(log_prob=lambda x: fitted.log_prob(change(x)) + log_det)

    return fit_whitened


def in_batches(log_prob: Callable[[np.ndarray], Any], x: np.ndarray) -> np.ndarray:
    """The log-density of any number of examples."""
    batches = np.split(x, range(EVAL_BATCH_SIZE, len(x), EVAL_BATCH_SIZE))
    return np.concatenate([np.asarray(log_prob(batch), np.float64) for batch in batches])


def _size(table: Table) -> str:
    return "many" if len(table.train) >= MANY else "few"


def _batches(table: Table, seed: int):
    """Training batches of the size that `fit` takes, by epochs."""
    rng, size = np.random.default_rng(seed), 256 if _size(table) == "many" else 64
    while True:
        order = rng.permutation(len(table.train))
        for start in range(0, len(order) - size + 1, size):
            yield table.train[order[start : start + size]]


MODELS: dict[str, Callable[[Table, int, float], Fitted]] = {
    **{"ours": ours, "normflows": normflows, "normflows_whitened": whitened(normflows)},
    **{
        "flowjax": flowjax,
        "flowjax_whitened": whitened(flowjax),
        "gmm": gmm,
        "gmm_bic": gmm_bic,
        "kde": kde,
    },
}
