"""Find out, on two examples, which blocks can be tapped and which cannot.

A block has the shared form if every use of its weight is a call that fisherlab knows, and
if every call keeps the examples apart: the pullback of one must vanish at the places of the
other, which hold what they hold for it alone. Everything else goes through per-example
gradients.
"""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from textwrap import shorten
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import BackwardCFunction

from fisherlab.errors import UnsupportedModelError
from fisherlab.layers import Block
from fisherlab.layers.blocks import TRANSPOSED
from fisherlab.operators.base import Provenance
from fisherlab.statistics import recorder, taps
from fisherlab.statistics.batches import Batch, Inputs, map_inputs
from fisherlab.statistics.model_view import ModelView, gradients_kept, require_repeatable
from fisherlab.statistics.recorder import Call, Pass
from fisherlab.statistics.taps import Tapped, generic


def vmapped(
    view: ModelView, blocks: Mapping[str, Block], batch: Batch, columns: Tensor
) -> dict[str, Tensor]:
    """Return D (v, n, d_out, d_in) of each block for output columns (v, n, ...).

    One level of ``vmap`` only: under two, PReLU's gradient is wrong (torch 2.13), in
    silence where the columns are one or as many as the examples.
    """
    chosen = {name: view.parameters[name] for name in _names(blocks)}

    def example(x: Inputs, column: Tensor) -> dict[str, Tensor]:
        alone = Batch(map_inputs(x, lambda t: t[None]), None)
        done: Any = torch.func.vjp(lambda p: view(alone, p), chosen)
        pulled = [done[1](c[None])[0] for c in column]
        return {name: torch.stack([p[name] for p in pulled]) for name in chosen}

    with torch.no_grad(), view.settings():
        over_examples = torch.func.vmap(example, in_dims=(0, 1), randomness="error")
        # out_dims=1 fails for what does not depend on the example (torch 2.13)
        pairs = over_examples(batch.x, columns).items()
        found = {name: matrices.transpose(0, 1) for name, matrices in pairs}
    return {name: block.pack(found) for name, block in blocks.items()}


def looped(
    view: ModelView, blocks: Mapping[str, Block], batch: Batch, columns: Tensor
) -> dict[str, Tensor]:
    """Return the same as `vmapped`, one example and one column after the other."""
    named = dict(view.model.named_parameters())
    leaves = {name: named[name] for name in _names(blocks)}
    v, n = columns.shape[:2]
    found = {
        name: torch.zeros(v, n, *p.shape, dtype=p.dtype, device=p.device)
        for name, p in leaves.items()
    }
    for example in range(n):
        one = slice(example, example + 1)
        output = view.directly(differentiable(batch.part(one)))
        pulled = pull(view, output, leaves, columns[:, one])
        for column, grads in enumerate(pulled):
            for name, grad in grads.items():
                found[name][column, example] = grad
    return {name: block.pack(found) for name, block in blocks.items()}


def pull(
    view: ModelView, output: Tensor, leaves: Mapping[str, Tensor], columns: Tensor
) -> Iterator[dict[str, Tensor]]:
    """Pull columns one by one back to the parameters that the output depends on."""
    if not output.requires_grad:
        return
    python, ends = _calls_python(output), list(leaves.values())
    for column in columns:
        with view.settings():  # a checkpoint calls its part of the model again
            if python:
                grads = _through_attributes(view, output, ends, column)
            else:
                grads = torch.autograd.grad(
                    output, ends, column, retain_graph=True, allow_unused=True
                )
        pairs = zip(leaves, grads, strict=True)
        yield {name: _dense(grad) for name, grad in pairs if grad is not None}


def _dense(grad: Tensor) -> Tensor:
    return grad.to_dense() if grad.is_sparse else grad  # nn.Embedding(sparse=True)


def _through_attributes(
    view: ModelView, output: Tensor, leaves: Sequence[Tensor], column: Tensor
) -> tuple[Tensor | None, ...]:
    """Go through ``.grad``, the only way that re-entrant checkpoints offer."""
    with gradients_kept(view.model):
        for parameter in view.model.parameters():
            parameter.grad = None
        output.backward(column, retain_graph=True)
        return tuple(leaf.grad for leaf in leaves)


def differentiable(batch: Batch) -> Batch:
    """Ask for input gradients: a re-entrant checkpoint on data has none otherwise."""

    def ask(tensor: Tensor) -> Tensor:
        floats = tensor.is_floating_point()
        return tensor.detach().requires_grad_() if floats else tensor

    return Batch(map_inputs(batch.x, ask), batch.y, batch.first)


def _names(blocks: Mapping[str, Block]) -> list[str]:
    return [name for block in blocks.values() for name in block.parameters]


def leads_to(output: Tensor, leaves: Mapping[str, Tensor]) -> set[str]:
    """Return the names of the leaves that autograd's graph of an output leads to.

    Examples
    --------
    >>> w, b = (torch.ones(2, requires_grad=True) for _ in range(2))
    >>> leads_to(w * w + 1, {"w": w, "b": b})
    {'w'}
    """
    names = {id(leaf): name for name, leaf in leaves.items()}
    ends = (id(getattr(node, "variable", None)) for node in _edges(output))
    return {names[end] for end in ends if end in names}


def _calls_python(output: Tensor) -> bool:
    """Tell whether a function written in Python takes part in the backward pass.

    Such a function may run a backward pass of its own (re-entrant checkpoints do), which
    reaches parameters that the graph does not show.
    """
    return isinstance(output.grad_fn, BackwardCFunction) or any(
        isinstance(node, BackwardCFunction) for node in _edges(output)
    )


def _edges(output: Tensor) -> Iterator[Any]:
    """Yield the node at the end of every edge, each edge once."""
    stack, seen = [output.grad_fn], set()
    while stack:
        node = stack.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        followers = [follower for follower, _ in node.next_functions]
        yield from (follower for follower in followers if follower is not None)
        stack += followers


APART = "its examples are coupled, or no axis of its calls holds them"
OTHERWISE = "not all examples use it alike"


class OtherUses(UnsupportedModelError):
    """Examples use weights otherwise than those looked at before."""

    def __init__(self, names: Sequence[str], first: int, last: int) -> None:
        self.names = tuple(names)
        listed = ", ".join(map(repr, names))
        super().__init__(
            f"Examples {first} to {last} use the weight of {listed} otherwise than those "
            "before them (more or other calls), so its statistics would be wrong. Let the "
            "first batch hold such examples (shuffle the data), collect them apart, or "
            "leave the block out with layers=[...]."
        )


@dataclass(frozen=True, eq=False)
class Probe:
    """Which blocks are tapped, and why the others are not.

    Parameters
    ----------
    tapped
        Blocks in shared form, and how they are tapped.
    general
        Blocks in per-example form, and the reason.
    output, alone
        The output for the two examples, and for the first without the second.
    unfollowed
        Why torch.func cannot give the per-example gradients, or "".
    overwrites_data
        Whether the model changes its inputs in place.
    example_bytes
        Bytes of the activations that the backward pass of one example needs, of the
        taps among them, and of their gradients for one column.
    column_bytes
        Bytes of these gradients for every further column that is held.
    """

    tapped: Mapping[str, Tapped]
    general: Mapping[str, str]
    output: Tensor
    alone: Tensor
    unfollowed: str
    overwrites_data: bool
    example_bytes: int
    column_bytes: int

    def matrices(
        self, view: ModelView, blocks: Mapping[str, Block], batch: Batch, columns: Tensor
    ) -> dict[str, Tensor]:
        """Return the per-example gradients of general blocks, the way that works."""
        way = looped if self.unfollowed else vmapped
        return way(view, blocks, batch, columns)

    def only(self, names: Collection[str]) -> "Probe":
        """Return the probe of some of its blocks."""
        tapped = {name: tap for name, tap in self.tapped.items() if name in names}
        general = {name: why for name, why in self.general.items() if name in names}
        each = self.output.element_size() * sum(tap.numbers for tap in tapped.values())
        fewer = 2 * (self.column_bytes - each)
        return replace(
            self,
            tapped=tapped,
            general=general,
            example_bytes=self.example_bytes - fewer,
            column_bytes=each,
        )

    def settled(self) -> "Probe":
        """Return the probe without the outputs, once their independence was seen."""
        output, alone = (t[:0].clone() for t in (self.output, self.alone))
        return replace(self, output=output, alone=alone)


def probe(
    view: ModelView, blocks: Mapping[str, Block], batch: Batch, apart: Collection[str] = ()
) -> Probe:
    """Run two examples and decide the form of every block.

    What the chosen forms give is compared with autograd on the model's own parameters,
    so that no gradient is lost in silence. Blocks of `apart` are taken example by example,
    for further examples use them otherwise.

    Raises
    ------
    UnsupportedModelError
        If axis 0 of the model's output is not the example, or it is random.
    """
    view = replace(view, copies_data=True)
    require_repeatable(view, batch)
    pair = differentiable(batch.part([0, min(1, len(batch) - 1)]))
    direct, example_bytes = _measured(view, pair)
    pair.require_outputs(direct)
    column = generic(direct)
    expected = _sums(view, blocks, direct, column)
    alone, overwrites = _alone(view, blocks, batch.part([0]))
    tapped, general = _forms(view, blocks, pair, alone, column, expected)
    for name in [one for one in tapped if one in apart]:
        del tapped[name]
        general[name] = OTHERWISE
    remaining = {name: block for name, block in blocks.items() if name in general}
    unfollowed = _unfollowed(view, remaining, pair, column, expected)
    for name in remaining:
        if not bool(expected[name].any()):
            general[name] += "; its gradient is zero on two examples"
    numbers = sum(tap.numbers for tap in tapped.values())
    each = direct.element_size() * numbers
    return Probe(
        tapped,
        general,
        direct.detach(),
        alone.output.detach(),
        unfollowed,
        overwrites,
        example_bytes + 2 * each,
        each,
    )


def _measured(view: ModelView, pair: Batch) -> tuple[Tensor, int]:
    """Return the output with its graph, and the bytes an example's activations take."""
    held: dict[int, int] = {p.data_ptr(): 0 for p in view.own.values()}

    def note(tensor: Tensor) -> Tensor:
        if tensor.layout == torch.strided:  # a sparse matrix of a graph has no storage
            held.setdefault(tensor.data_ptr(), tensor.untyped_storage().nbytes())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        output = view.directly(pair)
    return output, max(1, (sum(held.values()) + output.nbytes) // 2)


def _alone(view: ModelView, blocks: Mapping[str, Block], one: Batch) -> tuple[Pass, bool]:
    """Run one example, and tell whether the model changes its inputs."""
    copied = Batch(map_inputs(one.x, torch.clone), None)
    before = [t._version for t in copied.tensors()]
    done = recorder.forward(replace(view, copies_data=False), blocks, copied)
    return done, before != [t._version for t in copied.tensors()]


def require_independence(
    alone: Tensor, beside: Tensor, copies: Callable[[], Tensor] | None = None
) -> None:
    """Refuse a model whose output for one example depends on others, or on chance.

    Parameters
    ----------
    alone
        The output for one example (1, …).
    beside
        That of the same example in a run of several.
    copies
        Gives it for as many copies of the example: rounding (of products in float32
        inside a float64 model) changes with the number of examples, not with the others,
        so that small differences are judged by these.

    Raises
    ------
    UnsupportedModelError
        If the example alone has another output than beside the others.
    """
    power, alike = 0.5, alone.shape == beside.shape
    if alike and not _differs(alone, beside, power):
        return
    if not bool(beside.isfinite().all()):  # overflow is told of elsewhere
        return
    near = alike and not _differs(alone, beside)
    if near and (copies is None or not _differs(copies(), beside, power)):
        return
    raise UnsupportedModelError(
        "The output for an example changes with the examples beside it, or from call to "
        "call, so there are no per-example gradients. Look for batch statistics, dropout "
        "in functional calls, or a loop that ends once all examples have converged; "
        "check_deterministic=True names the layer."
    )


def expected_rules(model: nn.Module, blocks: Mapping[str, Block]) -> dict[str, str]:
    """Return the rules that blocks are expected to be tapped by, from their modules alone.

    Modules of torch that make a known call, and their subclasses, are expected to, and
    those that multiply by a weight stored (in, out).
    """
    named = dict(model.named_parameters())
    found = {}
    for name, block in blocks.items():
        owners = owners_of(model, named[block.weight])
        kinds = dict.fromkeys(_expected(module, block) for module in owners)
        if kinds and "" not in kinds:
            found[name] = " + ".join(kinds)
    return found


def _expected(module: nn.Module, block: Block) -> str:
    """Return the rule for a module's own calls, "" where it makes no known one."""
    for kinds, rule in _EXPECTED:
        if isinstance(module, kinds):
            return rule
    return "linear, stored (in, out)" if block.output_axis else ""


_EXPECTED: tuple[tuple[Any, str], ...] = (
    ((nn.Linear, nn.MultiheadAttention), "linear"),
    ((nn.Conv1d, nn.Conv2d, nn.Conv3d), "convolution"),
    (nn.Embedding, "embedding"),
    (TRANSPOSED, "transposed convolution"),
)


def owners_of(model: nn.Module, parameter: Tensor) -> list[nn.Module]:
    """Return the modules that hold a parameter."""
    return [
        module
        for module in model.modules()
        if any(p is parameter for p in module._parameters.values())
    ]


def no_call(owners: Sequence[nn.Module]) -> str:
    """Say why the parameter of some modules has no shared form."""
    kinds = ", ".join(sorted({type(m).__name__ for m in owners})) or "parameter"
    if any(isinstance(m, nn.utils.parametrize.ParametrizationList) for m in owners):
        return "a parametrisation computes the weight from it"
    if any("_g" in n for m in owners for n in m._parameters):
        return "weight_norm computes the weight from it"
    if any(isinstance(module, kinds) for module in owners for kinds, _ in _EXPECTED):
        return f"{kinds}: its weight enters no known call"
    return f"{kinds}: no shared form"


def _forms(
    view: ModelView,
    blocks: Mapping[str, Block],
    pair: Batch,
    alone: Pass,
    column: Tensor,
    expected: Mapping[str, Tensor],
) -> tuple[dict[str, Tapped], dict[str, str]]:
    """Return the blocks that can be tapped, and the reasons of the others."""
    leaves = view.leaves(blocks)
    apart = torch.stack([column, column])
    apart[0, 1], apart[1, 0] = 0, 0  # a column of each example
    try:
        with view.settings():  # a checkpoint calls its part of the model again
            done = recorder.forward(view, blocks, pair, leaves)
            each = [recorder.at_calls(done, one[None]) for one in apart]
    except RuntimeError as error:
        return {}, dict.fromkeys(blocks, str(error).splitlines()[0])
    reached = {
        name: [torch.cat(pair) for pair in zip(*(e[name] for e in each), strict=True)]
        for name in blocks
    }
    left = leads_to(done.output, leaves)
    left |= leads_to(done.output, view.own)
    tapped: dict[str, Tapped] = {}
    general: dict[str, str] = {}
    for name, block in blocks.items():
        calls = done.calls[name]
        reason = _reason(view, block, done, left)
        last = None if reason else _example_last(calls, alone.calls[name], reached[name])
        if last is None:
            general[name] = reason or APART
            continue
        tap = Tapped.of(block, calls, 2, last)
        if _differs(_summed(block, tap, calls, reached[name]), expected[name]):
            general[name] = "its calls give other gradients than autograd"
        else:
            tapped[name] = tap
    return tapped, general


def _reason(view: ModelView, block: Block, done: Pass, left: set[str]) -> str | None:
    """Return why a block cannot be tapped, or None if its uses allow it."""
    calls = done.calls[block.name]
    if not calls:
        return no_call(owners_of(view.model, view.own[block.weight]))
    for name in block.parameters:
        if name in left or block.name in done.unseen:
            return f"{name} is used outside its known calls, or where no gradient is seen"
    return None


def _example_last(
    calls: Sequence[Call], alone: Sequence[Call], reached: Sequence[Tensor]
) -> bool | None:
    """Return how calls hold the examples, see `Tapped`; None if they do not.

    Where the examples of axis 0 are seen apart, that is taken, and where each has but one
    position, so that both ways are the same.
    """
    if len(calls) != len(alone):
        return None
    each = [_fitting(*one) for one in zip(calls, alone, reached, strict=True)]
    fitting = {False, True}.intersection(*each)
    in_axis_0 = all(2 in (call.use.shape[0], call.use.positions) for call in calls)
    if False in fitting and (in_axis_0 or True not in fitting):
        return False
    return True if fitting == {True} else None


def _fitting(call: Call, alone: Call, gradients: Tensor) -> set[bool]:
    """Return the ways to hold two examples that a call agrees with.

    Its features at the places of the first example are those of this example alone, and
    a column of one example reaches no place of the other.
    """
    table, row = (c.use.evidence().flatten(0, 1) for c in (call, alone))
    nonzero = call.use.gradients(gradients).flatten(1, 2).ne(0).any(-1)
    if len(table) != 2 * len(row) or nonzero.shape[1] != len(table):
        return set()
    places = torch.arange(len(table), device=table.device)
    found = set()
    for last, (first, second) in (
        (False, places.view(2, -1)),
        (True, places.view(-1, 2).T),
    ):
        mixed = nonzero[0, second].any() | nonzero[1, first].any()
        if not bool(mixed) and not _differs(table[first], row):
            found.add(last)
    return found


def _summed(
    block: Block, tap: Tapped, calls: Sequence[Call], gradients: Sequence[Tensor]
) -> Tensor:
    """Return what the taps give as the gradient of a block, summed over the examples."""
    both = [g.sum(0, keepdim=True) for g in gradients]
    inputs, rows = taps.features(tap, calls, 2), taps.rows_of(tap, calls, both, 2)
    gone = [None] * len(tap.parts)
    found = taps.statistics_of(block, tap, inputs, gone, Provenance(), rows, 2)
    return found.samples.combine(rows[0].new_ones(1, 1, 2))[0]


def _sums(
    view: ModelView, blocks: Mapping[str, Block], output: Tensor, column: Tensor
) -> dict[str, Tensor]:
    """Return the gradient of each block, summed over the examples, from autograd."""
    leaves = {n: view.own[n] for block in blocks.values() for n in block.parameters}
    found: dict[str, Tensor] = {}
    for grads in pull(view, output, leaves, column[None]):
        found |= grads
    sums = {}
    for name, block in blocks.items():  # one by one: all are as large as the model
        missing = {n: leaves[n] for n in block.parameters if n not in found}
        found |= {n: torch.zeros_like(leaf) for n, leaf in missing.items()}
        sums[name] = block.pack({n: found.pop(n) for n in block.parameters})
    return sums


def _unfollowed(
    view: ModelView,
    blocks: Mapping[str, Block],
    pair: Batch,
    column: Tensor,
    expected: Mapping[str, Tensor],
) -> str:
    """Return why per-example gradients need a loop, or "" where torch.func serves."""
    if not blocks:
        return ""
    try:
        found = vmapped(view, blocks, pair, column[None])
    except (RuntimeError, NotImplementedError, ValueError, TypeError) as error:
        return shorten(str(error).splitlines()[0], 160, placeholder=" …")
    lost = [name for name in blocks if _differs(found[name].sum((0, 1)), expected[name])]
    if lost:
        return f"torch.func gives other gradients than autograd for {', '.join(lost)}"
    return ""


def _differs(found: Tensor, expected: Tensor, power: float = 0.25) -> bool:
    """Compare up to a power of eps; a quarter is above TF32, below a lost term."""
    if not expected.numel():
        return False
    if not expected.is_floating_point():
        return not torch.equal(found, expected)
    largest = float(torch.linalg.vector_norm(expected, torch.inf))
    allowed = torch.finfo(expected.dtype).eps ** power * largest
    return bool((found - expected).abs_().max() > allowed)
