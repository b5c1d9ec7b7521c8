"""The log-density of a model written down once more, in plain NumPy on numbers of any precision, see `plain_flow`.

Its determinant is that of the whole flow's Jacobian, by Gaussian elimination with exchanges of rows.
"""

from typing import Any

import numpy as np
from plain_flow import Numbers, _activation, _conv, _squeeze


def log_prob(numbers: Numbers, model: Any, u: Any, level: Any = None) -> Any:
    """Log-density of one example ``u`` of continuous data; with levels on [0, 1), minus ``D log num_levels``.

    Args:
        numbers: Kind of number.
        model: The density.
        u: Continuous data, in float64.
        level: Levels that ``u`` is the noise around; None where no transform asks for it.
    """
    spec, weights, prior = model.spec, model.weights, {name: np.asarray(values) for name, values in model.prior.items()}
    y, log_slopes = _transform(numbers, spec.transform, numbers.of(u), level)
    z, jacobian = forward_and_jacobian(numbers, spec.flow, weights, y)
    cells = 0 if spec.num_levels is None else spec.flow.num_dims * numbers.log(numbers.of(float(spec.num_levels)))
    return log_prior(numbers, spec.prior, prior, z) + log_abs_det(numbers, jacobian) + log_slopes - cells


def forward_and_jacobian(numbers: Numbers, spec: Any, weights: Any, x: Any) -> tuple[Any, Any]:
    """Latents ``(d,)`` of one input of the flow, numbers of that kind, and their Jacobian ``(d, d)``."""
    d, latents, rows = x.size, [], []
    v = numbers.of(np.eye(d)).reshape(d, *x.shape)  # a tangent for each entry of the input
    for i, stage in enumerate(spec.stages):
        own = weights[f"stage{i}"]
        x, v = _squeeze(x, stage.squeeze), np.stack([_squeeze(one, stage.squeeze) for one in v])
        if stage.kernel_sizes is None:
            x, v = x.ravel(), v.reshape(d, -1)
        for k in range(stage.num_blocks):
            scale = numbers.exp(numbers.of(own.actnorm.log_scale[k]))
            x, v = (x + numbers.of(own.actnorm.bias[k])) * scale, v * scale
            g, w = x, v
            for j, layer in enumerate(own.branch.weights.values()):
                if j or stage.preactivation:
                    beta = numbers.of(layer["beta"][k]) if "beta" in layer else None
                    slopes = _slopes(numbers, stage.activation, g, beta)
                    g, w = _activation(numbers, stage.activation, g, beta), np.concatenate([w * s for s in slopes], axis=-1)
                kernel = numbers.of(layer["kernel"][k])
                if kernel.ndim == 2:
                    g, w = g @ kernel, w @ kernel
                else:
                    g, w = (_conv(numbers, part, kernel, circular=stage.padding == "CIRCULAR") for part in (g, w))
                g = g + numbers.of(layer["bias"][k])
            x, v = x + g, v + w
        if stage.factor_out:
            half = x.shape[-1] // 2
            latents.append(x[..., half:].ravel())
            rows.append(v[..., half:].reshape(d, -1))
            x, v = x[..., :half], v[..., :half]
    return np.concatenate([*latents, x.ravel()]), np.concatenate([*rows, v.reshape(d, -1)], axis=1).T


def log_abs_det(numbers: Numbers, matrix: Any) -> Any:
    """``log|det A|`` by Gaussian elimination with exchanges of rows."""
    rest, total = matrix.copy(), 0
    while len(rest):
        pivot = int(np.argmax(abs(rest[:, 0])))
        row, others = rest[pivot], np.delete(rest, pivot, axis=0)
        total = total + numbers.log(abs(row[0]))
        rest = others[:, 1:] - (others[:, :1] / row[0]) * row[None, 1:]
    return total


def log_prior(numbers: Numbers, kind: str, prior: Any, z: Any) -> Any:
    """Log-density of latents; with ``class_logits`` of the mixture of the classes' priors."""
    log_scale = "log_std" if kind == "gaussian" else "log_scale"
    if "class_logits" not in prior:
        mean, scale = numbers.of(prior["mean"]), numbers.of(prior[log_scale])
        t = (z - mean) / numbers.exp(scale)
        if kind == "gaussian":
            half = numbers.of(0.5)
            return (-half * t * t - half * numbers.log(2 * _pi(numbers)) - scale).sum()
        return (-_softplus(numbers, t) - _softplus(numbers, -t) - scale).sum()
    logits = numbers.of(prior["class_logits"])
    own = [{name: values[k] for name, values in prior.items() if name != "class_logits"} for k in range(len(logits))]
    of_classes = np.array([log_prior(numbers, kind, one, z) for one in own]) + logits
    return _log_sum_exp(numbers, of_classes) - _log_sum_exp(numbers, logits)


def _log_sum_exp(numbers, values):
    return numbers.log(numbers.exp(values - values.max()).sum()) + values.max()


def _transform(numbers, transform, u, level):
    kind, one = type(transform).__name__, numbers.of(1.0)
    if kind in ("Identity", "Center"):
        return (u if kind == "Identity" else u - numbers.of(0.5)), 0
    if kind == "Standardize":
        mean, scale = numbers.of(transform.mean), numbers.of(transform.scale)
        return (u - mean) / scale, -numbers.log(scale).sum() * int(np.prod(u.shape[:-1]))
    if kind == "Whiten":
        factor, y = numbers.of(transform.factor), []
        for i, row in enumerate(factor):
            known = sum((row[j] * y[j] for j in range(i)), numbers.of(0.0))
            y.append((u[i] - numbers.of(transform.mean[i]) - known) / row[i])
        return np.array([np.asarray(one)[()] for one in y]), -numbers.log(np.diag(factor)).sum()
    log_slopes = 0
    if kind == "Equalize":
        u, slopes = _equalized(numbers, transform, u, level)
        log_slopes = numbers.log(slopes).sum()
    alpha = numbers.of(transform.alpha)
    s = alpha + (one - alpha - alpha) * u
    log_s, log_rest = numbers.log(s), numbers.log(one - s)
    return log_s - log_rest, log_slopes + (numbers.log(one - alpha - alpha) - log_s - log_rest).sum()


def _equalized(numbers, transform, u, level):
    """The distribution function of every entry, and its slope, from a list of its own frequencies."""
    n, m = len(transform.frequencies), int(np.argmax(transform.frequencies))
    frequencies = numbers.of(transform.frequencies)
    frequencies = frequencies / frequencies.sum()
    shares = [frequencies[m]] * u.size if transform.shares is None else numbers.of(transform.shares)
    values, slopes = [], []
    for entry, k, share in zip(u.ravel(), np.asarray(level).ravel(), shares, strict=True):
        own = frequencies * ((1 - share) / (1 - frequencies[m]))
        own[m] = share
        values.append(own[:k].sum() + own[k] * (entry * n - int(k)))
        slopes.append(own[k] * n)
    return np.array(values).reshape(u.shape), np.array(slopes)


def _slopes(numbers, name, x, beta):
    """Slopes of the outputs of an activation, one array for each copy of its channels."""
    one, zero = numbers.of(1.0), numbers.of(0.0)
    if name == "elu":
        return [np.where(x > 0, one, numbers.exp(np.where(x > 0, zero, x)))]
    if name in ("softplus", "softplus4"):
        return [_sigmoid(numbers, x if name == "softplus" else numbers.of(4.0) * x)]
    if name == "tanh":
        return [one - _activation(numbers, name, x, beta) ** 2]
    if name == "identity":
        return [np.broadcast_to(one, x.shape)]
    assert name in ("lipswish", "clipswish"), name
    t = _softplus(numbers, beta) * x
    s = _sigmoid(numbers, t)
    slope, swish = s + t * s * (one - s), numbers.of(11.0) / numbers.of(10.0)
    if name == "lipswish":
        return [slope / swish]
    factor = swish * (numbers.of(1004.0) / numbers.of(1000.0))
    return [slope / factor, (slope - one) / factor]


def _sigmoid(numbers, t):
    one, decay = numbers.of(1.0), numbers.exp(-abs(t))
    return np.where(t > 0, one / (one + decay), decay / (one + decay))


def _softplus(numbers, t):
    return np.where(t > 0, t, numbers.of(0.0)) + numbers.log(numbers.of(1.0) + numbers.exp(-abs(t)))


def _pi(numbers):
    """16 arctan(1/5) - 4 arctan(1/239) (Machin)."""

    def arctan_of_reciprocal(n):
        one, total = numbers.of(1.0), numbers.of(0.0)
        for k in range(40):
            total = total + (-1) ** k * one / (2 * k + 1) / numbers.of(float(n)) ** (2 * k + 1)
        return total

    return 16 * arctan_of_reciprocal(5) - 4 * arctan_of_reciprocal(239)
