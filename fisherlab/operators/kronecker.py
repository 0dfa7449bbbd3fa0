"""Sums of Kronecker products Σ_k G_k ⊗ A_k, row factor first, and one in factored form."""

import math
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cached_property, reduce
from typing import Any, final
from warnings import catch_warnings

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from fisherlab.errors import NumericalError
from fisherlab.numerics.krylov import RESTARTS, extreme_eigenpairs, smallest_eigenvalue
from fisherlab.numerics.linalg import (
    Label,
    compensated_sum,
    eigh,
    entrywise_inner,
    factorised,
    kron,
    require_finite,
    require_positive,
    spectrum,
)
from fisherlab.numerics.packed import second_moment
from fisherlab.operators.base import (
    Damping,
    Factored,
    Operator,
    Provenance,
    inner_product,
    tikhonov,
)
from fisherlab.operators.dense import Dense
from fisherlab.operators.eigenform import (
    Diagonal,
    Eigenform,
    KroneckerEigen,
    powers,
    quadratic_forms,
)
from fisherlab.operators.factored import FactoredFisher, WoodburyInverse
from fisherlab.operators.iterative import IterativeInverse
from fisherlab.operators.kronecker_congruence import (
    KroneckerCholesky,
    KroneckerCongruence,
    Term,
    factored_pair,
    inverse_pair,
    triangle_pair,
)
from fisherlab.samples.cross import multiplied

DENSE_ROWS = 4000  # sums of several terms are diagonalised densely up to this size
FORMED_ROWS = 512  # whether a damped sum is positive is seen on its matrix up to this size
SWEEPS = 200  # of LOBPCG for the smallest eigenvalue of a sum
FEW = 15  # restarts of Lanczos on a sum itself, whose products are the cheaper ones
CERTAIN = 1e3  # times the tolerance: what an eigenvalue found so exceeds is one
ROUGH = 1e-3  # what Lanczos is asked for first
CLEAR = 0.1  # what a sign is clear above, found so
CANCELLED = 1e-3  # share of the terms' squares below which a sum is formed otherwise
HIDDEN = 1e-9  # share of a sum that rounding of its terms may take

Flat = np.ndarray[tuple[int], np.dtype[np.float64]]


@final
@dataclass(frozen=True, eq=False, repr=False)
class KroneckerSum(Operator):
    """Σ_k G_k ⊗ A_k: KFAC, KPSVD and every sum of Kronecker products.

    Parameters
    ----------
    terms
        Pairs (G, A) of shapes (d_out, d_out) and (d_in, d_in); may be empty (zero).
    block_shape
        (d_out, d_in).
    singular_values, converged, iterations, residual
        How the terms were found, where an iteration found them: residual is the
        largest ‖Zᵀu − σv‖ / σ₁ of the pairs kept.

    Examples
    --------
    >>> op = KroneckerSum(((torch.eye(2), 3 * torch.eye(4)),), (2, 4))
    >>> op.trace(), op.stored_numbers
    (24.0, 13)
    """

    terms: Sequence[Term]
    block_shape: tuple[int, int]
    provenance: Provenance = Provenance()
    singular_values: Float[Tensor, " k"] | None = None
    converged: bool = True
    iterations: int = 0
    residual: float = 0.0
    precision: torch.dtype | None = None
    place: torch.device | None = None

    def __post_init__(self) -> None:
        """Settle the precision of a sum without terms."""
        if not self.terms and self.precision is None:
            object.__setattr__(self, "precision", torch.get_default_dtype())

    @property
    def stored_numbers(self) -> int:
        """Per term d_out(d_out+1)/2 + d_in(d_in+1)/2."""
        o, i = self.block_shape
        return len(self.terms) * (o * (o + 1) + i * (i + 1)) // 2

    @property
    def product_flops(self) -> int:
        """Per term d_out·d_in·(d_out + d_in)."""
        o, i = self.block_shape
        return len(self.terms) * o * i * (o + i)

    def _apply(self, w: Float[Tensor, "k o i"]) -> Float[Tensor, "k o i"]:
        if not self.terms:
            return torch.zeros_like(w)
        one = w.squeeze(0)  # of one weight, as a step has it, products are plain
        products = (rows @ one @ cols.T for rows, cols in self.terms)
        return reduce(torch.Tensor.add_, products).view(w.shape)

    def _dense(self) -> Float[Tensor, "p p"]:
        if self.cancels:
            return compensated_sum(self.terms).to(self.dtype)
        p = self.shape[0]
        out = torch.zeros(p, p, dtype=self.dtype, device=self.device)
        for rows, cols in self.terms:
            out += kron(rows, cols)
        return out

    def diagonal(self) -> Float[Tensor, "o i"]:
        """Return Σ diag(G) diag(A)ᵀ."""
        out = torch.zeros(self.block_shape, dtype=self.dtype, device=self.device)
        for rows, cols in self.terms:
            out += torch.outer(rows.diagonal(), cols.diagonal())
        return out

    def trace(self) -> float:
        """Return Σ tr G · tr A."""
        return sum(float(rows.trace()) * float(cols.trace()) for rows, cols in self.terms)

    def frobenius_norm(self) -> float:
        """Return (Σ_kl ⟨G_k, G_l⟩⟨A_k, A_l⟩)^½, or ‖R_G R_Aᵀ‖ where terms cancel.

        R_G and R_A are the triangles of the stacked factors: that form loses eps of the
        terms, the sum of inner products √eps.
        """
        squared, terms = self.inner(self), self.terms_norm
        if squared > CANCELLED * terms * terms or len(self.terms) < 2:  # ** may raise
            return max(squared, 0.0) ** 0.5
        triangles = (
            factorised("qr", torch.stack([f.flatten() for f in side], 1).double(), self).R
            for side in zip(*self.terms, strict=True)
        )
        rows, cols = triangles
        return float(torch.linalg.matrix_norm(rows @ cols.T))

    @property
    def terms_norm(self) -> float:
        """Σ_k ‖G_k‖‖A_k‖, the size of what is added up."""
        return sum(float(g.double().norm() * a.double().norm()) for g, a in self.terms)

    @cached_property
    def cancels(self) -> bool:
        """Whether terms of opposite sign hide the sum: their rounding shows in it."""
        hidden = HIDDEN / torch.finfo(torch.float64).eps * self.frobenius_norm()
        return len(self.terms) > 1 and self.terms_norm > hidden

    @cached_property
    def _eigen(self) -> Eigenform:
        """One term in its eigenbasis."""
        (rows, cols), *_ = self.terms
        row_values, row_basis = spectrum(rows, Label("the row factor of {}", self))
        col_values, col_basis = spectrum(cols, Label("the column factor of {}", self))
        entries = torch.outer(row_values, col_values)
        return KroneckerEigen(row_basis, col_basis, entries, self.provenance).formed

    def eigenvalues(self) -> Float[Tensor, " p"]:
        """Return all eigenvalues, descending.

        Raises
        ------
        ValueError
            For several terms above p = 4000; `top_eigenvalues(k)` remains.
        """
        if len(self.terms) == 1:
            return self._eigen.eigenvalues()
        p = self.shape[0]
        if p > DENSE_ROWS:
            raise ValueError(
                f"eigenvalues of {self!r}: {len(self.terms)} terms have no closed form and "
                f"p = {p} is above {DENSE_ROWS}. Use top_eigenvalues(k) instead."
            )
        return self.formed.eigenvalues()

    def eigenform(self) -> Eigenform | None:
        """Return one term in its eigenbasis; several have none in closed form."""
        return self._eigen if len(self.terms) == 1 else None

    @cached_property
    def smallest_eigenvalue(self) -> float:
        """The smallest eigenvalue: of the factors, the block, or as products tell it."""
        if not self.terms:
            return 0.0
        if len(self.terms) == 1 or self.shape[0] <= DENSE_ROWS:
            return float(self.eigenvalues()[-1])
        lower, upper = self._bounds
        eps, size = torch.finfo(self.dtype).eps, max(upper, -lower)
        if (least := max(1e-10, eps) * size) < -1.01 * lower:
            excess, direction = self._excess(least)
            if excess > 0:
                return self._lowest(direction)
        return self._search(RESTARTS)

    @property
    def _tolerance(self) -> float:
        return max(1e-8, 10 * torch.finfo(self.dtype).eps)

    def _search(self, restarts: int) -> float:
        return smallest_eigenvalue(self.to_scipy(), repr(self), self._tolerance, restarts)

    def _lowest(self, direction: Flat) -> float:
        """Return the smallest eigenvalue from a direction of negative curvature.

        Lanczos finds it at once where it stands alone. Else curvatures κ = yᵀΣy of y, the
        direction of `_excess(-κ)`, fall: the error of κ is squared at every step. LOBPCG
        takes over where a step is small. Where so many others lie near that it ends
        before one stands out, its residual is taken off.
        """
        from scipy.sparse.linalg import lobpcg

        products = self.to_scipy()
        curvature = float(direction @ products.matvec(direction))
        if curvature >= 0:  # what seemed negative was rounding
            return self._search(RESTARTS)
        clear = CERTAIN * self._tolerance * max(map(abs, self._bounds))
        with suppress(NumericalError):
            if (found := self._search(FEW)) < min(curvature, -clear):
                return found
        start, excess = direction, math.inf
        while excess >= CLEAR:
            excess, direction = self._negative(-curvature, ROUGH)
            found = float(direction @ products.matvec(direction))
            if found >= curvature:
                break
            curvature, start = found, direction
        near = max(1e-6, 100 * torch.finfo(self.dtype).eps) * -curvature
        beside = _leading_power(self, -curvature, -1.0).to_scipy()
        with catch_warnings(action="ignore"):  # that it ended early: it is looked at below
            _, block = lobpcg(
                products, start[:, None], M=beside, largest=False, tol=near, maxiter=SWEEPS
            )
        vector = block[:, 0] / np.linalg.norm(block)
        image = products.matvec(vector)
        found = float(vector @ image)
        left = float(np.linalg.norm(image - found * vector))
        return min(found - left * (left > 2 * near), curvature)

    def _excess(self, damping: float) -> tuple[float, Flat]:
        """Return what is positive where Σ + λI is not positive definite, its sign sure."""
        found = self._negative(damping, ROUGH)
        if abs(found[0]) < CLEAR:
            found = self._negative(damping, max(1e-9, 10 * torch.finfo(self.dtype).eps))
        return found

    def _negative(self, damping: float, tolerance: float) -> tuple[float, Flat]:
        r"""Return how negative Σ + λI is beside its first term, and in which direction.

        With L the damped first term it is :math:`-λ_{min}(L^{-1/2} (Σ + λI) L^{-1/2})`:
        a congruence keeps the signs (Sylvester). What the other terms add stands out
        there, while next to the smallest eigenvalue of Σ lie most of the others: some 30
        products find it, where for the latter 6,000 often do not.
        """
        half = _leading_power(self, damping, -0.5).to_scipy()
        whole = self.to_scipy()

        def product(x: Any) -> Any:
            turned = half.matvec(x)
            return 2 * x - half.matvec(whole.matvec(turned) + damping * turned)

        beside = type(whole)(self.shape, matvec=product, dtype=whole.dtype)
        values, vectors = extreme_eigenpairs(
            beside, 1, "LA", repr(self), tolerance, RESTARTS
        )
        direction = half.matvec(vectors.numpy()[:, 0])
        return float(values[0]) - 2, direction / np.linalg.norm(direction)

    @cached_property
    def _leading(self) -> Eigenform:
        """The first term in its eigenbasis."""
        return replace(self, terms=self.terms[:1])._eigen

    @cached_property
    def _bounds(self) -> tuple[float, float]:
        """What no eigenvalue is below or above: the first term's, and the others' norms."""
        (values,) = self._leading.tables
        others = sum(math.prod(map(self._norm, term)) for term in self.terms[1:])
        return min(0.0, float(values.min())) - others, float(values.max()) + others

    def _norm(self, factor: Tensor) -> float:
        return float(factorised("svdvals", factor.double(), self)[0])

    @property
    def _rounded_rows(self) -> int | None:
        return sum(self.weight_shape) if len(self.terms) == 1 else None

    def require_positive(self, damping: float) -> None:
        """Raise unless the damped sum is positive definite.

        Raises
        ------
        IndefiniteError
            Naming the smallest eigenvalue and the smallest damping that suffices.
        NumericalError
            If a factor holds NaN or infinity.
        """
        for rows, cols in self.terms:
            require_finite(rows, Label("a row factor of {}", self))
            require_finite(cols, Label("a column factor of {}", self))
        if len(self.terms) > 1 and damping:
            if self._bounds[0] > -damping / 2:  # half of it is no rounding
                return
            unknown = "smallest_eigenvalue" not in vars(self)
            if self.shape[0] > FORMED_ROWS and unknown:
                excess, direction = self._excess(damping)
                if excess < 0:
                    return
                vars(self)["smallest_eigenvalue"] = self._lowest(direction)
        top = [] if damping or not self.terms else [float(self.top_eigenvalues(1)[0])]
        values = torch.tensor([self.smallest_eigenvalue, *top], dtype=self.dtype)
        require_positive(values, damping, self, self._rounded_rows or self.shape[0])

    def inverse(self, damping: Damping) -> Operator:
        """Return (Σ + damping)⁻¹, an `Eigenform` for one term.

        One term with factored damping becomes the product of the inverse factors, whose
        products cost half of those in an eigenbasis.

        Raises
        ------
        IndefiniteError
            If the damped sum is not positive definite.
        """
        made = self.provenance.inverted
        if isinstance(damping, Factored):
            if not damping.value:
                replace(self, terms=self.terms[:1]).require_positive(0.0)
            halves = inverse_pair(self.terms, damping)
            if halves is not None:
                return KroneckerSum((halves,), self.block_shape, made)
            law = self.damped(damping)
            if isinstance(law, KroneckerCongruence):
                return law.inverted()
            return law.inverse(0.0)
        shift = tikhonov(damping, self)
        if len(self.terms) == 1:
            return replace(self._eigen.inverse(shift), provenance=made)
        self.require_positive(shift)
        if not self.terms:
            entries = torch.full(
                self.block_shape, 1 / shift, dtype=self.dtype, device=self.device
            )
            return Diagonal(entries, made)
        leading = _leading_power(self, shift, -1.0)
        return IterativeInverse(self, shift, leading, provenance=made)

    def cholesky_inverse(self, damping: Factored) -> Operator:
        """Return `inverse`, one term as triangles: cheaper for a product or two."""
        pair = triangle_pair(self.terms, damping) if damping.value else None
        if pair is None:
            return self.inverse(damping)
        return KroneckerCholesky(pair, self.dtype, self.provenance.inverted)

    def logdet(self, damping: Damping = 0.0) -> float:
        """Return log det(Σ + damping·I), of several terms above p = 4000 by Cholesky.

        Raises
        ------
        IndefiniteError
            If the damped sum is not positive definite.
        BudgetError
            If its p² numbers exceed half of the free memory.
        """
        large = len(self.terms) > 1 and self.shape[0] > DENSE_ROWS
        if isinstance(damping, Factored) or not large:
            return super().logdet(damping)
        shift = tikhonov(damping, self)
        self.require_positive(shift)
        return -IterativeInverse(self, shift).factor.logdet()

    def damped(self, damping: Damping) -> "KroneckerSum | KroneckerCongruence":
        """Return the damped matrix, whose inverse is `inverse(damping)`.

        Tikhonov: one more term (√λ I) ⊗ (√λ I). Factored: shifted factors for one term,
        a `KroneckerCongruence` for two.

        Raises
        ------
        ValueError
            For a factored damping of three and more terms unless its mode is "raw".
        NumericalError
            If a factored damping leaves the matrix indefinite.

        Examples
        --------
        >>> op = KroneckerSum(((torch.eye(2), torch.eye(3)),), (2, 3))
        >>> op.damped(Factored(1.0)).trace()
        24.0
        """
        if not isinstance(damping, Factored):
            return self._plus(tikhonov(damping, self))
        if not self.terms:
            return self._plus(damping.value)
        if len(self.terms) == 2:
            return factored_pair(self.terms, damping, repr(self), self.provenance)
        if len(self.terms) > 2 and damping.mode != "raw":
            raise ValueError(
                f"{self!r} with {damping!r}: no basis diagonalises {len(self.terms)} terms "
                "at once. Use mode='raw' or Tikhonov(λ)."
            )
        first, *rest = self.terms
        return replace(self, terms=(damping.damped(*first), *rest))

    def _plus(self, shift: float) -> "KroneckerSum":
        o, i = self.block_shape
        rows = torch.eye(o, dtype=self.dtype, device=self.device) * shift**0.5
        cols = torch.eye(i, dtype=self.dtype, device=self.device) * shift**0.5
        return replace(self, terms=(*self.terms, (rows, cols)))

    def sqrt(self, damping: Damping = 0.0) -> Operator:
        """Return (Σ + damping·I)^½.

        Raises
        ------
        IndefiniteError
            If the damped sum has a negative eigenvalue.
        """
        return self._power(0.5, tikhonov(damping, self))

    def inverse_sqrt(self, damping: Damping) -> Operator:
        """Return (Σ + damping·I)^-½.

        Raises
        ------
        IndefiniteError
            If the damped sum is not positive definite.
        """
        return self._power(-0.5, tikhonov(damping, self))

    def _power(self, exponent: float, damping: float) -> Operator:
        """Return a root: in the eigenbasis of one term, else through the dense block."""
        if len(self.terms) == 1:
            return self._eigen.power(exponent, damping)
        values, vectors = eigh(self.to_dense(), self)
        powered = powers(values, exponent, damping, self)
        made = self.provenance.by(f"{self.provenance.method}^{exponent:g}")
        return Dense((vectors * powered) @ vectors.T, self.block_shape, made)


def _leading_power(forward: KroneckerSum, shift: float, exponent: float) -> Eigenform:
    """Return a power of the damped leading term, kept positive definite."""
    leading = forward._leading
    (values,) = leading.tables
    damped = values.clamp_min(0) + shift
    floor = torch.finfo(damped.dtype).eps * float(damped.max())
    rest = max(shift, floor) ** exponent if leading.free else 0.0
    return replace(leading, tables=(damped.clamp_min(floor).pow(exponent),), rest=rest)


@inner_product(KroneckerSum, KroneckerSum)
def _sum_sum(a: KroneckerSum, b: KroneckerSum) -> float:
    return sum(
        entrywise_inner(g, h) * entrywise_inner(x, y)
        for g, x in a.terms
        for h, y in b.terms
    )


@inner_product(KroneckerSum, Eigenform)
def _sum_eigenform(a: KroneckerSum, b: Eigenform) -> float:
    if b.basis.pair is None:
        return b.inner_by_vectors(a)
    total = b.rest * a.trace() if b.rest else 0.0
    for term in a.terms:
        pairs = zip(term, b.basis.pair, strict=True)
        left, right = (quadratic_forms(factor, basis) for factor, basis in pairs)
        inside = b._inside.view(len(left), len(right)) * torch.outer(left, right)
        total += float(inside.sum(dtype=torch.float64))
    return total


@inner_product(FactoredFisher, KroneckerSum)
def _factored_sum(a: FactoredFisher, b: KroneckerSum) -> float:
    pairs = (a.samples.kronecker_inner(rows, cols) for rows, cols in b.terms)
    return sum(pairs) / a.count


@inner_product(WoodburyInverse, KroneckerSum)
def _woodbury_sum(a: WoodburyInverse, b: KroneckerSum) -> float:
    """Multiply the factors of the samples by those of the terms, where they have some."""
    inside = 0.0
    for rows, cols in b.terms:
        turned = multiplied(a.samples.to(b.dtype), rows.T, cols.T)
        if turned is None:
            return a.inner_with(b)
        inside += a.inner_of_samples(turned)
    return (b.trace() - inside) / a.damping


@inner_product(Dense, KroneckerSum)
def _dense_sum(a: Dense, b: KroneckerSum) -> float:
    o, i = a.weight_shape
    folded = a.matrix.view(o, i, o, i)
    return sum(
        float((torch.einsum("aibj,ij->ab", folded, cols) * rows).sum(dtype=torch.float64))
        for rows, cols in b.terms
    )


@inner_product(KroneckerSum, KroneckerCongruence)
def _sum_congruence(a: KroneckerSum, b: KroneckerCongruence) -> float:
    total = 0.0
    for rows, cols in a.terms:
        left = _forms(b.row_basis, rows)
        right = _forms(b.column_basis, cols)
        total += float((b.entries * torch.outer(left, right)).real.sum(dtype=torch.float64))
    return total


def _forms(basis: Tensor, middle: Tensor) -> Tensor:
    """Return rᴴ M r for every column r of a basis."""
    return (basis.conj() * (middle.to(basis.dtype) @ basis)).sum(0)


@final
@dataclass(frozen=True, eq=False, repr=False)
class KroneckerSamples(Operator):
    r"""(RᵀR) ⊗ (CᵀC) with the rows of R and C held instead of the factors.

    Products cost 2·(m_r + m_c)·d_out·d_in. Norms, spectra and inner products form the
    factors at the first question that needs them; products and solves never do.

    Parameters
    ----------
    row_samples
        R, shape (m_r, d_out).
    column_samples
        C, shape (m_c, d_in).

    Examples
    --------
    >>> op = KroneckerSamples(torch.ones(5, 2), torch.eye(3))
    >>> op.trace(), (op @ torch.ones(2, 3))[0, 0].item()
    (30.0, 10.0)
    """

    row_samples: Float[Tensor, "mr o"]
    column_samples: Float[Tensor, "mc i"]
    provenance: Provenance = Provenance()

    @cached_property
    def weight_shape(self) -> tuple[int, int]:
        """(d_out, d_in)."""
        return self.row_samples.shape[1], self.column_samples.shape[1]

    @property
    def product_flops(self) -> int:
        """2·(m_r + m_c)·d_out·d_in."""
        o, i = self.weight_shape
        return 2 * (len(self.row_samples) + len(self.column_samples)) * o * i

    @cached_property
    def formed(self) -> KroneckerSum:
        """The product with its factors formed."""
        rows, cols = second_moment(self.row_samples), second_moment(self.column_samples)
        return KroneckerSum(((rows, cols),), self.weight_shape, self.provenance)

    def _apply(self, w: Float[Tensor, "k o i"]) -> Float[Tensor, "k o i"]:
        rows, cols = self.row_samples, self.column_samples
        return (rows.T @ (rows @ w) @ cols.T) @ cols

    def _dense(self) -> Float[Tensor, "p p"]:
        rows = self.row_samples.T @ self.row_samples
        return kron(rows, self.column_samples.T @ self.column_samples)

    def diagonal(self) -> Float[Tensor, "o i"]:
        """Return diag(RᵀR) diag(CᵀC)ᵀ."""
        rows, cols = self.row_samples.square().sum(0), self.column_samples.square().sum(0)
        return torch.outer(rows, cols)

    def trace(self) -> float:
        """Return ‖R‖² ‖C‖²."""
        rows = self.row_samples.square().sum(dtype=torch.float64)
        return float(rows * self.column_samples.square().sum(dtype=torch.float64))
