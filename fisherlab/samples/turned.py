"""Samples of a weight that is stored the other way round: (in, out)."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import final

from jaxtyping import Float
from torch import Tensor

from fisherlab.samples.base import WHOLE, Samples
from fisherlab.samples.shared import SharedSamples


@final
@dataclass(frozen=True, eq=False)
class TurnedSamples(Samples):
    """Hold D_vn = E_vnᵀ: ``x @ W``, GPT-2's Conv1D, transposed convolutions.

    Parameters
    ----------
    upright
        E, with outputs in the rows.

    Examples
    --------
    >>> import torch
    >>> from fisherlab.samples import OuterSamples
    >>> upright = OuterSamples(torch.ones(4, 3), torch.ones(1, 4, 2))
    >>> TurnedSamples(upright).weight_shape
    (3, 2)
    """

    upright: Samples

    @property
    def columns(self) -> int:
        """V."""
        return self.upright.columns

    @property
    def examples(self) -> int:
        """N."""
        return self.upright.examples

    @property
    def positions(self) -> int:
        """T."""
        return self.upright.positions

    @property
    def weight_shape(self) -> tuple[int, int]:
        """(in, out)."""
        o, i = self.upright.weight_shape
        return i, o

    def some_columns(self, columns: slice) -> "TurnedSamples":
        """Return the samples of some columns."""
        return TurnedSamples(self.upright.some_columns(columns))

    def multiplied_often(self, limit: int) -> "TurnedSamples":
        """Return the form for many quadratic forms, see `SharedSamples`."""
        if not isinstance(self.upright, SharedSamples):
            return self
        return TurnedSamples(self.upright.multiplied_often(limit))

    def matrices(self, part: slice = WHOLE) -> Float[Tensor, "v n i o"]:
        """Form the matrices of some examples."""
        return self.upright.matrices(part).mT

    def project(self, w: Float[Tensor, "k i o"]) -> Float[Tensor, "k v n"]:
        """Return ⟨D_vn, w⟩."""
        return self.upright.project(w.mT.contiguous())

    def combine(self, c: Float[Tensor, "k v n"]) -> Float[Tensor, "k i o"]:
        """Return Σ c_vn D_vn."""
        return self.upright.combine(c).mT

    def squared_norms(self) -> Float[Tensor, "v n"]:
        """Return ‖D_vn‖²."""
        return self.upright.squared_norms()

    def squares(self) -> Float[Tensor, "i o"]:
        """Return Σ D∘D."""
        return self.upright.squares().T

    def rotated_squares(
        self, rows: Float[Tensor, "i r"], cols: Float[Tensor, "o c"]
    ) -> Float[Tensor, "r c"]:
        """Return Σ (rowsᵀ D cols)∘²."""
        return self.upright.rotated_squares(cols, rows).T

    def row_side(self, middle: Float[Tensor, "o o"]) -> Float[Tensor, "i i"]:
        """Return Σ D M Dᵀ."""
        return self.upright.column_side(middle)

    def column_side(self, middle: Float[Tensor, "i i"]) -> Float[Tensor, "o o"]:
        """Return Σ Dᵀ M D."""
        return self.upright.row_side(middle)

    def kronecker_inner(
        self, rows: Float[Tensor, "i i"], cols: Float[Tensor, "o o"]
    ) -> float:
        """Return Σ ⟨D, rows D cols⟩."""
        return self.upright.kronecker_inner(cols, rows)

    def gram(self) -> Float[Tensor, "m m"]:
        """Return all inner products: those of E."""
        return self.upright.gram()

    def squared_norm(self) -> float:
        """Return Σ ⟨D_a, D_b⟩²."""
        return self.upright.squared_norm()

    def _tiles(self) -> Iterator[tuple[slice, slice, Tensor]]:
        return self.upright._tiles()

    def add_dense_(
        self, out: Float[Tensor, "p p"], scale: float = 1.0
    ) -> Float[Tensor, "p p"]:
        """Write scale · S into `out`: the sum of E, with rows and columns exchanged."""
        i, o = self.weight_shape
        turned = self.upright.add_dense_(out.new_empty(out.shape), scale)
        return out.copy_(turned.view(o, i, o, i).permute(1, 0, 3, 2).reshape(out.shape))

    def dense_flops(self) -> int:
        """Count the multiply-adds of the dense sum."""
        return self.upright.dense_flops()

    def gram_flops(self) -> int:
        """Count the multiply-adds of the Gram matrix."""
        return self.upright.gram_flops()
