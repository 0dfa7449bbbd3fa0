"""A matrix whose factors are damped, in the place of one that λI is added to."""

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, final

from jaxtyping import Float
from torch import Tensor

from fisherlab.operators.base import (
    Damping,
    Factored,
    Operator,
    Provenance,
    inner_product,
    tikhonov,
)
from fisherlab.operators.dense import Dense
from fisherlab.operators.network.base import BlockDiagonal
from fisherlab.operators.stacked import Stacked, has_factors


@final
@dataclass(frozen=True, eq=False, repr=False)
class FactoredDamped(Operator):
    """M − λI with M the matrix of damped factors, so that adding λI to it gives M.

    Parameters
    ----------
    source
        The operator without damping.
    damping
        Factored(λ).
    law
        M.

    Examples
    --------
    >>> import torch
    >>> from fisherlab.operators import KroneckerSum
    >>> pair = KroneckerSum(((torch.eye(2), torch.eye(3)),), (2, 3))
    >>> factored_form(pair, Factored(1.0)).trace()
    18.0
    """

    source: Any
    damping: Factored
    law: Operator

    @property
    def provenance(self) -> Provenance:  # type: ignore[override]
        """That of the source."""
        made: Provenance = self.source.provenance
        return made

    @cached_property
    def weight_shape(self) -> tuple[int, int]:
        """(d_out, d_in)."""
        return self.law.weight_shape

    @property
    def stored_numbers(self) -> int:
        """Those of the damped matrix."""
        return self.law.stored_numbers

    def _apply(self, w: Float[Tensor, "k o i"]) -> Float[Tensor, "k o i"]:
        return self.law._apply(w) - self.damping.value * w

    def _dense(self) -> Float[Tensor, "p p"]:
        out = self.law._dense().clone()
        out.diagonal().sub_(self.damping.value)
        return out

    def diagonal(self) -> Float[Tensor, "o i"]:
        """Return the diagonal."""
        return self.law.diagonal() - self.damping.value

    def trace(self) -> float:
        """Return tr M − λp."""
        return self.law.trace() - self.damping.value * self.shape[0]

    def frobenius_norm(self) -> float:
        """Return ‖M − λI‖."""
        shift = self.damping.value
        squared = self.law.frobenius_norm() ** 2 - 2 * shift * self.law.trace()
        return max(squared + shift**2 * self.shape[0], 0.0) ** 0.5

    def eigenvalues(self) -> Float[Tensor, " p"]:
        """Return all eigenvalues, descending."""
        return self.law.eigenvalues() - self.damping.value

    def logdet(self, damping: Damping = 0.0) -> float:
        """Return log det M for λ, else that of the shifted matrix.

        Raises
        ------
        NumericalError
            If the damped matrix is not positive definite.
        """
        shift = tikhonov(damping, self)
        if shift == self.damping.value:
            return self.law._log_volume()
        return super().logdet(shift)

    def inverse(self, damping: Damping) -> Operator:
        """Return M⁻¹ for λ, else that of the shifted matrix, densely.

        Raises
        ------
        IndefiniteError
            If the damped matrix is not positive definite.
        """
        shift = tikhonov(damping, self)
        if shift == self.damping.value:
            found: Operator = self.source.inverse(self.damping)
            return found
        return Dense(self.to_dense(), self.weight_shape, self.provenance).inverse(shift)


def factored_form(operator: Operator, damping: Factored) -> Operator:
    """Return the matrix which λI makes the operator with damped factors.

    Raises
    ------
    ValueError
        For an operator without Kronecker terms.
    """
    if isinstance(operator, BlockDiagonal):  # blocks without factors take λ
        blocks = {
            name: factored_form(op, damping) if has_factors(op) else op
            for name, op in operator.blocks.items()
        }
        return replace(operator, blocks=blocks)
    if isinstance(operator, Stacked):
        parts = tuple(factored_form(part, damping) for part in operator.parts)
        return replace(operator, parts=parts)
    if not hasattr(operator, "damped"):
        tikhonov(damping, operator)  # says what is needed
    source: Any = operator
    return FactoredDamped(operator, damping, source.damped(damping))


@inner_product(FactoredDamped, Operator)
def _factored_damped_any(a: FactoredDamped, b: Operator) -> float:
    return a.law.inner(b) - a.damping.value * b.trace()
