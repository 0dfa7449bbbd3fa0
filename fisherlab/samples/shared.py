r"""Inputs and gradients at several positions that share one weight.

A quadratic form of per-example matrices is a sum over pairs of positions,
:math:`D M D^T = \sum_{ts} g_t (a_t^T M a_s) g_s^T`, in which no matrix is formed: cheaper
for few positions, dearer for many. The dense sum is

.. math:: S = \sum_{n,t,s} \Big(\sum_v g_{vnt} g_{vns}^T\Big) \otimes a_{nt} a_{ns}^T

The columns never enter the large product, whose cost is N·T²·p². It beats the sum of
per-example gradients, V·N·p²/2, for few positions and many columns.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import final

import torch
from jaxtyping import Float
from torch import Tensor

from fisherlab.numerics.devices import chunks, empty
from fisherlab.numerics.packed import mirror_, symmetric_flops, symmetric_product_
from fisherlab.samples import base
from fisherlab.samples.base import WHOLE, Samples, counted_together, kept_once


@final
@dataclass(frozen=True, eq=False)
class MatrixSamples(Samples):
    """Hold D_vn explicitly: norm layers, bare parameters, recurrent or tied weights."""

    stored: Float[Tensor, "v n o i"]

    @cached_property
    def columns(self) -> int:
        """V."""
        return self.stored.shape[0]

    @cached_property
    def examples(self) -> int:
        """N."""
        return self.stored.shape[1]

    @cached_property
    def weight_shape(self) -> tuple[int, int]:
        """(o, i)."""
        return self.stored.shape[2], self.stored.shape[3]

    def some_columns(self, columns: slice) -> "MatrixSamples":
        """Return the samples of some columns."""
        return MatrixSamples(self.stored[columns])

    def some_rows(self, rows: slice) -> "MatrixSamples":
        """Return D[rows]."""
        return MatrixSamples(self.stored[:, :, rows])

    def some_examples(self, index: Tensor) -> "MatrixSamples":
        """Return the samples of some examples."""
        return MatrixSamples(self.stored[:, index])

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
        return symmetric_flops(size, self.total)

    def gram_flops(self) -> int:
        """Count the multiply-adds of the Gram matrix (half a product)."""
        return self.stored.numel() * self.total // 2

    def counted(self, *, needs_inputs: bool, entrywise: bool) -> tuple[Samples, ...]:
        """Return nothing where inputs are needed: they are not known here."""
        return () if needs_inputs else (self,)


@final
@dataclass(frozen=True, eq=False)
class GroupedSamples(Samples):
    """Hold D_vn = [D¹_vn; D²_vn; …]: grouped convolutions, projections in one weight.

    Parameters
    ----------
    groups
        The samples of each group, of equal d_in.
    """

    groups: tuple[Samples, ...]

    @cached_property
    def columns(self) -> int:
        """V."""
        return self.groups[0].columns

    @cached_property
    def examples(self) -> int:
        """N."""
        return self.groups[0].examples

    @cached_property
    def weight_shape(self) -> tuple[int, int]:
        """(o, i), o over all groups."""
        rows = sum(group.weight_shape[0] for group in self.groups)
        return rows, self.groups[0].weight_shape[1]

    def _split(self, w: Tensor) -> tuple[Tensor, ...]:
        """Cut the rows of weights (..., o, i) into groups."""
        return w.split([group.weight_shape[0] for group in self.groups], -2)

    def some_columns(self, columns: slice) -> "GroupedSamples":
        """Return the samples of some columns."""
        return GroupedSamples(tuple(g.some_columns(columns) for g in self.groups))

    def some_examples(self, index: Tensor) -> "GroupedSamples":
        """Return the samples of some examples."""
        return GroupedSamples(tuple(g.some_examples(index) for g in self.groups))

    def matrices(self, part: slice = WHOLE) -> Float[Tensor, "v n o i"]:
        """Form the matrices of some examples."""
        return torch.cat([group.matrices(part) for group in self.groups], 2)

    def project(self, w: Float[Tensor, "k o i"]) -> Float[Tensor, "k v n"]:
        """Return ⟨D_vn, w⟩, added up over the groups."""
        pairs = zip(self.groups, self._split(w), strict=True)
        return torch.stack([group.project(rows_) for group, rows_ in pairs]).sum(0)

    def combine(self, c: Float[Tensor, "k v n"]) -> Float[Tensor, "k o i"]:
        """Return Σ c_vn D_vn."""
        return torch.cat([group.combine(c) for group in self.groups], 1)

    def squared_norms(self) -> Float[Tensor, "v n"]:
        """Return ‖D_vn‖²."""
        return torch.stack([group.squared_norms() for group in self.groups]).sum(0)

    def squares(self) -> Float[Tensor, "o i"]:
        """Return Σ D∘D."""
        return torch.cat([group.squares() for group in self.groups])

    def gram(self) -> Float[Tensor, "m m"]:
        """Return all inner products, added up over the groups."""
        total = self.groups[0].gram()
        for group in self.groups[1:]:
            total += group.gram()
        return total

    def dense_flops(self) -> int:
        """Count the multiply-adds of the dense sum: forming D, then half a product."""
        formed = sum(g.positions * g.weight_shape[0] for g in self.groups)
        forming = self.total * formed * self.weight_shape[1]
        return forming + super().dense_flops()

    def gram_flops(self) -> int:
        """Count the multiply-adds of the Gram matrix."""
        return sum(group.gram_flops() for group in self.groups)

    def counted(self, *, needs_inputs: bool, entrywise: bool) -> tuple[Samples, ...]:
        """Return those of all groups."""
        return counted_together(self.groups, needs_inputs, entrywise)


CHUNK_BYTES = 64 * 2**20  # pair factors formed at once


def pair_flops(examples: int, columns: int, positions: int, o: int, i: int) -> int:
    """Count the multiply-adds of the pair form."""
    pairs = examples * positions**2
    return pairs * (columns * o * o + i * i + (o * i) ** 2)


def form_flops(
    examples: int, columns: int, positions: int, o: int, i: int
) -> tuple[int, int]:
    """Count a quadratic form of all matrices: by pairs of positions, and by matrices."""
    t = positions
    by_pairs = examples * t * (columns * o * (o + t) + i * (i + t))
    return by_pairs, examples * columns * o * i * (t + o + i)


def table_flops(
    samples: int, examples: int, columns: int, positions: int, o: int, i: int
) -> tuple[int, int]:
    """Count all inner products: by pairs of positions, and by matrices."""
    by_pairs = (examples * positions) ** 2 * (i + columns**2 * (o + 1))
    return by_pairs, samples * o * i * (positions + samples)


def input_tables(
    inputs: Float[Tensor, "n t i"], middle: Float[Tensor, "i i"]
) -> Float[Tensor, "n t t"]:
    """Return a_ntᵀ M a_ns."""
    return (inputs @ middle) @ inputs.mT


def output_tables(
    gradients: Float[Tensor, "v n t o"], middle: Float[Tensor, "o o"]
) -> Float[Tensor, "n t t"]:
    """Return Σ_v g_vntᵀ M g_vns."""
    beside = gradients.permute(1, 2, 0, 3).contiguous()
    turned = (beside.flatten(0, 2) @ middle).view_as(beside)
    return turned.flatten(2) @ beside.flatten(2).mT


def position_table(
    first: tuple[Float[Tensor, "n t i"], Float[Tensor, "v n t o"]],
    second: tuple[Float[Tensor, "k s i"], Float[Tensor, "w k s o"]],
) -> Float[Tensor, "m l"]:
    """Return ⟨D_a, E_b⟩ = Σ_ts (g_at·h_bs)(a_at·b_bs), both v-major."""
    (a, g), (b, h) = first, second
    (v, n, t, _), (w, k, s, _) = g.shape, h.shape
    out = g.new_empty(v, n, w, k)
    right = (b.flatten(0, 1).mT, h.flatten(0, 2).mT)
    each = w * t * k * s * g.element_size()
    for part in chunks(n, CHUNK_BYTES // max(each, 1)):
        inputs = (a[part].flatten(0, 1) @ right[0]).view(-1, t, k, s)
        width = CHUNK_BYTES // max(each * len(inputs), 1)
        for columns in chunks(v, width):  # of 1,000 classes one example fills gigabytes
            outputs = g[columns, part].flatten(0, 2) @ right[1]
            outputs = outputs.view(-1, len(inputs), t, w, k, s).mul_(inputs[:, :, None])
            out[columns, part] = outputs.sum((2, 5))
    return out.view(v * n, w * k)


def add_pairs_(
    out: Float[Tensor, "p p"],
    inputs: Float[Tensor, "n t i"],
    gradients: Float[Tensor, "v n t o"],
    scale: float,
) -> Float[Tensor, "p p"]:
    """Write scale · Σ vec(D) vec(D)ᵀ into `out`, panel of rows by panel of rows."""
    (n, t, i), o = inputs.shape, gradients.shape[3]
    folded = out.zero_().view(o, i, o, i)
    each = t * t * (o * o + i * i) * inputs.element_size()
    for part in chunks(n, CHUNK_BYTES // max(each, 1)):
        g, a = gradients[:, part], inputs[part]
        left = torch.einsum("vnto,vnsp->ntsop", g, g).reshape(-1, o, o)
        right = torch.einsum("nti,nsj->ntsij", a, a).reshape(-1, i * i)
        for row in range(o):
            panel = (left[:, row].T @ right).view(o, i, i)
            folded[row].add_(panel.transpose(0, 1), alpha=scale)
    return out


def table_matrix(
    rows: Float[Tensor, "v n t d"], tables: Float[Tensor, " k"]
) -> Float[Tensor, "d d"]:
    """Return Σ_vn X_vnᵀ Y_n X_vn for T × T tables Y_n of the examples."""
    _, n, t, _ = rows.shape
    return rows.flatten(0, 2).T @ (tables.view(n, t, t) @ rows).flatten(0, 2)


TILE = 2048  # samples on one side of a tile of inner products


@final
@dataclass(frozen=True, eq=False)
class SharedSamples(Samples):
    """Hold D_vn = Σ_t g_vnt a_ntᵀ: convolutions, sequences, repeated calls."""

    inputs: Float[Tensor, "n t i"]
    gradients: Float[Tensor, "v n t o"]

    @property
    def positions(self) -> int:
        """T."""
        return self.inputs.shape[1]

    @cached_property
    def weight_shape(self) -> tuple[int, int]:
        """(o, i)."""
        return self.gradients.shape[3], self.inputs.shape[2]

    def some_columns(self, columns: slice) -> "SharedSamples":
        """Return the samples of some columns."""
        return SharedSamples(self.inputs, self.gradients[columns])

    def some_rows(self, rows: slice) -> "SharedSamples":
        """Return D[rows]."""
        return SharedSamples(self.inputs, self.gradients[..., rows])

    def some_examples(self, index: Tensor) -> "SharedSamples":
        """Return the samples of some examples."""
        return SharedSamples(self.inputs[index], self.gradients[:, index])

    def matrices(self, part: slice = WHOLE) -> Float[Tensor, "v n o i"]:
        """Form the matrices of some examples: one product per example, all columns."""
        return self._formed(part).transpose(0, 1)

    def _formed(
        self, part: slice, buffer: Float[Tensor, "m v o i"] | None = None
    ) -> Float[Tensor, "n v o i"]:
        """Form the matrices of some examples, at the beginning of a buffer if given."""
        gradients = self.gradients[:, part]
        v, n, t, o = gradients.shape
        i = self.inputs.shape[2]
        if buffer is None:
            buffer = empty((n, v, o, i), self.dtype, self.device)
        formed = buffer[:n]
        stacked = gradients.permute(1, 0, 3, 2).reshape(n, v * o, t)
        torch.bmm(stacked, self.inputs[part], out=formed.view(n, v * o, i))
        return formed

    def multiplied_often(self, limit: int) -> "SharedSamples | MatrixSamples":
        """Return the form for many quadratic forms: matrices formed once, if they fit.

        Forming them takes T/(d_out + d_in) of a quadratic form, again at each of them.
        """
        (o, i), samples = self.weight_shape, self.total
        by_pairs, _ = self._form_flops
        fit = samples * o * i * self.dtype.itemsize <= limit
        if not fit or by_pairs < samples * o * i * (o + i):
            return self
        return MatrixSamples(self.matrices())

    def project(self, w: Float[Tensor, "k o i"]) -> Float[Tensor, "k v n"]:
        """Return ⟨D_vn, w⟩ = Σ_t g_vnt · (w a_nt)."""
        if self._formed_for(len(w)):
            return self._by_matrices(w)
        flat = self.inputs.flatten(0, 1)
        out = self.gradients.new_empty(len(w), self.columns, self.examples)
        for k, one in enumerate(w):
            outputs = (flat @ one.T).view(self.gradients.shape[1:])
            out[k] = (self.gradients * outputs).sum((2, 3))
        return out

    def combine(self, c: Float[Tensor, "k v n"]) -> Float[Tensor, "k o i"]:
        """Return Σ c_vn D_vn."""
        out = self.gradients.new_zeros(len(c), *self.weight_shape)
        if self._formed_for(len(c)):
            for part in self.parts():
                rows = c[:, :, part].mT.flatten(1)
                out.flatten(1).addmm_(rows, self._formed(part).flatten(0, 1).flatten(1))
            return out
        flat = self.inputs.flatten(0, 1)
        for k, one in enumerate(c):
            mixed = torch.einsum("vn,vnto->nto", one, self.gradients)
            out[k] = mixed.flatten(0, 1).T @ flat
        return out

    def _formed_for(self, weights: int) -> bool:
        """Whether to form matrices for some weights, which take all positions else."""
        (o, i), v, t = self.weight_shape, self.columns, self.positions
        fits = v * o * i * self.dtype.itemsize <= CHUNK_BYTES
        return fits and v * (t + weights) * i < weights * t * (i + v)

    def _by_matrices(self, w: Float[Tensor, "k o i"]) -> Float[Tensor, "k v n"]:
        out = self.gradients.new_empty(len(w), self.columns, self.examples)
        for part in self.parts():
            found = self._formed(part).flatten(2) @ w.flatten(1).T
            out[:, :, part] = found.permute(2, 1, 0)
        return out

    @kept_once
    def squared_norms(self) -> Float[Tensor, "v n"]:
        """Return ‖D_vn‖², the diagonal of the inner products."""
        (o, i), t = self.weight_shape, self.inputs.shape[1]
        out = self.gradients.new_empty(self.columns, self.examples)
        if t * (self.columns * o + i) < self.columns * o * i:
            for part in self._pair_parts(1 + self.columns):
                a, g = self.inputs[part], self.gradients[:, part]
                out[:, part] = ((g @ g.mT) * (a @ a.mT)).sum((2, 3))
            return out
        for part in self.parts():
            out[:, part] = self.matrices(part).square().sum((2, 3))
        return out

    def rotated_squares(
        self, rows: Float[Tensor, "o r"], cols: Float[Tensor, "i c"]
    ) -> Float[Tensor, "r c"]:
        """Return Σ (rowsᵀ D cols)∘²: rotate positions or matrices, whichever is less."""
        (o, i), t = self.weight_shape, self.inputs.shape[1]
        if t * (self.columns * o * o + i * i) > self.columns * o * i * (o + i):
            return super().rotated_squares(rows, cols)
        turned = SharedSamples(self.inputs @ cols, self.gradients @ rows)
        return turned.squares()

    def row_side(self, middle: Float[Tensor, "i i"]) -> Float[Tensor, "o o"]:
        """Return Σ D M Dᵀ, through pairs of positions where they are cheaper."""
        if not self._forms_by_pairs:
            return super().row_side(middle)
        o = self.weight_shape[0]
        out = self.gradients.new_zeros(o, o)
        for part in self._pair_parts():
            g, inside = self.gradients[:, part], input_tables(self.inputs[part], middle)
            out.addmm_(g.flatten(0, 2).T, (inside @ g).flatten(0, 2))
        return out

    def column_side(self, middle: Float[Tensor, "o o"]) -> Float[Tensor, "i i"]:
        """Return Σ Dᵀ M D, through pairs of positions where they are cheaper."""
        if not self._forms_by_pairs:
            return super().column_side(middle)
        i = self.weight_shape[1]
        out = self.inputs.new_zeros(i, i)
        for part in self._pair_parts():
            a, inside = self.inputs[part], output_tables(self.gradients[:, part], middle)
            out.addmm_(a.flatten(0, 1).T, (inside @ a).flatten(0, 1))
        return out

    def kronecker_inner(
        self, rows: Float[Tensor, "o o"], cols: Float[Tensor, "i i"]
    ) -> float:
        """Return Σ ⟨D, rows D cols⟩, through pairs of positions where they are cheaper."""
        if not self._forms_by_pairs:
            return super().kronecker_inner(rows, cols)
        total = 0.0
        for part in self._pair_parts():
            inside = input_tables(self.inputs[part], cols)
            outside = output_tables(self.gradients[:, part], rows)
            total += float((inside * outside).sum(dtype=torch.float64))
        return total

    def form_flops(self) -> int:
        """Count the multiply-adds of `kronecker_inner`, in the cheaper of its two forms."""
        return min(self._form_flops)

    @property
    def _forms_by_pairs(self) -> bool:
        by_pairs, by_matrices = self._form_flops
        return by_pairs < by_matrices

    @property
    def _form_flops(self) -> tuple[int, int]:
        t = self.inputs.shape[1]
        return form_flops(self.examples, self.columns, t, *self.weight_shape)

    def _pair_parts(self, tables: int = 2) -> Iterator[slice]:
        """Cut the examples so that tables over pairs of positions stay small."""
        (o, i), t = self.weight_shape, self.inputs.shape[1]
        each = t * (tables * t + self.columns * o + i) * self.dtype.itemsize
        return chunks(self.examples, base.CHUNK_BYTES // max(each, 1))

    def add_dense_(
        self, out: Float[Tensor, "p p"], scale: float = 1.0
    ) -> Float[Tensor, "p p"]:
        """Write scale · Σ vec(D) vec(D)ᵀ into `out`, by the cheaper of two forms."""
        if self.pairs_are_cheaper or self.examples == 0:
            return self.add_pairs_(out, scale)
        return self._add_matrices_(out, scale)

    def _add_matrices_(
        self, out: Float[Tensor, "p p"], scale: float
    ) -> Float[Tensor, "p p"]:
        """Write scale · Σ vec(D) vec(D)ᵀ into `out`; fresh memory would cost a fifth."""
        buffer = None
        for part in self.parts():
            formed = self._formed(part, buffer)
            buffer = formed if buffer is None else buffer
            stacked = formed.flatten(2).flatten(0, 1)
            symmetric_product_(out, stacked, scale, beta=float(part.start > 0))
        return mirror_(out)

    def add_pairs_(self, out: Float[Tensor, "p p"], scale: float) -> Float[Tensor, "p p"]:
        """Write scale · Σ vec(D) vec(D)ᵀ into `out` through pairs of positions."""
        return add_pairs_(out, self.inputs, self.gradients, scale)

    @property
    def pairs_are_cheaper(self) -> bool:
        """Whether pairs of positions cost less than per-example gradients."""
        return self._pair_flops() < self._matrix_flops()

    def _pair_flops(self) -> int:
        o, i = self.weight_shape
        return pair_flops(self.examples, self.columns, self.inputs.shape[1], o, i)

    def _matrix_flops(self) -> int:
        p = self.weight_shape[0] * self.weight_shape[1]
        samples = self.total
        return samples * p * self.inputs.shape[1] + symmetric_flops(p, samples)

    def _tiles(self) -> Iterator[tuple[slice, slice, Tensor]]:
        """Yield tiles of inner products, rows before columns."""
        pieces = list(chunks(self.examples, self.tile))
        for at, left in enumerate(pieces):
            for right in pieces[at:]:
                yield left, right, self.inner_table(self, left, right)

    @property
    def tile(self) -> int:
        """Examples whose inner products are one tile; wide weights take fewer."""
        row = self.weight_shape[1] * self.dtype.itemsize
        return max(1, min(TILE, base.CHUNK_BYTES // (2 * row)) // max(1, self.columns))

    def inner_table(
        self, other: "SharedSamples", left: slice, right: slice
    ) -> Float[Tensor, "m k"]:
        """Return ⟨D_a, E_b⟩ for some examples of both, v-major, by the cheaper form.

        Matrices are formed a few rows at a time and once a tile, not once a pair of
        chunks.
        """
        same = self is other and left == right
        a, g = self.inputs[left], self.gradients[:, left]
        b, h = other.inputs[right], other.gradients[:, right]
        m, k = g.shape[0] * g.shape[1], h.shape[0] * h.shape[1]
        if self._tables_by_pairs:
            return position_table((a, g), (b, h))
        table = g.new_zeros(m, k)
        row = (m + k) * self.weight_shape[1] * self.dtype.itemsize
        for cut in chunks(self.weight_shape[0], base.CHUNK_BYTES // max(row, 1)):
            formed = SharedSamples(a, g[..., cut]).flat()
            others = formed
            if not same:
                others = SharedSamples(b, h[..., cut]).flat()
            table.addmm_(formed, others.T)
        return table

    @property
    def _tables_by_pairs(self) -> bool:
        by_pairs, by_matrices = self._table_flops()
        return by_pairs < by_matrices

    def _table_flops(self) -> tuple[int, int]:
        n, v, t = self.examples, self.columns, self.inputs.shape[1]
        return table_flops(v * n, n, v, t, *self.weight_shape)

    def dense_flops(self) -> int:
        """Count the multiply-adds of the dense sum, in the cheaper of its two forms."""
        return min(self._pair_flops(), self._matrix_flops())

    def gram_flops(self) -> int:
        """Count the multiply-adds of the Gram matrix, half of it by symmetry."""
        by_pairs, by_matrices = self._table_flops()
        o, i = self.weight_shape
        samples, t = self.total, self.inputs.shape[1]
        halved = by_matrices - samples * samples * o * i // 2
        return min(by_pairs, max(halved, samples * o * i * t))

    def factor_rows(self) -> tuple[int, int]:
        """Return V·N·T and N·T."""
        return self.total * self.positions, self.examples * self.positions

    def dense_route(self, form: str = "auto") -> base.DenseRoute:
        """Say how `add_dense_` goes, or the form that is asked for."""
        by_pairs = form == "pairs" or (form != "matrices" and self.pairs_are_cheaper)
        return "position pairs" if by_pairs else "per-example SYRK"

    def dense_workspace(self) -> int:
        """Count the bytes that `add_dense_` takes beside the block."""
        if not self.pairs_are_cheaper:
            return super().dense_workspace()
        (o, i), t = self.weight_shape, self.inputs.shape[1]
        tables = self.dtype.itemsize * self.examples * t**2 * (o * o + i * i)
        return min(CHUNK_BYTES, tables)
