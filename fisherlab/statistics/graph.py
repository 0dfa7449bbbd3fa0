"""What autograd's graph of an output tells about the parameters in it."""

from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor
from torch.autograd.function import BackwardCFunction


def uses(output: Tensor, leaves: Mapping[str, Tensor]) -> Counter[str]:
    """Count how often each leaf is used on the way to the output.

    Examples
    --------
    >>> import torch
    >>> w = torch.ones(2, requires_grad=True)
    >>> uses(w * w + 1, {"w": w})
    Counter({'w': 2})
    """
    names = {id(leaf): name for name, leaf in leaves.items()}
    ends = (getattr(node, "variable", None) for node in _edges(output))
    return Counter(names[id(end)] for end in ends if id(end) in names)


def calls_python(output: Tensor) -> bool:
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
