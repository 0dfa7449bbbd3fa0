r"""Eigendecompositions made once and used for many dampings, never as dense p × p bases.

.. math:: M = r I + \sum_j (v_j - r)\, u_j u_j^T

with orthonormal u_j and r the eigenvalue outside of their span (0 for samples).
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import singledispatch
from typing import final

import torch
from jaxtyping import Float
from torch import Tensor

from fisherlab.errors import UnsupportedMetric
from fisherlab.metrics.floors import EPS, LOST
from fisherlab.numerics.linalg import eigh, factorised
from fisherlab.operators import (
    Diagonal,
    FactoredFisher,
    FactoredMiniBlocks,
    InverseFactors,
    KroneckerDiagonal,
    KroneckerEigen,
    KroneckerLowRank,
    KroneckerSamples,
    KroneckerSum,
    LowRank,
    MiniBlocks,
    Operator,
    RowwiseEigen,
    SolvedByProducts,
    Stacked,
)
from fisherlab.operators.network import WholeNetwork

DENSE_ROWS = 4000  # blocks without a structured basis are diagonalised up to this size
PANEL_BYTES = 64 * 2**20  # eigenvectors formed at once
Rotation = Callable[[Tensor], Tensor]


@final
@dataclass(frozen=True, eq=False)
class Eigen:
    """An operator through its eigenvalues and products with its eigenvectors.

    Parameters
    ----------
    values
        v_j of the r eigenvectors kept, in any order, float64.
    rotate
        Weights (k, d_out, d_in) to their coefficients ⟨u_j, w⟩, shape (k, r).
    combine
        Coefficients (k, r) to Σ_j c_j u_j, shape (k, d_out, d_in).
    weight_shape
        (d_out, d_in).
    rest
        The eigenvalue outside of the span of the vectors kept.

    Examples
    --------
    >>> basis = decomposed(Diagonal(torch.tensor([[1.0, 2.0]]).double()))
    >>> basis.values.tolist(), basis.free
    ([1.0, 2.0], 0)
    """

    values: Float[Tensor, " r"]
    rotate: Rotation
    combine: Rotation
    weight_shape: tuple[int, int]
    rest: float = 0.0

    @property
    def rows(self) -> int:
        """P."""
        return self.weight_shape[0] * self.weight_shape[1]

    @property
    def free(self) -> int:
        """How many eigenvalues equal `rest`: p − r."""
        return self.rows - len(self.values)

    @property
    def smallest(self) -> float:
        """The smallest eigenvalue."""
        known = [float(self.values.min())] if len(self.values) else []
        return min([*known, self.rest] if self.free else known)

    @property
    def largest(self) -> float:
        """The largest eigenvalue, or 0."""
        known = [float(self.values.max())] if len(self.values) else []
        return max(0.0, self.rest, *known)

    def resolves(self, damping: float) -> bool:
        """Whether M + λI is positive, and float64 leaves its inverse three digits."""
        low = self.smallest + damping
        return low > 0 and EPS * (self.largest + damping) <= LOST * low

    def every(self) -> Float[Tensor, " p"]:
        """Return all p eigenvalues, descending."""
        rest = self.values.new_full((self.free,), self.rest)
        return torch.cat([self.values, rest]).sort(descending=True).values

    def vectors(self, index: Tensor) -> Float[Tensor, "k o i"]:
        """Return some eigenvectors, each in the shape of the weight."""
        picks = torch.zeros(
            len(index),
            len(self.values),
            dtype=self.values.dtype,
            device=self.values.device,
        )
        picks[torch.arange(len(index), device=index.device), index] = 1.0
        return self.combine(picks)

    def panels(self) -> list[Tensor]:
        """Cut the eigenvectors into runs whose vectors fit the workspace."""
        size = max(1, PANEL_BYTES // (8 * max(self.rows, len(self.values), 1)))
        return list(torch.arange(len(self.values), device=self.values.device).split(size))


def decomposed(operator: Operator, metric: str = "eigenvalues") -> Eigen:
    """Return the eigendecomposition of an operator, in float64.

    Parameters
    ----------
    operator
        Samples, Kronecker products, eigenforms, mini-blocks and diagonals keep their
        structure; anything else is diagonalised densely up to p = 4000.
    metric
        Who asks, for the error.

    Raises
    ------
    UnsupportedMetric
        If the operator has no structured basis and p is above 4000.
    NumericalError
        If it holds NaN or infinity.

    Notes
    -----
    d_out³ + d_in³ for Kronecker forms, M³ for M samples, p³ for the rest.

    Examples
    --------
    >>> from fisherlab.operators import Dense
    >>> decomposed(Dense(torch.diag(torch.tensor([3.0, 1.0])), (1, 2))).every().tolist()
    [3.0, 1.0]
    """
    double = operator.to(torch.float64)
    found = _structured(double)
    if found is not None:
        return found
    if double.shape[0] > DENSE_ROWS:
        raise UnsupportedMetric(
            metric,
            repr(operator),
            f"It has no structured eigenbasis and p = {double.shape[0]} is above "
            f"{DENSE_ROWS}. Use metrics of products (frobenius_error, spectral_error, "
            "direction_cosine), or a smaller layer.",
        )
    return _of_matrix(double.to_dense(), double.weight_shape, repr(operator))


def _of_matrix(matrix: Tensor, shape: tuple[int, int], what: str) -> Eigen:
    values, vectors = eigh(matrix, what)
    return Eigen(
        values,
        lambda w: w.flatten(1) @ vectors,
        lambda c: (c @ vectors.T).unflatten(1, shape),
        shape,
    )


@singledispatch
def _structured(operator: Operator) -> Eigen | None:
    return None


@_structured.register
def _(operator: FactoredFisher) -> Eigen | None:
    """Go through the Gram matrix: u_j = Dᵀ q_j / √(N κ_j).

    Vectors of small κ_j are far from orthonormal, which is harmless where they are
    measured against `rest`. As many samples as rows may leave no rest: then the block.
    """
    samples, count = operator.samples, operator.count
    wide = samples.columns * samples.examples >= operator.shape[0]
    if not operator.uses_gram or (wide and operator.shape[0] <= DENSE_ROWS):
        return None
    values, vectors = eigh(samples.gram().div_(count), f"the Gram matrix of {operator!r}")
    top = float(values[-1]) if len(values) else 0.0
    kept = values > top * len(values) * torch.finfo(values.dtype).eps
    values, vectors = values[kept], vectors[:, kept]
    turn = vectors / (values * count).sqrt()
    size = samples.columns, samples.examples
    return Eigen(
        values,
        lambda w: samples.project(w).flatten(1) @ turn,
        lambda c: samples.combine((c @ turn.T).unflatten(1, size)),
        operator.weight_shape,
    )


@_structured.register
def _(operator: KroneckerEigen) -> Eigen:
    rows, cols = operator.row_basis, operator.column_basis
    shape = operator.weight_shape
    return Eigen(
        operator.entries.flatten(),
        lambda w: (rows.T @ w @ cols).flatten(1),
        lambda c: rows @ c.unflatten(1, shape) @ cols.T,
        shape,
    )


@_structured.register
def _(operator: KroneckerSum) -> Eigen | None:
    if len(operator.terms) != 1:
        return None
    ((rows, cols),) = operator.terms
    row_values, row_basis = eigh(rows, f"the row factor of {operator!r}")
    col_values, col_basis = eigh(cols, f"the column factor of {operator!r}")
    entries = torch.outer(row_values, col_values)
    return _structured(KroneckerEigen(row_basis, col_basis, entries))


@_structured.register
def _(operator: KroneckerLowRank) -> Eigen:
    rows, cols = operator.row_basis, operator.column_basis
    inside = operator.entries.shape
    return Eigen(
        operator.entries.flatten() + operator.shift,
        lambda w: (rows.T @ w @ cols).flatten(1),
        lambda c: rows @ c.unflatten(1, inside) @ cols.T,
        operator.weight_shape,
        operator.shift,
    )


@_structured.register
def _(operator: Diagonal) -> Eigen:
    shape = operator.weight_shape
    return Eigen(
        operator.entries.flatten(),
        lambda w: w.flatten(1),
        lambda c: c.unflatten(1, shape),
        shape,
    )


@_structured.register
def _(operator: LowRank) -> Eigen:
    vectors, shape = operator.vectors.flatten(1), operator.weight_shape
    return Eigen(
        operator.values + operator.shift,
        lambda w: w.flatten(1) @ vectors.T,
        lambda c: (c @ vectors).unflatten(1, shape),
        shape,
        operator.shift,
    )


@_structured.register
def _(operator: MiniBlocks) -> Eigen:
    """Diagonalise block by block: coefficients in the order of the groups."""
    partition, pieces, values = operator.partition, [], []
    for (count, size), blocks in zip(partition.sizes, operator.blocks, strict=True):
        found = factorised("eigh", blocks, operator)
        pieces.append(found.eigenvectors)  # (1, k, k) for blocks that all share
        values.append(found.eigenvalues.expand(count, size).flatten())

    def rotate(w: Tensor) -> Tensor:
        inside = zip(partition.take(w), pieces, strict=True)
        return torch.cat([(x[:, :, None] @ basis).flatten(1) for x, basis in inside], 1)

    def combine(c: Tensor) -> Tensor:
        runs = c.split([count * size for count, size in partition.sizes], 1)
        parts = [
            (run.unflatten(1, size)[:, :, None] @ basis.mT)[:, :, 0]
            for run, size, basis in zip(runs, partition.sizes, pieces, strict=True)
        ]
        return partition.assemble(parts)

    return Eigen(torch.cat(values), rotate, combine, operator.weight_shape)


@_structured.register
def _(operator: RowwiseEigen) -> Eigen:
    basis, shape = operator.column_basis, operator.weight_shape
    return Eigen(
        operator.entries.flatten(),
        lambda w: (w @ basis).flatten(1),
        lambda c: c.unflatten(1, shape) @ basis.T,
        shape,
    )


@_structured.register
def _(operator: KroneckerDiagonal) -> Eigen:
    values, basis = eigh(operator.column_factor, f"the column factor of {operator!r}")
    entries = torch.outer(operator.row_diagonal, values)
    found = _structured(RowwiseEigen(basis, entries))
    assert found is not None
    return found


@_structured.register
def _(operator: Stacked) -> Eigen:
    """Decompose group by group; every eigenvector is zero outside of its group."""
    parts = [_whole(part) for part in operator.parts]
    heights = [part.weight_shape[0] for part in parts]
    counts = [len(part.values) for part in parts]

    def rotate(w: Tensor) -> Tensor:
        groups = zip(parts, w.split(heights, 1), strict=True)
        return torch.cat([part.rotate(rows) for part, rows in groups], 1)

    def combine(c: Tensor) -> Tensor:
        groups = zip(parts, c.split(counts, 1), strict=True)
        return torch.cat([part.combine(own) for part, own in groups], 1)

    values = torch.cat([part.values for part in parts])
    return Eigen(values, rotate, combine, operator.weight_shape)


def _whole(part: Operator) -> Eigen:
    """Return a decomposition with all p vectors, or with none left but of eigenvalue 0."""
    found = decomposed(part)
    if not found.free or found.rest == 0:
        return found
    return _of_matrix(part.to_dense(), part.weight_shape, repr(part))


@_structured.register
def _(operator: FactoredMiniBlocks) -> Eigen | None:
    return _structured(operator.formed)


@_structured.register(KroneckerSamples)
@_structured.register(InverseFactors)
def _(operator: KroneckerSamples | InverseFactors) -> Eigen | None:
    return _structured(operator.formed)


@_structured.register
def _(operator: SolvedByProducts) -> Eigen | None:
    return _structured(operator.forward)


@_structured.register
def _(operator: WholeNetwork) -> Eigen | None:
    return _structured(operator.whole)
