"""The best eigenvalues for a Kronecker eigenbasis: of KFAC, and of the partial traces."""

from dataclasses import dataclass, replace
from typing import final

from jaxtyping import Float
from torch import Tensor

from fisherlab.approximators.kronecker.kfac import factors, kfac_sums
from fisherlab.approximators.kronecker.partial_traces import partial_traces
from fisherlab.approximators.states import Sums, add, by_group
from fisherlab.numerics.linalg import eigh
from fisherlab.operators import KroneckerEigen, Operator, Provenance, RowwiseEigen
from fisherlab.samples import TokenSamples
from fisherlab.showing import shown
from fisherlab.statistics import LayerStatistics


@final
@dataclass(frozen=True, eq=False)
class Projection:
    """Bases that stand, and the squares of rotated gradients that are still summed.

    Parameters
    ----------
    row_basis
        None for the identity: the rows of an embedding stay as they are.
    """

    row_basis: Float[Tensor, "o o"] | None
    column_basis: Float[Tensor, "i i"]
    provenance: Provenance
    squares: Sums | None = None

    @classmethod
    def onto(
        cls,
        rows: Tensor,
        cols: Float[Tensor, "i i"],
        provenance: Provenance,
    ) -> "Projection":
        """Begin with the eigenvectors of two factors; the first may be a diagonal."""
        _, column_basis = eigh(cols, f"the column factor of {provenance}")
        if rows.dim() == 1:
            return cls(None, column_basis, provenance)
        _, row_basis = eigh(rows, f"the row factor of {provenance}")
        return cls(row_basis, column_basis, provenance)

    @classmethod
    def kept(cls, previous: Operator | None, provenance: Provenance) -> "Projection | None":
        """Begin with the bases of an earlier operator, None where it has none."""
        if isinstance(previous, KroneckerEigen):
            return cls(previous.row_basis, previous.column_basis, provenance)
        if isinstance(previous, RowwiseEigen):
            return cls(None, previous.column_basis, provenance)
        return None

    def seeing(self, statistics: LayerStatistics) -> "Projection":
        """Add Σ (Uᵀ D V)∘² of a chunk."""
        samples = statistics.samples
        if self.row_basis is None:
            assert isinstance(samples, TokenSamples)
            more = samples.column_squares(self.column_basis)
        else:
            more = samples.rotated_squares(self.row_basis, self.column_basis)
        return replace(self, squares=add(self.squares, Sums.of(statistics, more)))

    def __add__(self, other: "Projection") -> "Projection":
        """Add up two parts of the data in the same basis."""
        if self.squares is None or other.squares is None:
            return other if self.squares is None else self
        return replace(self, squares=self.squares + other.squares)

    def finished(self) -> KroneckerEigen | RowwiseEigen:
        """Divide by the examples."""
        assert self.squares is not None
        entries = self.squares.tensors[0] / self.squares.count
        if self.row_basis is None:
            return RowwiseEigen(self.column_basis, entries, self.provenance)
        return KroneckerEigen(self.row_basis, self.column_basis, entries, self.provenance)


@shown
@by_group
@final
@dataclass(frozen=True)
class EKFAC:
    r"""KFAC's eigenbasis with the exact second moments of the gradient in it.

    .. math:: F \approx (U_G \otimes U_A)\,\mathrm{diag}(s)\,(U_G \otimes U_A)^T, \quad
              s = \frac1N \sum (U_G^T D U_A)^{\circ 2}

    Parameters
    ----------
    keep_basis
        Take the eigenvectors of `previous` where it is given, so that a refresh costs no
        eigendecomposition; leave `previous` out to refresh them too.

    Notes
    -----
    s is the Frobenius-optimal diagonal for that basis, so
    ``‖F − F_EK‖² = ‖F‖² − ‖s‖²`` and the error is never above KFAC's; the trace is
    exact. Costs KFAC, two eigendecompositions and one more pass. Exact where KFAC is.
    Of an embedding the rows stay as they are and the columns are rotated: one
    eigendecomposition, d_in² + p numbers. s is not a product of two factors'
    eigenvalues, so that a factored damping means nothing here and is refused: Tikhonov.

    References
    ----------
    George et al. 2018, arXiv 1806.03884 (section 4.2: amortised eigendecompositions).

    Examples
    --------
    >>> import torch, fisherlab as fl
    >>> stats = fl.collect(torch.nn.Linear(3, 2), (torch.ones(4, 3), None), fl.Gaussian())
    >>> round(fl.EKFAC()(stats["weight"]).trace(), 5)
    8.0
    """

    keep_basis: bool = False

    def __call__(
        self,
        statistics: LayerStatistics,
        previous: Operator | None = None,
    ) -> Operator:
        """Return the eigenvalue-corrected block.

        Raises
        ------
        NeedsSharedForm
            If the block has no inputs and output gradients.
        """
        made = statistics.provenance.by(repr(self))
        kept = Projection.kept(previous, made) if self.keep_basis else None
        if kept is not None:
            return kept.seeing(statistics).finished()
        second = self.next_pass(self.accumulate(None, statistics))
        return self.finish(self.accumulate(second, statistics))

    def accumulate(
        self, state: Sums | Projection | None, statistics: LayerStatistics
    ) -> Sums | Projection:
        """Add KFAC's sums in the first pass, squared projections in the second."""
        if isinstance(state, Projection):
            return state.seeing(statistics)
        return kfac_sums(state, statistics, "expand", "EKFAC")

    def merge(
        self, first: Sums | Projection, second: Sums | Projection
    ) -> Sums | Projection:
        """Add up two parts of the same pass."""
        if isinstance(first, Sums) and isinstance(second, Sums):
            return first + second
        assert isinstance(first, Projection)
        assert isinstance(second, Projection)
        return first + second

    def next_pass(self, state: Sums | Projection) -> Projection | None:
        """Diagonalise the factors after the first pass."""
        if isinstance(state, Projection):
            return None
        return Projection.onto(*factors(state, "expand"), state.provenance.by(repr(self)))

    def finish(self, state: Sums | Projection) -> KroneckerEigen | RowwiseEigen:
        """Divide the squared projections by the examples."""
        assert isinstance(state, Projection)
        return state.finished()


@shown
@by_group
@final
@dataclass(frozen=True)
class TEKFAC:
    r"""TKFAC's eigenbasis with the exact second moments of the gradient in it.

    .. math:: F \approx (U_Ψ \otimes U_Φ)\,\mathrm{diag}(s)\,(U_Ψ \otimes U_Φ)^T, \quad
              s = \frac1N \sum (U_Ψ^T D U_Φ)^{\circ 2}

    Parameters
    ----------
    keep_basis
        As in `EKFAC`.

    Notes
    -----
    Ψ and Φ are the partial traces of F, so every kind of block has them. s is the
    Frobenius-optimal diagonal for the basis: ``‖F − F_TEK‖² = ‖F‖² − ‖s‖²``, never above
    TKFAC's error; the trace is exact.

    References
    ----------
    Gao et al. 2020, arXiv 2011.13609.

    Examples
    --------
    >>> import torch, fisherlab as fl
    >>> stats = fl.collect(torch.nn.Linear(3, 2), (torch.ones(4, 3), None), fl.Gaussian())
    >>> round(fl.TEKFAC()(stats["weight"]).trace(), 5)
    8.0
    """

    keep_basis: bool = False

    def __call__(
        self,
        statistics: LayerStatistics,
        previous: Operator | None = None,
    ) -> Operator:
        """Return the eigenvalue-corrected block."""
        made = statistics.provenance.by(repr(self))
        kept = Projection.kept(previous, made) if self.keep_basis else None
        if kept is not None:
            return kept.seeing(statistics).finished()
        second = self.next_pass(self.accumulate(None, statistics))
        return self.finish(self.accumulate(second, statistics))

    def accumulate(
        self, state: Sums | Projection | None, statistics: LayerStatistics
    ) -> Sums | Projection:
        """Add partial traces in the first pass, squared projections in the second."""
        if isinstance(state, Projection):
            return state.seeing(statistics)
        return add(state, partial_traces(statistics))

    def merge(
        self, first: Sums | Projection, second: Sums | Projection
    ) -> Sums | Projection:
        """Add up two parts of the same pass."""
        if isinstance(first, Sums) and isinstance(second, Sums):
            return first + second
        assert isinstance(first, Projection)
        assert isinstance(second, Projection)
        return first + second

    def next_pass(self, state: Sums | Projection) -> Projection | None:
        """Diagonalise the partial traces after the first pass."""
        if isinstance(state, Projection):
            return None
        rows, cols = state.tensors
        return Projection.onto(rows, cols, state.provenance.by(repr(self)))

    def finish(self, state: Sums | Projection) -> KroneckerEigen | RowwiseEigen:
        """Divide the squared projections by the examples."""
        assert isinstance(state, Projection)
        return state.finished()
