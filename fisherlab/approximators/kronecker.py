"""A Kronecker product by its partial traces, by its eigenvalues or by its divergence."""

from abc import abstractmethod
from dataclasses import dataclass, replace
from typing import ClassVar, NamedTuple, final

import torch
from jaxtyping import Float
from torch import Tensor

from fisherlab.approximators import register
from fisherlab.approximators.base import (
    EIGEN,
    Cost,
    OfSamples,
    OfSums,
    Sums,
    add,
    by_group,
    cubes,
    entry_count,
    factor_flops,
    pair_numbers,
    partial_trace_flops,
    rotation_flops,
)
from fisherlab.approximators.kfac import AnySums, UseSums, joint_factors, kfac_sums
from fisherlab.approximators.rearranged import Rearranged
from fisherlab.numerics.linalg import damped_cholesky, eigh, spectrum
from fisherlab.operators import (
    KroneckerEigen,
    KroneckerSum,
    Operator,
    Provenance,
    RowwiseEigen,
)
from fisherlab.samples import Samples, TokenSamples
from fisherlab.settings import setting
from fisherlab.statistics import LayerStatistics


def partial_traces(statistics: LayerStatistics) -> Sums:
    """Return Σ D Dᵀ and Σ Dᵀ D over a chunk."""
    samples = statistics.samples
    o = samples.weight_shape[0]
    cols = samples.column_side(torch.eye(o, dtype=samples.dtype, device=samples.device))
    return Sums.of(statistics, _rows(samples), cols)


def _rows(samples: Samples) -> Tensor:
    """Return Σ D Dᵀ."""
    i = samples.weight_shape[1]
    return samples.row_side(torch.eye(i, dtype=samples.dtype, device=samples.device))


def traced(state: Sums) -> tuple[Tensor, Tensor, Tensor]:
    """Return Ψ/√t and Φ/√t of t = tr F, and t; as they are where it is 0.

    Of one scale for every method, so that they are decomposed once.
    """
    rows, cols = (sums / state.count for sums in state.tensors)
    trace = rows.trace()
    root = torch.where(trace > 0, trace, 1.0).sqrt()
    return rows / root, cols / root, trace


@by_group
@final
@setting
class TKFAC(OfSums[Sums, Operator]):
    r"""Trace-restricted KFAC, F ≈ Ψ ⊗ Φ / tr F.

    .. math:: Ψ = \frac1N \sum D D^T, \quad Φ = \frac1N \sum D^T D

    Notes
    -----
    Ψ and Φ are the partial traces of F, so its trace and both partial traces are exact.
    One half-step pair of KPSVD's power iteration from the identity; with per-example D
    also the Fisher estimate of TNT (Ren & Goldfarb 2021, arXiv 2106.02925) and of squared
    Shampoo, so "tnt" is another name for it. For one position
    ``Φ = E[‖g‖² a aᵀ]``, ``Ψ = E[‖a‖² g gᵀ]``. Exact where F is one Kronecker product.

    References
    ----------
    Gao et al. 2020, arXiv 2011.10741.

    Examples
    --------
    >>> import torch, fisherlab as fl
    >>> stats = fl.collect(torch.nn.Linear(3, 2), (torch.ones(4, 3), None), fl.Gaussian())
    >>> round(fl.TKFAC()(stats["weight"]).trace(), 5)
    8.0
    """

    def accumulate(self, state: Sums | None, statistics: LayerStatistics) -> Sums:
        """Add the partial traces of a chunk."""
        return add(state, partial_traces(statistics))

    def finish(self, state: Sums) -> KroneckerSum:
        """Divide by the examples and the trace."""
        rows, cols, trace = traced(state)
        made = state.provenance.by("TKFAC()")
        terms = () if trace == 0 else ((rows, cols),)
        return KroneckerSum(
            terms,
            state.weight_shape,
            made,
            precision=rows.dtype,
            place=rows.device,
        )

    def cost(self, samples: Samples) -> Cost:
        """Count both partial traces."""
        return Cost(partial_trace_flops(samples), pair_numbers(samples))


@by_group
@final
@setting
class Shampoo(OfSums[Sums, Operator]):
    r"""Square roots of the partial traces, F ≈ L^½ ⊗ R^½.

    .. math:: L = \frac1N \sum D D^T, \quad R = \frac1N \sum D^T D

    Notes
    -----
    Shampoo multiplies the gradient by :math:`(L \otimes R)^{-1/4}`, the inverse square
    root of this matrix. D is per example here, an estimate of F; the optimiser puts the
    mean gradient of a batch in its place. It bounds F from above:
    :math:`F \preceq \sqrt{r}\, L^{1/2} \otimes R^{1/2}` for D of rank r. For the product
    with the right trace, :math:`L \otimes R / \mathrm{tr} F`, see `TKFAC`.

    References
    ----------
    Gupta, Koren & Singer 2018, arXiv 1802.09568, Lemma 8.

    Examples
    --------
    >>> import torch, fisherlab as fl
    >>> stats = fl.collect(torch.nn.Linear(3, 2), (torch.ones(4, 3), None), fl.Gaussian())
    >>> round(fl.Shampoo()(stats["weight"]).trace(), 4)
    11.3137
    """

    decomposes: ClassVar[bool] = True

    def accumulate(self, state: Sums | None, statistics: LayerStatistics) -> Sums:
        """Add the partial traces of a chunk."""
        return add(state, partial_traces(statistics))

    def finish(self, state: Sums) -> KroneckerSum:
        """Divide by the examples and take the roots."""
        made = state.provenance.by(repr(self))
        *pair, trace = traced(state)
        root = max(float(trace), 0.0) ** 0.25
        rows, cols = (root * _root(factor, f"a factor of {made}") for factor in pair)
        return KroneckerSum(((rows, cols),), state.weight_shape, made)

    def cost(self, samples: Samples) -> Cost:
        """Count both partial traces and their roots."""
        roots = (EIGEN + 1) * cubes(samples)
        return Cost(partial_trace_flops(samples) + roots, pair_numbers(samples))


@by_group
@final
@setting
class Muon(OfSums[Sums, Operator]):
    r"""One-sided Shampoo, F ≈ L^½ ⊗ I with L = (1/N) Σ D Dᵀ.

    Notes
    -----
    Muon replaces a gradient matrix :math:`G = U Σ V^T` by its nearest semi-orthogonal
    one, :math:`U V^T = (G G^T)^{-1/2} G`: it divides by this matrix for D = G. D is per
    example here; for the optimiser's, of the mean gradient, see `MuonPreconditioner`. It
    scales as a gradient, not as its square: read its cosine and direction, not its
    Frobenius error.

    References
    ----------
    Jordan et al. 2024, "Muon: an optimizer for hidden layers in neural networks"; as
    one-sided Shampoo: Bernstein & Newhouse 2024, arXiv 2409.20325.

    Examples
    --------
    >>> import torch, fisherlab as fl
    >>> stats = fl.collect(torch.nn.Linear(3, 2), (torch.ones(4, 3), None), fl.Gaussian())
    >>> round(fl.Muon()(stats["weight"]).trace(), 4)
    16.0
    """

    decomposes: ClassVar[bool] = True

    def accumulate(self, state: Sums | None, statistics: LayerStatistics) -> Sums:
        """Add Σ D Dᵀ of a chunk."""
        return add(state, Sums.of(statistics, _rows(statistics.samples)))

    def finish(self, state: Sums) -> KroneckerSum:
        """Divide by the examples and take the root."""
        made = state.provenance.by(repr(self))
        rows = _root(state.tensors[0] / state.count, f"the factor of {made}")
        eye = torch.eye(state.weight_shape[1], dtype=rows.dtype, device=rows.device)
        return KroneckerSum(((rows, eye),), state.weight_shape, made)

    def cost(self, samples: Samples) -> Cost:
        """Count one partial trace and its root."""
        root = (EIGEN + 1) * samples.weight_shape[0] ** 3
        return Cost(samples.row_trace_flops() + root, pair_numbers(samples))


def _root(factor: Tensor, what: str) -> Tensor:
    """Return the root of a factor, of rounding 0: its root would pass for a number."""
    values, vectors = spectrum(factor, what)
    rounding = len(factor) * torch.finfo(values.dtype).eps * values[-1]
    values = torch.where(values > rounding, values, 0.0)
    return (vectors * values.clamp_min(0).sqrt()) @ vectors.T


register.add({"tkfac": TKFAC()}, aliases={"tnt": "tkfac"})  # TNT's per-example form
register.add({"shampoo": Shampoo(), "muon": Muon()})


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


@by_group
@final
@setting
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


@by_group
@final
@setting
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


@by_group
@final
@setting
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


SWEEPS = 30  # pairs of half-steps until convergence, about


@final
@dataclass(frozen=True, eq=False)
class Alternation:
    r"""The two half-steps, each of which minimises over one factor in closed form.

    Parameters
    ----------
    block
        F as a map on matrices, M ↦ (1/N) Σ D M Dᵀ, in float64.
    ridge
        κ, absolute: what is fitted is F + κI.
    """

    block: Rearranged
    ridge: float

    def rows(self, cols: Tensor) -> Tensor:
        """Return the best G for an A: (Σ D A⁻¹ Dᵀ / N + κ tr(A⁻¹) I) / d_in."""
        inverse = _inverse(cols, "the column factor of KL-Shampoo")
        shift = self.ridge * inverse.trace()
        return _shifted(self.block.apply(inverse), shift) / len(cols)

    def cols(self, rows: Tensor) -> Tensor:
        """Return the best A for a G: (Σ Dᵀ G⁻¹ D / N + κ tr(G⁻¹) I) / d_out."""
        inverse = _inverse(rows, "the row factor of KL-Shampoo")
        shift = self.ridge * inverse.trace()
        return _shifted(self.block.adjoint(inverse), shift) / len(rows)


class Fitted(NamedTuple):
    """Both factors, of equal norm, and how they were found."""

    rows: Tensor
    cols: Tensor
    iterations: int
    residual: float


def fitted(
    steps: Alternation, start: Tensor, tolerance: float, max_iterations: int
) -> Fitted:
    """Alternate from a column factor until G stands still in its own metric.

    The residual is ‖G^-½ G₊ G^-½ − I‖ / √d_out, which no change of basis alters.
    """
    rows, cols, residual, sweep = steps.rows(start), start, float("inf"), 0
    while residual > tolerance and sweep < max_iterations:
        cols = steps.cols(rows)
        old, rows, sweep = rows, steps.rows(cols), sweep + 1
        residual = _moved(old, rows)
    scale = float(cols.norm() / rows.norm()) ** 0.5
    return Fitted(rows * scale, cols / scale, sweep, residual)


def _moved(old: Tensor, new: Tensor) -> float:
    half = damped_cholesky(old, 0.0, "the row factor of KL-Shampoo")
    left = torch.linalg.solve_triangular(half, new, upper=False)
    both = torch.linalg.solve_triangular(half, left.T, upper=False)
    both.diagonal().sub_(1)
    return float(both.norm()) / len(new) ** 0.5


def _inverse(matrix: Tensor, what: str) -> Tensor:
    return torch.cholesky_inverse(damped_cholesky(matrix, 0.0, what))


def _shifted(matrix: Tensor, shift: float | Tensor) -> Tensor:
    matrix.diagonal().add_(shift)
    return matrix


@by_group
@final
@setting
class KLShampoo(OfSamples[Operator]):
    r"""The Kronecker product nearest to F in Kullback-Leibler divergence.

    .. math:: \min_{G, A} \mathrm{KL}\big(N(0, F + κI) \,\|\, N(0, G \otimes A)\big)

    by two closed forms in turn, each the minimum over one factor:

    .. math:: G = \frac{1}{d_{in}} \Big(\frac1N \sum D A^{-1} D^T + κ \,\mathrm{tr}(A^{-1})
              I\Big), \quad A = \frac{1}{d_{out}} \Big(\frac1N \sum D^T G^{-1} D +
              κ \,\mathrm{tr}(G^{-1}) I\Big)

    Parameters
    ----------
    ridge
        κ as a share of the mean eigenvalue tr F / p. Few examples leave F singular, and
        without κ the divergence then falls without end; 0 is for blocks of full rank.
    tolerance
        On the change of G in its own metric: 1e-10 in float64, 2e-6 in float32 if None.
    max_iterations
        Pairs of half-steps; what has not converged by then says so.

    Raises
    ------
    ValueError
        For a negative ridge, or no iterations.

    Notes
    -----
    The divergence is geodesically convex in (G, A): its minimum is global, and unique up
    to the scale that the factors share. No half-step can raise it. What KPSVD is to the
    Frobenius error, this is to ``gaussian_kl``; TKFAC is where it starts. Exact, for κ = 0,
    where F is one Kronecker product of full rank. Keeps the samples of a stream; works in
    float64; an iteration costs two products with the rearranged block, as one of KPSVD,
    and two inverses. Holds d_out² + d_in² numbers.

    References
    ----------
    Lin, Lowe, Dangel, Eschenhagen, Xu & Grosse 2025, arXiv 2509.03378, section 3; the
    alternation for matrix normal distributions: Dutilleul 1999; its convexity: Wiesel 2012.

    Examples
    --------
    >>> import torch, fisherlab as fl
    >>> x = torch.eye(3).double()
    >>> model = torch.nn.Linear(3, 2, bias=False).double()
    >>> stats = fl.collect(model, (x, None), fl.Gaussian())
    >>> round(fl.KLShampoo()(stats["weight"]).trace(), 4)
    2.0
    """

    decomposes: ClassVar[bool] = True
    inverts: ClassVar[bool] = True  # with a ridge

    ridge: float = 1e-6
    tolerance: float | None = None
    max_iterations: int = 500

    def __post_init__(self) -> None:
        """Check ridge and iterations."""
        if not 0 <= self.ridge < float("inf") or self.max_iterations < 1:
            msg = f"{self!r}: a finite ridge of at least 0 and an iteration are expected."
            raise ValueError(msg)

    def __call__(
        self, statistics: LayerStatistics, previous: Operator | None = None
    ) -> Operator:
        """Return the product of one block, from the factors of `previous` if given.

        Raises
        ------
        NumericalError
            If a factor is singular, as it may be without a ridge.
        """
        samples, shape = statistics.samples, statistics.weight_shape
        made = statistics.provenance.by(repr(self))
        mean = float(samples.squared_norms().sum(dtype=torch.float64))
        mean /= statistics.count * shape[0] * shape[1]
        if mean == 0:
            place = samples.device
            return KroneckerSum((), shape, made, precision=samples.dtype, place=place)
        wide = Rearranged(samples.to(torch.float64), statistics.count).multiplied_often()
        steps = Alternation(wide, self.ridge * mean)
        limit = self.tolerance or (1e-10 if samples.dtype == torch.float64 else 2e-6)
        found = fitted(steps, _start(wide, mean, previous), limit, self.max_iterations)
        return KroneckerSum(
            ((found.rows.to(samples.dtype), found.cols.to(samples.dtype)),),
            shape,
            made,
            converged=found.residual <= limit,
            iterations=found.iterations,
            residual=found.residual,
        )

    def cost(self, samples: Samples) -> Cost:
        """Count the half-steps and the inverses between them."""
        flops = SWEEPS * (samples.alternating_flops() + cubes(samples))
        return Cost(flops, pair_numbers(samples))


def _start(block: Rearranged, mean: float, previous: Operator | None) -> Tensor:
    """Return a positive column factor: an earlier one, or TKFAC's."""
    if isinstance(previous, KroneckerSum) and len(previous.terms) == 1:
        cols, share = previous.terms[0][1].double(), 1e-6
        return _shifted(cols.clone(), share * float(cols.diagonal().mean()))
    o = block.samples.weight_shape[0]
    eye = torch.eye(o, dtype=torch.float64, device=block.samples.device)
    return _shifted(block.adjoint(eye) / o, 1e-2 * mean)


register.add({"kl-shampoo": KLShampoo()})
