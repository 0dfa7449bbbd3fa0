"""The exact block, and the best of a given rank: its largest eigenvalues."""

from typing import ClassVar, final

from torch import Tensor

from fisherlab import operators
from fisherlab.approximators import register
from fisherlab.approximators.base import (
    Cost,
    OfSamples,
    Returned,
    entry_count,
    leading_flops,
)
from fisherlab.numerics.krylov import extreme_eigenpairs
from fisherlab.numerics.linalg import eigh
from fisherlab.operators import FactoredFisher, Operator
from fisherlab.operators.factored import Form
from fisherlab.samples import Samples
from fisherlab.settings import setting
from fisherlab.statistics import LayerStatistics


@final
@setting
class ExactBlock(OfSamples[FactoredFisher]):
    r"""The exact block F = (1/N) Σ vec(D) vec(D)ᵀ, never formed unless asked.

    Parameters
    ----------
    form
        Where norms, solves and spectra are computed: "dense" (p × p), "gram" (samples
        × samples), or "auto", by counted flops. "matrices" and "pairs" force how the
        dense block of a shared weight is built.

    Notes
    -----
    Holds N·T·(d_in + V·d_out) numbers. Exact always.

    Examples
    --------
    >>> import torch, fisherlab as fl
    >>> stats = fl.collect(torch.nn.Linear(3, 2), (torch.ones(4, 3), None), fl.Gaussian())
    >>> fl.ExactBlock()(stats["weight"]).trace()
    8.0
    """

    result: ClassVar[Returned] = "exact"

    form: Form = "auto"

    def __call__(
        self,
        statistics: LayerStatistics,
        previous: Operator | None = None,
    ) -> FactoredFisher:
        """Return the exact block of one layer."""
        s = statistics
        made = s.provenance.by("exact")
        return FactoredFisher(s.samples, s.count, made, self.form)


DIRECT = 4096  # eigenvalue problems up to this size are solved whole


@final
@setting
class LowRank(OfSamples[operators.LowRank]):
    r"""The best approximation of the exact block of a given rank.

    .. math:: F \approx \sum_{k \le r} e_k\, vec(U_k) vec(U_k)^T

    Parameters
    ----------
    rank
        r; above the rank of the block there is nothing left to approximate.

    Raises
    ------
    ValueError
        If the rank is not positive.

    Notes
    -----
    From the M × M Gram matrix of the M = V·N samples (M²·(d_in + d_out) + M³
    multiply-adds), the p × p block where it is smaller, or Lanczos on products where both
    exceed 4096. Holds r·p numbers; damped solves are exact by Woodbury, 2·r·p
    multiply-adds. ``fl.average(old, new, weight)`` of two is the best of the rank for the
    average of both, which makes it the online estimate of TONGA. The error is
    ``(Σ_{k>r} e_k²)^½``; exact for r ≥ M.

    References
    ----------
    Le Roux, Manzagol & Bengio 2007, "Topmoumoute online natural gradient algorithm",
    section 3.

    Examples
    --------
    >>> import torch, fisherlab as fl
    >>> stats = fl.collect(torch.nn.Linear(3, 2), (torch.ones(4, 3), None), fl.Gaussian())
    >>> [round(e, 4) for e in fl.LowRank(rank=1)(stats["weight"]).values.tolist()]
    [4.0]
    """

    rank: int = 10
    result: ClassVar[Returned] = "columns"

    def __post_init__(self) -> None:
        """Check the rank."""
        if self.rank < 1:
            raise ValueError(f"LowRank(rank={self.rank}): a positive rank is expected.")

    def __call__(
        self,
        statistics: LayerStatistics,
        previous: Operator | None = None,
    ) -> operators.LowRank:
        """Return the best approximation of one block."""
        s = statistics
        exact = FactoredFisher(s.samples, s.count, s.provenance)
        p, m = exact.shape[0], s.samples.total
        made = s.provenance.by(repr(self))
        if m <= min(p, DIRECT):
            rows = _by_gram(exact, self.rank)
        elif p <= DIRECT:
            rows = _by_block(exact, self.rank)
        else:
            rows = _by_products(exact, self.rank)
        return operators.LowRank.of_rows(rows, self.rank, made)

    def cost(self, samples: Samples) -> Cost:
        """Count the eigenvalues of the block by its cheaper space."""
        p = entry_count(samples)
        rank = min(self.rank, p, samples.total)
        return Cost(leading_flops(samples), rank * (p + 1))


def _by_gram(exact: FactoredFisher, rank: int) -> Tensor:
    """Return √e_k U_k as combinations of the samples."""
    samples = exact.samples
    gram = samples.gram().double()
    _, vectors = eigh(gram, repr(exact))
    top = vectors.flip(1)[:, :rank].T.to(samples.dtype)
    mixed = samples.combine(top.reshape(-1, samples.columns, samples.examples))
    return mixed / exact.count**0.5


def _by_block(exact: FactoredFisher, rank: int) -> Tensor:
    """Return √e_k U_k from the dense block."""
    values, vectors = eigh(exact.to_dense(), repr(exact))
    return _scaled(values.flip(0)[:rank], vectors.flip(1)[:, :rank], exact)


def _by_products(exact: FactoredFisher, rank: int) -> Tensor:
    """Return √e_k U_k by Lanczos."""
    values, vectors = extreme_eigenpairs(exact.to_scipy(), rank, "LA", repr(exact))
    return _scaled(values, vectors, exact)


def _scaled(values: Tensor, vectors: Tensor, exact: FactoredFisher) -> Tensor:
    rows = (vectors * values.clamp_min(0).sqrt()).T
    rows = rows.to(dtype=exact.dtype, device=exact.device)
    return rows.reshape(-1, *exact.weight_shape)


register.add({"exact": ExactBlock()})
register.add({"low-rank": LowRank()})
