"""Find out, on two examples, which blocks can be tapped and which cannot.

A block has the shared form if every use of its weight is a call of a module that fisherlab
knows, and if the example is axis 0 of every such call: the pullback of one example must
vanish at all others. Everything else goes through per-example gradients.
"""

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fisherlab.errors import UnsupportedModelError
from fisherlab.layers import Block, shared_form
from fisherlab.statistics.batches import Batch
from fisherlab.statistics.model_view import ModelView
from fisherlab.statistics.taps import Tapped


@dataclass(frozen=True, eq=False)
class Probe:
    """Which blocks are tapped, and why the others are not."""

    tapped: Mapping[str, Tapped]
    general: Mapping[str, str]


@dataclass(frozen=True, eq=False)
class _Call:
    output: Tensor
    shape: torch.Size
    overwritten: bool


def probe(view: ModelView, blocks: Mapping[str, Block], batch: Batch) -> Probe:
    """Run two examples and decide the form of every block.

    Raises
    ------
    UnsupportedModelError
        If axis 0 of the model's output is not the example.
    """
    pair = batch.part([0, min(1, len(batch) - 1)])
    candidates, general = _candidates(view.model, blocks)
    leaves = {
        name: view.parameters[name].clone().requires_grad_()
        for block in blocks.values()
        for name in block.parameters
    }
    calls, output = _record(view, candidates, pair, leaves)
    if output.dim() == 0 or output.shape[0] != 2:
        raise UnsupportedModelError(
            f"For 2 examples the model's output has shape {tuple(output.shape)}; axis 0 "
            "must be the example."
        )
    uses = _uses(output, leaves)
    tapped: dict[str, Tapped] = {}
    for name, modules in candidates.items():
        reason = _reason(blocks[name], calls[name], uses, output)
        if reason:
            general[name] = reason
            continue
        form = shared_form(modules[0])
        assert form is not None
        tapped[name] = Tapped(
            modules,
            form,
            blocks[name].bias is not None,
            tuple(call.shape[1:] for call in calls[name]),
            any(call.overwritten for call in calls[name]),
        )
    return Probe(tapped, general)


def _candidates(
    model: nn.Module, blocks: Mapping[str, Block]
) -> tuple[dict[str, tuple[nn.Module, ...]], dict[str, str]]:
    """Find the modules that own each block's weight and have a shared form."""
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
        known = [m for m in owners if shared_form(m) and m._parameters["weight"] is weight]
        if not owners or len(known) < len(owners):
            kinds = ", ".join(sorted({type(m).__name__ for m in owners})) or "parameter"
            general[name] = f"{kinds}: no shared form"
        elif any(m._parameters.get("bias") is not bias and bias is not None for m in known):
            general[name] = "tied weights with different biases"
        else:
            candidates[name] = owners
    return candidates, general


def _record(
    view: ModelView,
    candidates: Mapping[str, tuple[nn.Module, ...]],
    pair: Batch,
    leaves: Mapping[str, Tensor],
) -> tuple[dict[str, list[_Call]], Tensor]:
    raw: dict[str, list[tuple[Tensor, int, Tensor]]] = {name: [] for name in candidates}
    handles = []
    try:
        for name, modules in candidates.items():
            for module in modules:

                def hook(
                    m: nn.Module, args: tuple[Tensor, ...], out: Tensor, n: str = name
                ) -> Tensor:
                    raw[n].append((args[0], args[0]._version, out))
                    return out.clone()  # in-place followers leave `out` alone

                handles.append(module.register_forward_hook(hook))
        with torch.enable_grad():
            output = view(pair, leaves)
    finally:
        for handle in handles:
            handle.remove()
    calls = {
        name: [_Call(out, out.shape, x._version != version) for x, version, out in rows]
        for name, rows in raw.items()
    }
    return calls, output


def _uses(output: Tensor, leaves: Mapping[str, Tensor]) -> Counter[str]:
    """Count how often each parameter is used, by walking the graph of the output."""
    names = {id(leaf): name for name, leaf in leaves.items()}
    uses: Counter[str] = Counter()
    for _, variable in _edges(output):
        if id(variable) in names:
            uses[names[id(variable)]] += 1
    return uses


def _edges(output: Tensor) -> Iterator[tuple[object, Tensor]]:
    stack, seen = [output.grad_fn], set()
    while stack:
        node = stack.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        for follower, _ in node.next_functions:
            if follower is None:
                continue
            variable = getattr(follower, "variable", None)
            if variable is not None:
                yield node, variable
            else:
                stack.append(follower)


def _reason(
    block: Block, calls: list[_Call], uses: Counter[str], output: Tensor
) -> str | None:
    """Return why a block cannot be tapped, or None if it can."""
    if not calls:
        return "its module is never called"
    for name in block.parameters:
        if uses[name] != len(calls):
            return f"{name} is used outside its module"
    if any(call.shape[0] != 2 for call in calls):
        return "the example is not axis 0 of its output"
    column = torch.zeros_like(output)
    spread = torch.arange(1, output[0].numel() + 1, device=output.device)
    column[0] = spread.to(output.dtype).sqrt().cos().view(output.shape[1:])
    grads = torch.autograd.grad(
        output, [c.output for c in calls], column, retain_graph=True, allow_unused=True
    )
    if any(g is not None and bool(g[1].any()) for g in grads):
        return "its examples are coupled: the example is not axis 0 of its output"
    return None
