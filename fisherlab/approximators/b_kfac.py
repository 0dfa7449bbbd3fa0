"""B-KFAC: running averages of KFAC's factors kept at low rank, never formed."""

from dataclasses import dataclass
from typing import final

import torch
from jaxtyping import Float
from torch import Tensor

from fisherlab.numerics.krylov import orthonormal
from fisherlab.operators import KroneckerLowRank, Operator
from fisherlab.statistics import LayerStatistics

LowRank = tuple[Tensor, Tensor]  # orthonormal U (n, r) and values d (r,): U diag(d) Uᵀ


@final
@dataclass(frozen=True)
class BKFAC:
    r"""KFAC's factors as running averages of a fixed rank, updated in place of a sum.

    .. math:: X_k = ρ X_{k-1} + (1 - ρ) M M^T \approx U \mathrm{diag}(d) U^T

    Parameters
    ----------
    rank
        Columns of U kept from step to step, for each factor.
    decay
        ρ, the share of what was there before; the first call uses its batch alone.

    Notes
    -----
    ``previous`` is the operator of the step before: the average is inside the method, so
    it is not combined with `average`. A call costs O(d (r + m)²) for m columns of the
    batch: linear in the width d. Exact (KFAC of the averaged factors) while the rank is
    not exceeded. The published spectrum continuation is left out: eigenvalues outside
    the span are zero, and Tikhonov damping is added to them.

    References
    ----------
    Puiu 2022, arXiv 2210.08494 (Brand's update).

    Examples
    --------
    >>> import torch, fisherlab as fl
    >>> stats = fl.collect(torch.nn.Linear(3, 2), (torch.ones(4, 3), None), fl.Gaussian())
    >>> op = fl.BKFAC(rank=2)(stats["weight"])
    >>> op.entries.shape, round(fl.BKFAC(rank=2)(stats["weight"], previous=op).trace(), 4)
    (torch.Size([2, 1]), 8.0)
    """

    rank: int = 32
    decay: float = 0.95

    def __post_init__(self) -> None:
        """Check rank and decay."""
        if self.rank < 1 or not 0 <= self.decay < 1:
            msg = f"{self!r}: a rank of at least 1 and a decay in [0, 1) are expected."
            raise ValueError(msg)

    def __call__(
        self,
        statistics: LayerStatistics,
        previous: Operator | None = None,
    ) -> KroneckerLowRank:
        """Return the averaged product after one more batch.

        Raises
        ------
        NeedsSharedForm
            If the block has no inputs and output gradients.
        """
        inputs, gradients = statistics.shared("BKFAC")
        row_batch = gradients.flatten(0, 2).T / max(statistics.positions, 1) ** 0.5
        col_batch = inputs.flatten(0, 1).T / statistics.count**0.5
        rows, cols = _factors(previous)
        row_basis, row_values = brand_update(rows, row_batch, self.rank, self.decay)
        col_basis, col_values = brand_update(cols, col_batch, self.rank, self.decay)
        return KroneckerLowRank(
            row_basis,
            col_basis,
            torch.outer(row_values, col_values),
            row_values=row_values,
            provenance=statistics.provenance.by(repr(self)),
        )


def brand_update(
    before: LowRank | None, batch: Float[Tensor, "n m"], rank: int, decay: float
) -> LowRank:
    """Return ρ U diag(d) Uᵀ + (1 − ρ) M Mᵀ, cut to its `rank` largest values.

    Parameters
    ----------
    before
        U and d; None to begin with M Mᵀ alone.
    batch
        M, the columns of the new batch.
    rank, decay
        Values kept, and ρ.

    Examples
    --------
    >>> basis, values = brand_update(None, torch.eye(3), rank=2, decay=0.9)
    >>> values.tolist()
    [1.0, 1.0]
    """
    share = 1.0 if before is None else 1 - decay
    columns = batch * share**0.5
    if before is None:
        basis, values = columns[:, :0], columns.new_zeros(0)
    else:
        basis, values = before
    inside = basis.T @ columns
    fresh = orthonormal(columns, None, [basis])
    wide = torch.cat([basis, fresh], 1)
    seen = torch.cat([inside, fresh.T @ columns])
    kept = torch.cat([decay * values, values.new_zeros(fresh.shape[1])])
    small = torch.diag(kept) + seen @ seen.T
    found, turn = torch.linalg.eigh(small)
    top = slice(max(len(found) - rank, 0), None)
    return (wide @ turn[:, top]).flip(1), found[top].clamp_min(0).flip(0)


def _factors(previous: Operator | None) -> tuple[LowRank | None, LowRank | None]:
    """Return the low-rank factors of the operator before, where it has them."""
    if not isinstance(previous, KroneckerLowRank) or previous.row_values is None:
        return None, None
    rows = previous.row_values
    total = float(rows.sum())
    cols = previous.entries.sum(0) / total if total > 0 else previous.entries.sum(0)
    return (previous.row_basis, rows), (previous.column_basis, cols)
