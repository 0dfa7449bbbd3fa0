"""Note the functional calls that use weights, and where their outputs lie in the graph."""

import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, replace
from functools import partial
from math import prod
from typing import Any, final

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.overrides import TorchFunctionMode

from fisherlab.layers.blocks import Block, Place, place_of
from fisherlab.layers.opened import OPENED
from fisherlab.layers.uses import READERS, Form, Reading, Use
from fisherlab.statistics.batches import Batch
from fisherlab.statistics.model_view import ModelView


@final
@dataclass(frozen=True, eq=False)
class Call:
    """A use of a block's parameters, and the place of its output in the graph."""

    use: Use
    edge: GradientEdge

    @property
    def numbers(self) -> int:
        """Of the output."""
        return prod(self.use.shape)


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
        """The places of all outputs, each once."""
        every = [call.edge for calls in self.calls.values() for call in calls]
        return list({id(edge): edge for edge in every}.values())


@final
class Recorder(TorchFunctionMode):
    """Note the calls that use the parameters of some blocks, for the time of a context.

    Parameters
    ----------
    blocks
        Whose parameters are looked for.
    tensors
        The parameters by name, or what stands in their place.
    apart
        Whether the parameters are cut off from the graph in these calls: nothing is kept
        for their gradients, and what still leads to them are uses that were not noted.
    """

    def __init__(
        self, blocks: Mapping[str, Block], *tensors: Mapping[str, Tensor], apart: bool
    ) -> None:
        super().__init__()
        self.calls: dict[str, list[Call]] = {name: [] for name in blocks}
        self.unseen: set[str] = set()  # blocks used where autograd looks away
        self._apart = apart
        self._known: dict[int, tuple[Tensor, Block]] = {}
        self._last: dict[str, Callable[[], Tensor | None]] = {}  # outputs, by block
        for held in tensors:
            for block in blocks.values():
                for name in block.parameters:
                    self._known[id(held[name])] = held[name], block

    def __torch_function__(
        self,
        function: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Call a function of torch, and note it if it uses one of the parameters."""
        options = kwargs or {}
        opened = OPENED.get(function)
        made = None if opened is None else opened(self._is_own, *args, **options)
        if made is not None:
            with self:
                return made()
        reader = READERS.get(function)
        for reading in () if reader is None else reader(*args, **options):
            uses, own = self._uses(reading)
            if uses:
                return self._noted(partial(function, *args, **options), uses, own)
        return function(*args, **options)

    def _is_own(self, tensor: Tensor) -> bool:
        return self._placed(tensor) is not None

    def _noted(
        self, call: "partial[Any]", uses: Sequence[Use], own: Sequence[Tensor | None]
    ) -> Any:
        """Make a call whose uses are known, and note it."""
        if not torch.is_grad_enabled():
            self.unseen.update(use.block.name for use in uses)
            return call()
        if self._apart:
            cut = partial(_cut, own=own)
            options = {name: cut(value) for name, value in call.keywords.items()}
            call = partial(call.func, *map(cut, call.args), **options)
        output = call()
        if not output.requires_grad:  # the graph begins here
            output = output.requires_grad_().clone()
        edge = get_gradient_edge(output)
        for use in uses:
            self._note(use, edge, output)
        return output

    def _note(self, use: Use, edge: GradientEdge, output: Tensor) -> None:
        name = use.block.name
        noted, last = self.calls[name], self._last.get(name)
        self._last[name] = weakref.ref(output)
        if use.columns is None and last is not None and last() is use.reading.input:
            before = noted[-1].use
            if before.rows == use.rows and not (before.ones or before.form.turned):
                # F.linear(x, W) + b: the layer that F.linear(x, W, b) is
                noted[-1] = replace(noted[-1], use=replace(before, ones=True))
                return
        noted.append(Call(replace(use, shape=output.shape), edge))

    def _uses(self, reading: Reading) -> tuple[list[Use], list[Tensor | None]]:
        """Return what a call is to the blocks, and the arguments that are theirs."""
        weight, bias = self._placed(reading.weight), self._placed(reading.bias)
        use = None if weight is None else _weight_use(reading, *weight)
        if bias is None:
            return ([use], [reading.weight]) if use else ([], [])
        parameter, block, place = bias
        if use is None:
            return [_bias_use(reading, *bias)], [reading.bias]
        both = [reading.weight, reading.bias]
        joined = block is use.block and place.rows == use.rows
        if joined and block.bias is not None and not use.form.turned:
            return [replace(use, ones=True)], both
        return [use, _bias_use(reading, parameter, block, place)], both

    def _placed(self, tensor: Tensor | None) -> tuple[Tensor, Block, Place] | None:
        """Return the parameter that a tensor is, or is a view of, and where it lies."""
        if tensor is None:
            return None
        base = tensor if id(tensor) in self._known else tensor._base
        if base is None or id(base) not in self._known:
            return None
        parameter, block = self._known[id(base)]
        place = place_of(tensor, parameter)
        return None if place is None else (parameter, block, place)


def _weight_use(
    reading: Reading, parameter: Tensor, block: Block, place: Place
) -> Use | None:
    """Return how a call uses a block's weight, None where that is not known."""
    linear = reading.kind == "linear"
    width = block.weight_shape[1] - (block.bias is not None)
    whole = place == Place((0, block.rows), (0, width))
    if (place.turned and not linear) or (reading.groups > 1 and not whole):
        return None
    form = Form(
        looked_up=reading.kind == "embedding",
        turned=reading.flipped != place.turned,
        groups=reading.groups,
    )
    return Use(reading, block, parameter, form, place.rows, place.columns, ones=False)


def _bias_use(reading: Reading, parameter: Tensor, block: Block, place: Place) -> Use:
    return Use(reading, block, parameter, Form(), place.rows, None, ones=True)


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
    single, edges = len(columns) == 1, done.edges
    found: Sequence[Tensor | None] = [None] * len(edges)
    if edges and done.output.requires_grad:
        found = torch.autograd.grad(
            done.output,
            edges,
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
    """Sort gradients (v, *shape) at `edges` by block; zeros where nothing depends."""
    pairs = zip(done.edges, found, strict=True)
    at = {id(edge): gradient for edge, gradient in pairs}

    def filled(call: Call) -> Tensor:
        gradient, like = at[id(call.edge)], call.use.parameter
        if gradient is None:
            return like.new_zeros(columns, *call.use.shape)
        return gradient.to(like.dtype)

    return {name: [filled(call) for call in calls] for name, calls in done.calls.items()}
