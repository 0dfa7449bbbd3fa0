"""The Fisher of a whole model from its definition: one backward pass per output.

Plain autograd on the model's own parameters, one example at a time, the closed form of
the output Fisher in the middle: F = (1/N) Σ_n J_nᵀ H_n J_n.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

import fisherlab as fl
from fisherlab.layers import Block
from tests.model_zoo import Case


def full_fisher(case: Case, blocks: Mapping[str, Block]) -> Tensor:
    """Return F over all blocks, one after the other, each as vec([weight, bias])."""
    examples = _examples(case)
    total = sum(
        jacobian.T @ output_fisher(case.likelihood, output, label) @ jacobian
        for jacobian, output, label in (_jacobian(case.model, blocks, *e) for e in examples)
    )
    assert isinstance(total, Tensor)
    return total / len(examples)


def spans(blocks: Mapping[str, Block], model: nn.Module) -> dict[str, slice]:
    """Return where each block lies, counted from the parameters' own sizes."""
    named, found, start = dict(model.named_parameters()), {}, 0
    for name, block in blocks.items():
        size = sum(named[parameter].numel() for parameter in block.parameters)
        found[name] = slice(start, start + size)
        start += size
    return found


def _examples(case: Case) -> list[tuple[Any, Tensor | None]]:
    def part(t: Tensor, n: int) -> Tensor:
        return t[n : n + 1]

    first = next(iter(case.x.values())) if isinstance(case.x, dict) else case.x
    first = first[0] if isinstance(first, tuple) else first
    found = []
    for n in range(len(first)):
        if isinstance(case.x, dict):
            x: Any = {name: part(t, n) for name, t in case.x.items()}
        elif isinstance(case.x, tuple):
            x = tuple(part(t, n) for t in case.x)
        else:
            x = part(case.x, n)
        found.append((x, None if case.y is None else case.y[n]))
    return found


def _jacobian(
    model: nn.Module, blocks: Mapping[str, Block], x: Any, label: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return (entries × parameters), the output and the label of one example."""
    named = dict(model.named_parameters())
    rows, size = [], None
    while size is None or len(rows) < size:
        for parameter in named.values():
            parameter.grad = None
        if isinstance(x, dict):
            output = model(**x)
        else:
            output = model(*x) if isinstance(x, tuple) else model(x)
        size = output.numel()
        output.flatten()[len(rows)].backward()  # type: ignore[no-untyped-call]
        rows.append(torch.cat([_vector(named, block) for block in blocks.values()]))
    for parameter in named.values():
        parameter.grad = None
    return torch.stack(rows), output[0].detach(), label


def _vector(named: Mapping[str, nn.Parameter], block: Block) -> Tensor:
    """Return the gradient of one block as a vector, the bias after each row."""
    grads = [named[name].grad for name in block.parameters]
    full = [
        torch.zeros_like(named[name]) if grad is None else grad
        for name, grad in zip(block.parameters, grads, strict=True)
    ]
    weight = full[0].reshape(block.rows, -1)
    return torch.cat([weight, *(g.reshape(-1, 1) for g in full[1:])], 1).flatten()


def output_fisher(likelihood: Any, output: Tensor, label: Tensor | None) -> Tensor:
    """Return E[∇ℓ ∇ℓᵀ] over labels drawn from the model, for one example's output."""
    if isinstance(likelihood, fl.Gaussian):
        return torch.eye(output.numel(), dtype=output.dtype) / likelihood.variance
    if isinstance(likelihood, fl.Bernoulli):
        q = output.flatten().sigmoid()
        return torch.diag(q * (1 - q))
    classes = output.shape[-1]
    p = output.reshape(-1, classes).softmax(-1)
    used = torch.ones(len(p), dtype=torch.bool)
    if label is not None:
        used = (label != likelihood.ignore_index).reshape(-1)
    each = [(torch.diag(q) - torch.outer(q, q)) * u for q, u in zip(p, used, strict=True)]
    return torch.block_diag(*each)
