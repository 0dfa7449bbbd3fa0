"""Samples made of others: of a weight used in several ways, or stored as (in, out)."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import cast, final

import torch
from jaxtyping import Float
from torch import Tensor

from fisherlab.samples.base import WHOLE, DenseRoute, Samples, counted_together, kept_once
from fisherlab.samples.outer import OuterSamples
from fisherlab.samples.shared import SharedSamples
from fisherlab.samples.tokens import TokenSamples


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

    @cached_property
    def columns(self) -> int:
        """V."""
        return self.upright.columns

    @cached_property
    def examples(self) -> int:
        """N."""
        return self.upright.examples

    @property
    def positions(self) -> int:
        """T."""
        return self.upright.positions

    @cached_property
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

    def form_flops(self) -> int:
        """Count `kronecker_inner`: that of E."""
        return self.upright.form_flops()

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

    def dense_route(self, form: str = "auto") -> DenseRoute:
        """Say how the sum of E goes."""
        return self.upright.dense_route(form)

    def dense_workspace(self) -> int:
        """Count the bytes that `add_dense_` takes beside the block: E's, and a copy."""
        o, i = self.weight_shape
        return self.dtype.itemsize * (o * i) ** 2 + self.upright.dense_workspace()

    def counted(self, *, needs_inputs: bool, entrywise: bool) -> tuple[Samples, ...]:
        """Return those of E: rows and columns change places."""
        return self.upright.counted(needs_inputs=needs_inputs, entrywise=entrywise)


Pair = OuterSamples | SharedSamples | TurnedSamples


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

    @cached_property
    def columns(self) -> int:
        """V."""
        return self.uses[0].columns

    @cached_property
    def examples(self) -> int:
        """N."""
        return self.uses[0].examples

    @property
    def positions(self) -> int:
        """T, of all uses."""
        return sum(use.positions for use in self.uses)

    @cached_property
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
    def gram(self) -> Float[Tensor, "m m"]:
        """Return all inner products; of a tied table without a matrix of its size."""
        tied = self._tied
        if tied is None:
            return super().gram()
        table, pair = tied
        crossed = looked_up_inner(table, pair)
        return table.gram() + pair.gram() + crossed + crossed.T

    def squared_norm(self) -> float:
        """Return Σ ⟨D_a, D_b⟩²."""
        if self._tied is None:
            return super().squared_norm()
        return float(self.gram().square().sum(dtype=torch.float64))

    @property
    def _tied(self) -> tuple[TokenSamples, Pair] | None:
        """The two uses of an embedding that is a layer's weight too, if it is large."""
        tables = [use for use in self.uses if isinstance(use, TokenSamples)]
        pairs = [use for use in self.uses if isinstance(use, Pair)]
        if len(self.uses) != 2 or len(tables) != 1 or len(pairs) != 1:
            return None
        t, s = tables[0].tokens.shape[1], pairs[0].positions
        return (tables[0], pairs[0]) if t * s < self.weight_shape[0] else None

    @kept_once
    def squared_norms(self) -> Float[Tensor, "v n"]:
        """Return ‖D_vn‖², from the matrices of a few examples at a time."""
        if self._tied is not None:
            return self.gram().diagonal().view(self.columns, self.examples)
        out = torch.empty(self.columns, self.examples, dtype=self.dtype, device=self.device)
        for part in self.parts():
            out[:, part] = self.matrices(part).square().sum((2, 3))
        return out

    def dense_flops(self) -> int:
        """Count the multiply-adds of the dense sum: forming D, then half a product."""
        return self.matrix_flops() + super().dense_flops()

    def gram_flops(self) -> int:
        """Count the multiply-adds of the Gram matrix: forming D, then half a product."""
        o, i = self.weight_shape
        samples = self.total
        tied = self._tied
        if tied is not None:
            each = tied[0].tokens.shape[1] * tied[1].positions * i
            return samples * samples * each + sum(use.gram_flops() for use in tied)
        return self.matrix_flops() + samples * samples * o * i // 2

    def counted(self, *, needs_inputs: bool, entrywise: bool) -> tuple[Samples, ...]:
        """Return all uses where their inputs are needed, else the sums themselves."""
        if not needs_inputs:
            return (self,)
        return counted_together(self.uses, needs_inputs, entrywise)


def looked_up_inner(table: TokenSamples, pair: Pair) -> Float[Tensor, "m m"]:
    """Return ⟨D_a, E_b⟩ for a table that is looked up and for pairs, v-major.

    Σ_ts r_ms[k(n,t)] (g_vnt · c_ms), where the pairs are E = Σ_s r_s c_sᵀ.
    """
    rows, cols = _sides(pair)
    v, n = table.columns, table.examples
    out = table.gradients.new_empty(v, n, v, n)
    for at in range(n):
        found = rows[..., table.tokens[at].clamp_min(0)]
        inside = torch.einsum("vti,wmsi->vwmst", table.gradients[:, at], cols)
        out[:, at] = (inside * found).sum((3, 4))
    return out.view(v * n, v * n)


def _sides(pair: Pair) -> tuple[Float[Tensor, "_ n s o"], Float[Tensor, "_ n s i"]]:
    """Return r and c; the columns v are one on the side of the inputs."""
    if isinstance(pair, TurnedSamples):
        rows, cols = _sides(cast("Pair", pair.upright))
        return cols, rows
    inputs, gradients = pair.inputs, pair.gradients
    if isinstance(pair, OuterSamples):
        inputs, gradients = inputs[:, None], gradients[:, :, None]
    return gradients, inputs[None]


def _sum(tensors: Iterable[Tensor]) -> Tensor:
    first, *rest = tensors
    total = first.clone()
    for tensor in rest:
        total += tensor
    return total
