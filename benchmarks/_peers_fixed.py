"""A trained flow of ours, to evaluate and to invert: as it is, and with the same weights in normflows' blocks.

Workers of `peers.py`. The arrays of a case are inputs ``x`` of the flow in float64, (b, c, h, w) or (b, d), and their latents
``z``. For inverses ``z`` is given, and ``x`` are its exact preimages.
"""

import time
from dataclasses import asdict
from typing import cast

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
        self._log_dets, self._evals = [], 0
        for layer in self._flows:
            if hasattr(layer, "iresblock"):
                layer.iresblock.nnet.register_forward_hook(self._count)

    def _count(self, *_):
        self._evals += 1

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
        """Mean and variance of every image's log-determinant over all draws so far, and the variance of their mean."""
        values = np.stack(self._log_dets)
        return {
            "draws": len(values),
            "mean": values.mean(axis=0).tolist(),
            "variance": values.var(axis=0, ddof=1).tolist(),
            "variance_of_mean": float(values.mean(axis=1).var(ddof=1)),
        }

    def invert(self, num, tolerance=None):
        """Seconds of the inverse of all latents, mean over ``num``, by its iteration.

        Args:
            num: Inverses.
            tolerance: ``atol`` and ``rtol`` of its rule; None for its own, 1e-5.
        """
        settings = {} if tolerance is None else {"atol": tolerance, "rtol": tolerance}
        start = time.perf_counter()
        for _ in range(num):
            self._evals, y = 0, self._z.float()
            with self._torch.no_grad():
                for layer in reversed(self._flows):
                    if hasattr(layer, "iresblock"):
                        y = layer.iresblock._inverse_fixed_point(y, **settings)
                    else:
                        y = layer.forward(y)[0]
            self._found = y.numpy()
        return (time.perf_counter() - start) / num

    def error(self):
        """How far the last inverse is from the exact one, and the evaluations of branches in all blocks together."""
        return {**error_of(self._found, self._x.numpy()), "evals": self._evals}


class Ours:
    """The flow as the commands for trained models run it, examples shared by one device a core.

    Args:
        model: File of the model.
        arrays: As for `Normflows`.
    """

    def __init__(self, model, arrays):
        prepare_ours()
        import jax

        import iresnet_jax
        from iresnet_jax.training import parallel

        self._jax, self._model, self._over_batches = jax, iresnet_jax.load(model), parallel.over_batches
        with np.load(arrays) as given:
            self._x, self._z = given["x"], given["z"]
        self._compiled = set()
        self._placed = parallel.on_local_devices(self._model)
        self._inverse = parallel.parallelize_eval(lambda model, z: model.flow().inverse(z))

    def log_probs(self, num, images, target):
        """Seconds of the log-likelihoods of images to a stated accuracy, mean over ``num``, and what was found.

        Args:
            num: Evaluations, all with the same keys; one before the first compiles.
            images: File of the images, as levels.
            target: Largest bias + standard error of an image, in bits/dim.
        """
        from iresnet_jax.evaluation import stated_accuracy
        from iresnet_jax.models.density import Density

        model, levels = cast(Density, self._model), np.load(images)
        if images not in self._compiled:
            stated_accuracy.log_prob(model, levels, target)
            self._compiled.add(images)
        start = time.perf_counter()
        for _ in range(num):
            values, accuracy = stated_accuracy.log_prob(model, levels, target)
        seconds = (time.perf_counter() - start) / num
        return {"seconds": seconds, "values": values[:, 0].tolist(), "accuracy": asdict(accuracy)}

    def invert(self, num, atol, refine):
        """Seconds of the inverse of all latents, mean over ``num``.

        Args:
            num: Inverses; one before them compiles.
            atol: Tolerance of the solver.
            refine: Whether it goes on in float64.
        """
        from iresnet_jax.bijections.residual import Solver

        model = self._placed.with_(solver=Solver(atol=atol, refine=refine))
        z = self._z.astype(np.float64 if refine else np.float32)

        def inverse():
            return self._over_batches(self._inverse, model, lambda places: z[places], len(z), len(z))

        with self._jax.enable_x64(refine):
            if (atol, refine) not in self._compiled:
                inverse()
                self._compiled.add((atol, refine))
            start = time.perf_counter()
            for _ in range(num):
                self._found, self._info = inverse()
            return (time.perf_counter() - start) / num

    def error(self):
        """How far the last inverse is from the exact one, and what the solver says."""
        found = np.moveaxis(self._found, -1, 1) if self._found.ndim == 4 else self._found
        evals, bound, converged = (np.asarray(field) for field in (self._info.num_evals, *self._info[2:]))
        says = {"evals": float(evals.mean()), "error_bound": float(bound.max()), "converged": float(converged.mean())}
        return {**error_of(found, self._x), **says}
