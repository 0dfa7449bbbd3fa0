"""Per-example gradient matrices, held as they are."""

from dataclasses import dataclass
from typing import final

import torch
from jaxtyping import Float
from torch import Tensor

from fisherlab.numerics.packed import symmetric_flops
from fisherlab.samples import rows
from fisherlab.samples.base import cast_once, kept_once


@final
@dataclass(frozen=True, eq=False)
class MatrixSamples:
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

    @property
    def dtype(self) -> torch.dtype:
        """The precision."""
        return self.stored.dtype

    @property
    def device(self) -> torch.device:
        """The device."""
        return self.stored.device

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return self.stored.nbytes

    @cast_once
    def to(self, dtype: torch.dtype) -> "MatrixSamples":
        """Return the samples in another precision."""
        return MatrixSamples(self.stored.to(dtype))

    def some_columns(self, columns: slice) -> "MatrixSamples":
        """Return the samples of some columns."""
        return MatrixSamples(self.stored[columns])

    def matrices(self, part: slice = slice(None)) -> Float[Tensor, "v n o i"]:
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

    @kept_once
    def squares(self) -> Float[Tensor, "o i"]:
        """Return Σ D∘D."""
        return rows.summed(self, lambda d: d.square().sum(0))

    def rotated_squares(
        self, rows_basis: Float[Tensor, "o r"], cols_basis: Float[Tensor, "i c"]
    ) -> Float[Tensor, "r c"]:
        """Return Σ (rowsᵀ D cols)∘²."""
        return rows.summed(self, lambda d: (rows_basis.T @ d @ cols_basis).square().sum(0))

    def row_side(self, middle: Float[Tensor, "i i"]) -> Float[Tensor, "o o"]:
        """Return Σ D M Dᵀ."""
        return rows.summed(self, lambda d: row_product(d, middle))

    def column_side(self, middle: Float[Tensor, "o o"]) -> Float[Tensor, "i i"]:
        """Return Σ Dᵀ M D."""
        return rows.summed(self, lambda d: column_product(d, middle))

    def kronecker_inner(
        self, rows_factor: Float[Tensor, "o o"], cols_factor: Float[Tensor, "i i"]
    ) -> float:
        """Return Σ ⟨D, rows D cols⟩."""
        return float((self.row_side(cols_factor) * rows_factor).sum())

    def add_dense_(
        self, out: Float[Tensor, "p p"], scale: float = 1.0
    ) -> Float[Tensor, "p p"]:
        """Write scale · Σ vec(D) vec(D)ᵀ into `out`."""
        return rows.add_dense_(self, out, scale)

    def gram(self) -> Float[Tensor, "m m"]:
        """Return all inner products."""
        return rows.gram(self)

    def squared_norm(self) -> float:
        """Return Σ ⟨D_a, D_b⟩²."""
        return rows.squared_norm(self)

    def dense_flops(self) -> int:
        """Count the multiply-adds of the dense sum (about half a product)."""
        size = self.weight_shape[0] * self.weight_shape[1]
        return symmetric_flops(size, self.columns * self.examples)

    def gram_flops(self) -> int:
        """Count the multiply-adds of the Gram matrix (half a product)."""
        return self.stored.numel() * self.columns * self.examples // 2


def row_product(
    matrices: Float[Tensor, "m o i"], middle: Float[Tensor, "i i"]
) -> Float[Tensor, "o o"]:
    """Return Σ D M Dᵀ of formed matrices as one product over (m, i)."""
    left = (matrices @ middle).transpose(0, 1).flatten(1)
    return left @ matrices.transpose(0, 1).flatten(1).T


def column_product(
    matrices: Float[Tensor, "m o i"], middle: Float[Tensor, "o o"]
) -> Float[Tensor, "i i"]:
    """Return Σ Dᵀ M D of formed matrices as one product over (m, o)."""
    return matrices.flatten(0, 1).T @ (middle @ matrices).flatten(0, 1)
