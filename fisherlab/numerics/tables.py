"""Large symmetric tables that are applied but not held whole: of positions, by halves."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import final

import torch
from jaxtyping import Float
from torch import Tensor

from fisherlab.numerics.memory import spans


@final
@dataclass(frozen=True, eq=False)
class PositionTable:
    r"""The inner products of all :math:`x_{nt} x_{ns}^T`, summed over columns v.

    It takes tables :math:`Y_n` (T × T) of an example each to those of the matrix
    :math:`M = \sum_{vn} X_{vn}^T Y_n X_{vn}` they stand for,
    :math:`\sum_v X_{vn} M X_{vn}^T`, through the Gram matrix of the rows alone: 2 V² N² T³
    multiply-adds, where M would cost V N T d (d + T).

    Parameters
    ----------
    gram
        Inner products of the V·N·T rows, v-major.
    columns, examples, positions
        V, N, T.

    Examples
    --------
    >>> rows = torch.tensor([[1.0], [2.0]])
    >>> (PositionTable(rows @ rows.T, 1, 1, 2) @ torch.ones(4)).tolist()
    [9.0, 18.0, 18.0, 36.0]
    """

    gram: Float[Tensor, "m m"]
    columns: int
    examples: int
    positions: int

    @classmethod
    def of(cls, rows: Float[Tensor, "v n t d"]) -> "PositionTable":
        """Return the table of some rows."""
        flat = rows.flatten(0, 2)
        return cls(flat @ flat.T, *rows.shape[:3])

    @property
    def dtype(self) -> torch.dtype:
        """The precision."""
        return self.gram.dtype

    def double(self) -> "PositionTable":
        """Return the table in float64."""
        sizes = self.columns, self.examples, self.positions
        return PositionTable(self.gram.double(), *sizes)

    def diagonal(self) -> Float[Tensor, " k"]:
        """Return the squared lengths of Σ_v x_vnt x_vnsᵀ."""
        v, n, t = self.columns, self.examples, self.positions
        own = self.gram.view(v, n, t, v, n, t).diagonal(dim1=1, dim2=4)
        own = own.diagonal(dim1=1, dim2=3)  # (v, w, n, t)
        return torch.einsum("vwnt,vwns->nts", own, own).flatten()

    def __matmul__(self, x: Tensor) -> Tensor:
        """Multiply with columns (N·T·T, k) or with one (N·T·T,)."""
        if x.dim() == 2:
            images = [self @ column for column in x.T]
            return torch.stack(images, 1) if images else x.clone()
        v, n, t = self.columns, self.examples, self.positions
        pieces, size = self.gram.view(v * n, t, -1), v * n * t
        inside = (x.view(n, t, t).repeat(v, 1, 1) @ pieces).view(size, v * n, t)
        found = torch.bmm(pieces, inside.transpose(0, 1))
        return found.view(v, n, t, t).sum(0).flatten()


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
        yield from zip(
            spans([len(panel) for panel in self.panels]), self.panels, strict=True
        )
