"""Matrices that are functions of something else, which is held in their place."""

from abc import abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor

from fisherlab.operators.base import Operator


class FromState(Operator):
    """A matrix that is no linear function of what moving averages average, its state."""

    @property
    @abstractmethod
    def state(self) -> Sequence[Tensor]:
        """The tensors that are averaged, all of one precision."""

    @abstractmethod
    def with_state(self, state: Sequence[Tensor]) -> "FromState":
        """Return the same kind of matrix for another state."""

    def averaged(self, new: "FromState", weight: float) -> "FromState":
        """Return the matrix of the state weight·self + (1 − weight)·new."""
        pairs = zip(self.state, new.state, strict=True)
        return new.with_state([torch.lerp(b, a, weight) for a, b in pairs])
