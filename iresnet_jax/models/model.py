"""The common part of all models: replacing fields, a certificate, saving.

A file holds the spec as JSON and the arrays, and nothing of the training. Bounds of norms are not
stored, see `bounds`: a file cannot claim a certificate that its weights do not have.
"""

import dataclasses
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from iresnet_jax.atomic_files import path_of, replacing
from iresnet_jax.bijections.bijection import Bijection
from iresnet_jax.checked_dataclasses import tagged
from iresnet_jax.models import bounds
from iresnet_jax.models.architecture import FlowSpec, check_names
from iresnet_jax.models.certificate import Certificate, certificate_of
from iresnet_jax.models.claims import check_claims
from iresnet_jax.models.contractions import check_fit, freeze
from iresnet_jax.models.flow import as_params, flow_bijection, is_traced

FILE_NAME = "model.npz"
FORMAT = 2
HEADER = "header"
# fields of models that `flow_bijection` takes
_HOW = ("estimator", "solver", "unroll", "rematerialize")

M = TypeVar("M", bound="Model")


class Model:
    """A model as a value: `spec`, all that defines it but its weights, and `weights` of its flow,
    see `flow`.

    Attributes:
        arrays: Names of the fields with arrays beside the weights.
    """

    arrays: ClassVar[tuple[str, ...]] = ()
    spec: Any
    weights: Any

    def with_(self: M, **changes: Any) -> M:
        """The same model with other fields, such as ``solver``.

        Raises:
            ValueError: If the weights do not fit a new ``spec``.
        """
        if "weights" in changes:
            changes["weights"] = bounds.without_bounds(changes["weights"])
        elif "spec" in changes and self.weights and changes["spec"].flow != self.spec.flow:
            check_fit(changes["spec"].flow, self.weights)
        return dataclasses.replace(self, **changes)  # pyright: ignore[reportArgumentType, reportCallIssue]

    def learned(self, name: str) -> Any:
        """The arrays of a field in `arrays`."""
        return getattr(self, name)

    def promoted(self, x: Any) -> Array:
        """Numbers in the precision of the weights, if theirs is lower; of JAX's floats while
        there are no weights.
        """
        x, weights = jnp.asarray(x), jax.tree.leaves(as_params(self.weights))
        return x.astype(
            jnp.result_type(x, *weights)
            if weights
            else jnp.promote_types(x.dtype, jnp.result_type(float))
        )

    def _flow_of(self, spec: FlowSpec, weights: Any, context: Any = None) -> Bijection:
        """The bijection of a flow's weights, run as this model says."""
        how = {name: getattr(self, name) for name in _HOW if hasattr(self, name)}
        return flow_bijection(spec, weights, context=context, **how)

    def with_bounds(self: M) -> M:
        """The same model with guaranteed bounds of its weights as arrays of its branches, for
        programs of one's own.

        Methods such as `decode` bound the weights themselves outside of ``jit``: a program of
        norms, or some microseconds where they have bounded these very arrays before. A model that a
        program is given without bounds inverts as well, and reports infinite error bounds. Within
        ``jit`` this method computes the bounds there, at every call.

        Example:
            >>> jax.jit(lambda model, z: model.decode(z))(model.with_bounds(), z)  # doctest: +SKIP
        """
        return dataclasses.replace(self, weights=bounds.with_bounds(self.spec.flow, self.weights))  # pyright: ignore

    def _for_programs(self: M) -> M:
        """The model as programs take it: `with_bounds`, or as it is within a program."""
        return self if is_traced(self.weights) or not self.weights else self.with_bounds()

    def certificate(self) -> Certificate:
        """Norms of all layers and Lipschitz constants of all blocks and of the whole model,
        estimated and guaranteed.
        """
        return certificate_of(
            self.spec.flow, self.weights, self.spec.bilipschitz(), constrained=self.spec.constrained
        )

    def freeze(self: M) -> M:
        """The same model, every block certified to be within the budget of ``spec.flow.coeff``,
        see `contractions.freeze`.
        """
        if not self.spec.constrained:
            raise ValueError(
                "this network has no Lipschitz constraint: there is nothing to freeze it to"
            )
        return self.with_(weights=freeze(self.spec.flow, as_params(self.weights)))

    def check_branches(self, x: Any, *, context: Any = None) -> None:
        """Checks bounds that are the user's word on data: ratios ``|g(x) - g(y)| / |x - y|`` of
        every such branch.

        Raises:
            ValueError: If a branch stretches the data by more than it claims; the message names the
                block and both numbers.
        """
        scaled = ()
        if context is not None:
            if not self.spec.flow.context_dim:
                raise ValueError("this model has no context: leave it out")
            x, context, _ = self._examples(x, context)  # pyright: ignore[reportAttributeAccessIssue]
            scaled = (self.scale_context(context),)  # pyright: ignore[reportAttributeAccessIssue]
        check_claims(self.spec.flow, self.weights, self.preprocess(x), *scaled)  # pyright: ignore[reportAttributeAccessIssue]

    def save(self, path: str | os.PathLike[str], about: Mapping[str, Any] | None = None) -> Path:
        """Writes the model to one file, which `iresnet_jax.load` reads; a file that was there is
        replaced in one step.

        Args:
            path: The file; ``.npz`` is its customary end.
            about: JSON data that travel with the model, such as the settings of its training.

        Raises:
            ValueError: If two branches of one's own have the same name, or a number is not finite.
        """
        check_names(self.spec.flow)
        path = path_of(path)
        if path.is_dir():
            raise ValueError(f"{path} is a folder: give a file, such as {path / FILE_NAME}")
        header = {"format": FORMAT, "spec": tagged(self.spec), "about": dict(about or {})}
        stored = {
            "params": as_params(self.weights),
            **{name: self.learned(name) for name in self.arrays},
        }
        arrays: dict[str, Any] = {
            array_name(key): np.asarray(leaf) for key, leaf in jax.tree.leaves_with_path(stored)
        }
        arrays = {
            name: array.astype(np.promote_types(array.dtype, np.float32))
            for name, array in arrays.items()
        }
        if bad := [name for name, array in arrays.items() if not np.all(np.isfinite(array))]:
            raise ValueError(
                f"{bad[0]} holds numbers that are not finite, which no file takes: "
                "give the model finite ones"
            )
        arrays[HEADER] = np.frombuffer(json.dumps(header).encode(), np.uint8)
        with replacing(path) as incoming, incoming.open("wb") as file:
            np.savez_compressed(file, **arrays)
        return path


def array_name(path: Any) -> str:
    """Name of an array in a file by its path in a pytree, such as
    ``params/stage0/blocks/conv0/kernel``.
    """
    return jax.tree_util.keystr(path, simple=True, separator="/")
