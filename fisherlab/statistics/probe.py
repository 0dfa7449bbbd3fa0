"""Find out, on two examples, which blocks can be tapped and which cannot.

A block has the shared form if every use of its weight is a call of a module that fisherlab
knows, and if the example is axis 0 of every such call: the pullback of one example must
vanish at all others. Everything else goes through per-example gradients.
"""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from fisherlab.errors import UnsupportedModelError
from fisherlab.layers import Block, shared_form
from fisherlab.statistics import per_example, taps
from fisherlab.statistics.batches import Batch, map_inputs
from fisherlab.statistics.determinism import require_repeatable
from fisherlab.statistics.graph import uses
from fisherlab.statistics.model_view import ModelView
from fisherlab.statistics.taps import Tapped, generic


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
        way = per_example.looped if self.unfollowed else per_example.vmapped
        return way(view, blocks, batch, columns)

    def is_of(self, model: nn.Module) -> bool:
        """Whether the modules that are tapped belong to a model, not to a copy of it."""
        modules = set(model.modules())
        return all(m in modules for tap in self.tapped.values() for m in tap.modules)

    def settled(self) -> "Probe":
        """Return the probe without the outputs, once their independence was seen."""
        output, alone = (t[:0].clone() for t in (self.output, self.alone))
        return replace(self, output=output, alone=alone)


@dataclass(frozen=True, eq=False)
class _Call:
    output: Tensor
    shape: torch.Size


def probe(view: ModelView, blocks: Mapping[str, Block], batch: Batch) -> Probe:
    """Run two examples and decide the form of every block.

    What the chosen forms give is compared with autograd on the model's own parameters,
    so that no gradient is lost in silence.

    Raises
    ------
    UnsupportedModelError
        If axis 0 of the model's output is not the example, or it is random.
    """
    view = replace(view, copies_data=True)
    require_repeatable(view, batch)
    pair = per_example.differentiable(batch.part([0, min(1, len(batch) - 1)]))
    direct, example_bytes = _measured(view, pair)
    if direct.dim() == 0 or direct.shape[0] != 2:
        raise UnsupportedModelError(
            f"For 2 examples the model's output has shape {tuple(direct.shape)}; axis 0 "
            "must be the example."
        )
    tapped, general = _forms(view, blocks, pair, direct)
    column = generic(direct)
    expected = _sums(view, blocks, direct, column)
    wrong = _wrongly_tapped(view, blocks, tapped, pair, column, expected)
    general |= wrong
    remaining = {name: block for name, block in blocks.items() if name in general}
    unfollowed = _unfollowed(view, remaining, pair, column, expected)
    for name in remaining:
        if not bool(expected[name].any()):
            general[name] += "; its gradient is zero on two examples"
    kept = {name: tap for name, tap in tapped.items() if name not in wrong}
    alone, overwrites = _alone(view, batch.part([0]))
    each = direct.element_size() * _tapped_numbers(kept)
    return Probe(
        kept,
        general,
        direct.detach(),
        alone,
        unfollowed,
        overwrites,
        example_bytes + 2 * each,
        each,
    )


def _tapped_numbers(tapped: Mapping[str, Tapped]) -> int:
    """Count the outputs of one example that are tapped."""
    return sum(shape.numel() for tap in tapped.values() for shape in tap.outputs)


def _measured(view: ModelView, pair: Batch) -> tuple[Tensor, int]:
    """Return the output with its graph, and the bytes an example's activations take."""
    held: dict[int, int] = {p.data_ptr(): 0 for p in view.model.parameters()}

    def note(tensor: Tensor) -> Tensor:
        held.setdefault(tensor.data_ptr(), tensor.untyped_storage().nbytes())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        output = view.directly(pair)
    return output, max(1, (sum(held.values()) + output.nbytes) // 2)


def _alone(view: ModelView, one: Batch) -> tuple[Tensor, bool]:
    """Return the output of one example, and whether the model changes its inputs."""
    copied = Batch(map_inputs(one.x, torch.clone), None)
    args, kwargs = copied.arguments()
    before = [t._version for t in (*args, *kwargs.values())]
    with torch.no_grad():
        output = replace(view, copies_data=False)(copied)
    return output, before != [t._version for t in (*args, *kwargs.values())]


def _forms(
    view: ModelView, blocks: Mapping[str, Block], pair: Batch, direct: Tensor
) -> tuple[dict[str, Tapped], dict[str, str]]:
    """Return the blocks that can be tapped, and the reasons of the others."""
    candidates, general = expected_forms(view.model, blocks)
    leaves = {
        name: view.parameters[name].clone().requires_grad_()
        for block in blocks.values()
        for name in block.parameters
    }
    calls, output = _record(view, candidates, pair, leaves)
    seen = uses(output, leaves)
    hidden = uses(direct, dict(view.model.named_parameters())) - seen
    mixed = _mixed(output, {n: c for n, c in calls.items() if not _misfit(c)})
    tapped: dict[str, Tapped] = {}
    for name, modules in candidates.items():
        block = blocks[name]
        reason = _reason(block, calls[name], seen, hidden) or mixed.get(name)
        if reason:
            general[name] = reason
        else:
            tapped[name] = _tapped(block, modules, calls[name])
    return tapped, general


def require_independence(found: Probe) -> None:
    """Refuse a model whose output for one example depends on another, or on chance.

    Raises
    ------
    UnsupportedModelError
        If the first example alone has another output than beside the second.
    """
    beside = found.output[:1]
    same = found.alone.shape == beside.shape and not _differs(found.alone, beside)
    if same or not bool(beside.isfinite().all()):  # overflow is told of elsewhere
        return
    raise UnsupportedModelError(
        "The output for an example changes with the examples beside it, or from call to "
        "call, so there are no per-example gradients. Look for batch statistics or "
        "dropout in functional calls; check_deterministic=True names the layer."
    )


def expected_forms(
    model: nn.Module, blocks: Mapping[str, Block]
) -> tuple[dict[str, tuple[nn.Module, ...]], dict[str, str]]:
    """Find the modules that own each block's weight, or why it has no shared form."""
    named = dict(model.named_parameters())
    candidates: dict[str, tuple[nn.Module, ...]] = {}
    general: dict[str, str] = {}
    for name, block in blocks.items():
        weight = named[block.weight]
        bias = None if block.bias is None else named[block.bias]
        owners = tuple(
            module
            for module in model.modules()
            if any(p is weight for p in module._parameters.values())
        )
        known = [
            m for m in owners if shared_form(m) and m._parameters.get("weight") is weight
        ]
        if not owners or len(known) < len(owners):
            kinds = ", ".join(sorted({type(m).__name__ for m in owners})) or "parameter"
            general[name] = f"{kinds}: no shared form"
        elif any(m._parameters.get("bias") is not bias and bias is not None for m in known):
            general[name] = "tied weights with different biases"
        elif len({_way(m) for m in known}) > 1:
            general[name] = "tied weights of modules that use them in different ways"
        else:
            candidates[name] = owners
    return candidates, general


def _way(module: nn.Module) -> tuple[int, bool]:
    form = shared_form(module)
    assert form is not None
    return form.groups, form.looked_up


def _record(
    view: ModelView,
    candidates: Mapping[str, tuple[nn.Module, ...]],
    pair: Batch,
    leaves: Mapping[str, Tensor],
) -> tuple[dict[str, list[_Call]], Tensor]:
    calls: dict[str, list[_Call]] = {name: [] for name in candidates}
    handles = []
    try:
        for name, modules in candidates.items():

            def hook(m: Any, args: Any, out: Tensor, n: str = name) -> Tensor:
                calls[n].append(_Call(out, out.shape))
                return out.clone()  # in-place followers leave `out` alone

            handles += [module.register_forward_hook(hook) for module in modules]
        with torch.enable_grad():
            output = view(pair, leaves)
    finally:
        for handle in handles:
            handle.remove()
    return calls, output


def _misfit(calls: list[_Call]) -> bool:
    return not calls or any(call.shape[0] != 2 for call in calls)


def _reason(
    block: Block, calls: list[_Call], seen: Counter[str], hidden: Counter[str]
) -> str | None:
    """Return why a block cannot be tapped, or None if its uses allow it."""
    if not calls:
        return "its module is never called"
    for name in block.parameters:
        if hidden[name] or seen[name] != len(calls):
            return f"{name} is used outside its module, or where no gradient is seen"
    if _misfit(calls):
        return "the example is not axis 0 of its output"
    return None


def _mixed(output: Tensor, calls: Mapping[str, list[_Call]]) -> dict[str, str]:
    """Tell which calls mix the examples: example 0 reaches into place 1 of axis 0."""
    outputs = {name: [c.output for c in cs] for name, cs in calls.items()}
    flat = [out for outs in outputs.values() for out in outs if out.requires_grad]
    if not flat or not output.requires_grad:
        return {}
    column = torch.zeros_like(output)
    column[0] = generic(output[0])
    try:
        grads = torch.autograd.grad(
            output, flat, column, retain_graph=True, allow_unused=True
        )
    except RuntimeError as error:
        return dict.fromkeys(calls, str(error).splitlines()[0])
    reached = {
        id(out)
        for out, grad in zip(flat, grads, strict=True)
        if grad is not None and bool(grad[1].any())
    }
    why = "its examples are coupled: the example is not axis 0 of its output"
    return {n: why for n, outs in outputs.items() if any(id(o) in reached for o in outs)}


def _tapped(block: Block, modules: tuple[nn.Module, ...], calls: list[_Call]) -> Tapped:
    form = shared_form(modules[0])
    assert form is not None
    return Tapped(
        modules,
        form,
        block.bias is not None,
        tuple(call.shape[1:] for call in calls),
    )


def _sums(
    view: ModelView, blocks: Mapping[str, Block], output: Tensor, column: Tensor
) -> dict[str, Tensor]:
    """Return the gradient of each block, summed over the examples, from autograd."""
    named = dict(view.model.named_parameters())
    leaves = {n: named[n] for block in blocks.values() for n in block.parameters}
    found = {name: torch.zeros_like(leaf) for name, leaf in leaves.items()}
    for grads in per_example.pull(view, output, leaves, column[None]):
        found |= grads
    return {name: block.pack(found) for name, block in blocks.items()}


def _wrongly_tapped(
    view: ModelView,
    blocks: Mapping[str, Block],
    tapped: Mapping[str, Tapped],
    pair: Batch,
    column: Tensor,
    expected: Mapping[str, Tensor],
) -> dict[str, str]:
    """Return the blocks whose taps do not give the gradients of autograd, and why."""
    if not tapped:
        return {}
    try:
        done = taps.forward(view, tapped, pair)
        gradients = taps.pull(view, [done], tapped, column[None], 1)
    except RuntimeError as error:
        return dict.fromkeys(tapped, str(error).splitlines()[0])
    wrong = {}
    for name, tap in tapped.items():
        inputs = taps.features(tap, done.inputs[name])
        found = taps.described(blocks[name], tap, inputs, None, gradients[name], 2)
        if _differs(found.samples.matrices().sum((0, 1)), expected[name]):
            wrong[name] = "taps give other gradients than autograd"
    return wrong


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
        found = per_example.vmapped(view, blocks, pair, column[None])
    except (RuntimeError, NotImplementedError, ValueError, TypeError) as error:
        return str(error).splitlines()[0]
    lost = [name for name in blocks if _differs(found[name].sum((0, 1)), expected[name])]
    if lost:
        return f"torch.func gives other gradients than autograd for {', '.join(lost)}"
    return ""


def _differs(found: Tensor, expected: Tensor) -> bool:
    """Compare far above rounding (TF32 too), far below what a lost term would make."""
    allowed = torch.finfo(expected.dtype).eps ** 0.25 * float(expected.abs().max())
    return bool(((found - expected).abs() > allowed).any())
