"""Inputs and output gradients of layers, put together from the calls of a recorder.

Pulling a column of the model's output back to the calls gives the gradients there, and no
weight gradient is formed. Collection and the steps of optimisers share it.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from typing import final

import torch
from torch import Tensor

from fisherlab.layers.blocks import Block, Span
from fisherlab.layers.uses import Form
from fisherlab.numerics.devices import chunks, empty, spans
from fisherlab.operators.base import Provenance
from fisherlab.statistics.batches import Batch
from fisherlab.statistics.recorder import Call, Pass, at_calls
from fisherlab.statistics.values import LayerStatistics

Described = Callable[[Sequence[Tensor], int], LayerStatistics]


@final
@dataclass(frozen=True)
class Part:
    """What alike uses of the same rows contribute to a block.

    Parameters
    ----------
    form
        What its gradient is made of.
    rows
        Of the block's weight.
    calls
        Which of the block's calls.
    positions
        Outputs of one example, of all these calls.
    """

    form: Form
    rows: Span
    calls: tuple[int, ...]
    positions: int

    def of_whole(self, block: Block) -> "Part":
        """Return the part as it is where it is all of a plain block: D = Σ g aᵀ."""
        return replace(self, form=Form(), rows=(0, block.rows))


@final
@dataclass(frozen=True)
class Tapped:
    """A block whose uses are all known.

    Parameters
    ----------
    parts
        One where all uses are alike; else their gradients lie below each other, where the
        parts use rows of their own, or add up.
    sizes
        Numbers that every call puts out for one example.
    rule
        What the calls are, in words.
    example_last
        Whether the example is the second axis of the calls, or the faster part of a
        first axis that holds positions too; else it is the first, or the slower part.
    """

    parts: tuple[Part, ...]
    sizes: tuple[int, ...]
    rule: str
    example_last: bool = False

    @classmethod
    def of(
        cls, block: Block, calls: Sequence[Call], examples: int, example_last: bool
    ) -> "Tapped":
        """Put the calls of a block together that are alike."""
        spans = sorted({call.use.rows for call in calls})
        ends = [0, *(last for _, last in spans)]
        tiles = [(first, last) for first, last in pairwise(ends)]
        rows = {span: span for span in spans}
        forms = {span: {c.use.form for c in calls if c.use.rows == span} for span in spans}
        alone = all(len(forms[span]) == 1 for span in spans)
        if spans != tiles or ends[-1] != block.rows or not alone:
            rows = dict.fromkeys(spans, (0, block.rows))
        sizes = tuple(call.numbers // examples for call in calls)
        kinds: dict[tuple[Span, Form], list[int]] = {}
        for number, call in enumerate(calls):
            kinds.setdefault((rows[call.use.rows], call.use.form), []).append(number)
        parts = []
        for (span, form), own in kinds.items():
            positions = sum(calls[k].use.positions for k in own) // examples
            parts.append(Part(form, span, tuple(own), positions))
        ordered = tuple(sorted(parts, key=lambda part: part.rows))
        return cls(ordered, sizes, _rule(calls, ordered), example_last)

    @property
    def numbers(self) -> int:
        """Numbers of all gradients of an example."""
        return sum(self.sizes)

    def fits(self, calls: Sequence[Call], examples: int) -> bool:
        """Tell whether a block was used as often, and on as much, as expected."""
        return [call.numbers for call in calls] == [examples * s for s in self.sizes]

    def stacked(
        self, read: Callable[[int, Span], Tensor], axis: int, examples: int
    ) -> list[Tensor]:
        """Return what is read of the calls of every part, stacked along positions."""
        found = []
        for part in self.parts:
            each = (read(call, part.rows) for call in part.calls)
            rows = [self.by_example(one, axis, examples) for one in each]
            found.append(rows[0] if len(rows) == 1 else torch.cat(rows, axis + 1))
        return found

    def by_example(self, rows: Tensor, axis: int, examples: int) -> Tensor:
        """Return rows whose axes (call, position) at `axis` are (example, position)."""
        if self.example_last:
            apart = rows.flatten(axis, axis + 1).unflatten(axis, (-1, examples))
            return apart.transpose(axis, axis + 1)
        if rows.shape[axis] == examples:
            return rows
        return rows.flatten(axis, axis + 1).unflatten(axis, (examples, -1))


def _rule(calls: Sequence[Call], parts: Sequence[Part]) -> str:
    """Name the calls and how they come together."""
    kinds: dict[str, int] = {}
    for call in calls:
        use = call.use
        kind = "bias" if use.columns is None else use.reading.kind
        stored = ", stored (in, out)" if use.form.turned and kind == "linear" else ""
        kinds[kind + stored] = kinds.get(kind + stored, 0) + 1
    named = " + ".join(n + (f" ×{k}" if k > 1 else "") for n, k in kinds.items())
    if len(parts) > 1 and parts[0].rows != parts[1].rows:
        return f"{named}, {len(parts)} groups of rows"
    return named


def rows_of(
    tap: Tapped, calls: Sequence[Call], gradients: Sequence[Tensor], examples: int
) -> list[Tensor]:
    """Return (v, n, t, d_out) of every part, its calls stacked along positions."""

    def read(call: int, rows: Span) -> Tensor:
        return calls[call].use.gradients(gradients[call], rows)

    return tap.stacked(read, 1, examples)


def features(tap: Tapped, calls: Sequence[Call], examples: int) -> list[Tensor]:
    """Return (n, t, d_in) of every part, its calls stacked along positions.

    For embeddings (n, t), the rows looked up.
    """
    return tap.stacked(lambda call, rows: calls[call].use.features(rows), 0, examples)


def described(
    blocks: Mapping[str, Block],
    tapped: Mapping[str, Tapped],
    passes: Sequence[Pass],
    batch: Batch,
    mask: Tensor | None,
    made: Provenance,
) -> dict[str, Described]:
    """Return, block by block, what makes statistics of output gradients and a count.

    Where the likelihood's mask leaves a position no gradient, its features count as none.
    """
    gone: Mapping[str, Sequence[Tensor | None]] = {}
    if mask is not None:
        output = torch.cat([done.output.detach() for done in passes])
        gone = _masked_positions(partial(pull, passes, tapped), output, mask)
    found: dict[str, Described] = {}
    for name, tap in tapped.items():
        lost = gone.get(name, [None] * len(tap.parts))
        rows = []
        triples = zip(tap.parts, _joined_features(name, tap, passes), lost, strict=True)
        for part, inputs, none in triples:  # nothing at the positions that do not count
            held, table = inputs, part.form.looked_up
            if none is not None:
                where = none if table else none[..., None]
                held = inputs.masked_fill(where, -1 if table else 0)
            rows.append(batch.own(held))
        about = replace(made, layer=name)
        found[name] = partial(statistics_of, blocks[name], tap, rows, lost, about)
    return found


def statistics_of(
    block: Block,
    tap: Tapped,
    inputs: Sequence[Tensor],
    gone: Sequence[Tensor | None],
    made: Provenance,
    gradients: Sequence[Tensor],
    count: int,
) -> LayerStatistics:
    """Return the statistics of a block from the features and gradients of its parts.

    `gone` are the positions (n, t) that do not count, whose features are cleared.
    """
    about = replace(made, examples=count)
    pieces = zip(tap.parts, inputs, gone, gradients, strict=True)
    parts = [_of_part(block, about, *piece, count) for piece in pieces]
    if len(parts) == 1:
        return parts[0]
    positions = sum(part.positions for part in parts)
    return LayerStatistics(
        block, count, parts=tuple(parts), positions=positions, provenance=about
    )


def _of_part(
    block: Block,
    made: Provenance,
    part: Part,
    inputs: Tensor,
    gone: Tensor | None,
    gradients: Tensor,
    count: int,
) -> LayerStatistics:
    own, form = block.some_rows(*part.rows), part.form
    if form.looked_up:
        found = inputs >= 0
        if not bool(found.all()):
            gradients = gradients * found[None, :, :, None]
        positions = int(found.sum()) if count else 0
        return LayerStatistics(
            own,
            count,
            tokens=inputs,
            gradients=gradients,
            positions=positions,
            provenance=made,
        )
    lost = 0 if gone is None else int(gone.sum())
    return LayerStatistics(
        own,
        count,
        inputs=inputs,
        gradients=gradients,
        positions=(inputs.shape[0] * inputs.shape[1] - lost) if count else 0,
        groups=form.groups,
        turned=form.turned,
        provenance=made,
    )


def _masked_positions(
    pull: Callable[[Tensor], Mapping[str, Sequence[Tensor]]], output: Tensor, mask: Tensor
) -> dict[str, list[Tensor | None]]:
    """Return where (n, t) the likelihood's mask leaves the positions of parts no gradient.

    `pull` gives the gradients (1, n, t, d_out) of a column (1, *output.shape). What counts
    reaches no such position, and what is masked does; where nothing does (units that are
    off), the mask itself decides if it has a number a position, else the position counts.
    """
    column, own = generic(output), mask.flatten(1) == 0
    kept, left = (pull((column * side)[None]) for side in (mask, 1 - mask))

    def lost(counted: Tensor, left_out: Tensor) -> Tensor | None:
        reached, masked = (rows[0].ne(0).any(-1) for rows in (counted, left_out))
        masked = masked | own if own.shape == reached.shape else masked
        places = masked & ~reached
        return places if bool(places.any()) else None

    return {
        name: [lost(*pair) for pair in zip(rows, left[name], strict=True)]
        for name, rows in kept.items()
    }


def generic(like: Tensor) -> Tensor:
    """Return fixed numbers without a pattern, so that nothing cancels by accident."""
    numbers = torch.arange(1, like.numel() + 1, device=like.device)
    return numbers.float().sqrt().cos().to(like.dtype).view(like.shape)


def _joined_features(name: str, tap: Tapped, passes: Sequence[Pass]) -> list[Tensor]:
    """Return the features of one block over the examples of all passes, part by part."""
    rooms: list[Tensor] = []
    for done, here in _placed(passes):  # copied while a pass is still in cache
        found = features(tap, done.calls[name], len(done.output))
        if len(passes) == 1:
            return found
        if not rooms:
            size = sum(len(one.output) for one in passes)
            rooms = [empty((size, *r.shape[1:]), r.dtype, r.device) for r in found]
        for room, rows in zip(rooms, found, strict=True):
            room[here] = rows
    return rooms


def pull(
    passes: Sequence[Pass],
    tapped: Mapping[str, Tapped],
    columns: Tensor,
    at_once: int = 1,
    *,
    keep: bool = True,
) -> dict[str, list[Tensor]]:
    """Pull output columns (v, *output.shape) back to gradients (v, n, t, d_out) of parts.

    One column after the other (a loop is the fastest on a CPU), or `at_once` of them
    under vmap. The examples of the columns are those of the passes, in order. What one
    backward pass gives in whole is not copied. The graph stays if it is to be kept.
    """
    out: dict[str, list[Tensor]] = {name: [] for name in tapped}
    whole = len(passes) == 1 and len(columns) <= at_once
    for done, here in _placed(passes):
        for part in chunks(len(columns), at_once):
            last = part.stop >= len(columns)
            pulled = at_calls(done, columns[part, here], keep=keep or not last)
            for name, tap in tapped.items():
                found = rows_of(tap, done.calls[name], pulled[name], len(done.output))
                if not out[name]:
                    sizes = len(columns), sum(len(one.output) for one in passes)
                    out[name] = [_room(rows, *sizes, whole=whole) for rows in found]
                for room, rows in zip(out[name], found, strict=True):
                    if room is not rows:  # written while the column is still in cache
                        room[part, here] = rows
    return out


def _placed(passes: Sequence[Pass]) -> Iterator[tuple[Pass, slice]]:
    """Yield every pass with the place of its examples among all."""
    yield from zip(passes, spans([len(done.output) for done in passes]), strict=True)


def _room(rows: Tensor, columns: int, examples: int, *, whole: bool) -> Tensor:
    """Return space for all columns and examples, in the order that later work reads.

    Where `rows` are whole and lie like that, they are the space themselves.

    Where positions come last in memory (convolutions) they stay there, as a transposing
    copy costs twice, and the columns of an example lie together, so that one product an
    example forms its gradients.
    """
    _, _, t, o = rows.shape
    positions_last = len(rows) == 1 and rows.transpose(2, 3).is_contiguous()
    if whole and (rows.is_contiguous() or positions_last):  # no number repeated, as a sum's
        return rows
    if rows.stride(2) == 1 and t > 1:
        room = empty((examples, columns, o, t), rows.dtype, rows.device)
        return room.permute(1, 0, 3, 2)
    return empty((columns, examples, t, o), rows.dtype, rows.device)
