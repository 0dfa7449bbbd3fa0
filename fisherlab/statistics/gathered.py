"""Statistics on their way into memory: chunks and runs, joined and held against others."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import final

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from fisherlab.errors import NumericalError
from fisherlab.numerics.linalg import factorised
from fisherlab.numerics.memory import require
from fisherlab.statistics.network import Statistics
from fisherlab.statistics.values import LayerStatistics, summable

Run = tuple[LayerStatistics, ...]
Layers = Mapping[str, LayerStatistics]


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
    pieces: Layers,
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


def require_equal(first: Layers, second: Layers) -> None:
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


def _compared(first: Layers, second: Layers) -> Iterator[tuple[str, str, Tensor, Tensor]]:
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
    seen = max(layer.count for layer in joined.values())
    made = replace(next(iter(joined.values())).provenance, layer="", examples=seen)
    return Statistics(joined, made)
