"""Inputs and gradients of a layer used at one position: every D is an outer product."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import final

import torch
from jaxtyping import Float
from torch import Tensor

from fisherlab.numerics.devices import chunks, is_accelerator
from fisherlab.numerics.packed import (
    HalfTable,
    kronecker_sum_,
    mirror_,
    pack_sums,
    pair_count,
    pair_offset,
    pair_scale,
    rearranged,
    second_moment,
    symmetric_flops,
    symmetric_product_,
    triangle_chunks,
    weighted_moment,
    workspace_numbers,
)
from fisherlab.samples.base import WHOLE, DenseRoute, Samples, kept_once

GRAM_ROWS = 512  # examples per block of an N × N table that is never held whole
KEPT_EXAMPLES = 2048  # tables up to this size are kept for the next question
FEW_COLUMNS = 128  # up to here the whole table of products costs less than half of it
PIECE_NUMBERS = 2**22  # packed G, or products of columns, formed at once
KEPT_PAIRS = 2**22  # packed rearrangements up to this size are kept


@final
@dataclass(frozen=True, eq=False)
class OuterSamples(Samples):
    """Hold D_vn = g_vn a_nᵀ; every sum works on a_n and G_n = Σ_v g_vn g_vnᵀ."""

    inputs: Float[Tensor, "n i"]
    gradients: Float[Tensor, "v n o"]

    @cached_property
    def weight_shape(self) -> tuple[int, int]:
        """(o, i)."""
        return self.gradients.shape[2], self.inputs.shape[1]

    def some_columns(self, columns: slice) -> "OuterSamples":
        """Return the samples of some columns."""
        return OuterSamples(self.inputs, self.gradients[columns])

    def some_rows(self, rows: slice) -> "OuterSamples":
        """Return D[rows]."""
        return OuterSamples(self.inputs, self.gradients[..., rows])

    def some_examples(self, index: Tensor) -> "OuterSamples":
        """Return the samples of some examples."""
        return OuterSamples(self.inputs[index], self.gradients[:, index])

    def matrices(self, part: slice = WHOLE) -> Float[Tensor, "v n o i"]:
        """Form the matrices of some examples."""
        return self.gradients[:, part, :, None] * self.inputs[part, None, :]

    def project(self, w: Float[Tensor, "k o i"]) -> Float[Tensor, "k v n"]:
        """Return ⟨D_vn, w⟩ = g_vn · (w a_n)."""
        outputs = w @ self.inputs.T
        return torch.einsum("vno,kon->kvn", self.gradients, outputs)

    def combine(self, c: Float[Tensor, "k v n"]) -> Float[Tensor, "k o i"]:
        """Return Σ c_vn g_vn a_nᵀ, adding the columns up first."""
        return torch.einsum("kvn,vno->kon", c, self.gradients) @ self.inputs

    @kept_once
    def squared_norms(self) -> Float[Tensor, "v n"]:
        """Return ‖g_vn‖² ‖a_n‖²."""
        return self.gradients.square().sum(2) * self.inputs.square().sum(1)

    def squares(self) -> Float[Tensor, "o i"]:
        """Return Σ D∘D."""
        return self.output_energy.T @ self.inputs.square()

    @property
    def output_energy(self) -> Float[Tensor, "n o"]:
        """Return Σ_v g_vn∘g_vn, the diagonals of G_n."""
        return self.gradients.square().sum(0)

    def rotated_squares(
        self, rows: Float[Tensor, "o r"], cols: Float[Tensor, "i c"]
    ) -> Float[Tensor, "r c"]:
        """Return Σ (rowsᵀ D cols)∘²."""
        energy = (self.gradients @ rows).square_().sum(0)
        return energy.T @ (self.inputs @ cols).square_()

    def input_forms(self, middle: Float[Tensor, "i i"]) -> Float[Tensor, " n"]:
        """Return a_nᵀ M a_n."""
        return (self.inputs @ middle).mul_(self.inputs).sum(1)

    def output_forms(self, middle: Float[Tensor, "o o"]) -> Float[Tensor, " n"]:
        """Return tr(G_n M) = Σ_v g_vnᵀ M g_vn."""
        return (self.gradients @ middle).mul_(self.gradients).sum((0, 2))

    def weighted_outputs(self, weights: Float[Tensor, " n"]) -> Float[Tensor, "o o"]:
        """Return Σ_n w_n G_n."""
        repeated = weights.expand(self.columns, -1).reshape(-1)
        return weighted_moment(self.gradients.flatten(0, 1), repeated)

    def weighted_inputs(self, weights: Float[Tensor, " n"]) -> Float[Tensor, "i i"]:
        """Return Σ_n w_n a_n a_nᵀ."""
        return weighted_moment(self.inputs, weights)

    def row_side(self, middle: Float[Tensor, "i i"]) -> Float[Tensor, "o o"]:
        """Return Σ (a_nᵀ M a_n) G_n."""
        return self.weighted_outputs(self.input_forms(middle))

    def column_side(self, middle: Float[Tensor, "o o"]) -> Float[Tensor, "i i"]:
        """Return Σ tr(G_n M) a_n a_nᵀ."""
        return self.weighted_inputs(self.output_forms(middle))

    def kronecker_inner(
        self, rows: Float[Tensor, "o o"], cols: Float[Tensor, "i i"]
    ) -> float:
        """Return Σ tr(G_n rows) (a_nᵀ cols a_n)."""
        return float(self.output_forms(rows) @ self.input_forms(cols))

    def add_dense_(
        self, out: Float[Tensor, "p p"], scale: float = 1.0
    ) -> Float[Tensor, "p p"]:
        """Write scale · Σ G_n ⊗ a_n a_nᵀ into `out` through packed factors."""
        o, i = self.weight_shape
        kronecker_sum_(out.view(o, i, o, i), self.gradients, self.inputs, scale)
        return out

    def gram(self) -> Float[Tensor, "m m"]:
        """Return (a_n · a_m)(g_vn · g_wm), v-major."""
        v, n, o = self.gradients.shape
        flat = self.gradients.reshape(v * n, o)
        table = (flat @ flat.T).view(v, n, v, n)
        table *= (self.inputs @ self.inputs.T)[:, None, :]
        return table.view(v * n, v * n)

    def squared_norm(self) -> float:
        """Return Σ_nm (a_n·a_m)² ⟨G_n, G_m⟩, by the cheaper of Grams and packed form."""
        if self.packed_is_cheaper:
            return float(self.packed.square().sum(dtype=torch.float64))
        total = 0.0
        for left, right, inputs, outputs in self.squared_grams():
            weight = 1.0 if left == right else 2.0
            total += weight * float((inputs * outputs).sum(dtype=torch.float64))
        return total

    @cached_property
    def packed(self) -> Float[Tensor, "op ip"]:
        """The rearranged S in packed symmetric coordinates (see `rearranged`)."""
        return rearranged(self.gradients, self.inputs)

    @property
    def packed_is_cheaper(self) -> bool:
        """Whether the packed rearrangement is small and costs less than the Grams."""
        (o, i), v = self.weight_shape, self.columns
        size = pair_count(o) * pair_count(i)
        outputs = pair_count(o) if self._packs_outputs() else v * v * o
        gram = self.examples * (i + outputs) // 2
        return size <= KEPT_PAIRS and size <= gram

    def squared_grams(self) -> Iterator[tuple[slice, slice, Tensor, Tensor]]:
        """Yield blocks (rows, columns, (a_n·a_m)², ⟨G_n, G_m⟩), rows ≤ columns."""
        if self.examples <= KEPT_EXAMPLES:
            whole = slice(0, self.examples)
            yield whole, whole, *self.kept_grams
        else:
            yield from self._gram_tiles()

    def half_grams(self) -> tuple[HalfTable, HalfTable]:
        """Return the upper halves of (a_n·a_m)² and ⟨G_n, G_m⟩; they are not kept."""
        panels: list[tuple[Tensor, Tensor]] = []
        for left, right, *tiles in self._gram_tiles():
            rows, width = left.stop - left.start, self.examples - left.start
            if left == right:
                panels.append(
                    (tiles[0].new_empty(rows, width), tiles[0].new_empty(rows, width))
                )
            here = slice(right.start - left.start, right.stop - left.start)
            for panel, tile in zip(panels[-1], tiles, strict=True):
                panel[:, here] = tile
        inputs, outputs = zip(*panels, strict=True)
        return HalfTable(inputs), HalfTable(outputs)

    def _gram_tiles(self) -> Iterator[tuple[slice, slice, Tensor, Tensor]]:
        """Yield `squared_grams` tile by tile, row after row."""
        size = GRAM_ROWS if self._packs_outputs() else GRAM_ROWS // max(1, self.columns)
        pieces = list(chunks(self.examples, size))
        for at, left in enumerate(pieces):
            rows = self._output_rows(left)
            for right in pieces[at:]:
                inputs = (self.inputs[left] @ self.inputs[right].T).square_()
                others = rows if left == right else self._output_rows(right)
                yield left, right, inputs, self._output_block(rows, others)

    @cached_property
    def kept_grams(self) -> tuple[Float[Tensor, "n n"], Float[Tensor, "n n"]]:
        """The tables (a_n·a_m)² and ⟨G_n, G_m⟩, kept for the next question."""
        return self.grams()

    def grams(self) -> tuple[Float[Tensor, "n n"], Float[Tensor, "n n"]]:
        """Return the tables (a_n·a_m)² and ⟨G_n, G_m⟩."""
        return _products(self.inputs).square_(), self._output_gram()

    def _output_gram(self) -> Float[Tensor, "n n"]:
        """Return ⟨G_n, G_m⟩, by pieces of the packed G or of the columns' products."""
        v, n, o = self.gradients.shape
        if v == 1:
            return _products(self.gradients[0]).square_()
        table, columns = self.gradients.new_zeros(n, n), self.gradients.transpose(0, 1)
        if not self._packs_outputs():
            for part in chunks(n, PIECE_NUMBERS // max(1, v * v * n)):
                table[part] = self._output_block(columns[part], columns)
            return table
        scale = pair_scale(o, self.gradients)
        for start, stop in triangle_chunks(o, max(o, PIECE_NUMBERS // max(1, n))):
            at = slice(pair_offset(o, start), pair_offset(o, stop))
            room = table.new_empty(n, at.stop - at.start)
            pairs = pack_sums(columns, start, stop, room)
            symmetric_product_(table, pairs * scale[at, None])
        return mirror_(table)

    def _packs_outputs(self) -> bool:
        o, v = self.weight_shape[0], self.columns
        return v > 1 and pair_count(o) < v * v * o

    def _output_rows(self, part: slice) -> Tensor:
        """Return svec(G_n) (n, pairs) where that is shorter, else g as (n, v, o)."""
        columns = self.gradients[:, part].transpose(0, 1)
        if not self._packs_outputs():
            return columns
        o = self.weight_shape[0]
        rows = columns.new_empty(len(columns), pair_count(o))
        pack_sums(columns, 0, o, rows)
        return rows.mul_(pair_scale(o, rows))

    def _output_block(self, left: Tensor, right: Tensor) -> Tensor:
        """Return ⟨G_n, G_m⟩ from rows of either kind."""
        if left.dim() == 2:
            return left @ right.T
        products = (left.flatten(0, 1) @ right.flatten(0, 1).T).square_()
        v = self.columns
        if v == 1:
            return products
        return products.view(len(left), v, len(right), v).sum((1, 3))

    def product_work(self) -> int:
        """Count the multiply-adds of `project` and `combine`; columns are added first."""
        o, i = self.weight_shape
        return 2 * self.examples * o * (i + self.columns)

    def form_flops(self) -> int:
        """Count the multiply-adds of `kronecker_inner`: of both factors by themselves."""
        o, i = self.weight_shape
        return self.examples * (i * i + self.columns * o * o)

    def dense_flops(self) -> int:
        """Count the multiply-adds of the packed product; columns never enter."""
        o, i = self.weight_shape
        return self.examples * pair_count(o) * pair_count(i)

    def gram_flops(self) -> int:
        """Count the multiply-adds of the Gram matrix of all V·N samples."""
        o, i = self.weight_shape
        return self.examples**2 * (i + self.columns**2 * o)

    def square_flops(self) -> int:
        """Count the multiply-adds of `squares`."""
        o, i = self.weight_shape
        return self.examples * o * i

    def row_trace_flops(self) -> int:
        """Count the multiply-adds of Σ ‖a‖² G."""
        o, i = self.weight_shape
        return symmetric_flops(o, self.total) + self.total * o * o + self.examples * i * i

    def column_trace_flops(self) -> int:
        """Count the multiply-adds of Σ tr(G) a aᵀ, beside the other sum."""
        return symmetric_flops(self.weight_shape[1], self.examples)

    def alternating_flops(self) -> int:
        """Count the multiply-adds of `row_side` and `column_side`."""
        o, i = self.weight_shape
        return 3 * self.examples * (i * i + self.columns * o * o) // 2

    def factor_rows(self) -> tuple[int, int]:
        """Return V·N and N."""
        return self.total, self.examples

    def dense_route(self, form: str = "auto") -> DenseRoute:
        """Say how `add_dense_` goes: by one product of packed coordinates."""
        return "packed GEMM"

    def dense_workspace(self) -> int:
        """Count the bytes that `add_dense_` takes beside the block."""
        numbers = workspace_numbers(
            self.columns,
            self.examples,
            *self.weight_shape,
            accelerator=is_accelerator(self.device),
        )
        return self.dtype.itemsize * numbers


def _products(rows: Tensor) -> Tensor:
    """Return X Xᵀ; the products of few columns cost less than mirroring half of them."""
    return rows @ rows.T if rows.shape[1] <= FEW_COLUMNS else second_moment(rows.T)
