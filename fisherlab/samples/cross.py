"""Sums and Gram matrices between two sets of samples of the same examples."""

from collections.abc import Iterator, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from fisherlab.numerics.devices import chunks
from fisherlab.samples.base import WHOLE, Samples, Tiles
from fisherlab.samples.outer import OuterSamples
from fisherlab.samples.shared import SharedSamples
from fisherlab.samples.summed import TurnedSamples

CHUNK_BYTES = 64 * 2**20  # products of examples formed at once
TABLE_ROWS = 1024  # rows and columns of a tile of inner products
Index = Sequence[int] | slice | Tensor


def cross_product(
    left: Samples, right: Samples, rows: Index = WHOLE, columns: Index = WHOLE
) -> Float[Tensor, "p q"]:
    """Return Σ_vn vec(D_vn) vec(E_vn)ᵀ for samples D and E, or a part of it.

    Two sets at one position cost N·p·q multiply-adds whatever V is; others V times as
    many.
    """
    if left.cuts == right.cuts and len(left.cuts) > 1:
        parts = zip(left.in_parts(), right.in_parts(), strict=True)
        found = (cross_product(one, other, rows, columns) for one, other in parts)
        return _added(found)
    whole = _is_whole(rows) and _is_whole(columns)
    if whole and isinstance(left, OuterSamples) and isinstance(right, OuterSamples):
        return _outer_product(left, right)
    return _product(left, right, rows, columns)


def index_length(samples: Samples, index: Index) -> int:
    """Return how many entries of vec(w) an index names."""
    o, i = samples.weight_shape
    if isinstance(index, slice):
        return len(range(*index.indices(o * i)))
    return len(index)


def gram_block(samples: Samples, left: slice, right: slice) -> Float[Tensor, "m k"]:
    """Return ⟨D_a, D_b⟩ for a among some examples and b among others, both v-major."""
    if isinstance(samples, TurnedSamples):
        return gram_block(samples.upright, left, right)
    if isinstance(samples, SharedSamples):
        return samples.inner_table(samples, left, right)
    if not isinstance(samples, OuterSamples):
        return samples.flat(left) @ samples.flat(right).T
    return _outer_table(samples, samples, left, right)


def _outer_table(
    first: OuterSamples, second: OuterSamples, left: slice, right: slice
) -> Float[Tensor, "m k"]:
    """Return (g_a·h_b)(a_a·b_b) for some examples of each, v-major."""
    rows, cols = first.gradients[:, left], second.gradients[:, right]
    (v, n), (w, k) = rows.shape[:2], cols.shape[:2]
    table = (rows.flatten(0, 1) @ cols.flatten(0, 1).T).view(v, n, w, k)
    table *= (first.inputs[left] @ second.inputs[right].T)[:, None, :]
    return table.view(v * n, w * k)


def squared_inner(left: Samples, right: Samples) -> float:
    """Return Σ_ab ⟨D_a, E_b⟩² for samples D and E of one weight, summed in float64.

    Tile by tile of the table of inner products. Two sets at one position form no matrix
    and cost N²(i + V² o) multiply-adds, others V² N² p.
    """
    right, total = right.to(left.dtype), 0.0
    for one in left.in_parts():
        for other in right.in_parts():
            for *_, table in _tables(one, other):
                total += float(table.square().sum(dtype=torch.float64))
    return total


def inner_products(left: Samples, right: Samples) -> Float[Tensor, "m k"]:
    """Return ⟨D_a, E_b⟩ for all samples D and E of one weight, both v-major.

    Examples
    --------
    >>> one = OuterSamples(torch.ones(2, 3), torch.ones(1, 2, 2))
    >>> inner_products(one, OuterSamples(torch.ones(1, 3), torch.ones(1, 1, 2)))
    tensor([[6.],
            [6.]])
    """
    (v, n), (w, k) = ((s.columns, s.examples) for s in (left, right))
    out = torch.empty(v, n, w, k, dtype=left.dtype, device=left.device)
    for some, others, table in _tables(left, right):
        size = (v, some.stop - some.start, w, others.stop - others.start)
        out[:, some, :, others] = table.view(size)
    return out.view(v * n, w * k)


def _tables(left: Samples, right: Samples) -> Tiles:
    """Yield ⟨D_a, E_b⟩ tile by tile, with their examples."""
    if isinstance(left, TurnedSamples) and isinstance(right, TurnedSamples):
        left, right = left.upright, right.upright
    if isinstance(left, OuterSamples) and isinstance(right, OuterSamples):
        for some in chunks(left.examples, TABLE_ROWS // max(1, left.columns)):
            for others in chunks(right.examples, TABLE_ROWS // max(1, right.columns)):
                yield some, others, _outer_table(left, right, some, others)
        return
    if isinstance(left, SharedSamples) and isinstance(right, SharedSamples):
        for some in chunks(left.examples, left.tile):
            for others in chunks(right.examples, right.tile):
                yield some, others, left.inner_table(right, some, others)
        return
    for some in left.parts():
        formed = left.flat(some)
        for others in right.parts():
            yield some, others, formed @ right.flat(others).T


def multiplied(
    samples: Samples, rows: Float[Tensor, "o r"], cols: Float[Tensor, "i c"]
) -> Samples | None:
    """Return the samples rowsᵀ D cols, by their factors; None where they have none.

    Examples
    --------
    >>> one = OuterSamples(torch.ones(2, 3), torch.ones(1, 2, 2))
    >>> two = multiplied(one, torch.eye(2), 5 * torch.eye(3))
    >>> two.squared_norms()
    tensor([[150., 150.]])
    """
    if isinstance(samples, TurnedSamples):
        upright = multiplied(samples.upright, cols, rows)
        return None if upright is None else TurnedSamples(upright)
    if isinstance(samples, (OuterSamples, SharedSamples)):
        return type(samples)(samples.inputs @ cols, samples.gradients @ rows)
    return None


def row_panels(samples: Samples, room: int) -> Iterator[Samples]:
    """Yield the samples of some rows of the weight, whose matrices take about `room` bytes.

    Samples whose rows have no short form are yielded whole.
    """
    o, i = samples.weight_shape
    for cut in chunks(o, room // max(samples.total * i * samples.dtype.itemsize, 1)):
        panel = samples.some_rows(cut)
        yield samples if panel is None else panel
        if panel is None:
            return


def _added(tensors: Iterator[Tensor]) -> Tensor:
    total = next(tensors)
    for more in tensors:
        total += more
    return total


def _is_whole(index: Index) -> bool:
    return isinstance(index, slice) and index == WHOLE


def _product(left: Samples, right: Samples, at: Index, to: Index) -> Tensor:
    """Return the sum at some indices, from matrices formed in chunks."""
    sizes = index_length(left, at), index_length(right, to)
    out = torch.zeros(*sizes, dtype=left.dtype, device=left.device)
    larger = max(left, right, key=lambda s: s.weight_shape[0] * s.weight_shape[1])
    for part in larger.parts():
        a, b = left.flat(part)[:, at], right.flat(part)[:, to]
        out.addmm_(a.T, b)
    return out


def _outer_product(left: OuterSamples, right: OuterSamples) -> Tensor:
    """Return Σ_n (Σ_v g_vn h_vnᵀ) ⊗ a_n b_nᵀ as one product over the examples."""
    (o, i), (p, j) = left.weight_shape, right.weight_shape
    out = torch.zeros(o * p, i * j, dtype=left.dtype, device=left.device)
    each = max(1, (o * p + i * j) * left.dtype.itemsize)
    for part in chunks(left.examples, CHUNK_BYTES // each):
        g, h = left.gradients[:, part], right.gradients[:, part]
        outputs = g.permute(1, 2, 0) @ h.permute(1, 0, 2)
        inputs = left.inputs[part, :, None] * right.inputs[part, None, :]
        out.addmm_(outputs.flatten(1).T, inputs.flatten(1))
    return out.view(o, p, i, j).permute(0, 2, 1, 3).reshape(o * i, p * j)
