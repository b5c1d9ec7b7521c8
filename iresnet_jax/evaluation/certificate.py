"""Lipschitz constants of a model: estimated from below by power iteration, certified from above."""

import math
from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Layer:
    """Operator norm of one layer.

    Attributes:
        target: Largest norm that the constraint allows; None where only the block has one.
        estimate: Norm by power iteration, a lower bound.
        bound: Certified upper bound.
    """

    target: float | None
    estimate: float
    bound: float


@dataclass(frozen=True)
class Block(Layer):
    """Lipschitz constant of one residual branch: the product of its layers' norms.

    Attributes:
        name: "stage0/block03".
        layers: Layers by name, first layer first.
    """

    name: str
    layers: Mapping[str, Layer]


@dataclass(frozen=True)
class Certificate:
    """Lipschitz constants of all blocks, and what they say about the whole model, from data to latents.

    Attributes:
        coeff: Coefficient of the constraint; None without one.
        budget: "layer" or "block"; None without a constraint.
        blocks: Blocks, first block first.
        forward: Upper bound of ``Lip(F)``.
        inverse: Upper bound of ``Lip(F^-1)``.
    """

    coeff: float | None
    budget: str | None
    blocks: tuple[Block, ...]
    forward: float
    inverse: float

    @property
    def certified(self) -> bool:
        """Whether every block's bound is below 1."""
        return all(block.bound < 1 for block in self.blocks)

    @property
    def max_block(self) -> float:
        """Largest bound of a block; NaN if any is."""
        return max((block.bound for block in self.blocks), key=lambda bound: (math.isnan(bound), bound))

    @property
    def target(self) -> float | None:
        """Largest Lipschitz constant that the constraint allows a block; None without a constraint."""
        return max((block.target for block in self.blocks if block.target is not None), default=None)

    def table(self) -> str:
        """Target, estimate and certified bound of every layer and block, as text."""
        rows: list[tuple[str, Layer]] = []
        for block in self.blocks:
            rows += [(f"{block.name}/{name}", layer) for name, layer in block.layers.items()]
            rows.append((block.name, block))
        width = max(len(name) for name, _ in rows)
        lines = [f"{'':{width}}   target  estimate  certified bound"]
        for name, row in rows:
            limit = "" if row.target is None else f"{row.target:.4f}"
            lines.append(f"{name:{width}}  {limit:>7}  {row.estimate:8.5f}  {row.bound:15.5f}")
        return "\n".join(lines)

    def verdict(self) -> str:
        """One line: whether every block is certified a contraction."""
        failed = [block.name for block in self.blocks if not block.bound < 1]
        total = len(self.blocks)
        if failed:
            return f"NOT CERTIFIED: no bound below 1 for {len(failed)} of {total} blocks, the first is {failed[0]}"
        return (
            f"certified: every one of {total} blocks is a contraction, Lip(g) <= {self.max_block:.5f}; whole model: "
            f"Lip(F) <= {self.forward:.3g}, Lip(F^-1) <= {self.inverse:.3g}"
        )

    def __str__(self) -> str:
        return f"{self.table()}\n{self.verdict()}"
