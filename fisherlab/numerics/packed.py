r"""Packed symmetric products and tables: half the numbers, a quarter of the flops.

The upper triangle of a symmetric d × d matrix is stored row after row as d(d+1)/2
numbers ("pairs"). For the sum of Kronecker products of symmetric matrices

.. math:: F = \sum_n G_n \otimes a_n a_n^T

packing both factors leaves one matrix product of (o(o+1)/2) × N × (m(m+1)/2), whose
result is the Van Loan rearrangement of F in packed coordinates.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import final

import torch
from jaxtyping import Float
from torch import Tensor

from fisherlab.numerics.devices import chunks, empty, is_accelerator, spans

PAIR_ROWS = 1024  # packed output rows multiplied at once: fast, and the product stays small
EXAMPLES = 1000  # examples packed at once: fewer slow the products down
SQUARE_ROWS = 16  # rows of the examples' squares at once: they stay in cache
LEAF = 1200  # symmetric products are halved down to this size, and then go by panels
PANEL = 96  # rows of a panel: right of it nothing is wasted, and it stays in cache
# Calls are what an accelerator pays: there a leaf is one panel, a piece is packed at once.
INPUT_ROWS = 2200  # packed input rows at once, so that N × m(m+1)/2 is never held


def pair_count(size: int) -> int:
    """Return the number of entries of the upper triangle."""
    return size * (size + 1) // 2


def pair_offset(size: int, row: int) -> int:
    """Return the position of entry (row, row) in the packed triangle."""
    return row * size - row * (row - 1) // 2


def pair_index(size: int, device: torch.device | None = None) -> Tensor:
    """Return the size × size table of packed positions of all entries.

    Examples
    --------
    >>> pair_index(3).tolist()
    [[0, 1, 2], [1, 3, 4], [2, 4, 5]]
    """
    index = torch.empty(size, size, dtype=torch.long, device=device)
    rows, cols = torch.triu_indices(size, size, device=device)
    order = torch.arange(len(rows), device=device)
    index[rows, cols] = order
    index[cols, rows] = order
    return index


def pack(matrix: Tensor) -> Tensor:
    """Pack symmetric matrices (..., d, d) isometrically: off-diagonals times √2.

    Examples
    --------
    >>> pack(torch.eye(2)).tolist()
    [1.0, 0.0, 1.0]
    """
    size = matrix.shape[-1]
    rows, cols = torch.triu_indices(size, size, device=matrix.device)
    return matrix[..., rows, cols] * pair_scale(size, matrix)


def unpack(packed: Tensor, size: int) -> Tensor:
    """Invert `pack`."""
    scaled = packed / pair_scale(size, packed)
    return scaled[..., pair_index(size, packed.device)]


def pair_scale(size: int, like: Tensor) -> Tensor:
    """Return 1 on diagonal pairs and √2 on the others, packed."""
    rows, cols = torch.triu_indices(size, size, device=like.device)
    scale = torch.full((len(rows),), 2.0**0.5, dtype=like.dtype, device=like.device)
    scale[rows == cols] = 1.0
    return scale


def pack_outer(rows: Tensor, start: int, stop: int, out: Tensor) -> Tensor:
    """Write pairs (i, j ≥ i), start ≤ i < stop, of x_i x_j, example by example.

    Parameters
    ----------
    rows
        Shape (d, n): the last axis runs over examples and is contiguous.
    start, stop
        Rows of the triangle.
    out
        Buffer of at least that many pairs × n; a view of it is returned.
    """
    size, position = rows.shape[0], 0
    if is_accelerator(rows.device):
        first, second = _pairs(size, start, stop, rows.device)
        return torch.mul(rows[first], rows[second], out=out[: len(first)])
    for i in range(start, stop):
        torch.mul(rows[i], rows[i:], out=out[position : position + size - i])
        position += size - i
    return out[:position]


def pack_sums(columns: Tensor, start: int, stop: int, out: Tensor) -> Tensor:
    """Write pairs (i, j ≥ i), start ≤ i < stop, of Σ_v x_vi x_vj, example by example.

    Parameters
    ----------
    columns
        Shape (n, V, d).
    start, stop
        Rows of the triangle.
    out
        Buffer of n × at least that many pairs; a view of it, pairs × n, is returned.
    """
    size, position = columns.shape[2], 0
    if is_accelerator(columns.device):
        first, second = _pairs(size, start, stop, columns.device)
        squares = columns[:, :, start:stop].mT @ columns[:, :, start:]
        packed = squares[:, first - start, second - start]
        return out[:, : len(first)].copy_(packed).T
    for rows in chunks(stop - start, SQUARE_ROWS):
        first = start + rows.start
        left = columns[:, :, first : start + rows.stop].transpose(1, 2)
        squares = left @ columns[:, :, first:]
        for i in range(rows.stop - rows.start):
            width = size - first - i
            out[:, position : position + width] = squares[:, i, i:]
            position += width
    return out[:, :position].T


def _pairs(size: int, start: int, stop: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return i and j of the pairs (i, j ≥ i), start ≤ i < stop, in packed order."""
    rows, cols = torch.triu_indices(stop - start, size - start, device=device) + start
    return rows, cols


def triangle_chunks(size: int, pairs: int) -> list[tuple[int, int]]:
    """Cut the rows of a triangle so that each piece holds about `pairs` pairs."""
    pieces, start, held = [], 0, 0
    for row in range(size):
        if row > start and held + size - row > pairs:
            pieces.append((start, row))
            start, held = row, 0
        held += size - row
    pieces.append((start, size))
    return pieces


class _Workspace:
    """Gradients and inputs as they are packed, and buffers that are used again and again.

    First touch of fresh memory costs as much as the packing itself.
    """

    def __init__(self, gradients: Tensor, inputs: Tensor) -> None:
        self.alone = gradients.shape[0] == 1
        self.gradients = (
            gradients[0].T if self.alone else gradients.transpose(0, 1)
        ).contiguous()
        self.inputs = inputs.T.contiguous()
        self.outputs = o = gradients.shape[-1]
        m = inputs.shape[-1]
        self.output_pieces = triangle_chunks(o, PAIR_ROWS)
        self.input_pieces = triangle_chunks(m, INPUT_ROWS)
        examples = min(EXAMPLES, inputs.shape[0])
        pairs, wide = _longest(o, self.output_pieces), _longest(m, self.input_pieces)
        held = (pairs, examples) if self.alone else (examples, pairs)
        self.output_pairs = empty(held, inputs.dtype, inputs.device)
        self.input_pairs = empty((wide, examples), inputs.dtype, inputs.device)
        self.product = empty((pairs, pair_count(m)), inputs.dtype, inputs.device)


def workspace_numbers(
    columns: int, examples: int, o: int, m: int, *, accelerator: bool = False
) -> int:
    """Return how many numbers `kronecker_sum_` holds beside the block."""
    outputs = triangle_chunks(o, PAIR_ROWS)
    pairs, wide = _longest(o, outputs), _longest(m, triangle_chunks(m, INPUT_ROWS))
    turned = columns * examples * o + examples * m
    squares = 0 if columns == 1 else min(o, SQUARE_ROWS) * o
    packed, spread = pairs + wide + squares, o * m * m
    if accelerator:  # what is packed and spread at once, a piece holds half of
        packed, spread = 4 * pairs + 3 * wide, 2 * pairs * m * m
    return turned + packed * min(EXAMPLES, examples) + pairs * pair_count(m) + spread


def _longest(size: int, pieces: list[tuple[int, int]]) -> int:
    return max(pair_offset(size, b) - pair_offset(size, a) for a, b in pieces)


def _product_rows(space: _Workspace, piece: tuple[int, int], scale: float) -> Tensor:
    """Return rows of scale · Σ_n pairs(G_n) pairs(a_n a_nᵀ)ᵀ, valid until the next call."""
    m, examples = space.inputs.shape
    first, end = (pair_offset(space.outputs, row) for row in piece)
    result = space.product[: end - first]
    for part in chunks(examples, EXAMPLES):
        inputs, n = space.inputs[:, part], part.stop - part.start
        if space.alone:  # pairs of Σ_v g_v g_vᵀ × examples
            room = space.output_pairs[:, :n]
            left = pack_outer(space.gradients[:, part], *piece, room)
        else:
            left = pack_sums(space.gradients[part], *piece, space.output_pairs[:n])
        for start, stop in space.input_pieces:
            room = space.input_pairs[:, :n]
            right = pack_outer(inputs, start, stop, room)  # pairs of a aᵀ × examples
            at = pair_offset(m, start)
            columns = result[:, at : at + right.shape[0]]
            columns.addmm_(left, right.T, beta=float(part.start > 0), alpha=scale)
    return result


def rearranged(gradients: Tensor, inputs: Tensor) -> Tensor:
    """Return Σ_n svec(G_n) svec(a_n a_nᵀ)ᵀ, G_n = Σ_v g_vn g_vnᵀ, isometrically packed.

    Parameters
    ----------
    gradients
        Shape (V, N, o).
    inputs
        Shape (N, m).

    Returns
    -------
    Tensor
        Shape (o(o+1)/2, m(m+1)/2): the Van Loan rearrangement of Σ_n G_n ⊗ a_n a_nᵀ
        in packed coordinates; its singular values and norm are those of the full one.
    """
    o, m = gradients.shape[-1], inputs.shape[-1]
    out = inputs.new_zeros(pair_count(o), pair_count(m))
    if inputs.shape[0] == 0:
        return out
    space = _Workspace(gradients, inputs)
    for piece in space.output_pieces:
        rows = slice(pair_offset(o, piece[0]), pair_offset(o, piece[1]))
        out[rows] = _product_rows(space, piece, 1.0)
    return out.mul_(pair_scale(o, inputs)[:, None]).mul_(pair_scale(m, inputs))


def kronecker_sum_(out: Tensor, gradients: Tensor, inputs: Tensor, scale: float) -> Tensor:
    """Write scale · Σ_n G_n ⊗ a_n a_nᵀ into a dense block, in place.

    Parameters
    ----------
    out
        Shape (o, m, o, m), contiguous; overwritten.
    gradients
        Shape (V, N, o); G_n = Σ_v g_vn g_vnᵀ.
    inputs
        Shape (N, m).

    Notes
    -----
    N · o(o+1)/2 · m(m+1)/2 multiply-adds; beside `out` it holds the factors transposed
    and buffers of about max(512, o) packed rows.
    """
    o, m = gradients.shape[-1], inputs.shape[-1]
    if inputs.shape[0] == 0:
        return out.zero_()
    space = _Workspace(gradients, inputs)
    if is_accelerator(inputs.device):
        return _spread_(out, space, scale)
    columns = pair_index(m, inputs.device).reshape(-1)
    panels = inputs.new_empty(o, m * m)
    for start, stop in space.output_pieces:
        packed = _product_rows(space, (start, stop), scale)
        base = pair_offset(o, start)
        for row in range(start, stop):
            at = pair_offset(o, row) - base
            rows = packed[at : at + o - row]
            torch.index_select(rows, 1, columns, out=panels[: o - row])
            panel = panels[: o - row].view(o - row, m, m)
            out[row, :, row:, :] = panel.transpose(0, 1)
            out[row + 1 :, :, row, :] = panel[1:]
    return out


def _spread_(out: Tensor, space: _Workspace, scale: float) -> Tensor:
    """Write the packed product into the dense block, a few calls a piece."""
    o, m = out.shape[:2]
    outputs, inputs = pair_index(o, out.device), pair_index(m, out.device)
    for start, stop in space.output_pieces:
        packed = _product_rows(space, (start, stop), scale)
        here = outputs[start:stop, start:] - pair_offset(o, start)
        rows = packed[here[:, None, :, None], inputs[None, :, None, :]]
        out[start:stop, :, start:] = rows
        out[stop:, :, start:stop] = rows[:, :, stop - start :].permute(2, 1, 0, 3)
    return out


def symmetric_product_(
    out: Tensor, rows: Tensor, scale: float = 1.0, *, beta: float = 1.0
) -> Tensor:
    """Set the upper triangle of `out` to beta · out + scale · XᵀX; half the flops.

    Large matrices are halved recursively into two squares of the diagonal and one
    rectangle; small ones go panel by panel. Call `mirror_` once when all has been added.
    With beta = 0 what `out` holds is not read.
    """
    return _triangle_(out, rows, rows, scale, beta)


def weighted_product_(out: Tensor, rows: Tensor, weights: Tensor) -> Tensor:
    """Add Xᵀ diag(w) X to the upper triangle of `out`, for weights of any sign."""
    return _triangle_(out, rows, rows * weights[:, None], 1.0, 1.0)


def _triangle_(
    out: Tensor, left: Tensor, right: Tensor, scale: float, beta: float
) -> Tensor:
    """Set the upper triangle of `out` to beta · out + scale · LᵀR, LᵀR symmetric."""
    size = out.shape[0]
    if size <= LEAF:
        for part in chunks(size, _panel(out)):
            panel = out[part, part.start :]
            panel.addmm_(left[:, part].T, right[:, part.start :], alpha=scale, beta=beta)
        return out
    half = size // 2
    _triangle_(out[:half, :half], left[:, :half], right[:, :half], scale, beta)
    _triangle_(out[half:, half:], left[:, half:], right[:, half:], scale, beta)
    out[:half, half:].addmm_(left[:, :half].T, right[:, half:], alpha=scale, beta=beta)
    return out


def symmetric_flops(size: int, rows: int) -> int:
    """Return the multiply-adds of `symmetric_product_` for rows (n, d): about d² n / 2.

    Examples
    --------
    >>> symmetric_flops(100, 7), symmetric_flops(1000, 7) / (1000 * 1000 * 7)
    (67312, 0.54688)
    """
    return _written(size) * rows


@lru_cache(maxsize=4096)
def _written(size: int) -> int:
    """Count the entries that `_triangle_` writes; halves of one size are counted once."""
    if size <= LEAF:
        return sum((p.stop - p.start) * (size - p.start) for p in chunks(size, PANEL))
    half = size // 2
    return _written(half) + _written(size - half) + half * (size - half)


def mirror_(matrix: Tensor) -> Tensor:
    """Copy the upper triangle onto the lower one, in place, panel by panel."""
    for part in chunks(matrix.shape[0], _panel(matrix)):
        _mirror_panel_(matrix, part)
    return matrix


def _panel(matrix: Tensor) -> int:
    return LEAF if is_accelerator(matrix.device) else PANEL


def _mirror_panel_(matrix: Tensor, part: slice) -> None:
    if part.stop < matrix.shape[0]:
        matrix[part.stop :, part] = matrix[part, part.stop :].T
    square = matrix[part, part]
    lower = square.T.tril(-1)
    square.triu_().add_(lower)


def second_moment(rows: Tensor) -> Tensor:
    """Return XᵀX for rows (n, d), symmetric to the last bit.

    Examples
    --------
    >>> second_moment(torch.ones(3, 2)).tolist()
    [[3.0, 3.0], [3.0, 3.0]]
    """
    size = rows.shape[1]
    out = rows.new_empty(size, size)
    if size > LEAF:
        return mirror_(symmetric_product_(out, rows, beta=0.0))
    for part in chunks(size, _panel(out)):  # mirrored while it is in cache
        torch.mm(rows[:, part].T, rows[:, part.start :], out=out[part, part.start :])
        _mirror_panel_(out, part)
    return out


def weighted_moment(rows: Tensor, weights: Tensor) -> Tensor:
    """Return Xᵀ diag(w) X for rows (n, d), symmetric to the last bit."""
    size = rows.shape[1]
    return mirror_(weighted_product_(rows.new_zeros(size, size), rows, weights))


@final
@dataclass(frozen=True, eq=False)
class PositionTable:
    r"""The inner products of all :math:`x_{nt} x_{ns}^T`, summed over columns v.

    It takes tables :math:`Y_n` (T × T) of an example each to those of the matrix
    :math:`M = \sum_{vn} X_{vn}^T Y_n X_{vn}` they stand for,
    :math:`\sum_v X_{vn} M X_{vn}^T`, through the Gram matrix of the rows alone: 2 V² N² T³
    multiply-adds, where M would cost V N T d (d + T).

    Parameters
    ----------
    gram
        Inner products of the V·N·T rows, v-major.
    columns, examples, positions
        V, N, T.

    Examples
    --------
    >>> rows = torch.tensor([[1.0], [2.0]])
    >>> (PositionTable(rows @ rows.T, 1, 1, 2) @ torch.ones(4)).tolist()
    [9.0, 18.0, 18.0, 36.0]
    """

    gram: Float[Tensor, "m m"]
    columns: int
    examples: int
    positions: int

    @classmethod
    def of(cls, rows: Float[Tensor, "v n t d"]) -> "PositionTable":
        """Return the table of some rows."""
        flat = rows.flatten(0, 2)
        return cls(flat @ flat.T, *rows.shape[:3])

    @property
    def dtype(self) -> torch.dtype:
        """The precision."""
        return self.gram.dtype

    def double(self) -> "PositionTable":
        """Return the table in float64."""
        sizes = self.columns, self.examples, self.positions
        return PositionTable(self.gram.double(), *sizes)

    def diagonal(self) -> Float[Tensor, " k"]:
        """Return the squared lengths of Σ_v x_vnt x_vnsᵀ."""
        v, n, t = self.columns, self.examples, self.positions
        own = self.gram.view(v, n, t, v, n, t).diagonal(dim1=1, dim2=4)
        own = own.diagonal(dim1=1, dim2=3)  # (v, w, n, t)
        return torch.einsum("vwnt,vwns->nts", own, own).flatten()

    def __matmul__(self, x: Tensor) -> Tensor:
        """Multiply with columns (N·T·T, k) or with one (N·T·T,)."""
        if x.dim() == 2:
            images = [self @ column for column in x.T]
            return torch.stack(images, 1) if images else x.clone()
        v, n, t = self.columns, self.examples, self.positions
        pieces, size = self.gram.view(v * n, t, -1), v * n * t
        inside = (x.view(n, t, t).repeat(v, 1, 1) @ pieces).view(size, v * n, t)
        found = torch.bmm(pieces, inside.transpose(0, 1))
        return found.view(v, n, t, t).sum(0).flatten()


@final
@dataclass(frozen=True, eq=False)
class HalfTable:
    """A symmetric n × n table in n²/2 numbers, which is read once for a product.

    Parameters
    ----------
    panels
        One after the other, rows of the table from their diagonal on: shape
        (rows, n − rows above).

    Examples
    --------
    >>> table = HalfTable((torch.tensor([[2.0, 1.0]]), torch.tensor([[3.0]])))
    >>> (table @ torch.eye(2)).tolist()
    [[2.0, 1.0], [1.0, 3.0]]
    """

    panels: tuple[Tensor, ...]

    @property
    def dtype(self) -> torch.dtype:
        """The precision."""
        return self.panels[0].dtype

    def double(self) -> "HalfTable":
        """Return the table in float64."""
        return HalfTable(tuple(panel.double() for panel in self.panels))

    def diagonal(self) -> Float[Tensor, " n"]:
        """Return the diagonal."""
        return torch.cat([panel.diagonal() for panel in self.panels])

    def __matmul__(self, x: Tensor) -> Tensor:
        """Multiply with columns (n, k) or with one (n,)."""
        out = torch.zeros_like(x)
        for rows, panel in self._placed():
            out[rows] += panel @ x[rows.start :]
            out[rows.stop :] += panel[:, len(panel) :].T @ x[rows]
        return out

    def _placed(self) -> Iterator[tuple[slice, Tensor]]:
        """Yield every panel with its rows."""
        yield from zip(
            spans([len(panel) for panel in self.panels]), self.panels, strict=True
        )
