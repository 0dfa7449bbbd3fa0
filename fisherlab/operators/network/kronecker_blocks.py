r"""A matrix over several weights whose every block is one Kronecker product.

.. math:: F_{ij} = G_{ij} \otimes A_{ij}

The blocks G_ij form one matrix over the outputs of all layers, A_ij one over their
inputs: the whole is their Khatri-Rao product, and positive semi-definite if both are.
"""

from dataclasses import dataclass, replace
from functools import cached_property
from typing import final

import torch
from jaxtyping import Float
from torch import Tensor

from fisherlab.numerics.devices import spans
from fisherlab.numerics.linalg import kron
from fisherlab.operators.base import (
    Damping,
    Factored,
    Provenance,
    column_inner,
    inner_product,
    tikhonov,
)
from fisherlab.operators.dense import Dense
from fisherlab.operators.kronecker import KroneckerSum
from fisherlab.operators.network.base import (
    DENSE_ROWS,
    BlockDiagonal,
    NetworkOperator,
    Shapes,
    Weights,
    WholeNetwork,
    same_blocks,
    tikhonov_inverse,
)
from fisherlab.samples import OuterSamples


@final
@dataclass(frozen=True, eq=False, repr=False)
class KroneckerBlocks(NetworkOperator):
    """G_ij ⊗ A_ij between all pairs of weights.

    Parameters
    ----------
    rows
        All G_ij as one symmetric matrix, (Σ d_out, Σ d_out).
    columns
        All A_ij as one symmetric matrix, (Σ d_in, Σ d_in).
    shapes
        Block name to (d_out, d_in), in the order of both.

    Raises
    ------
    ValueError
        For factors that do not fit one another.

    Examples
    --------
    >>> shapes = {"a": (1, 2), "b": (1, 2)}
    >>> op = KroneckerBlocks(torch.eye(2), torch.ones(4, 4), shapes)
    >>> op.trace(), op.block("a", "b").sum().item()
    (4.0, 0.0)
    """

    rows: Float[Tensor, "o o"]
    columns: Float[Tensor, "i i"]
    shapes: Shapes
    provenance: Provenance = Provenance()

    def __post_init__(self) -> None:
        """Check that the two matrices fit the blocks."""
        expected = [sum(shape[axis] for shape in self.shapes.values()) for axis in (0, 1)]
        if [len(self.rows), len(self.columns)] != expected:
            raise ValueError(
                f"KroneckerBlocks: matrices of {len(self.rows)} and {len(self.columns)} "
                f"rows were given, {expected} are expected for {dict(self.shapes)}."
            )

    @cached_property
    def places(self) -> dict[str, tuple[slice, slice]]:
        """Block name to its outputs and its inputs in the two matrices."""
        outputs = spans([o for o, _ in self.shapes.values()])
        inputs = spans([i for _, i in self.shapes.values()])
        return dict(zip(self.shapes, zip(outputs, inputs, strict=True), strict=True))

    def factors(
        self, row: str, column: str
    ) -> tuple[Float[Tensor, "o p"], Float[Tensor, "i j"]]:
        """Return G_ij and A_ij of two blocks, views."""
        (o, i), (p, j) = self.places[row], self.places[column]
        return self.rows[o, p], self.columns[i, j]

    @cached_property
    def weight_shapes(self) -> Shapes:
        """Block name to (d_out, d_in)."""
        return self.shapes

    @property
    def stored_numbers(self) -> int:
        """The free numbers of both matrices."""
        o, i = len(self.rows), len(self.columns)
        return (o * (o + 1) + i * (i + 1)) // 2

    @property
    def product_flops(self) -> int:
        """Σ_j d_in(j)·Σ_i d_out(i)·(d_out(j) + d_in(i))."""
        shapes = self.shapes.values()
        return sum(j * o * (p + i) for p, j in shapes for o, i in shapes)

    def _apply_blocks(self, ws: Weights) -> dict[str, Tensor]:
        out = {name: torch.zeros_like(ws[name]) for name in self.shapes}
        for column, (p, _) in self.places.items():
            left = self.rows[:, p] @ ws[column]
            for row, (o, _) in self.places.items():
                out[row] += left[:, o] @ self.factors(row, column)[1].T
        return out

    def diagonal_block(self, name: str) -> KroneckerSum:
        """Return G_ii ⊗ A_ii."""
        made = replace(self.provenance, layer=name)
        return KroneckerSum((self.factors(name, name),), self.shapes[name], made)

    def block(self, row: str, column: str) -> Float[Tensor, "p q"]:
        """Return the dense block G_ij ⊗ A_ij between two weights."""
        return kron(*self.factors(row, column))

    def _dense(self) -> Float[Tensor, "p p"]:
        rows = [torch.cat([self.block(i, j) for j in self.shapes], 1) for i in self.shapes]
        return torch.cat(rows)

    def diagonal(self) -> Float[Tensor, "p 1"]:
        """Return the diagonal; `split` cuts it into blocks."""
        return self.join(
            {name: self.diagonal_block(name).diagonal() for name in self.shapes}
        )

    def trace(self) -> float:
        """Return Σ tr G_ii · tr A_ii."""
        return sum(self.diagonal_block(name).trace() for name in self.shapes)

    def frobenius_norm(self) -> float:
        """Return (Σ_ij ‖G_ij‖² ‖A_ij‖²)^½."""
        return max(_blocks_blocks(self, self), 0.0) ** 0.5

    def damped(self, damping: Damping) -> NetworkOperator:
        """Return the damped matrix; `Factored` shifts the diagonal G_ii and A_ii.

        Examples
        --------
        >>> one = KroneckerBlocks(torch.eye(2), torch.eye(2), {"a": (2, 2)})
        >>> one.damped(Factored(1.0)).trace()
        16.0
        """
        if not isinstance(damping, Factored):
            shift = tikhonov(damping, self)
            matrix = self.to_dense()
            matrix.diagonal().add_(shift)
            whole = Dense(matrix, self.weight_shape, self.provenance)
            return WholeNetwork(whole, self.shapes, self.provenance)
        rows, columns = self.rows.clone(), self.columns.clone()
        for name, (o, i) in self.places.items():
            rows[o, o], columns[i, i] = damping.damped(*self.factors(name, name))
        return replace(self, rows=rows, columns=columns)

    def inverse(self, damping: Damping) -> WholeNetwork:
        """Return the damped inverse: dense up to 2000 rows, else iterative.

        Raises
        ------
        IndefiniteError
            If the damped matrix is not positive definite.
        """
        if isinstance(damping, Factored):
            return tikhonov_inverse(self.damped(damping), 0.0, self._local(damping))
        shift = tikhonov(damping, self)
        return tikhonov_inverse(self, shift, self._local(damping))

    def _local(self, damping: Damping) -> BlockDiagonal | None:
        """Return the inverse of the diagonal blocks where it will be needed."""
        if self.shape[0] <= DENSE_ROWS:
            return None
        blocks = {name: self.diagonal_block(name) for name in self.shapes}
        return BlockDiagonal(blocks, self.provenance).inverse(damping)


def _block_sums(table: Tensor, lengths: list[int]) -> Tensor:
    """Return the sum of every block of a symmetric table cut into lengths, float64."""
    cut = torch.stack([part.double().sum(0) for part in table.split(lengths)])
    return torch.stack([part.sum(1) for part in cut.split(lengths, 1)], 1)


@inner_product(KroneckerBlocks, KroneckerBlocks)
def _blocks_blocks(a: KroneckerBlocks, b: KroneckerBlocks) -> float:
    if not same_blocks(a, b):
        return column_inner(a, b)
    shapes = list(a.shapes.values())
    rows = _block_sums(a.rows * b.rows, [o for o, _ in shapes])
    columns = _block_sums(a.columns * b.columns, [i for _, i in shapes])
    return float((rows * columns).sum())


@inner_product(KroneckerBlocks, WholeNetwork)
def _blocks_whole(a: KroneckerBlocks, b: WholeNetwork) -> float:
    if not same_blocks(a, b):
        return column_inner(a, b)
    held = [block.samples for block in (b.pieces or {}).values()]
    outer = [samples for samples in held if isinstance(samples, OuterSamples)]
    if held and b.pieces and len(outer) == len(held):
        return _samples_inner(a, outer) / next(iter(b.pieces.values())).count
    return b.whole.inner(a)


def _samples_inner(a: KroneckerBlocks, pieces: list[OuterSamples]) -> float:
    """Return Σ_ij Σ_vn (g_iᵀ G_ij g_j)(a_iᵀ A_ij a_j) without forming a gradient."""
    total = 0.0
    for row, left in zip(a.shapes, pieces, strict=True):
        for column, right in zip(a.shapes, pieces, strict=True):
            rows, columns = a.factors(row, column)
            outputs = ((left.gradients @ rows) * right.gradients).sum((0, 2))
            inputs = ((left.inputs @ columns) * right.inputs).sum(1)
            total += float((outputs * inputs).sum(dtype=torch.float64))
    return total
