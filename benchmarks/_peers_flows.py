"""One trained flow twice: as it is, and with the same weights in normflows' blocks.

Both have inputs ``x`` of the flow in float64 and their latents ``z``. For inverses ``z`` is given,
and ``x`` are its exact preimages. Seconds are means over some calls, after one that warms up.
"""

import time

import jax
import jax.numpy as jnp
import numpy as np
from _models import decode, norms
from _processes import most_cores

from iresnet_jax.bijections.residual import Solver
from iresnet_jax.maths.logdet_exact import ExactLogdet
from iresnet_jax.models.flow import as_params
from iresnet_jax.training import parallel
from iresnet_jax.training.objectives import evaluate_examples


def architecture(spec):
    """Plain data of a `DensitySpec`'s flow, for `_pytorch`; ``ValueError`` for a flow that it
    does not build.
    """
    stages = []
    for stage in spec.flow.layout:
        given, inside = stage.spec, stage.branch
        if (
            given.factor_out
            or given.squeeze not in (1, 2)
            or given.padding != "SAME"
            or spec.flow.budget == "network"
        ):
            raise ValueError(
                "PyTorch has squeezes by 2, a budget for each layer or block and no "
                f"factor-out: {given}"
            )
        side, _, channels = stage.in_shape if len(stage.in_shape) == 3 else (1, 1, 1)
        is_flattened = len(stage.in_shape) == 3 and len(inside.in_shape) == 1
        stages.append(
            {
                "num_blocks": given.num_blocks,
                # Each layer of a block with one budget gets its root: PyTorch has a coefficient for
                # each layer.
                "coeff": spec.flow.coeff
                ** (1 if spec.flow.budget == "layer" else 1 / len(inside.layers)),
                "squeeze": int(given.squeeze == 2),
                "flattened": (side // given.squeeze, channels * given.squeeze**2)
                if is_flattened
                else None,
                "positional_bias": given.positional_bias,
                "layers": [layer._asdict() for layer in inside.layers],
            }
        )
    last = spec.flow.layout[-1].branch.in_shape
    ends = (last[0], last[-1]) if len(last) == 3 else None
    return {"stages": stages, "ends": ends}


def exact_inverse(model, z):
    """The preimages of latents in float64, to 1e-10 in every block."""
    with jax.enable_x64(True):
        precise = model.with_(solver=Solver(atol=1e-10, refine=True))
        x, info = decode(precise, jnp.asarray(z), precise.bounds())
        if not bool(info.converged.all()):
            raise RuntimeError(
                "the exact inverse did not converge: residuals up to "
                f"{float(info.residual.max()):.1e}"
            )
        return np.asarray(x)


def _decoded(own, z):
    model, bounds = own
    return decode(model, z, bounds)


def _mean_seconds(num, function):
    """Mean seconds of some calls after one that is not counted, and the last result."""
    function()
    start = time.perf_counter()
    for _ in range(num):
        found = function()
    return (time.perf_counter() - start) / num, found


def _error(found, exact):
    """Largest error of an entry, and of an example in the Euclidean norm."""
    difference = np.asarray(found, np.float64) - exact
    return {"largest": float(np.abs(difference).max()), "euclidean": float(norms(difference).max())}


class TorchFlow:
    """The flow of a density with normflows' residual blocks in PyTorch, on the cores that are
    compared.

    ``RuntimeError`` if its latents in float64 differ from ``z`` by more than ``agreement``, of
    those above 1 as a share.
    """

    def __init__(self, model, x, z, agreement):
        import torch  # pyright: ignore[reportMissingImports]

        torch.set_num_threads(len(most_cores()))
        torch.manual_seed(0)
        from _pytorch import fixed_flow

        weights = {
            stage: {
                f"{layer}/{name}": np.array(value)
                for layer, own in params["blocks"].items()
                for name, value in own.items()
            }
            for stage, params in as_params(model.weights).items()
        }
        x = np.asarray(x, np.float64)
        self._torch, self._x = torch, torch.tensor(np.moveaxis(x, -1, 1) if x.ndim == 4 else x)
        self._z = torch.tensor(np.array(z, np.float32))
        self._flows, self._log_dets, self._evals = (
            fixed_flow(architecture(model.spec), weights),
            [],
            0,
        )
        for layer in self._flows:
            if hasattr(layer, "iresblock"):
                layer.iresblock.nnet.register_forward_hook(self._count)
        self.agreement = {
            name: self._difference(x)
            for name, x in (("float64", self._x), ("float32", self._x.float()))
        }
        if not self.agreement["float64"] <= agreement:
            raise RuntimeError(
                f"PyTorch's latents in float64 are ours up to {self.agreement['float64']:.1e}, not "
                f"{agreement:.1e}"
            )

    def _count(self, *_):
        self._evals += 1

    def _difference(self, x):
        """Largest difference of the latents from ours, in the precision of inputs, which the
        flow then keeps.
        """
        with self._torch.no_grad():
            for layer in self._flows:
                layer.to(x.dtype)
                x = layer.iresblock(x) if hasattr(layer, "iresblock") else layer.inverse(x)[0]
        return float(((x - self._z).abs() / self._z.abs().clamp(min=1)).max())

    def draw(self, num):
        """Seconds of one draw of all log-determinants, by its estimator with 20 exact terms; all
        draws are kept.
        """

        def once():
            x, total = self._x.float(), self._torch.zeros(())
            with self._torch.no_grad():
                for layer in self._flows:
                    x, log_det = layer.inverse(x)
                    total = total + log_det
            self._log_dets.append(total.double().numpy())

        return _mean_seconds(num, once)[0]

    @property
    def log_dets(self):
        """Every image's log-determinant in all draws so far."""
        return np.stack(self._log_dets)

    def invert(self, num, tolerance=None, refine=False):
        """Seconds of the inverse of all latents by its iteration, whose ``atol`` and ``rtol`` are
        1e-5 by default.

        In float32, or all of it in float64.
        """
        tolerances = {} if tolerance is None else {"atol": tolerance, "rtol": tolerance}
        z = self._z.double() if refine else self._z.float()
        for layer in self._flows:
            layer.to(z.dtype)

        def once():
            self._evals, y = 0, z
            with self._torch.no_grad():
                for layer in reversed(self._flows):
                    has_block = hasattr(layer, "iresblock")
                    y = (
                        layer.iresblock._inverse_fixed_point(y, **tolerances)
                        if has_block
                        else layer.forward(y)[0]
                    )
            return y.numpy()

        seconds, self._found = _mean_seconds(num, once)
        return seconds

    def error(self):
        """How far the last inverse is from the exact one, and the evaluations of branches in all
        blocks together.
        """
        return {**_error(self._found, self._x.numpy()), "evals": self._evals}


class OurFlow:
    """The flow of a density as the commands for trained models run it, examples shared by one
    device a core.
    """

    def __init__(self, model, x, z):
        self._model, self._x, self._z = model, np.asarray(x, np.float64), np.asarray(z)
        self._placed = parallel.on_local_devices(model)

    def log_probs(self, num, images):
        """Seconds of the log-likelihoods of images with exact log-determinants, and the values
        in nats.
        """
        model = self._model.with_(estimator=ExactLogdet())

        def once():
            return evaluate_examples(model, images, jax.random.key(0), len(images))

        seconds, found = _mean_seconds(num, once)
        return seconds, -np.asarray(found[model.spec.metric], np.float64) / model.spec.unit_of_a_nat

    def invert(self, num, atol, refine):
        """Seconds of the inverse of all latents, which may go on in float64."""
        model = self._placed.with_(solver=Solver(atol=atol, refine=refine))
        z = self._z.astype(np.float64 if refine else np.float32)

        def once():
            own, places = (model, model.bounds()), lambda places: z[places]
            return parallel.over_batches(_decoded, own, places, len(z), len(z))

        with jax.enable_x64(refine):
            seconds, (self._found, self._info) = _mean_seconds(num, once)
        return seconds

    def error(self):
        """How far the last inverse is from the exact one, and what the solver says."""
        evals, bound, converged = (
            np.asarray(field) for field in (self._info.num_evals, *self._info[2:])
        )
        says = {
            "evals": float(evals.mean()),
            "error_bound": float(bound.max()),
            "converged": float(converged.mean()),
        }
        return {**_error(self._found, self._x), **says}
