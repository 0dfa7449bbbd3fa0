"""Per-example gradients of any parameter: the path of blocks without a shared form.

``vmap`` over examples of ``vjp`` over the parameters; where torch.func cannot go
(checkpointing, old-style autograd functions, parameters it cannot see), a loop.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import BackwardCFunction

from fisherlab.layers import Block
from fisherlab.statistics.batches import Batch, Inputs, map_inputs
from fisherlab.statistics.model_view import ModelView, gradients_kept


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
