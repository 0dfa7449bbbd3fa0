"""Inputs and output gradients of layers, seen at the calls that use their weights.

A recorder notes every such call and the place of its output in autograd's graph; pulling a
column of the model's output back to these places gives the gradients there, and no weight
gradient is formed. Collection and the steps of optimisers share it.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, final

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.overrides import TorchFunctionMode

from fisherlab.layers import Block
from fisherlab.layers.uses import Form, Use, read, with_bias_column
from fisherlab.numerics.memory import chunks, empty
from fisherlab.operators.base import Provenance
from fisherlab.statistics.batches import Batch
from fisherlab.statistics.model_view import ModelView
from fisherlab.statistics.values import LayerStatistics

Described = Callable[[Tensor, int], LayerStatistics]


@final
@dataclass(frozen=True)
class Tapped:
    """A block whose uses are all known, and alike.

    Parameters
    ----------
    form
        What its gradient is made of.
    bias
        Whether the inputs get a column of ones.
    width
        Features of an output.
    positions
        Outputs of one example, call by call.
    example_last
        Whether the example is the second axis of the calls, or the faster part of a
        first axis that holds positions too; else it is the first, or the slower part.
    """

    form: Form
    bias: bool
    width: int
    positions: tuple[int, ...]
    example_last: bool = False

    def by_example(self, rows: Tensor, axis: int, examples: int) -> Tensor:
        """Return rows whose axes (call, position) at `axis` are (example, position)."""
        if self.example_last:
            apart = rows.flatten(axis, axis + 1).unflatten(axis, (-1, examples))
            return apart.transpose(axis, axis + 1)
        if rows.shape[axis] == examples:
            return rows
        return rows.flatten(axis, axis + 1).unflatten(axis, (examples, -1))


@final
@dataclass(frozen=True, eq=False)
class Call:
    """A use of a weight, and the place of its output in the graph."""

    use: Use
    edge: GradientEdge
    shape: torch.Size


@final
@dataclass(frozen=True, eq=False)
class Pass:
    """One forward pass: the output with its graph, and the calls of every block.

    `unseen` are the blocks that were used where autograd looks away, too.
    """

    output: Tensor
    calls: Mapping[str, Sequence[Call]]
    unseen: AbstractSet[str] = frozenset()

    @property
    def edges(self) -> list[GradientEdge]:
        """The places of all outputs, block after block."""
        return [call.edge for calls in self.calls.values() for call in calls]

    def fits(self, tapped: Mapping[str, Tapped]) -> bool:
        """Tell whether the weights were used as often, and on as much, as expected."""
        examples = len(self.output)
        return all(
            [call.shape.numel() for call in self.calls[name]]
            == [examples * positions * tap.width for positions in tap.positions]
            for name, tap in tapped.items()
        )


@final
class Recorder(TorchFunctionMode):
    """Note the calls that use the weights of some blocks, for the time of a context.

    Parameters
    ----------
    blocks
        Whose weights are looked for.
    tensors
        The parameters by name, or what stands in their place.
    apart
        Whether the weights are cut off from the graph in these calls: nothing is kept for
        their gradients, and what still leads to them are uses that were not noted.
    """

    def __init__(
        self, blocks: Mapping[str, Block], *tensors: Mapping[str, Tensor], apart: bool
    ) -> None:
        super().__init__()
        self.calls: dict[str, list[Call]] = {name: [] for name in blocks}
        self.unseen: set[str] = set()  # blocks used where autograd looks away
        self._apart = apart
        self._weights: dict[int, tuple[Tensor, Block]] = {}
        self._biases: dict[int, str] = {}
        for held in tensors:
            for block in blocks.values():
                weight = held[block.weight]
                self._weights[id(weight)] = weight, block
                if block.bias is not None:
                    self._biases[id(held[block.bias])] = block.bias

    def __torch_function__(
        self,
        function: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Call a function of torch, and note it if it uses one of the weights."""
        options = kwargs or {}
        use = read(function, args, options)
        block = None if use is None else self._block(use)
        if use is None or block is None:
            return function(*args, **options)
        if not torch.is_grad_enabled():
            self.unseen.add(block.name)
            return function(*args, **options)
        if self._apart:
            cut = partial(_cut, own=(use.weight, use.bias))
            args = tuple(map(cut, args))
            options = {name: cut(value) for name, value in options.items()}
        output = function(*args, **options)
        if not output.requires_grad:  # the graph begins here
            output = output.requires_grad_().clone()
        call = Call(use, get_gradient_edge(output), output.shape)
        self.calls[block.name].append(call)
        return output

    def _block(self, use: Use) -> Block | None:
        """Return the block whose weight, with the bias that belongs to it, is used."""
        weight = use.weight
        base = weight if id(weight) in self._weights else weight._base
        if base is None or id(base) not in self._weights:
            return None
        parameter, block = self._weights[id(base)]
        if not _same_place(weight, parameter):
            return None
        bias = None if use.bias is None else self._biases.get(id(use.bias))
        return block if bias == block.bias else None


def _same_place(weight: Tensor, parameter: Tensor) -> bool:
    """Tell whether a weight is a parameter itself, or one as a matrix (d_out, ...)."""
    if weight is parameter:
        return True
    if weight.data_ptr() != parameter.data_ptr():
        return False
    flat = parameter.flatten(1) if parameter.dim() > 1 else parameter
    return weight.shape == flat.shape and weight.stride() == flat.stride()


def _cut(value: Any, own: Sequence[Tensor | None]) -> Any:
    is_own = isinstance(value, Tensor) and any(value is tensor for tensor in own)
    return value.detach() if is_own else value


def forward(
    view: ModelView,
    blocks: Mapping[str, Block],
    batch: Batch,
    leaves: Mapping[str, Tensor] | None = None,
) -> Pass:
    """Run the model once and keep the graph from the calls of the blocks to the output."""
    held = {**view.parameters, **(leaves or {})}
    recorder = Recorder(blocks, held, view.own, apart=True)
    with torch.enable_grad(), recorder:
        output = view(batch, leaves)
    return Pass(output, recorder.calls, recorder.unseen)


def at_calls(done: Pass, columns: Tensor, *, keep: bool = True) -> dict[str, list[Tensor]]:
    """Return the gradients (v, *shape) at every call, for columns (v, *output.shape)."""
    single = len(columns) == 1
    found: Sequence[Tensor | None] = [None] * len(done.edges)
    if done.edges and done.output.requires_grad:
        found = torch.autograd.grad(
            done.output,
            done.edges,
            columns[0] if single else columns,
            retain_graph=keep,
            is_grads_batched=not single,
            allow_unused=True,
        )
    whole = [g[None] if single and g is not None else g for g in found]
    return by_call(done, whole, len(columns))


def by_call(
    done: Pass, found: Iterable[Tensor | None], columns: int = 1
) -> dict[str, list[Tensor]]:
    """Sort gradients (v, *shape) by block, zeros for what the output does not depend on."""
    each = iter(found)

    def filled(call: Call) -> Tensor:
        gradient, weight = next(each), call.use.weight
        if gradient is None:
            return weight.new_zeros(columns, *call.shape)
        return gradient.to(weight.dtype)

    return {name: [filled(call) for call in calls] for name, calls in done.calls.items()}


def rows_of(tap: Tapped, gradients: Sequence[Tensor], examples: int) -> Tensor:
    """Return (v, n, t, d_out): gradients (v, *shape) of calls stacked along positions."""
    rows = [tap.by_example(tap.form.gradients(g), 1, examples) for g in gradients]
    return rows[0] if len(rows) == 1 else torch.cat(rows, 2)


def features(tap: Tapped, calls: Sequence[Call], examples: int) -> Tensor:
    """Return (n, t, d_in): the calls stacked along the positions, the bias column last.

    For embeddings (n, t), the rows looked up.
    """
    rows = [tap.by_example(call.use.features(), 0, examples) for call in calls]
    joined = rows[0] if len(rows) == 1 else torch.cat(rows, 1)
    return with_bias_column(joined, tap.form.groups) if tap.bias else joined


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
    gone: Mapping[str, Tensor] = {}
    if mask is not None:
        output = torch.cat([done.output.detach() for done in passes])
        gone = _masked_positions(partial(pull, passes, tapped), output, mask)
    found: dict[str, Described] = {}
    for name, tap in tapped.items():
        lost, rows = gone.get(name), _joined_features(name, tap, passes)
        rows = batch.own(_counting(tap, rows, lost))
        about = replace(made, layer=name)
        found[name] = partial(statistics_of, blocks[name], tap, rows, lost, about)
    return found


def statistics_of(
    block: Block,
    tap: Tapped,
    inputs: Tensor,
    gone: Tensor | None,
    made: Provenance,
    gradients: Tensor,
    count: int,
) -> LayerStatistics:
    """Return the statistics of a block from features or rows, and output gradients.

    `gone` are the positions (n, t) that do not count, whose features are cleared.
    """
    about = replace(made, examples=count)
    if tap.form.looked_up:
        found = inputs >= 0
        if not bool(found.all()):
            gradients = gradients * found[None, :, :, None]
        positions = int(found.sum()) if count else 0
        return LayerStatistics(
            block,
            count,
            tokens=inputs,
            gradients=gradients,
            positions=positions,
            provenance=about,
        )
    lost = 0 if gone is None else int(gone.sum())
    return LayerStatistics(
        block,
        count,
        inputs=inputs,
        gradients=gradients,
        positions=(inputs.shape[0] * inputs.shape[1] - lost) if count else 0,
        groups=tap.form.groups,
        provenance=about,
    )


def _masked_positions(
    pull: Callable[[Tensor], Mapping[str, Tensor]], output: Tensor, mask: Tensor
) -> dict[str, Tensor]:
    """Return where (n, t) the likelihood's mask leaves a block's positions no gradient.

    `pull` gives the gradients (1, n, t, d_out) of a column (1, *output.shape). What counts
    reaches no such position, and what is masked does; where nothing does (units that are
    off), the mask itself decides if it has a number a position, else the position counts.
    """
    column, parts = generic(output), (mask, 1 - mask)
    counted, left_out = (
        {name: rows[0].ne(0).any(-1) for name, rows in pull((column * part)[None]).items()}
        for part in parts
    )
    own, gone = mask.flatten(1) == 0, {}
    for name, reached in counted.items():
        masked = left_out[name] | own if own.shape == reached.shape else left_out[name]
        gone[name] = masked & ~reached
    return {name: places for name, places in gone.items() if bool(places.any())}


def generic(like: Tensor) -> Tensor:
    """Return fixed numbers without a pattern, so that nothing cancels by accident."""
    numbers = torch.arange(1, like.numel() + 1, device=like.device)
    return numbers.float().sqrt().cos().to(like.dtype).view(like.shape)


def _counting(tap: Tapped, inputs: Tensor, gone: Tensor | None) -> Tensor:
    """Return features or rows with nothing at the positions that do not count."""
    if gone is None:
        return inputs
    if tap.form.looked_up:
        return inputs.masked_fill(gone, -1)
    return inputs.masked_fill(gone[..., None], 0)


def _joined_features(name: str, tap: Tapped, passes: Sequence[Pass]) -> Tensor:
    """Return the features (n, t, d_in) of one block over the examples of all passes."""
    room: Tensor | None = None
    for done, here in _placed(passes):  # copied while a pass is still in cache
        rows = features(tap, done.calls[name], len(done.output))
        if len(passes) == 1:
            return rows
        if room is None:
            shape = (_examples(passes), *rows.shape[1:])
            room = empty(shape, rows.dtype, rows.device)
        room[here] = rows
    assert room is not None
    return room


def pull(
    passes: Sequence[Pass],
    tapped: Mapping[str, Tapped],
    columns: Tensor,
    at_once: int = 1,
    *,
    keep: bool = True,
) -> dict[str, Tensor]:
    """Pull output columns (v, *output.shape) back to gradients (v, n, t, d_out).

    One column after the other (a loop is the fastest on a CPU), or `at_once` of them
    under vmap. The examples of the columns are those of the passes, in order. What one
    backward pass gives in whole is not copied. The graph stays if it is to be kept.
    """
    out: dict[str, Tensor] = {}
    whole = len(passes) == 1 and len(columns) <= at_once
    for done, here in _placed(passes):
        for part in chunks(len(columns), at_once):
            last = part.stop >= len(columns)
            pulled = at_calls(done, columns[part, here], keep=keep or not last)
            for name, tap in tapped.items():
                rows = rows_of(tap, pulled[name], len(done.output))
                if whole and _is_plain(rows):
                    out[name] = rows
                    continue
                if name not in out:  # written while the column is still in cache
                    out[name] = _room(rows, len(columns), _examples(passes))
                out[name][part, here] = rows
    return out


def _examples(passes: Sequence[Pass]) -> int:
    return sum(len(done.output) for done in passes)


def _placed(passes: Sequence[Pass]) -> Iterator[tuple[Pass, slice]]:
    """Yield every pass with the place of its examples among all."""
    first = 0
    for done in passes:
        yield done, slice(first, first + len(done.output))
        first += len(done.output)


def _room(rows: Tensor, columns: int, examples: int) -> Tensor:
    """Return space for all columns and examples, in the order that later work reads.

    Where positions come last in memory (convolutions) they stay there, as a transposing
    copy costs twice, and the columns of an example lie together, so that one product an
    example forms its gradients.
    """
    _, _, t, o = rows.shape
    if rows.stride(2) == 1 and t > 1:
        room = empty((examples, columns, o, t), rows.dtype, rows.device)
        return room.permute(1, 0, 3, 2)
    return empty((columns, examples, t, o), rows.dtype, rows.device)


def _is_plain(rows: Tensor) -> bool:
    """Tell whether gradients lie as in `_room`: a sum's, say, are one number repeated."""
    positions_last = rows.shape[0] == 1 and rows.transpose(2, 3).is_contiguous()
    return rows.is_contiguous() or positions_last
