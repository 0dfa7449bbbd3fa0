r"""The statistics of several blocks, what stands between two, and the full Fisher.

.. math:: F_{ij} = \frac{1}{N} \sum_{vn} vec(D^i_{vn}) vec(D^j_{vn})^T
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import final

import torch
from jaxtyping import Float
from torch import Tensor

from fisherlab.numerics.memory import Budget, parse_budget, readable, require, spans
from fisherlab.operators.base import Provenance
from fisherlab.samples.cross import Index, cross_product, index_length
from fisherlab.showing import html_table
from fisherlab.statistics.values import LayerStatistics


@final
class Statistics(Mapping[str, LayerStatistics]):
    """A mapping from block names to their statistics, with how they were made.

    Examples
    --------
    >>> import torch, fisherlab as fl
    >>> model = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.Linear(2, 4))
    >>> stats = fl.collect(model, (torch.ones(5, 3), None), fl.Gaussian())
    >>> list(stats), stats.provenance.examples
    (['0', '1'], 5)
    """

    def __init__(
        self, layers: Mapping[str, LayerStatistics], provenance: Provenance
    ) -> None:
        self._layers = dict(layers)
        self.provenance = provenance

    @classmethod
    def of(cls, given: object, call: str) -> "Statistics":
        """Return what a call was given as statistics: a mapping of layers is as good.

        Parameters
        ----------
        given
            Statistics, a mapping from names to layers of them, or one layer.
        call
            Who asks, for the error.

        Raises
        ------
        TypeError
            If it is anything else.

        Examples
        --------
        >>> Statistics.of([], "compare")
        Traceback (most recent call last):
        TypeError: compare: statistics are expected, as collect returns them, or a \
mapping from names to layers of them; list was given.
        """
        if isinstance(given, cls):
            return given
        layers = {given.name: given} if isinstance(given, LayerStatistics) else given
        held = layers.values() if isinstance(layers, Mapping) else [None]
        if not isinstance(layers, Mapping) or not all(
            isinstance(layer, LayerStatistics) for layer in held
        ):
            raise TypeError(
                f"{call}: statistics are expected, as collect returns them, or a mapping "
                f"from names to layers of them; {type(given).__name__} was given."
            )
        first = next(iter(held), None)
        made = Provenance() if first is None else replace(first.provenance, layer="")
        return cls(layers, made)

    def __getitem__(self, name: str) -> LayerStatistics:
        """Return one block's statistics; an unknown name lists the known ones."""
        if name not in self._layers:
            msg = f"no block {name!r}; known: {', '.join(self._layers)}"
            raise KeyError(msg)
        return self._layers[name]

    def __iter__(self) -> Iterator[str]:
        """Iterate over block names."""
        return iter(self._layers)

    def __len__(self) -> int:
        """Return the number of blocks."""
        return len(self._layers)

    @property
    def nbytes(self) -> int:
        """Bytes held by all blocks."""
        return sum(layer.nbytes for layer in self.values())

    @property
    def device(self) -> torch.device:
        """Where they are held."""
        each = (layer.device for layer in self.values())
        return next(each, torch.device("cpu"))

    def __repr__(self) -> str:
        """Return one line."""
        made = str(self.provenance)
        return f"Statistics({len(self)} blocks, {made}, {readable(self.nbytes)})"

    def _repr_html_(self) -> str:
        """Return a folding table, a row a block."""
        rows: dict[str, object] = {"made": str(self.provenance)}
        rows |= {
            name: f"{layer.weight_shape}, {readable(layer.nbytes)}"
            for name, layer in self.items()
        }
        return html_table(f"Statistics of {len(self)} blocks", rows)


Layers = Statistics | Mapping[str, LayerStatistics] | LayerStatistics


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

    Examples
    --------
    >>> import torch, fisherlab as fl
    >>> model = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.Linear(2, 4))
    >>> stats = fl.collect(model, (torch.ones(5, 3), None), fl.Gaussian(), compress=False)
    >>> fl.full_matrix(stats).block("0", "1").shape
    torch.Size([8, 12])
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
    stats: Layers,
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
    stats = Statistics.of(stats, "cross_block")
    first, second = stats[row], stats[column]
    require_matching("cross_block", first, second)
    left, right = first.samples, second.samples
    counts = [index_length(s, index) for s, index in ((left, rows), (right, columns))]
    bytes_needed = 2 * counts[0] * counts[1] * left.dtype.itemsize
    limit = parse_budget(budget, left.device)
    what = f"cross_block of {row!r} and {column!r} ({counts[0]}×{counts[1]})"
    require(bytes_needed, limit, what, "Choose `rows` and `columns`.")
    return cross_product(left, right, rows, columns).div_(first.count)


def full_matrix(stats: Layers, *, budget: Budget = None) -> FullMatrix:
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
    stats = Statistics.of(stats, "full_matrix")
    shapes = (layer.weight_shape for layer in stats.values())
    offsets = dict(zip(stats, spans([o * i for o, i in shapes]), strict=True))
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


def require_matching(call: str, first: LayerStatistics, second: LayerStatistics) -> None:
    """Raise unless column v of one layer belongs to column v of the other.

    Raises
    ------
    ValueError
        If columns were compressed, or their number or that of the examples differs.
    """
    if first.name == second.name:
        return
    compressed = [s.name for s in (first, second) if s.compressed]
    if compressed:
        msg = (
            f"{call} of {first.name!r} and {second.name!r}: the columns of "
            f"{', '.join(map(repr, compressed))} were compressed and no longer match. "
            "Collect with compress=False."
        )
        raise ValueError(msg)
    sizes = [(s.samples.columns, s.samples.examples) for s in (first, second)]
    if sizes[0] != sizes[1]:
        msg = (
            f"{call} of {first.name!r} and {second.name!r}: (columns, examples) are "
            f"{sizes[0]} and {sizes[1]}; equal ones are expected."
        )
        raise ValueError(msg)
