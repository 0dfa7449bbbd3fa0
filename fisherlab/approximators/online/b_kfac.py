"""KFAC's factors as low-rank running averages, and what keeps them near the averages."""

from dataclasses import dataclass
from typing import final

import torch
from jaxtyping import Float
from torch import Tensor

from fisherlab.approximators.kronecker.kfac import roots
from fisherlab.numerics.krylov import orthonormal
from fisherlab.numerics.linalg import factorised
from fisherlab.numerics.packed import second_moment
from fisherlab.operators import KroneckerLowRank, Operator
from fisherlab.settings import numeric
from fisherlab.showing import shown
from fisherlab.statistics import LayerStatistics

LowRank = tuple[Tensor, Tensor]  # orthonormal U (n, r) and values d (r,): U diag(d) Uᵀ


@shown
@numeric
@final
@dataclass(frozen=True)
class Correction:
    r"""Diagonalise the averaged factor within some of the columns of U.

    .. math:: Q^T X Q = W Λ W^T, \quad Q \leftarrow Q W, \quad d_Q \leftarrow Λ

    for a random subset Q of the columns. Costs O(n² c) for c columns, and never increases
    :math:`\|X - U \mathrm{diag}(d) U^T\|_F`.

    Parameters
    ----------
    columns
        c, how many columns; all of them if None.
    every
        Steps between corrections.
    seed
        Of the choice of columns, which depends on the step too.

    Raises
    ------
    ValueError
        For `columns` or `every` below 1.

    References
    ----------
    Puiu 2022, arXiv 2210.08494 (B-KFAC-C).

    Examples
    --------
    >>> start = torch.eye(3)[:, :1], torch.zeros(1)
    >>> Correction()(start, torch.diag(torch.tensor([4.0, 2.0, 1.0])), 1, 1)[1].item()
    4.0
    """

    columns: int | None = None
    every: int = 1
    seed: int = 0

    def __post_init__(self) -> None:
        """Check the numbers."""
        if self.every < 1 or (self.columns is not None and self.columns < 1):
            msg = f"{self!r}: columns and every of at least 1 are expected."
            raise ValueError(msg)

    def __call__(
        self, low: LowRank, moment: Float[Tensor, "n n"], rank: int, step: int
    ) -> LowRank:
        """Return U and d after the correction, largest values first."""
        basis, values = (part.clone() for part in low)
        generator = torch.Generator().manual_seed(self.seed + step)
        chosen = torch.randperm(len(values), generator=generator, device="cpu")[
            : self.columns
        ]
        chosen = chosen.to(basis.device)
        part = basis[:, chosen]
        found, turn = factorised("eigh", part.T @ moment @ part, self)
        basis[:, chosen], values[chosen] = part @ turn, found.clamp_min(0)
        order = values.argsort(descending=True)
        return basis[:, order], values[order]


@shown
@numeric
@final
@dataclass(frozen=True)
class RandomisedSVD:
    r"""Take U and d anew from the averaged factor, by a randomised decomposition.

    .. math:: A \approx U \mathrm{diag}(d) U^T, \qquad
        U \text{ within the span of } A^q Ω

    Power iteration on r + oversample random columns, then the eigenvectors within their
    span: O(n² (r + oversample)), against O(n³) of a full decomposition.

    Parameters
    ----------
    oversample
        Columns beyond the rank.
    iterations
        Products with the factor.
    every
        Steps between refreshes; 1 is RS-KFAC.
    seed
        Of the random columns, which depend on the step too.

    Raises
    ------
    ValueError
        For a number below its least value, which is named.

    References
    ----------
    Halko, Martinsson & Tropp 2011; Puiu 2022, arXiv 2206.15397.

    Examples
    --------
    >>> moment = torch.diag(torch.tensor([4.0, 2.0, 1.0]))
    >>> start = torch.eye(3)[:, :1], torch.zeros(1)
    >>> round(RandomisedSVD()(start, moment, 1, 1)[1].item(), 4)
    4.0
    """

    oversample: int = 10
    iterations: int = 3
    every: int = 1
    seed: int = 0

    def __post_init__(self) -> None:
        """Check the numbers."""
        if min(self.oversample, self.iterations - 1, self.every - 1) < 0:
            msg = (
                f"{self!r}: oversample of at least 0, iterations and every of at least 1 "
                "are expected."
            )
            raise ValueError(msg)

    def __call__(
        self, low: LowRank, moment: Float[Tensor, "n n"], rank: int, step: int
    ) -> LowRank:
        """Return the leading eigenpairs of the factor, largest first."""
        size = len(moment)
        generator = torch.Generator().manual_seed(self.seed + step)
        width = min(rank + self.oversample, size)
        noise = torch.randn(
            size, width, generator=generator, dtype=torch.float64, device="cpu"
        )
        basis = noise.to(dtype=moment.dtype, device=moment.device)
        for _ in range(self.iterations):
            basis = factorised("qr", moment @ basis, self).Q
        values, turn = factorised("eigh", basis.T @ moment @ basis, self)
        top = slice(max(width - rank, 0), None)
        return (basis @ turn[:, top]).flip(1), values[top].clamp_min(0).flip(0)


@shown
@numeric
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
    refresh
        What the averaged factors X themselves, then kept beside U, do against the drift
        of repeated cutting: `Correction` (B-KFAC-C), `RandomisedSVD` (B-R-KFAC; every
        step, RS-KFAC), or nothing (B-KFAC, which never forms X).

    Raises
    ------
    ValueError
        For a rank below 1 or a decay outside of [0, 1).

    Notes
    -----
    ``previous`` is the operator of the step before: the average is inside the method, so
    it is not combined with `average`. A call costs O(d (r + m)²) for m columns of the
    batch: linear in the width d; with a refresh X costs d² m. Exact (KFAC of the averaged
    factors) while the rank is not exceeded. The published spectrum continuation is left
    out: eigenvalues outside the span are zero, and Tikhonov damping is added to them.

    References
    ----------
    Puiu 2022, arXiv 2210.08494 (Brand's update, its correction and refresh) and
    arXiv 2206.15397 (RS-KFAC).

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
    refresh: Correction | RandomisedSVD | None = None

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
        rows_, cols_ = roots(statistics, "BKFAC")
        row_batch = rows_.T / max(statistics.positions, 1) ** 0.5
        col_batch = cols_.T / statistics.count**0.5
        rows, cols = _factors(previous)
        rows = brand_update(rows, row_batch, self.rank, self.decay)
        cols = brand_update(cols, col_batch, self.rank, self.decay)
        steps = 1 + (previous.steps if isinstance(previous, KroneckerLowRank) else 0)
        moments = None
        if self.refresh is not None:
            moments = self._moments(previous, row_batch, col_batch)
            if steps % self.refresh.every == 0:
                rows = self.refresh(rows, moments[0], self.rank, steps)
                cols = self.refresh(cols, moments[1], self.rank, steps)
        return KroneckerLowRank(
            rows[0],
            cols[0],
            torch.outer(rows[1], cols[1]),
            row_values=rows[1],
            provenance=statistics.provenance.by(repr(self)),
            moments=moments,
            steps=steps,
        )

    def _moments(
        self, previous: Operator | None, rows: Tensor, cols: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Return the averages that the low-rank factors stand for."""
        fresh = second_moment(rows.T), second_moment(cols.T)
        old = previous.moments if isinstance(previous, KroneckerLowRank) else None
        if old is None:
            return fresh
        g, a = (torch.lerp(new, x, self.decay) for x, new in zip(old, fresh, strict=True))
        return g, a


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
    fresh = orthonormal(columns, [basis])
    wide = torch.cat([basis, fresh], 1)
    seen = torch.cat([inside, fresh.T @ columns])
    kept = torch.cat([decay * values, values.new_zeros(fresh.shape[1])])
    small = torch.diag(kept) + seen @ seen.T
    found, turn = factorised("eigh", small, "a low-rank factor of BKFAC")
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
