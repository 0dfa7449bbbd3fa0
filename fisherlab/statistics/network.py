r"""The statistics of several blocks, joined from chunks, and the full Fisher between them.

.. math:: F_{ij} = \frac{1}{N} \sum_{vn} vec(D^i_{vn}) vec(D^j_{vn})^T
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import final

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from fisherlab.errors import NumericalError
from fisherlab.numerics.devices import Budget, parse_budget, readable, require, spans
from fisherlab.numerics.linalg import factorised
from fisherlab.operators.base import Provenance
from fisherlab.samples.cross import Index, cross_product, index_length
from fisherlab.showing import html_table
from fisherlab.statistics.values import LayerStatistics, summable


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
        ValueError
            If it holds no layer.

        Examples
        --------
        >>> Statistics.of([], "compare")
        Traceback (most recent call last):
        TypeError: compare: statistics are expected, as collect returns them, or a \
mapping from names to layers of them; list was given.
        """
        if isinstance(given, cls) and given:
            return given
        layers = {given.name: given} if isinstance(given, LayerStatistics) else given
        if not isinstance(layers, Mapping) or not all(
            isinstance(layer, LayerStatistics) for layer in layers.values()
        ):
            raise TypeError(
                f"{call}: statistics are expected, as collect returns them, or a mapping "
                f"from names to layers of them; {type(given).__name__} was given."
            )
        if not layers:
            raise ValueError(
                f"{call}: statistics of at least one block are expected, none given."
            )
        return cls(layers, replace(next(iter(layers.values())).provenance, layer=""))

    def __getitem__(self, name: str) -> LayerStatistics:
        """Return one block's statistics; an unknown name lists the known ones."""
        if name not in self._layers:
            raise KeyError(f"no block {name!r}; known: {', '.join(self._layers)}")
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
        raise ValueError(
            f"{call} of {first.name!r} and {second.name!r}: the columns of "
            f"{', '.join(map(repr, compressed))} were compressed and no longer match. "
            "Collect with compress=False."
        )
    sizes = [(s.samples.columns, s.samples.examples) for s in (first, second)]
    if sizes[0] != sizes[1]:
        raise ValueError(
            f"{call} of {first.name!r} and {second.name!r}: (columns, examples) are "
            f"{sizes[0]} and {sizes[1]}; equal ones are expected."
        )


Run = tuple[LayerStatistics, ...]
ByName = Mapping[str, LayerStatistics]


@final
@dataclass(frozen=True, eq=False)
class Chunks:
    """Statistics of a block by runs of examples, each in chunks of columns as they come.

    With `compress` columns are replaced by fewer as soon as it pays.
    """

    runs: tuple[Run, ...] = ()
    compress: bool = True
    nbytes: int = 0

    def add(self, piece: LayerStatistics) -> "Chunks":
        """Add a chunk: further columns join the last run, examples begin a new one."""
        goes_on = self.runs and not piece.count
        before = self.runs[:-1] if goes_on else self.runs
        run: Run = (*self.runs[-1], piece) if goes_on else (piece,)
        added = own_bytes(piece)
        if self.compress and too_many_columns(run):
            joined = join_columns(run)
            added += own_bytes(joined) - sum(map(own_bytes, run))
            run = (joined,)
        return replace(self, runs=(*before, run), nbytes=self.nbytes + added)

    def __add__(self, other: "Chunks") -> "Chunks":
        """Put two parts of the data after each other."""
        nbytes = self.nbytes + other.nbytes
        return replace(self, runs=self.runs + other.runs, nbytes=nbytes)

    @property
    def pieces(self) -> Run:
        """All chunks in order."""
        return tuple(piece for run in self.runs for piece in run)

    def joined(self) -> LayerStatistics:
        """Return all runs as one."""
        return join_examples([join_columns(run, self.compress) for run in self.runs])


def foretold(
    pieces: ByName,
    columns: int,
    examples: int,
    held: Mapping[str, Chunks],
    compress: bool,
) -> int:
    """Return the bytes that there will be, from the first chunks of a run."""
    size = sum(_run_bytes(piece, columns, compress) for piece in pieces.values())
    count = max(1, *(piece.count for piece in pieces.values()))
    return max(held_bytes(held) + size, size * examples // count)


def held_bytes(held: Mapping[str, Chunks]) -> int:
    """Return the bytes of all blocks."""
    return sum(block.nbytes for block in held.values())


def own_bytes(piece: LayerStatistics) -> int:
    """Count the bytes of a chunk; the inputs are those of the run's first one."""
    if piece.parts:
        return sum(map(own_bytes, piece.parts))
    held = [piece.gradients, piece.matrices]
    held += [piece.inputs, piece.tokens] if piece.count else []
    return sum(tensor.nbytes for tensor in held if tensor is not None)


def _run_bytes(piece: LayerStatistics, columns: int, compress: bool) -> int:
    """Count the bytes of a run, from its first chunk, once it has all its columns."""
    if piece.parts:
        return sum(_run_bytes(part, columns, False) for part in piece.parts)
    held = piece.matrices if piece.gradients is None else piece.gradients
    if held is None or not len(held):
        return own_bytes(piece)
    single = piece.gradients is not None and held.shape[2] == 1
    kept = min(columns, held.shape[3]) if compress and single else columns
    return own_bytes(piece) + held.nbytes * (kept - len(held)) // len(held)


def too_many_columns(run: Sequence[LayerStatistics]) -> bool:
    """Tell whether fewer columns than those of a run's chunks have the same sum."""
    gradients = [piece.gradients for piece in run if piece.gradients is not None]
    if not gradients or gradients[0].shape[2] != 1:
        return False
    return sum(g.shape[0] for g in gradients) > gradients[0].shape[3]


def join_columns(
    pieces: Sequence[LayerStatistics], compressed: bool = True
) -> LayerStatistics:
    """Join further columns of the same examples; compress where T = 1 and V > d_out."""
    first = pieces[0]
    if first.parts:  # their columns belong together
        join = partial(join_columns, compressed=False)
        return replace(first, parts=_by_part(pieces, join))
    if first.gradients is None:
        matrices = [p.matrices for p in pieces if p.matrices is not None]
        return replace(first, matrices=_cat(matrices, 0))
    gradients = _cat([p.gradients for p in pieces if p.gradients is not None], 0)
    fewer = compress(gradients) if compressed else gradients
    mixed = fewer is not gradients or any(piece.compressed for piece in pieces)
    return replace(first, gradients=fewer, compressed=mixed)


def compress(gradients: Float[Tensor, "v n t o"]) -> Float[Tensor, "w n t o"]:
    """Replace V > d_out columns by d_out with the same Σ_v g gᵀ (a QR per example)."""
    v, _, t, o = gradients.shape
    if t != 1 or v <= o:
        return gradients
    stacked = summable(gradients[:, :, 0]).transpose(0, 1)
    found = factorised("qr", stacked, "the output gradients of a batch", mode="r").R
    fewer: Tensor = found.transpose(0, 1)[:, :, None].to(gradients.dtype)
    return fewer


def join_examples(pieces: Sequence[LayerStatistics]) -> LayerStatistics:
    """Join batches of examples, padding positions with zeros to the longest."""
    first = pieces[0]
    count = sum(piece.count for piece in pieces)
    total = sum(piece.positions for piece in pieces)
    made = replace(first.provenance, examples=count)
    mixed = any(piece.compressed for piece in pieces)
    joined = replace(first, count=count, positions=total, provenance=made, compressed=mixed)
    if len(pieces) == 1:
        return joined
    if first.parts:
        return replace(joined, parts=_by_part(pieces, join_examples))
    columns = max(piece.samples.columns for piece in pieces)
    if first.gradients is None:
        matrices = [_grow(p.matrices, 0, columns) for p in pieces]
        return replace(joined, matrices=_cat(matrices, 1))
    length = max(p.gradients.shape[2] for p in pieces if p.gradients is not None)
    gradients = [_grow(_grow(p.gradients, 2, length), 0, columns) for p in pieces]
    whole = _cat(gradients, 1)
    if first.tokens is not None:
        tokens = [_grow(p.tokens, 1, length, value=-1) for p in pieces]
        return replace(joined, tokens=_cat(tokens, 0), gradients=whole)
    inputs = [_grow(p.inputs, 1, length) for p in pieces]
    return replace(joined, inputs=_cat(inputs, 0), gradients=whole)


def _by_part(
    pieces: Sequence[LayerStatistics],
    join: Callable[[Sequence[LayerStatistics]], LayerStatistics],
) -> tuple[LayerStatistics, ...]:
    return tuple(map(join, zip(*(piece.parts for piece in pieces), strict=True)))


def _cat(tensors: Sequence[Tensor], axis: int) -> Tensor:
    return tensors[0] if len(tensors) == 1 else torch.cat(list(tensors), axis)


def _grow(tensor: Tensor | None, axis: int, size: int, value: float = 0) -> Tensor:
    """Pad one axis at its end, with zeros unless told otherwise."""
    assert tensor is not None
    missing = size - tensor.shape[axis]
    if not missing:
        return tensor
    sides = [0, 0] * (tensor.dim() - axis - 1) + [0, missing]
    return F.pad(tensor, sides, value=value)


def require_equal(first: ByName, second: ByName) -> None:
    """Name the first layer that differs between two runs, its input before its gradient.

    Summation in another order is let through: the bound is eps^¾ of the largest entry.

    Raises
    ------
    NumericalError
        Naming the layer.

    Examples
    --------
    >>> from fisherlab.layers import Block
    >>> block = Block("0", "0.weight", None, (1, 1), 1)
    >>> one = {"0": LayerStatistics(block, 1, matrices=torch.ones(1, 1, 1, 1))}
    >>> require_equal(one, one)
    """
    for name, what, a, b in _compared(first, second):
        allowed = torch.finfo(a.dtype).eps ** 0.75 * float(a.abs().max())
        difference = float((a - b).abs().max())
        if difference > allowed:
            raise NumericalError(
                f"Two runs of the same batch differ in {what} of layer {name!r} by "
                f"{difference:.3g}. Look for randomness between it and the layer before: "
                "functional dropout, noise, or a sum in random order."
            )


def _compared(first: ByName, second: ByName) -> Iterator[tuple[str, str, Tensor, Tensor]]:
    for what, fields in (
        ("the input", ("inputs",)),
        ("the gradient", ("gradients", "matrices")),
    ):
        for name, one in first.items():
            other = second[name]
            parts = zip(one.parts or (one,), other.parts or (other,), strict=True)
            for mine, its in parts:
                for field in fields:
                    a, b = getattr(mine, field), getattr(its, field)
                    if a is not None and b is not None:
                        yield name, what, a, b


def gathered(
    run: Callable[..., Iterator[dict[str, LayerStatistics]]],
    chunk_size: int | None,
    examples: int,
    limit: int,
    compress: bool,
) -> Statistics:
    """Join all chunks in memory."""
    kept: dict[str, Chunks] = {}
    remedy = "Use fewer layers or MonteCarlo, approximate(), or collect(store=folder)."

    def planned(pieces: dict[str, LayerStatistics], columns: int) -> None:
        needed = foretold(pieces, columns, examples, kept, compress)
        require(needed, limit, "collect", remedy)

    for pieces in run(chunk_size=chunk_size, planned=planned):
        for name, piece in pieces.items():
            kept[name] = kept.get(name, Chunks((), compress)).add(piece)
        require(held_bytes(kept), limit, "collect", remedy)
    joined = {name: kept.pop(name).joined() for name in list(kept)}  # one by one
    return together(joined)


def together(layers: Mapping[str, LayerStatistics]) -> Statistics:
    """Return the statistics of layers of one collection."""
    seen = max(layer.count for layer in layers.values())
    made = replace(next(iter(layers.values())).provenance, layer="", examples=seen)
    return Statistics(layers, made)
