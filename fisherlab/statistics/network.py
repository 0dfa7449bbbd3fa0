r"""Blocks between layers, and the full Fisher of a small network.

.. math:: F_{ij} = \frac{1}{N} \sum_{vn} vec(D^i_{vn}) vec(D^j_{vn})^T
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import final

import torch
from jaxtyping import Float
from torch import Tensor

from fisherlab.numerics.memory import Budget, chunks, parse_budget, readable, require
from fisherlab.operators.base import html_table
from fisherlab.samples import OuterSamples, Samples
from fisherlab.samples.rows import flat, parts
from fisherlab.statistics.values import LayerStatistics, Statistics

CHUNK_BYTES = 64 * 2**20  # products of examples formed at once
Index = Sequence[int] | slice | Tensor


@final
@dataclass(frozen=True, eq=False, repr=False)
class FullMatrix:
    """The Fisher over all blocks, with the place of each.

    Parameters
    ----------
    values
        F, symmetric, blocks in the order of the statistics, each in row-major vec.
    offsets
        Block name to the rows (and columns) it takes.
    """

    values: Float[Tensor, "p p"]
    offsets: Mapping[str, slice]

    def block(self, row: str, column: str) -> Float[Tensor, "p q"]:
        """Return one block, a view."""
        return self.values[self.offsets[row], self.offsets[column]]

    def __repr__(self) -> str:
        """Return one line."""
        p = len(self.values)
        return f"FullMatrix({p}×{p}, {len(self.offsets)} blocks, {self._size})"

    @property
    def _size(self) -> str:
        return readable(self.values.nbytes)

    def _repr_html_(self) -> str:
        """Return a folding table of the offsets."""
        spans = {name: f"{at.start} to {at.stop - 1}" for name, at in self.offsets.items()}
        return html_table(f"Full Fisher, {self._size}", dict(spans))


def cross_block(
    stats: Statistics,
    row: str,
    column: str,
    *,
    rows: Index = slice(None),
    columns: Index = slice(None),
    budget: Budget = None,
) -> Float[Tensor, "p q"]:
    r"""Form the block between two layers, or the part of it at some indices.

    .. math:: F_{ij} = \frac{1}{N} \sum_{vn} vec(D^i_{vn}) vec(D^j_{vn})^T

    Parameters
    ----------
    stats
        Statistics that hold both layers, collected with ``compress=False`` where a
        layer has fewer outputs than there are columns.
    row, column
        Block names; the same name twice gives the layer's own block.
    rows, columns
        Indices o·d_in + i into vec of the two weights; all by default.
    budget
        Bytes the block may take.

    Returns
    -------
    Tensor
        Shape (p_i, p_j), or of the indices given.

    Raises
    ------
    KeyError
        If a block is unknown.
    ValueError
        If the columns of the two layers do not match.
    BudgetError
        If the block would exceed the budget.

    Notes
    -----
    Layers at one position cost N·p_i·p_j multiply-adds whatever V is; others V times
    as many.

    Examples
    --------
    >>> import fisherlab as fl
    >>> model = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.Linear(2, 4))
    >>> data = (torch.ones(5, 3), None)
    >>> stats = fl.collect(model, data, fl.Gaussian(), compress=False)
    >>> cross_block(stats, "0", "1").shape
    torch.Size([8, 12])
    """
    first, second = stats[row], stats[column]
    _require_matching(first, second)
    whole = _is_whole(rows) and _is_whole(columns)
    left, right = first.samples, second.samples
    counts = [_length(s, index) for s, index in ((left, rows), (right, columns))]
    bytes_needed = 2 * counts[0] * counts[1] * left.dtype.itemsize
    limit = parse_budget(budget, left.device)
    what = f"cross_block of {row!r} and {column!r} ({counts[0]}×{counts[1]})"
    require(bytes_needed, limit, what, "Choose `rows` and `columns`.")
    if whole and isinstance(left, OuterSamples) and isinstance(right, OuterSamples):
        return _outer_product(left, right).div_(first.count)
    return _product(left, right, rows, columns).div_(first.count)


def full_matrix(stats: Statistics, *, budget: Budget = None) -> FullMatrix:
    """Form the Fisher over all blocks of a small network.

    Parameters
    ----------
    stats
        Statistics collected with ``compress=False`` where a layer has fewer outputs
        than there are columns.
    budget
        Bytes the matrix may take.

    Raises
    ------
    ValueError
        If the columns of two layers do not match.
    BudgetError
        If the matrix would exceed the budget.

    Examples
    --------
    >>> import fisherlab as fl
    >>> model = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.Linear(2, 4))
    >>> data = (torch.ones(5, 3), None)
    >>> stats = fl.collect(model, data, fl.Gaussian(), compress=False)
    >>> full_matrix(stats)
    FullMatrix(20×20, 2 blocks, 1.6 KiB)
    """
    offsets = _offsets(stats)
    size = max(at.stop for at in offsets.values())
    held = next(iter(stats.values())).samples
    needed = size * size * held.dtype.itemsize
    remedy = "Use single blocks: cross_block, or ExactBlock for one layer."
    limit = parse_budget(budget, held.device)
    require(needed, limit, f"full_matrix ({size}×{size})", remedy)
    values = torch.empty(size, size, dtype=held.dtype, device=held.device)
    names = list(stats)
    for number, row in enumerate(names):
        for column in names[number:]:
            block = cross_block(stats, row, column, budget=budget)
            values[offsets[row], offsets[column]] = block
            values[offsets[column], offsets[row]] = block.T
    return FullMatrix(values, offsets)


def _offsets(stats: Statistics) -> dict[str, slice]:
    found, start = {}, 0
    for name, layer in stats.items():
        o, i = layer.weight_shape
        found[name] = slice(start, start + o * i)
        start += o * i
    return found


def _require_matching(first: LayerStatistics, second: LayerStatistics) -> None:
    if first.name == second.name:
        return
    compressed = [s.name for s in (first, second) if s.compressed]
    if compressed:
        msg = (
            f"cross_block of {first.name!r} and {second.name!r}: the columns of "
            f"{', '.join(map(repr, compressed))} were compressed and no longer match. "
            "Collect with compress=False."
        )
        raise ValueError(msg)
    sizes = [(s.samples.columns, s.samples.examples) for s in (first, second)]
    if sizes[0] != sizes[1]:
        msg = (
            f"cross_block of {first.name!r} and {second.name!r}: (columns, examples) are "
            f"{sizes[0]} and {sizes[1]}; equal ones are expected."
        )
        raise ValueError(msg)


def _is_whole(index: Index) -> bool:
    return isinstance(index, slice) and index == slice(None)


def _length(samples: Samples, index: Index) -> int:
    o, i = samples.weight_shape
    if isinstance(index, slice):
        return len(range(*index.indices(o * i)))
    return len(index)


def _product(left: Samples, right: Samples, at: Index, to: Index) -> Tensor:
    """Return Σ vec(D_i) vec(D_j)ᵀ at some indices, from matrices formed in chunks."""
    sizes = _length(left, at), _length(right, to)
    out = torch.zeros(*sizes, dtype=left.dtype, device=left.device)
    larger = max(left, right, key=lambda s: s.weight_shape[0] * s.weight_shape[1])
    for part in parts(larger):
        a, b = flat(left, part)[:, at], flat(right, part)[:, to]
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
