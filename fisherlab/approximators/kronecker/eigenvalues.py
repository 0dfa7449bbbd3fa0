"""The best eigenvalues for a Kronecker eigenbasis: KFAC's, or the partial traces'."""

from abc import abstractmethod
from dataclasses import dataclass, replace
from typing import ClassVar, final

from jaxtyping import Float
from torch import Tensor

from fisherlab.approximators import register
from fisherlab.approximators.base import OfSums
from fisherlab.approximators.costs import (
    EIGEN,
    Cost,
    cubes,
    entry_count,
    factor_flops,
    pair_numbers,
    partial_trace_flops,
    rotation_flops,
)
from fisherlab.approximators.kronecker.kfac import (
    AnySums,
    UseSums,
    joint_factors,
    kfac_sums,
)
from fisherlab.approximators.kronecker.partial_traces import partial_traces, traced
from fisherlab.approximators.states import Sums, add, by_group
from fisherlab.numerics.linalg import eigh, spectrum
from fisherlab.operators import KroneckerEigen, Operator, Provenance, RowwiseEigen
from fisherlab.samples import Samples, TokenSamples
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

    row_basis: Float[Tensor, "o r"] | None
    column_basis: Float[Tensor, "i c"]
    provenance: Provenance
    sums: Sums | None = None

    @classmethod
    def onto(
        cls,
        rows: Tensor,
        cols: Float[Tensor, "i i"],
        provenance: Provenance,
    ) -> "Projection":
        """Begin with the eigenvectors of two factors; the first may be a diagonal."""
        if rows.dim() == 1:  # every row of a table needs the whole basis
            _, whole = eigh(cols, f"the column factor of {provenance}")
            return cls(None, whole, provenance)
        _, column_basis = spectrum(cols, f"the column factor of {provenance}")
        _, row_basis = spectrum(rows, f"the row factor of {provenance}")
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
        return self.summing(add(self.sums, Sums.of(statistics, more)))

    def summing(self, sums: Sums | None) -> "Projection":
        """Return the same bases with other squares."""
        return replace(self, sums=sums)

    def __add__(self, other: "Projection") -> "Projection":
        """Add up two parts of the data in the same basis."""
        if self.sums is None or other.sums is None:
            return other if self.sums is None else self
        return self.summing(self.sums + other.sums)

    def finished(self) -> KroneckerEigen | RowwiseEigen:
        """Divide by the examples."""
        assert self.sums is not None
        entries = self.sums.tensors[0] / self.sums.count
        if self.row_basis is None:
            return RowwiseEigen(self.column_basis, entries, self.provenance)
        return KroneckerEigen(self.row_basis, self.column_basis, entries, self.provenance)


class _Corrected(OfSums[AnySums | Projection, Operator]):
    """Two passes: sums that give a basis, and the second moments of the gradient in it."""

    decomposes: ClassVar[bool] = True

    keep_basis: bool

    @abstractmethod
    def sums(self, state: AnySums | None, statistics: LayerStatistics) -> AnySums:
        """Add a chunk to the sums of the first pass."""

    @abstractmethod
    def factors(self, state: AnySums) -> tuple[Tensor, Tensor]:
        """Return the matrices whose eigenvectors are the basis; a diagonal as a vector."""

    def begun(
        self, statistics: LayerStatistics, previous: Operator | None
    ) -> Projection | None:
        """Keep the basis of `previous`, if that is asked for."""
        made = statistics.provenance.by(repr(self))
        return Projection.kept(previous, made) if self.keep_basis else None

    def accumulate(
        self, state: AnySums | Projection | None, statistics: LayerStatistics
    ) -> AnySums | Projection:
        """Add the sums in the first pass, squared projections in the second."""
        if isinstance(state, Projection):
            return state.seeing(statistics)
        return self.sums(state, statistics)

    def next_pass(self, state: AnySums | Projection) -> Projection | None:
        """Diagonalise the factors after the first pass."""
        if isinstance(state, Projection):
            return None
        return Projection.onto(*self.factors(state), state.provenance.by(repr(self)))

    def finish(self, state: AnySums | Projection) -> KroneckerEigen | RowwiseEigen:
        """Divide the squared projections by the examples."""
        assert isinstance(state, Projection)
        return state.finished()


@shown
@by_group
@final
@dataclass(frozen=True)
class EKFAC(_Corrected):
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
    Of a weight used in several ways the basis is that of the partial traces of KFAC's sum.

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

    needs_inputs: ClassVar[bool] = True

    keep_basis: bool = False

    def sums(self, state: AnySums | None, statistics: LayerStatistics) -> AnySums:
        """Add KFAC's sums.

        Raises
        ------
        NeedsSharedForm
            If the block has no inputs and output gradients.
        """
        return kfac_sums(state, statistics, "expand", "EKFAC")

    def factors(self, state: AnySums) -> tuple[Tensor, Tensor]:
        """Return KFAC's factors; of several uses the partial traces of its sum."""
        return joint_factors(state, "expand")

    def cost(self, samples: Samples) -> Cost:
        """Count KFAC, two eigendecompositions and the squares in their basis."""
        return Cost(factor_flops(samples) + _basis_flops(samples), _numbers(samples))


class _OfPartialTraces(_Corrected):
    """The basis of the partial traces, which every kind of block has."""

    def sums(self, state: AnySums | None, statistics: LayerStatistics) -> AnySums:
        """Add partial traces."""
        assert not isinstance(state, UseSums)
        return add(state, partial_traces(statistics))

    def factors(self, state: AnySums) -> tuple[Tensor, Tensor]:
        """Return the partial traces."""
        assert isinstance(state, Sums)
        rows, cols, _ = traced(state)
        return rows, cols

    def cost(self, samples: Samples) -> Cost:
        """Count partial traces, two eigendecompositions and the squares in their basis."""
        flops = partial_trace_flops(samples) + _basis_flops(samples)
        return Cost(flops, _numbers(samples))


@shown
@by_group
@final
@dataclass(frozen=True)
class TEKFAC(_OfPartialTraces):
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


@shown
@by_group
@final
@dataclass(frozen=True)
class SOAP(_OfPartialTraces):
    r"""Shampoo's eigenbasis with the exact second moments of the gradient in it.

    .. math:: F \approx (U_L \otimes U_R)\,\mathrm{diag}(s)\,(U_L \otimes U_R)^T, \quad
              s = \frac1N \sum (U_L^T D U_R)^{\circ 2}

    Parameters
    ----------
    keep_basis
        As in `EKFAC`: what SOAP does between two refreshes of its basis.

    Notes
    -----
    L and R are Shampoo's factors, the partial traces of F, with D per example; so this is
    the matrix of `TEKFAC` under the name of its optimiser. s is the best diagonal for
    Shampoo's basis, so the error is never above Shampoo's at any scale. For SOAP itself,
    which runs Adam in that basis on mean gradients, see `SOAPPreconditioner`.

    References
    ----------
    Vyas, Morwani, Zhao, Kwun, Shapira, Brandfonbrener, Janson & Kakade 2024,
    arXiv 2409.11321.

    Examples
    --------
    >>> import torch, fisherlab as fl
    >>> stats = fl.collect(torch.nn.Linear(3, 2), (torch.ones(4, 3), None), fl.Gaussian())
    >>> round(fl.SOAP()(stats["weight"]).trace(), 5)
    8.0
    """

    keep_basis: bool = False


def _basis_flops(samples: Samples) -> int:
    return EIGEN * cubes(samples) + rotation_flops(samples)


def _numbers(samples: Samples) -> int:
    return pair_numbers(samples) + entry_count(samples)


register.add({"ekfac": EKFAC()})
register.add({"tekfac": TEKFAC(), "soap": SOAP()})
