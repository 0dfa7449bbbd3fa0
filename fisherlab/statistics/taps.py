"""Inputs and output gradients of layers, through zero taps added to their outputs.

The network becomes a function of the taps alone; pulling a column of the output back
through it gives the gradient at every tapped output, and no weight gradient is formed.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from fisherlab.layers import Block, SharedForm
from fisherlab.layers.shared_form import with_bias_column
from fisherlab.numerics.memory import chunks, empty
from fisherlab.statistics.batches import Batch
from fisherlab.statistics.model_view import ModelView
from fisherlab.statistics.values import LayerStatistics

Calls = dict[str, tuple[Tensor, ...]]


@dataclass(frozen=True, eq=False)
class Tapped:
    """A block whose modules are tapped.

    Parameters
    ----------
    modules
        The modules that use the weight (several if it is tied).
    form
        How their inputs and output gradients become rows of features.
    bias
        Whether the inputs get a column of ones.
    outputs
        Output shapes of the calls of one forward pass, without the example axis.
    """

    modules: tuple[nn.Module, ...]
    form: SharedForm
    bias: bool
    outputs: tuple[torch.Size, ...]


@dataclass(frozen=True, eq=False)
class Pass:
    """One forward pass: the output with its graph, layer inputs, and the taps."""

    output: Tensor
    inputs: Calls
    taps: Calls


def forward(view: ModelView, tapped: Mapping[str, Tapped], batch: Batch) -> Pass:
    """Run the model once with zero taps and keep the graph from them to the output."""
    zeros = partial(torch.zeros, dtype=view.dtype, device=view.device, requires_grad=True)
    taps: Calls = {
        name: tuple(zeros(len(batch), *shape) for shape in tap.outputs)
        for name, tap in tapped.items()
    }
    seen: dict[str, list[Tensor]] = {name: [] for name in tapped}
    with torch.enable_grad(), _hooked(tapped, taps, seen):
        output = view(batch)
    return Pass(output, {name: tuple(inputs) for name, inputs in seen.items()}, taps)


@contextmanager
def _hooked(
    tapped: Mapping[str, Tapped], taps: Calls, seen: dict[str, list[Tensor]]
) -> Iterator[None]:
    handles = []

    def tap(name: str) -> Callable[[Any, Any, Any, Tensor], Tensor]:
        def hook(module: Any, args: Any, kwargs: Any, output: Tensor) -> Tensor:
            seen[name].append(module_input(args, kwargs))
            return output + taps[name][len(seen[name]) - 1]

        return hook

    try:
        for name, block in tapped.items():
            hook = tap(name)
            for module in block.modules:
                handles.append(module.register_forward_hook(hook, with_kwargs=True))
        yield
    finally:
        for handle in handles:
            handle.remove()


def module_input(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor:
    """Return the one input of a linear layer or convolution, however it was passed."""
    found: Tensor = args[0] if args else next(iter(kwargs.values()))
    return found


def features(tap: Tapped, inputs: tuple[Tensor, ...]) -> Tensor:
    """Return (n, t, d_in): the calls stacked along the positions, the bias column last.

    For embeddings (n, t), the rows looked up.
    """
    rows = [tap.form.inputs(x.detach()) for x in inputs]
    joined = rows[0] if len(rows) == 1 else torch.cat(rows, 1)
    return with_bias_column(joined, tap.form.groups) if tap.bias else joined


def masked_positions(
    pull: Callable[[Tensor], Mapping[str, Tensor]], output: Tensor, mask: Tensor | None
) -> dict[str, Tensor]:
    """Return where (n, t) the likelihood's mask leaves a block's positions no gradient.

    `pull` gives the gradients (1, n, t, d_out) of a column (1, *output.shape). What counts
    reaches no such position, and what is masked does; where nothing does (units that are
    off), the mask itself decides if it has a number a position, else the position counts.
    """
    if mask is None:
        return {}
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


def counting(tap: Tapped, inputs: Tensor, gone: Tensor | None) -> Tensor:
    """Return features or rows with nothing at the positions that do not count."""
    if gone is None:
        return inputs
    if tap.form.looked_up:
        return inputs.masked_fill(gone, -1)
    return inputs.masked_fill(gone[..., None], 0)


def described(
    block: Block,
    tap: Tapped,
    inputs: Tensor,
    gone: Tensor | None,
    gradients: Tensor,
    count: int,
) -> LayerStatistics:
    """Return the statistics of a block from what was tapped.

    `gone` are the positions (n, t) that do not count, which `counting` has cleared.
    """
    if tap.form.looked_up:
        found = inputs >= 0
        if not bool(found.all()):
            gradients = gradients * found[None, :, :, None]
        return LayerStatistics(
            block,
            count,
            tokens=inputs,
            gradients=gradients,
            positions=int(found.sum()) if count else 0,
        )
    lost = 0 if gone is None else int(gone.sum())
    return LayerStatistics(
        block,
        count,
        inputs=inputs,
        gradients=gradients,
        positions=(inputs.shape[0] * inputs.shape[1] - lost) if count else 0,
        groups=tap.form.groups,
    )


def joined_features(name: str, tap: Tapped, passes: Sequence[Pass]) -> Tensor:
    """Return the features (n, t, d_in) of one block over the examples of all passes."""
    if len(passes) == 1:
        return features(tap, passes[0].inputs[name])
    room: Tensor | None = None
    for done, here in _placed(passes):  # copied while a pass is still in cache
        rows = features(tap, done.inputs[name])
        if room is None:
            shape = (_examples(passes), *rows.shape[1:])
            room = empty(shape, rows.dtype, rows.device)
        room[here] = rows
    assert room is not None
    return room


def pull(
    view: ModelView,
    passes: Sequence[Pass],
    tapped: Mapping[str, Tapped],
    columns: Tensor,
    at_once: int,
) -> dict[str, Tensor]:
    """Pull output columns (v, *output.shape) back to gradients (v, n, t, d_out).

    One column after the other (a loop is the fastest on a CPU), or `at_once` of them
    under vmap. The examples of the columns are those of the passes, in order. What one
    backward pass gives in whole is not copied.
    """
    out: dict[str, Tensor] = {}
    whole = len(passes) == 1 and len(columns) <= at_once
    for done, here in _placed(passes):
        for part in chunks(len(columns), at_once):
            pulled = _pull_part(view, done, columns[part, here])
            for name, tap in tapped.items():
                calls = [tap.form.gradients(g) for g in pulled[name]]
                rows = calls[0] if len(calls) == 1 else torch.cat(calls, 2)
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


def _pull_part(view: ModelView, done: Pass, columns: Tensor) -> Calls:
    """Return gradients (v, *tap.shape) of every tap."""
    single = len(columns) == 1
    with view.settings():  # a checkpoint calls its part of the model again
        grads = torch.autograd.grad(
            done.output,
            [tap for taps in done.taps.values() for tap in taps],
            columns[0] if single else columns,
            retain_graph=True,
            is_grads_batched=not single,
            materialize_grads=True,
        )
    found = iter(g[None] if single else g for g in grads)
    return {name: tuple(next(found) for _ in taps) for name, taps in done.taps.items()}
