"""What keeps low-rank running averages close to the averages they stand for."""

from dataclasses import dataclass
from typing import final

import torch
from jaxtyping import Float
from torch import Tensor

from fisherlab.numerics.linalg import factorised
from fisherlab.showing import shown

LowRank = tuple[Tensor, Tensor]  # orthonormal U (n, r) and values d (r,): U diag(d) Uᵀ


@shown
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
        chosen = torch.randperm(len(values), generator=generator)[: self.columns]
        chosen = chosen.to(basis.device)
        part = basis[:, chosen]
        found, turn = factorised("eigh", part.T @ moment @ part, self)
        basis[:, chosen], values[chosen] = part @ turn, found.clamp_min(0)
        order = values.argsort(descending=True)
        return basis[:, order], values[order]


@shown
@final
@dataclass(frozen=True)
class RandomisedSVD:
    """Take U and d anew from the averaged factor, by a randomised decomposition.

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
        noise = torch.randn(size, width, generator=generator, dtype=torch.float64)
        basis = noise.to(dtype=moment.dtype, device=moment.device)
        for _ in range(self.iterations):
            basis = factorised("qr", moment @ basis, self).Q
        values, turn = factorised("eigh", basis.T @ moment @ basis, self)
        top = slice(max(width - rank, 0), None)
        return (basis @ turn[:, top]).flip(1), values[top].clamp_min(0).flip(0)
