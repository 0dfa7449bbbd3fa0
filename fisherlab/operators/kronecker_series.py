r"""The Fisher block of a weight used at T times: a series of Kronecker products.

.. math:: F = \sum_{|d| < T} (T - |d|)\, V_d, \qquad
          V_d = G_0^{1/2} \hatΨ_G^d G_0^{1/2} \otimes A_0^{1/2} \hatΨ_A^d A_0^{1/2}

with :math:`V_{-d} = V_d^T` and :math:`\hatΨ_X = X_0^{-1/2} X_1 X_0^{-1/2}`: gradients at
different times are correlated as in a linear chain.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Literal, final

import torch
from jaxtyping import Float
from torch import Tensor

from fisherlab.errors import IndefiniteError
from fisherlab.numerics.devices import STAYS
from fisherlab.numerics.linalg import eigh, factorised, kron, require_positive
from fisherlab.operators.base import Damping, Factored, Operator, Provenance, tikhonov
from fisherlab.operators.kronecker import KroneckerSum
from fisherlab.operators.kronecker_congruence import KroneckerCongruence, Term

Transition = tuple[Tensor, Tensor]  # X₀^½ and Ψ̂, square and of one size


@final
@dataclass(frozen=True, eq=False, repr=False)
class StationaryInverse(Operator):
    r"""The inverse of T Σ_d V_d over all lags d, the limit of long sequences.

    .. math:: \tfrac1T X^{-1/2} (I - P^T)(I - P P^T)^{-1}(I - P) X^{-1/2}, \quad
              P = \hatΨ_G \otimes \hatΨ_A, \; X = G_0 \otimes A_0

    Parameters
    ----------
    row_root, column_root
        G₀^-½ and A₀^-½.
    row_step, column_step
        Ψ̂_G and Ψ̂_A.
    length
        T.

    References
    ----------
    Martens, Ba & Johnson 2018, "Kronecker-factored curvature approximations for
    recurrent neural networks", option 2.
    """

    row_root: Float[Tensor, "o o"]
    column_root: Float[Tensor, "i i"]
    row_step: Float[Tensor, "o o"]
    column_step: Float[Tensor, "i i"]
    length: int
    provenance: Provenance = Provenance()

    @classmethod
    def of(
        cls, rows: Transition, cols: Transition, length: int, made: Provenance
    ) -> "StationaryInverse":
        """Invert a chain given the roots of its moments and its transitions.

        Raises
        ------
        IndefiniteError
            If a moment is singular, or neighbours are fully correlated in both factors.
        """
        what = f"the chain {made}"
        sizes = [float(factorised("svdvals", step, what)[0]) for _, step in (rows, cols)]
        smallest = min(float(factorised("eigvalsh", r, what)[0]) for r, _ in (rows, cols))
        if smallest <= 0 or sizes[0] * sizes[1] >= 1:
            raise IndefiniteError(what, 0.0, min(smallest, 0.0))
        inverses = [factorised("inv", root, what) for root, _ in (rows, cols)]
        return cls(inverses[0], inverses[1], rows[1], cols[1], length, made)

    @cached_property
    def weight_shape(self) -> tuple[int, int]:
        """(d_out, d_in)."""
        return len(self.row_root), len(self.column_root)

    @property
    def stored_numbers(self) -> int:
        """3/2 (d_out² + d_in²)."""
        return sum(n * (n + 1) // 2 + n * n for n in self.weight_shape)

    @property
    def product_flops(self) -> int:
        """Six Kronecker products."""
        o, i = self.weight_shape
        return 6 * o * i * (o + i)

    @cached_property
    def _correlations(self) -> tuple[Tensor, Tensor, Tensor]:
        """The eigenvectors of Ψ̂Ψ̂ᵀ on both sides and 1/(1 − μ_G μ_Aᵀ)."""
        (row_values, row_basis), (col_values, col_basis) = (
            factorised("eigh", step @ step.T, self)
            for step in (self.row_step, self.column_step)
        )
        return row_basis, col_basis, 1 / (1 - torch.outer(row_values, col_values))

    def _apply(self, w: Float[Tensor, "k o i"]) -> Float[Tensor, "k o i"]:
        row_basis, col_basis, scale = self._correlations
        z = self.row_root @ w @ self.column_root
        z = z - self.row_step @ z @ self.column_step.T
        z = row_basis @ ((row_basis.T @ z @ col_basis) * scale) @ col_basis.T
        z = z - self.row_step.T @ z @ self.column_step
        return self.row_root @ z @ self.column_root / self.length

    def _dense(self) -> Float[Tensor, "p p"]:
        step = kron(self.row_step, self.column_step)
        root = kron(self.row_root, self.column_root)
        eye = torch.eye(len(step), dtype=self.dtype, device=self.device)
        middle: Tensor = factorised("solve", eye - step @ step.T, self, eye - step)
        return root @ (eye - step.T) @ middle @ root / self.length


Chain = Literal["symmetric", "stationary"]


@final
@dataclass(frozen=True, eq=False, repr=False)
class KroneckerSeries(Operator):
    r"""Σ_{|d|<T} (T − |d|) V_d of a linear chain in time.

    Parameters
    ----------
    rows, cols
        (G₀, G₁) and (A₀, A₁): second moments at equal times, and of a time with the one
        before it.
    length
        T.
    chain
        "symmetric" (option 1) replaces Ψ̂ by its symmetric part, so that F is diagonal in
        one Kronecker basis. "stationary" (option 2) keeps Ψ̂; its factored inverse is that
        of T → ∞.
    precision
        Of products and results; by default that of the moments, which stay as they were
        made: X₁ holds √s of a direction whose share of X₀ is s, so that rounding X₀ by
        eps would change the series by √eps.

    Examples
    --------
    >>> eye, zero = torch.eye(2), torch.zeros(2, 2)
    >>> op = KroneckerSeries((eye, zero), (eye, zero), length=3)
    >>> op.trace()
    12.0
    """

    rows: tuple[Float[Tensor, "o o"], Float[Tensor, "o o"]] = field(metadata=STAYS)
    cols: tuple[Float[Tensor, "i i"], Float[Tensor, "i i"]] = field(metadata=STAYS)
    length: int
    chain: Chain = "symmetric"
    provenance: Provenance = Provenance()
    precision: torch.dtype | None = None

    @cached_property
    def weight_shape(self) -> tuple[int, int]:
        """(d_out, d_in)."""
        return len(self.rows[0]), len(self.cols[0])

    @property
    def dtype(self) -> torch.dtype:
        """The precision of products and results."""
        return self.precision or self.rows[0].dtype

    @property
    def stored_numbers(self) -> int:
        """3/2 (d_out² + d_in²): symmetric moments and full ones of neighbours."""
        return sum(n * (n + 1) // 2 + n * n for n in self.weight_shape)

    @cached_property
    def formed(self) -> Operator:
        """The series: one congruence (symmetric), or a sum of 2T − 1 terms."""
        rows, cols = self._transitions()
        if self.chain == "symmetric":
            whole = _congruence(rows, cols, self.length, self.provenance)
            return whole.to(self.dtype)
        terms = tuple(_series(rows, cols, self.length))
        return KroneckerSum(terms, self.weight_shape, self.provenance).to(self.dtype)

    def _transitions(self) -> tuple[Transition, Transition]:
        """X₀^½ and Ψ̂ of both sides, in float64."""
        rows = transition(*self.rows, self.chain, f"the row moments of {self!r}")
        return rows, transition(*self.cols, self.chain, f"the column moments of {self!r}")

    def damped(self, damping: Factored) -> "KroneckerSeries":
        """Return the series of the damped G₀ and A₀; the neighbours stay as they are."""
        rows, cols = damping.damped(self.rows[0], self.cols[0])
        return replace(self, rows=(rows, self.rows[1]), cols=(cols, self.cols[1]))

    def inverse(self, damping: Damping) -> Operator:
        """Return (M + damping)⁻¹.

        Tikhonov inverts the series itself. Factored damps G₀ and A₀ and uses the closed
        form of the chain: exact for "symmetric", the limit T → ∞ for "stationary".

        Raises
        ------
        IndefiniteError
            If the damped matrix is not positive definite.
        """
        if isinstance(damping, Factored):
            if not damping.value:
                moments = (self.rows[0], self.cols[0])
                values = (eigh(m.double(), self)[0].to(self.dtype) for m in moments)
                require_positive(torch.outer(*values).flatten(), 0.0, self)
            chosen = self.damped(damping)
            if self.chain == "symmetric":
                assert isinstance(chosen.formed, KroneckerCongruence)
                return chosen.formed.inverted()
            return chosen._stationary_inverse()
        if isinstance(self.formed, KroneckerSum):
            return self.formed.inverse(damping)
        return self.formed.inverse(tikhonov(damping, self))

    def _stationary_inverse(self) -> StationaryInverse:
        made = self.provenance.inverted
        rows, cols = self._transitions()
        return StationaryInverse.of(rows, cols, self.length, made).to(self.dtype)

    def to(self, dtype: torch.dtype) -> "KroneckerSeries":
        """Return the series in another precision, of the same moments."""
        return replace(self, precision=dtype)


def transition(
    moment: Float[Tensor, "n n"], lagged: Float[Tensor, "n n"], chain: Chain, what: str
) -> Transition:
    """Return X₀^½ and Ψ̂ = X₀^-½ X₁ X₀^-½ on the range of X₀, with ‖Ψ̂‖ ≤ 1."""
    values, vectors = eigh(moment.double(), what)
    rounding = len(values) * torch.finfo(moment.dtype).eps
    kept = values > rounding * values[-1].clamp_min(0)
    roots = values.clamp_min(0).sqrt()
    inverse = torch.where(kept, 1 / roots.where(kept, 1.0), 0.0)
    root = (vectors * roots) @ vectors.T
    inverse_root = (vectors * inverse) @ vectors.T
    psi = inverse_root @ lagged.double() @ inverse_root
    if chain == "symmetric":
        psi = (psi + psi.T) / 2
    left, sizes, right = factorised("svd", psi, what)
    return root, (left * sizes.clamp_max(1.0)) @ right


def weights(products: Float[Tensor, "*n"], length: int) -> Float[Tensor, "*n"]:
    """Return Σ_{|d|<T} (T − |d|) x^|d|, summed by Horner's rule.

    The closed form ``(T(1 − x²) − 2x(1 − x^T)) / (1 − x)²`` cancels near x = 1.

    Examples
    --------
    >>> weights(torch.tensor([0.0, 1.0]), 3).tolist()
    [3.0, 9.0]
    """
    total = torch.zeros_like(products)
    for lag in range(length - 1, 0, -1):
        total = (total + 2.0 * (length - lag)) * products
    return total + length


def _congruence(
    rows: Transition, cols: Transition, length: int, made: Provenance
) -> KroneckerCongruence:
    row_values, row_basis = factorised("eigh", rows[1], f"the row transition of {made}")
    col_values, col_basis = factorised("eigh", cols[1], f"the column transition of {made}")
    entries = weights(torch.outer(row_values, col_values), length)
    return KroneckerCongruence(rows[0] @ row_basis, cols[0] @ col_basis, entries, made)


def _series(rows: Transition, cols: Transition, length: int) -> Iterator[Term]:
    """Yield the 2T − 1 terms (T − |d|) V_d."""
    left, right = rows[0], cols[0]  # X₀^½ Ψ̂^d
    for lag in range(length):
        term = (length - lag) * left @ rows[0], right @ cols[0]
        yield term
        if lag:
            yield term[0].T, term[1].T
        left, right = left @ rows[1], right @ cols[1]
