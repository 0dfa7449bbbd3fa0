"""Per-example gradient matrices, held as they are."""

from dataclasses import dataclass
from typing import final

from jaxtyping import Float
from torch import Tensor

from fisherlab.numerics.packed import symmetric_flops
from fisherlab.samples.base import WHOLE, Samples, kept_once


@final
@dataclass(frozen=True, eq=False)
class MatrixSamples(Samples):
    """Hold D_vn explicitly: norm layers, bare parameters, recurrent or tied weights."""

    stored: Float[Tensor, "v n o i"]

    @property
    def columns(self) -> int:
        """V."""
        return self.stored.shape[0]

    @property
    def examples(self) -> int:
        """N."""
        return self.stored.shape[1]

    @property
    def weight_shape(self) -> tuple[int, int]:
        """(o, i)."""
        return self.stored.shape[2], self.stored.shape[3]

    def some_columns(self, columns: slice) -> "MatrixSamples":
        """Return the samples of some columns."""
        return MatrixSamples(self.stored[columns])

    def matrices(self, part: slice = WHOLE) -> Float[Tensor, "v n o i"]:
        """Return the matrices of some examples."""
        return self.stored[:, part]

    def project(self, w: Float[Tensor, "k o i"]) -> Float[Tensor, "k v n"]:
        """Return ⟨D_vn, w⟩."""
        flat = w.flatten(1) @ self.stored.flatten(0, 1).flatten(1).T
        return flat.unflatten(1, self.stored.shape[:2])

    def combine(self, c: Float[Tensor, "k v n"]) -> Float[Tensor, "k o i"]:
        """Return Σ c_vn D_vn."""
        flat = c.flatten(1) @ self.stored.flatten(0, 1).flatten(1)
        return flat.unflatten(1, self.weight_shape)

    @kept_once
    def squared_norms(self) -> Float[Tensor, "v n"]:
        """Return ‖D_vn‖²."""
        return self.stored.square().sum((2, 3))

    def dense_flops(self) -> int:
        """Count the multiply-adds of the dense sum (about half a product)."""
        size = self.weight_shape[0] * self.weight_shape[1]
        return symmetric_flops(size, self.columns * self.examples)

    def gram_flops(self) -> int:
        """Count the multiply-adds of the Gram matrix (half a product)."""
        return self.stored.numel() * self.columns * self.examples // 2
