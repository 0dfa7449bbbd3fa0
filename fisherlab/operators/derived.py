"""Matrices that are functions of something else, which is held in their place."""

from abc import abstractmethod
from collections.abc import Iterator, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from fisherlab.operators.base import Operator
from fisherlab.operators.dampings import Damping


class Derived(Operator):
    """A matrix that is computed, at the first question, as another operator."""

    @property
    @abstractmethod
    def formed(self) -> Operator:
        """The matrix, in the form that answers questions."""

    @property
    def product_flops(self) -> int:
        """Those of the formed matrix."""
        return self.formed.product_flops

    def _apply(self, w: Float[Tensor, "k o i"]) -> Float[Tensor, "k o i"]:
        return self.formed._apply(w)

    def _dense(self) -> Float[Tensor, "p p"]:
        return self.formed._dense()

    def diagonal(self) -> Float[Tensor, "o i"]:
        """Return the diagonal."""
        return self.formed.diagonal()

    def trace(self) -> float:
        """Return the trace."""
        return self.formed.trace()

    def frobenius_norm(self) -> float:
        """Return √ΣM²."""
        return self.formed.frobenius_norm()

    def eigenvalues(self) -> Float[Tensor, " p"]:
        """Return all eigenvalues, descending."""
        return self.formed.eigenvalues()

    def _spectra(self) -> Iterator[Tensor]:
        return self.formed._spectra()

    def solve(
        self, w: Float[Tensor, "*k o i"], damping: Damping
    ) -> Float[Tensor, "*k o i"]:
        """Return (M + damping·I)⁻¹ w.

        Raises
        ------
        IndefiniteError
            If the damped matrix is not positive definite.
        """
        self._check(w, "solve")
        return self.formed.solve(w, damping)

    def inverse(self, damping: Damping) -> Operator:
        """Return (M + damping·I)⁻¹.

        Raises
        ------
        IndefiniteError
            If the damped matrix is not positive definite.
        """
        return self.formed.inverse(damping)


class FromState(Derived):
    """A matrix that is no linear function of what moving averages average, its state."""

    @property
    @abstractmethod
    def state(self) -> Sequence[Tensor]:
        """The tensors that are averaged, all of one precision."""

    @abstractmethod
    def with_state(self, state: Sequence[Tensor]) -> "FromState":
        """Return the same kind of matrix for another state."""

    @property
    def dtype(self) -> torch.dtype:
        """The precision."""
        return self.state[0].dtype

    @property
    def device(self) -> torch.device:
        """The device."""
        return self.state[0].device

    @property
    def stored_numbers(self) -> int:
        """Those of the state."""
        return sum(tensor.numel() for tensor in self.state)

    def averaged(self, new: "FromState", weight: float) -> "FromState":
        """Return the matrix of the state weight·self + (1 − weight)·new."""
        pairs = zip(self.state, new.state, strict=True)
        return new.with_state([torch.lerp(b, a, weight) for a, b in pairs])

    def to(self, dtype: torch.dtype) -> "FromState":
        """Return the matrix in another precision."""
        if dtype == self.dtype:
            return self
        return self.with_state([tensor.to(dtype) for tensor in self.state])
