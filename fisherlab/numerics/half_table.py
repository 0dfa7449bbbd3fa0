"""Symmetric tables of which one half is held: the panels from the diagonal on."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import final

import torch
from jaxtyping import Float
from torch import Tensor


@final
@dataclass(frozen=True, eq=False)
class HalfTable:
    """A symmetric n × n table in n²/2 numbers, which is read once for a product.

    Parameters
    ----------
    panels
        One after the other, rows of the table from their diagonal on: shape
        (rows, n − rows above).

    Examples
    --------
    >>> table = HalfTable((torch.tensor([[2.0, 1.0]]), torch.tensor([[3.0]])))
    >>> (table @ torch.eye(2)).tolist()
    [[2.0, 1.0], [1.0, 3.0]]
    """

    panels: tuple[Tensor, ...]

    @property
    def dtype(self) -> torch.dtype:
        """The precision."""
        return self.panels[0].dtype

    def double(self) -> "HalfTable":
        """Return the table in float64."""
        return HalfTable(tuple(panel.double() for panel in self.panels))

    def diagonal(self) -> Float[Tensor, " n"]:
        """Return the diagonal."""
        return torch.cat([panel.diagonal() for panel in self.panels])

    def __matmul__(self, x: Tensor) -> Tensor:
        """Multiply with columns (n, k) or with one (n,)."""
        out = torch.zeros_like(x)
        for rows, panel in self._placed():
            out[rows] += panel @ x[rows.start :]
            out[rows.stop :] += panel[:, len(panel) :].T @ x[rows]
        return out

    def _placed(self) -> Iterator[tuple[slice, Tensor]]:
        """Yield every panel with its rows."""
        start = 0
        for panel in self.panels:
            yield slice(start, start + len(panel)), panel
            start += len(panel)
