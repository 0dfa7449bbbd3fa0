"""Samples of a weight that is used in several ways, whose gradients add up."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import final

import torch
from jaxtyping import Float
from torch import Tensor

from fisherlab.samples.base import WHOLE, Samples, kept_once


@final
@dataclass(frozen=True, eq=False)
class SummedSamples(Samples):
    """Hold D_vn = Σ_k E^k_vn: an embedding that is the last layer's weight too.

    Parameters
    ----------
    uses
        E^1, E^2, …, of the same columns and examples.

    Examples
    --------
    >>> from fisherlab.samples import OuterSamples
    >>> one = OuterSamples(torch.ones(4, 3), torch.ones(1, 4, 2))
    >>> SummedSamples((one, one)).squared_norms()
    tensor([[24., 24., 24., 24.]])
    """

    uses: tuple[Samples, ...]

    @property
    def columns(self) -> int:
        """V."""
        return self.uses[0].columns

    @property
    def examples(self) -> int:
        """N."""
        return self.uses[0].examples

    @property
    def positions(self) -> int:
        """T, of all uses."""
        return sum(use.positions for use in self.uses)

    @property
    def weight_shape(self) -> tuple[int, int]:
        """(o, i)."""
        return self.uses[0].weight_shape

    def some_columns(self, columns: slice) -> "SummedSamples":
        """Return the samples of some columns."""
        return SummedSamples(tuple(use.some_columns(columns) for use in self.uses))

    def matrices(self, part: slice = WHOLE) -> Float[Tensor, "v n o i"]:
        """Form the matrices of some examples."""
        return _sum(use.matrices(part) for use in self.uses)

    def project(self, w: Float[Tensor, "k o i"]) -> Float[Tensor, "k v n"]:
        """Return ⟨D_vn, w⟩."""
        return _sum(use.project(w) for use in self.uses)

    def combine(self, c: Float[Tensor, "k v n"]) -> Float[Tensor, "k o i"]:
        """Return Σ c_vn D_vn."""
        return _sum(use.combine(c) for use in self.uses)

    @kept_once
    def squared_norms(self) -> Float[Tensor, "v n"]:
        """Return ‖D_vn‖², from the matrices of a few examples at a time."""
        out = torch.empty(self.columns, self.examples, dtype=self.dtype, device=self.device)
        for part in self.parts():
            out[:, part] = self.matrices(part).square().sum((2, 3))
        return out

    def dense_flops(self) -> int:
        """Count the multiply-adds of the dense sum: forming D, then half a product."""
        return self._forming_flops() + super().dense_flops()

    def gram_flops(self) -> int:
        """Count the multiply-adds of the Gram matrix: forming D, then half a product."""
        o, i = self.weight_shape
        samples = self.columns * self.examples
        return self._forming_flops() + samples * samples * o * i // 2

    def _forming_flops(self) -> int:
        o, i = self.weight_shape
        return self.columns * self.examples * self.positions * o * i


def _sum(tensors: Iterable[Tensor]) -> Tensor:
    first, *rest = tensors
    total = first.clone()
    for tensor in rest:
        total += tensor
    return total
