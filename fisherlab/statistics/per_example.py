"""Per-example gradients of any parameter: the path of blocks without a shared form.

``vmap`` over examples of ``vjp`` over the parameters; where torch.func cannot go (fused
recurrent kernels, checkpointing), a loop of ``autograd.grad``.
"""

import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from fisherlab.layers import Block
from fisherlab.statistics.batches import Batch, Inputs, map_inputs
from fisherlab.statistics.model_view import ModelView


def matrices(
    view: ModelView, blocks: Mapping[str, Block], batch: Batch, columns: Tensor
) -> dict[str, Tensor]:
    """Return D (v, n, d_out, d_in) of each block for output columns (v, n, ...)."""
    names = [name for block in blocks.values() for name in block.parameters]
    chosen = {name: view.parameters[name] for name in names}
    try:
        grads = _vmapped(view, chosen, batch, columns)
    except (RuntimeError, NotImplementedError, ValueError):
        grads = _looped(view, chosen, batch, columns)
    return {name: block.pack(grads) for name, block in blocks.items()}


def _vmapped(
    view: ModelView, chosen: Mapping[str, Tensor], batch: Batch, columns: Tensor
) -> dict[str, Tensor]:
    def example(x: Inputs, column: Tensor) -> dict[str, Tensor]:
        alone = Batch(map_inputs(x, lambda t: t[None]), None)
        done: Any = torch.func.vjp(lambda p: view(alone, p), dict(chosen))
        pullback = done[1]
        pulled = torch.func.vmap(lambda c: pullback(c[None])[0])(column)
        return dict(pulled)

    with torch.no_grad(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="There is a performance drop")
        over_examples = torch.func.vmap(
            example, in_dims=(0, 1), out_dims=1, randomness="error"
        )
        return dict(over_examples(batch.x, columns))


def _looped(
    view: ModelView, chosen: Mapping[str, Tensor], batch: Batch, columns: Tensor
) -> dict[str, Tensor]:
    v, n = columns.shape[:2]
    leaves = {name: p.clone().requires_grad_() for name, p in chosen.items()}
    out = {name: p.new_zeros(v, n, *p.shape) for name, p in chosen.items()}
    for example in range(n):
        with torch.enable_grad():
            output = view(batch.part(slice(example, example + 1)), leaves)
        for column in range(v):
            grads = torch.autograd.grad(
                output,
                list(leaves.values()),
                columns[column, example : example + 1],
                retain_graph=column + 1 < v,
                allow_unused=True,
            )
            for name, grad in zip(leaves, grads, strict=True):
                if grad is not None:
                    out[name][column, example] = grad
    return out
