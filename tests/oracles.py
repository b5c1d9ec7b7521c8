"""Independent references in NumPy float64: slow, dense and plain, without the library."""

import numpy as np


def conv_forward(x, kernel, *, padding="SAME"):
    """``y[i] = sum_t x[i + t - p] K[t]`` on a batch NHWC with taps HWIO, one tap at a time."""
    x, kernel = np.asarray(x, np.float64), np.asarray(kernel, np.float64)
    (_, height, width, _), taps = x.shape, kernel.shape[:2]
    pads = [((n - 1) // 2, n // 2) for n in taps]
    x = np.pad(x, ((0, 0), *pads, (0, 0)), mode="wrap" if padding == "CIRCULAR" else "constant")
    y = np.zeros((len(x), height, width, kernel.shape[3]))
    for i in range(taps[0]):
        for j in range(taps[1]):
            y += x[:, i : i + height, j : j + width] @ kernel[i, j]
    return y


def dense_conv_matrix(kernel, height: int, width: int, *, padding="SAME"):
    """The layer on flattened HWC images: column k is its output for the k-th unit image."""
    num_inputs = height * width * np.shape(kernel)[2]
    units = np.eye(num_inputs).reshape(num_inputs, height, width, -1)
    return conv_forward(units, kernel, padding=padding).reshape(num_inputs, -1).T


def operator_norm(matrix) -> float:
    """The largest singular value."""
    return float(np.linalg.norm(np.asarray(matrix, np.float64), 2))


def series_logdet(jacobian, num_terms: int) -> float:
    """``sum_{k <= n} (-1)^(k+1) tr(J^k) / k``, the truncated series of ``log det(I + J)``."""
    power, total = np.eye(len(jacobian)), 0.0
    for k in range(1, num_terms + 1):
        power = power @ jacobian
        total += (-1) ** (k + 1) * np.trace(power) / k
    return total


def tanh_network(x, w1, bias, w2):
    """``g(x) = W2 tanh(W1 x + b)`` of one vector, and its Jacobian ``W2 diag(1 - tanh^2) W1``."""
    t = np.tanh(w1 @ x + bias)
    return w2 @ t, w2 @ ((1 - t**2)[:, None] * w1)


def invert_by_newton(branch_and_jacobian, y, num_steps: int = 100):
    """Solves ``x + g(x) = y`` for one vector by damped Newton steps with dense solves."""
    x = np.asarray(y, np.float64)

    def residual(x):
        return x + branch_and_jacobian(x)[0] - y

    for _ in range(num_steps):
        now = residual(x)
        step, scale = np.linalg.solve(np.eye(len(x)) + branch_and_jacobian(x)[1], now), 1.0
        while np.linalg.norm(residual(x - scale * step)) >= np.linalg.norm(now):
            scale /= 2
            if scale < 1e-4:
                return x
        x = x - scale * step
    return x
