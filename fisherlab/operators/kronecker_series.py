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

from fisherlab.numerics.held import STAYS
from fisherlab.numerics.linalg import eigh, factorised, require_positive
from fisherlab.operators.base import Operator, Provenance
from fisherlab.operators.dampings import Damping, Factored, tikhonov
from fisherlab.operators.kronecker import KroneckerSum
from fisherlab.operators.kronecker_congruence import KroneckerCongruence, Term
from fisherlab.operators.kronecker_stationary import StationaryInverse, Transition

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

    @property
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
        made = self.provenance.by(f"inverse of {self.provenance.method}")
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
