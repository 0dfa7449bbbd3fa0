"""Samples of several weights seen as one, and samples that are visited part by part."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypeVar, final

import torch
from jaxtyping import Float
from torch import Tensor

from fisherlab.numerics.devices import Held, chunks, spans
from fisherlab.samples.base import CHUNK_BYTES, WHOLE, Samples, kept_once
from fisherlab.samples.cross import cross_product, gram_block, inner_products, squared_inner
from fisherlab.samples.outer import OuterSamples

GRAM_ROWS = 2048  # samples per side of a block of the Gram matrix
DENSE_ROWS = 4000  # sums up to this size may be formed to take their norm


@final
@dataclass(frozen=True, eq=False)
class StackedSamples(Samples):
    """Stack D_vn of several weights below each other: vectors (p, 1), p = Σ p_b.

    The columns and the examples of all weights must match. Products and inner products
    are sums over the weights; no vector of length p is held per sample.

    Examples
    --------
    >>> one = OuterSamples(torch.ones(4, 3), torch.ones(1, 4, 2))
    >>> StackedSamples((one, one)).weight_shape
    (12, 1)
    """

    pieces: tuple[Samples, ...]

    @cached_property
    def columns(self) -> int:
        """V."""
        return self.pieces[0].columns

    @cached_property
    def examples(self) -> int:
        """N."""
        return self.pieces[0].examples

    @cached_property
    def sizes(self) -> tuple[int, ...]:
        """p_b of every weight."""
        return tuple(s.weight_shape[0] * s.weight_shape[1] for s in self.pieces)

    @cached_property
    def weight_shape(self) -> tuple[int, int]:
        """(p, 1)."""
        return sum(self.sizes), 1

    def some_columns(self, columns: slice) -> "StackedSamples":
        """Return the samples of some columns."""
        return StackedSamples(tuple(s.some_columns(columns) for s in self.pieces))

    def matrices(self, part: slice = WHOLE) -> Float[Tensor, "v n p 1"]:
        """Form the long vectors of some examples."""
        return torch.cat([s.matrices(part).flatten(2) for s in self.pieces], 2)[..., None]

    def project(self, w: Float[Tensor, "k p 1"]) -> Float[Tensor, "k v n"]:
        """Return ⟨D_vn, w⟩, a sum over the weights."""
        total: Tensor | None = None
        for piece, own in zip(self.pieces, w.split(self.sizes, 1), strict=True):
            value = piece.project(own.reshape(len(w), *piece.weight_shape))
            total = value if total is None else total + value
        assert total is not None
        return total

    def combine(self, c: Float[Tensor, "k v n"]) -> Float[Tensor, "k p 1"]:
        """Return Σ c_vn D_vn."""
        return torch.cat([s.combine(c).flatten(1) for s in self.pieces], 1)[..., None]

    def squared_norms(self) -> Float[Tensor, "v n"]:
        """Return ‖D_vn‖²."""
        return torch.stack([piece.squared_norms() for piece in self.pieces]).sum(0)

    def squares(self) -> Float[Tensor, "p 1"]:
        """Return Σ D∘D."""
        return torch.cat([piece.squares().flatten() for piece in self.pieces])[:, None]

    def row_side(self, middle: Float[Tensor, "1 1"]) -> Float[Tensor, "p p"]:
        """Return Σ D M Dᵀ."""
        p = self.weight_shape[0]
        out = torch.empty(p, p, dtype=self.dtype, device=self.device)
        return self.add_dense_(out) * middle

    def column_side(self, middle: Float[Tensor, "p p"]) -> Float[Tensor, "1 1"]:
        """Return Σ Dᵀ M D."""
        return self.summed(lambda d: (d * (middle @ d)).sum(0)).sum(0, keepdim=True)

    def kronecker_inner(
        self, rows_factor: Float[Tensor, "p p"], cols_factor: Float[Tensor, "1 1"]
    ) -> float:
        """Return Σ ⟨D, rows D cols⟩."""
        return float(self.column_side(rows_factor) * cols_factor)

    def add_dense_(
        self, out: Float[Tensor, "p p"], scale: float = 1.0
    ) -> Float[Tensor, "p p"]:
        """Write scale · Σ vec(D) vec(D)ᵀ into `out`, block by block."""
        places = spans(self.sizes)
        for number, (piece, at) in enumerate(zip(self.pieces, places, strict=True)):
            own = torch.empty(2 * [at.stop - at.start], dtype=out.dtype, device=out.device)
            out[at, at] = piece.add_dense_(own, scale)
            for other, to in zip(self.pieces[:number], places, strict=False):
                block = cross_product(piece, other).mul_(scale)
                out[at, to], out[to, at] = block, block.T
        return out

    def gram(self) -> Float[Tensor, "m m"]:
        """Return all inner products, a sum over the weights, v-major."""
        total = self.pieces[0].gram()
        for piece in self.pieces[1:]:
            total += piece.gram()
        return total

    def squared_norm(self) -> float:
        """Return Σ ⟨D_a, D_b⟩², from the sum itself where that is small and cheaper."""
        p = self.weight_shape[0]
        if p <= DENSE_ROWS and self.dense_flops() < self.gram_flops():
            out = torch.empty(p, p, dtype=self.dtype, device=self.device)
            return float(self.add_dense_(out).square().sum(dtype=torch.float64))
        return sum(
            weight * float(block.square().sum(dtype=torch.float64))
            for weight, block in self._gram_blocks()
        )

    def _gram_blocks(self) -> Iterator[tuple[float, Tensor]]:
        pieces = list(chunks(self.examples, GRAM_ROWS // max(1, self.columns)))
        for at, left in enumerate(pieces):
            for right in pieces[at:]:
                block = gram_block(self.pieces[0], left, right)
                for piece in self.pieces[1:]:
                    block += gram_block(piece, left, right)
                yield 1.0 if left == right else 2.0, block

    def dense_flops(self) -> int:
        """Count the multiply-adds of the dense sum; outer products add columns first."""
        p = self.weight_shape[0]
        outer = all(isinstance(piece, OuterSamples) for piece in self.pieces)
        return self.examples * (1 if outer else self.columns) * p * p // 2

    def gram_flops(self) -> int:
        """Count the multiply-adds of the Gram matrix."""
        return sum(piece.gram_flops() for piece in self.pieces)


Answer = TypeVar("Answer")


@final
@dataclass(frozen=True, eq=False)
class PartedSamples(Samples):
    """Hold D by parts of the examples, of which one or two are open at a time.

    Every sum is added up over the parts, every table of inner products put together
    from pairs of them. What is counted (flops, numbers, bytes) is that of the whole, so
    that the same forms are chosen.

    Parameters
    ----------
    pieces
        The parts in order, of equal columns: `Samples`, or what has their `dtype`,
        `device` and `examples` and is `opened` to them, and let go of after use.
    like
        The whole on the device "meta": its shapes.

    Examples
    --------
    >>> from fisherlab.samples import OuterSamples
    >>> one = OuterSamples(torch.ones(4, 3), torch.ones(1, 4, 2))
    >>> whole = OuterSamples(
    ...     torch.ones(8, 3, device="meta"), torch.ones(1, 8, 2, device="meta")
    ... )
    >>> PartedSamples((one, one), whole).squared_norm()
    2304.0
    """

    pieces: tuple[Any, ...]
    like: Samples

    @cached_property
    def columns(self) -> int:
        """V."""
        return self.like.columns

    @cached_property
    def examples(self) -> int:
        """N, over all parts."""
        return self.like.examples

    @cached_property
    def weight_shape(self) -> tuple[int, int]:
        """(o, i)."""
        return self.like.weight_shape

    @property
    def positions(self) -> int:
        """T, of the part with the most."""
        return self.like.positions

    @property
    def device(self) -> torch.device:
        """Where the parts are opened."""
        device: torch.device = self.pieces[0].device
        return device

    @property
    def nbytes(self) -> int:
        """Bytes of all parts, wherever they are kept."""
        return self.like.nbytes

    @property
    def stored_numbers(self) -> int:
        """Numbers of all parts."""
        return self.like.stored_numbers

    @property
    def counted_as(self) -> Samples:
        """The whole, by its shapes alone."""
        return self.like

    @cached_property
    def cuts(self) -> tuple[int, ...]:
        """The examples of every part."""
        return tuple(piece.examples for piece in self.pieces)

    def in_parts(self) -> Iterator[Samples]:
        """Yield the samples of every part."""
        for piece in self.pieces:
            yield piece.opened()

    def _each(self, answer: Callable[[Samples], Answer]) -> Iterator[Answer]:
        """Yield what every part answers; it is let go of before the next is opened."""
        for piece in self.pieces:
            yield answer(piece.opened())

    def _total(self, sums: Callable[[Samples], Tensor]) -> Tensor:
        found = self._each(sums)
        total = next(found)
        for more in found:
            total += more
        return total

    def some_columns(self, columns: slice) -> "PartedSamples":
        """Return the samples of some columns."""
        some = tuple(_Columns(piece, columns) for piece in self.pieces)
        return PartedSamples(some, self.like.some_columns(columns))

    def matrices(self, part: slice = WHOLE) -> Float[Tensor, "v n o i"]:
        """Form the matrices of some examples."""
        start, stop, _ = part.indices(self.examples)
        found = []
        for piece, at in zip(self.pieces, spans(self.cuts), strict=True):
            first, last = max(start, at.start), min(stop, at.stop)
            if first < last:
                here = slice(first - at.start, last - at.start)
                found.append(piece.opened().matrices(here))
        if not found:
            return self.pieces[0].opened().matrices(slice(0, 0))
        return found[0] if len(found) == 1 else torch.cat(found, 1)

    def parts(self, limit: int = CHUNK_BYTES) -> Iterator[slice]:
        """Cut the examples so that matrices stay below `limit` bytes, each in one part."""
        for piece, at in zip(self.pieces, spans(self.cuts), strict=True):
            for part in list(piece.opened().parts(limit)):
                yield slice(at.start + part.start, at.start + part.stop)

    def stacks(self, limit: int = CHUNK_BYTES) -> Iterator[Float[Tensor, "m o i"]]:
        """Yield all matrices in stacks below `limit` bytes, part by part."""
        for piece in self.pieces:
            yield from piece.opened().stacks(limit)

    def project(self, w: Float[Tensor, "k o i"]) -> Float[Tensor, "k v n"]:
        """Return ⟨D_vn, w⟩."""
        return torch.cat(list(self._each(lambda part: part.project(w))), 2)

    def combine(self, c: Float[Tensor, "k v n"]) -> Float[Tensor, "k o i"]:
        """Return Σ c_vn D_vn."""
        weights = iter(c.split(self.cuts, 2))
        return self._total(lambda part: part.combine(next(weights)))

    @kept_once
    def squared_norms(self) -> Float[Tensor, "v n"]:
        """Return ‖D_vn‖²."""
        return torch.cat(list(self._each(lambda part: part.squared_norms())), 1)

    @kept_once
    def squares(self) -> Float[Tensor, "o i"]:
        """Return Σ D∘D."""
        return self._total(lambda part: part.squares())

    def rotated_squares(
        self, rows: Float[Tensor, "o r"], cols: Float[Tensor, "i c"]
    ) -> Float[Tensor, "r c"]:
        """Return Σ (rowsᵀ D cols)∘²."""
        return self._total(lambda part: part.rotated_squares(rows, cols))

    def column_squares(self, cols: Float[Tensor, "i c"]) -> Float[Tensor, "o c"]:
        """Return Σ (D cols)∘²."""
        return self._total(lambda part: part.column_squares(cols))

    def row_side(self, middle: Float[Tensor, "i i"]) -> Float[Tensor, "o o"]:
        """Return Σ D M Dᵀ."""
        return self._total(lambda part: part.row_side(middle))

    def column_side(self, middle: Float[Tensor, "o o"]) -> Float[Tensor, "i i"]:
        """Return Σ Dᵀ M D."""
        return self._total(lambda part: part.column_side(middle))

    def kronecker_inner(
        self, rows: Float[Tensor, "o o"], cols: Float[Tensor, "i i"]
    ) -> float:
        """Return Σ ⟨D, rows D cols⟩."""
        return sum(self._each(lambda part: part.kronecker_inner(rows, cols)))

    def diagonal_inner(
        self, diagonal: Float[Tensor, " o"], cols: Float[Tensor, "i i"]
    ) -> float:
        """Return Σ ⟨D, diag(d) D cols⟩."""
        return sum(self._each(lambda part: part.diagonal_inner(diagonal, cols)))

    def add_dense_(
        self, out: Float[Tensor, "p p"], scale: float = 1.0
    ) -> Float[Tensor, "p p"]:
        """Write scale · S into `out`; a second matrix holds that of one part."""
        self.pieces[0].opened().add_dense_(out, scale)
        room = torch.empty_like(out) if self.pieces[1:] else out
        for piece in self.pieces[1:]:
            out += piece.opened().add_dense_(room, scale)
        return out

    def gram(self) -> Float[Tensor, "m m"]:
        """Return all inner products, from pairs of parts, v-major."""
        v, n = self.columns, self.examples
        table = torch.empty(v, n, v, n, dtype=self.dtype, device=self.device)
        for left, right, one, other in self._pairs():
            size = (v, left.stop - left.start, v, right.stop - right.start)
            found = one.gram() if other is None else inner_products(one, other)
            table[:, left, :, right] = block = found.view(size)
            if other is not None:
                table[:, right, :, left] = block.permute(2, 3, 0, 1)
        return table.view(v * n, v * n)

    def squared_norm(self) -> float:
        """Return Σ ⟨D_a, D_b⟩², from pairs of parts."""
        return sum(
            one.squared_norm() if other is None else 2 * squared_inner(one, other)
            for *_, one, other in self._pairs()
        )

    def _pairs(self) -> Iterator[tuple[slice, slice, Samples, Samples | None]]:
        """Yield places and samples of all pairs of parts, None for the same one again."""
        places = spans(self.cuts)
        for number, (piece, left) in enumerate(zip(self.pieces, places, strict=True)):
            one = piece.opened()
            yield left, left, one, None
            for other, right in zip(
                self.pieces[number + 1 :], places[number + 1 :], strict=True
            ):
                yield left, right, one, other.opened()

    def product_work(self) -> int:
        """Count the multiply-adds of `project` and `combine`."""
        return self.like.product_work()

    def dense_flops(self) -> int:
        """Count the multiply-adds of the dense sum."""
        return self.like.dense_flops()

    def gram_flops(self) -> int:
        """Count the multiply-adds of the Gram matrix."""
        return self.like.gram_flops()


@final
@dataclass(frozen=True, eq=False)
class _Columns(Held):
    """Some columns of a piece."""

    piece: Any
    columns: slice

    @property
    def examples(self) -> int:
        count: int = self.piece.examples
        return count

    def opened(self) -> Samples:
        some: Samples = self.piece.opened().some_columns(self.columns)
        return some


@final
@dataclass(frozen=True, eq=False)
class _Stack(Held):
    """The pieces of several weights with the same examples."""

    pieces: tuple[Any, ...]

    @property
    def examples(self) -> int:
        count: int = self.pieces[0].examples
        return count

    def opened(self) -> Samples:
        return StackedSamples(tuple(piece.opened() for piece in self.pieces))


def stacked(samples: Sequence[Samples]) -> Samples:
    """Return the samples of several weights as those of one long vector.

    Examples
    --------
    >>> from fisherlab.samples import OuterSamples
    >>> one = OuterSamples(torch.ones(4, 3), torch.ones(1, 4, 2))
    >>> stacked([one, one]).weight_shape
    (12, 1)
    """
    parted = [one for one in samples if isinstance(one, PartedSamples)]
    if not parted or len(parted) < len(samples) or len({one.cuts for one in parted}) > 1:
        return StackedSamples(tuple(samples))
    whole = StackedSamples(tuple(one.like for one in parted))
    beside = zip(*(one.pieces for one in parted), strict=True)
    return PartedSamples(tuple(map(_Stack, beside)), whole)


def unstacked(samples: Samples) -> tuple[Samples, ...]:
    """Return the samples of every weight of a stack, none where it is no stack.

    Examples
    --------
    >>> from fisherlab.samples import OuterSamples
    >>> one = OuterSamples(torch.ones(4, 3), torch.ones(1, 4, 2))
    >>> [each.weight_shape for each in unstacked(stacked([one, one]))]
    [(2, 3), (2, 3)]
    """
    whole = samples.counted_as
    if not isinstance(whole, StackedSamples) or not isinstance(samples, PartedSamples):
        return samples.pieces if isinstance(samples, StackedSamples) else ()
    beside = zip(*(piece.pieces for piece in samples.pieces), strict=True)
    return tuple(
        PartedSamples(tuple(pieces), like)
        for pieces, like in zip(beside, whole.pieces, strict=True)
    )
