"""Natural-gradient steps by conjugate gradients that form neither F nor its factors."""

from dataclasses import dataclass
from typing import ClassVar, Literal, final

from fisherlab.approximators import register
from fisherlab.approximators.base import OfSamples, Returned
from fisherlab.approximators.blocks.exact import ExactBlock
from fisherlab.approximators.costs import Cost
from fisherlab.approximators.kronecker.kfac import roots
from fisherlab.operators import KroneckerSamples, Operator, SolvedByProducts, Stopping
from fisherlab.samples import Samples
from fisherlab.settings import numeric
from fisherlab.showing import shown
from fisherlab.statistics import LayerStatistics

Variant = Literal["kfac", "exact"]


@shown
@numeric
@final
@dataclass(frozen=True)
class CGFAC(OfSamples[SolvedByProducts]):
    r"""The block of a variant, damped systems in it solved by conjugate gradients.

    With 𝒢 (V·N·T × d_out) and 𝒜 (N·T × d_in) the products are

    .. math:: \text{kfac: } \frac{1}{N^2 T}\, 𝒢^T 𝒢\, W 𝒜^T 𝒜, \qquad
              \text{exact: } \frac1N \sum_{vn} \langle D_{vn}, W \rangle D_{vn}

    Parameters
    ----------
    variant
        "kfac" for KFAC's matrix, "exact" for F itself.
    tolerance
        Relative residual; 1e-10 in float64 and 1e-5 in float32 if None.
    max_iterations
        A cap that ends the iteration with what it has, as the method is meant to be used
        (5 to 20). If None, a residual that is not reached is an error.

    Raises
    ------
    ValueError
        For an unknown variant, or fewer than one iteration.

    Notes
    -----
    A product costs 2·(V·N·T + N·T)·d_out·d_in for "kfac" and 4·V·N·d_out·d_in for
    "exact" at one position. Holds the samples, so it can be neither streamed nor
    averaged. ``op.solve(w, damping, start=...)`` starts from the last step's answer;
    ``op.solution(...)`` tells iterations and residual.

    References
    ----------
    Chen 2021, arXiv 2101.00218. Only its abstract could be consulted: which of the two
    variants and which stopping rule it uses is not known.

    Examples
    --------
    >>> import torch, fisherlab as fl
    >>> stats = fl.collect(torch.nn.Linear(3, 2), (torch.ones(4, 3), None), fl.Gaussian())
    >>> op = fl.CGFAC(max_iterations=5)(stats["weight"])
    >>> op.solve(torch.ones(2, 4), damping=1.0)[0, 0].item()
    0.20000000298023224
    """

    needs_inputs: ClassVar[bool] = True
    result: ClassVar[Returned] = "products"

    variant: Variant = "kfac"
    tolerance: float | None = None
    max_iterations: int | None = None

    def __post_init__(self) -> None:
        """Check the variant and the cap."""
        if self.variant not in ("kfac", "exact"):
            msg = f"CGFAC(variant={self.variant!r}): 'kfac' or 'exact' is expected."
            raise ValueError(msg)
        if self.max_iterations is not None and self.max_iterations < 1:
            msg = f"CGFAC(max_iterations={self.max_iterations}): at least 1 is expected."
            raise ValueError(msg)

    def __call__(
        self,
        statistics: LayerStatistics,
        previous: Operator | None = None,
    ) -> SolvedByProducts:
        """Return the block of one layer.

        Raises
        ------
        NeedsSharedForm
            For "kfac", if the block has no inputs and output gradients.
        """
        exact = self.variant == "exact"
        forward = ExactBlock()(statistics) if exact else _kfac(statistics)
        cut = self.max_iterations is not None
        stopping = Stopping(self.tolerance, self.max_iterations or 2000, cut)
        return SolvedByProducts(forward, stopping, statistics.provenance.by(repr(self)))

    def cost(self, samples: Samples) -> Cost:
        """Count nothing: the samples are all it holds."""
        return Cost(0, 0)


def _kfac(statistics: LayerStatistics) -> KroneckerSamples:
    """Return KFAC's matrix with its scale in the rows."""
    rows, cols = roots(statistics, "CGFAC(variant='kfac')", turned=True)
    rows = rows / max(statistics.positions, 1) ** 0.5
    cols = cols / statistics.count**0.5
    rows, cols = (cols, rows) if statistics.turned else (rows, cols)
    return KroneckerSamples(rows, cols, statistics.provenance.by("CGFAC"))


register.add({"cg-fac": CGFAC()})
