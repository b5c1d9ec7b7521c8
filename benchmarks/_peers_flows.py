"""One trained flow in two processes: as it is, and with the same weights in normflows' blocks.

Arrays of a case are inputs ``x`` of the flow in float64, (b, c, h, w) or (b, d), and their latents ``z``. For inverses ``z`` is
given, and ``x`` are its exact preimages.
"""

import contextlib
import time
from dataclasses import asdict
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from _processes import most_cores
from _steps import prepare_jax

import iresnet_jax
from iresnet_jax.bijections.residual import Solver
from iresnet_jax.evaluation import stated_accuracy
from iresnet_jax.models.density import Density
from iresnet_jax.models.flow import as_params
from iresnet_jax.training import parallel


def architecture(spec):
    """Plain data of a `DensitySpec`'s flow, for `_pytorch`; ``ValueError`` for a flow that it does not build."""
    stages = []
    for stage in spec.flow.layout:
        given, inside = stage.spec, stage.branch
        if given.factor_out or given.squeeze not in (1, 2) or given.padding != "SAME" or spec.flow.budget != "layer":
            raise ValueError(f"PyTorch has squeezes by 2, a budget for each layer and no factor-out: {given}")
        side, _, channels = stage.in_shape if len(stage.in_shape) == 3 else (1, 1, 1)
        is_flattened = len(stage.in_shape) == 3 and len(inside.in_shape) == 1
        stages.append(
            {
                "num_blocks": given.num_blocks,
                "squeeze": int(given.squeeze == 2),
                "flattened": (side // given.squeeze, channels * given.squeeze**2) if is_flattened else None,
                "positional_bias": given.positional_bias,
                "layers": [layer._asdict() for layer in inside.layers],
            }
        )
    last = spec.flow.layout[-1].branch.in_shape
    ends = (last[0], last[-1]) if len(last) == 3 else None
    return {"stages": stages, "ends": ends, "coeff": spec.flow.coeff, "prior": spec.prior_family}


def write_arrays(model, x, z, path):
    """Writes inputs (b, h, w, c) or (b, d), their latents, and the weights of the flow by path."""
    x = np.asarray(x, np.float64)
    arrays: dict[str, Any] = {"x": np.moveaxis(x, -1, 1) if x.ndim == 4 else x, "z": np.asarray(z, np.float32)}
    for stage, params in as_params(model.weights).items():
        for layer, own in params["blocks"].items():
            arrays |= {f"{stage}/{layer}/{name}": np.asarray(value) for name, value in own.items()}
    np.savez(path, **arrays)


def exact_inverse(model, z):
    """The preimages of latents in float64, to 1e-10 in every block."""
    with jax.enable_x64(True):
        precise = model.with_(solver=Solver(atol=1e-10, refine=True))
        x, info = jax.jit(lambda model, z: model.flow().inverse(z))(precise, jnp.asarray(z))
        if not bool(info.converged.all()):
            raise RuntimeError(f"the exact inverse did not converge: residuals up to {float(info.residual.max()):.1e}")
        return np.asarray(x)


def error_of(found, exact):
    """Largest error of an entry, and of an example in the Euclidean norm."""
    difference = np.asarray(found, np.float64).reshape(len(exact), -1) - exact.reshape(len(exact), -1)
    return {"largest": float(np.abs(difference).max()), "euclidean": float(np.linalg.norm(difference, axis=1).max())}


@contextlib.contextmanager
def pair(model, x, z, start, folder, *, agreement):
    """`OurFlow` and `TorchFlow` on all cores that are compared, and how far their latents are apart, see `TorchFlow.check`.

    Both end with the context. ``RuntimeError`` if latents in float64 differ by more than ``agreement``.
    """
    cores = most_cores()
    write_arrays(model, x, z, folder / "arrays.npz")
    arrays, file = str(folder / "arrays.npz"), str(model.save(folder / "model.npz"))
    given = {"architecture": architecture(model.spec), "arrays": arrays, "threads": len(cores)}
    ours = start(cores, "_peers_flows", "OurFlow", {"model": file, "arrays": arrays})
    theirs = start(cores, "_peers_flows", "TorchFlow", given)
    found = theirs.ask("check")
    if not found["float64"] <= agreement:
        raise RuntimeError(f"PyTorch's latents in float64 are those of ours up to {found['float64']:.1e}, not {agreement:.1e}")
    yield ours, theirs, found
    for worker in (ours, theirs):
        worker.stop()


class TorchFlow:
    """The flow with normflows' residual blocks in PyTorch: see `architecture` and `write_arrays`."""

    def __init__(self, architecture, arrays, threads):
        import torch  # pyright: ignore[reportMissingImports]

        torch.set_num_threads(threads)
        torch.manual_seed(0)
        from _pytorch import fixed_flow

        weights: dict[str, dict[str, Any]] = {}
        with np.load(arrays) as given:
            self._torch, self._x, self._z = torch, torch.tensor(given["x"]), torch.tensor(given["z"])
            for stage, _, name in (path.partition("/") for path in given.files if "/" in path):
                weights.setdefault(stage, {})[name] = given[f"{stage}/{name}"]
        self._flows = fixed_flow(architecture, weights)
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
        """Seconds of the inverse of all latents, mean over ``num``, by its iteration, whose ``atol`` and ``rtol`` are 1e-5."""
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


def _mean_seconds(num, function):
    """Mean seconds of some calls after one that does not count, and the last result."""
    function()
    start = time.perf_counter()
    for _ in range(num):
        found = function()
    return (time.perf_counter() - start) / num, found


def _inverse(model, z):
    return model.flow().inverse(z)


class OurFlow:
    """The flow as the commands for trained models run it, examples shared by one device a core."""

    def __init__(self, model, arrays):
        prepare_jax()
        self._model = cast(Density, iresnet_jax.load(model))
        with np.load(arrays) as given:
            self._x, self._z = given["x"], given["z"]
        self._placed = parallel.on_local_devices(self._model)

    def log_probs(self, num, images, target):
        """Seconds of the log-likelihoods of a file of images, mean over ``num`` after one that compiles, and what was found.

        Each has the same keys and a bias + standard error of at most ``target`` bits/dim.
        """
        levels = np.load(images)
        seconds, (values, accuracy) = _mean_seconds(num, lambda: stated_accuracy.log_prob(self._model, levels, target))
        return {"seconds": seconds, "values": values[:, 0].tolist(), "accuracy": asdict(accuracy)}

    def invert(self, num, atol, refine):
        """Seconds of the inverse of all latents, mean over ``num`` after one that compiles; it may go on in float64."""
        model = self._placed.with_(solver=Solver(atol=atol, refine=refine))
        z = self._z.astype(np.float64 if refine else np.float32)

        def inverse():
            return parallel.over_batches(_inverse, model, lambda places: z[places], len(z), len(z))

        with jax.enable_x64(refine):
            seconds, (self._found, self._info) = _mean_seconds(num, inverse)
        return seconds

    def error(self):
        """How far the last inverse is from the exact one, and what the solver says."""
        found = np.moveaxis(self._found, -1, 1) if self._found.ndim == 4 else self._found
        evals, bound, converged = (np.asarray(field) for field in (self._info.num_evals, *self._info[2:]))
        says = {"evals": float(evals.mean()), "error_bound": float(bound.max()), "converged": float(converged.mean())}
        return {**error_of(found, self._x), **says}
