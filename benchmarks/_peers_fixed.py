"""A trained flow of ours, to evaluate and to invert: as it is, and with the same weights in normflows' blocks.

Workers of `peers.py`. The arrays of a case are inputs ``x`` of the flow in float64, (b, c, h, w) or (b, d), and their latents
``z``. For inverses ``z`` is given, and ``x`` are its exact preimages.
"""

import time

import numpy as np
from _peers_step import prepare_ours


def error_of(found, exact):
    """Largest error of an entry, and of an example in the Euclidean norm."""
    difference = np.asarray(found, np.float64).reshape(len(exact), -1) - exact.reshape(len(exact), -1)
    return {"largest": float(np.abs(difference).max()), "euclidean": float(np.linalg.norm(difference, axis=1).max())}


class Normflows:
    """The flow with normflows' residual blocks in PyTorch.

    Args:
        architecture: See `_peers_cases.architecture`.
        arrays: File with ``x``, ``z`` and the weights of ours, see `_peers_cases.write_arrays`.
        threads: Threads of PyTorch.
    """

    def __init__(self, architecture, arrays, threads):
        import torch  # pyright: ignore[reportMissingImports]

        torch.set_num_threads(threads)
        torch.manual_seed(0)
        from _peers_torch import fixed_flow

        with np.load(arrays) as given:
            known = {name: given[name] for name in given.files}
        self._torch, self._x, self._z = torch, torch.tensor(known["x"]), torch.tensor(known["z"])
        self._flows = fixed_flow(architecture, known)
        self._log_dets = []

    def check(self):
        """Largest difference of the latents from ours, of those above 1 as a share, in float32 and in float64."""
        found = {}
        with self._torch.no_grad():
            for name, x in (("float32", self._x.float()), ("float64", self._x)):
                for layer in self._flows:
                    layer.to(x.dtype)
                    x = layer.iresblock(x) if hasattr(layer, "iresblock") else layer.inverse(x)[0]
                found[name] = float(((x - self._z).abs() / self._z.abs().clamp(min=1)).max())
        for layer in self._flows:
            layer.float()
        return found

    def draws(self, num):
        """Seconds of one draw of all log-determinants, mean over ``num``, by its estimator with 20 exact terms."""
        start = time.perf_counter()
        for _ in range(num):
            x, total = self._x.float(), 0
            with self._torch.no_grad():
                for layer in self._flows:
                    x, log_det = layer.inverse(x)
                    total = total + log_det
            self._log_dets.append(self._torch.as_tensor(total).double().numpy())
        return (time.perf_counter() - start) / num

    def log_dets(self):
        """Mean and variance of every image's log-determinant over all draws so far."""
        values = np.stack(self._log_dets)
        return {"mean": values.mean(axis=0).tolist(), "variance": values.var(axis=0, ddof=1).tolist(), "draws": len(values)}

    def invert(self, num, tolerance=None):
        """Seconds of the inverse of all latents, mean over ``num``, by its iteration.

        Args:
            num: Inverses.
            tolerance: ``atol`` and ``rtol`` of its rule; None for its own, 1e-5.
        """
        settings = {} if tolerance is None else {"atol": tolerance, "rtol": tolerance}
        start = time.perf_counter()
        for _ in range(num):
            y = self._z.float()
            with self._torch.no_grad():
                for layer in reversed(self._flows):
                    if hasattr(layer, "iresblock"):
                        y = layer.iresblock._inverse_fixed_point(y, **settings)
                    else:
                        y = layer.forward(y)[0]
            self._found = y.numpy()
        return (time.perf_counter() - start) / num

    def error(self):
        """How far the last inverse is from the exact one."""
        return error_of(self._found, self._x.numpy())


class Ours:
    """The flow as the library runs it.

    Args:
        model: File of the model.
        arrays: As for `Normflows`.
    """

    def __init__(self, model, arrays):
        prepare_ours()
        import jax
        import jax.numpy as jnp

        import iresnet_jax

        self._jax, self._jnp, self._model = jax, jnp, iresnet_jax.load(model)
        with np.load(arrays) as given:
            self._x, self._z = given["x"], given["z"]
        self._images = np.moveaxis(self._x, 1, -1) if self._x.ndim == 4 else self._x
        self._forward = jax.jit(lambda model, x, key: model.flow().forward_and_logdet(x, key)[:2])
        self._compiled = set()
        self._inverse = jax.jit(lambda model, z: model.flow().inverse(z))

    def log_dets(self, num, estimator, key=0, num_images=None):
        """Seconds of the log-determinants of all images, or of some, mean over ``num``, and their values.

        Args:
            num: Evaluations; one before them compiles.
            estimator: Plain data of a `LogdetConfig`.
            key: Number of the key of the probes; further evaluations have the following ones.
            num_images: Images, from the first.
        """
        from iresnet_jax.training.config import LogdetConfig

        model = self._model.with_(estimator=LogdetConfig(**estimator).build())
        x = self._jnp.asarray(self._images[:num_images], self._jnp.float32)
        keys = [self._jax.random.key(key + i) for i in range(num)]
        self._jax.block_until_ready(self._forward(model, x, keys[0]))
        start = time.perf_counter()
        values = [np.asarray(self._forward(model, x, key)[1], np.float64) for key in keys]
        return {"seconds": (time.perf_counter() - start) / num, "values": np.stack(values).tolist()}

    def invert(self, num, atol, refine):
        """Seconds of the inverse of all latents, mean over ``num``.

        Args:
            num: Inverses; one before them compiles.
            atol: Tolerance of the solver.
            refine: Whether it goes on in float64.
        """
        from iresnet_jax.bijections.residual import Solver

        model = self._model.with_(solver=Solver(atol=atol, refine=refine))
        with self._jax.enable_x64(refine):
            z = self._jnp.asarray(self._z)
            if (atol, refine) not in self._compiled:
                self._jax.block_until_ready(self._inverse(model, z))
                self._compiled.add((atol, refine))
            start = time.perf_counter()
            for _ in range(num):
                found, self._info = self._jax.block_until_ready(self._inverse(model, z))
            seconds = (time.perf_counter() - start) / num
            self._found = np.asarray(found)
        return seconds

    def error(self):
        """How far the last inverse is from the exact one, and what the solver says."""
        found = np.moveaxis(self._found, -1, 1) if self._found.ndim == 4 else self._found
        evals, converged = (np.asarray(values) for values in (self._info.num_evals, self._info.converged))
        return {**error_of(found, self._x), "mean_evals": float(evals.mean()), "converged": float(converged.mean())}
