"""Functions of torch that hide known calls, written out with them."""

import string
import types
from collections import Counter
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, Final

import torch
from torch import Tensor
from torch.nn import functional as F

IsWeight = Callable[[Tensor], bool]
Made = Callable[[], Tensor] | None


def _written_out(function: Any) -> Callable[..., Made]:
    """Return how a function of torch written in Python is called so that a mode sees it.

    As it is, such a function hands itself to the mode in whole.
    """
    scope = {**function.__globals__, "has_torch_function": lambda _: False}
    code, name = function.__code__, function.__name__
    opened = types.FunctionType(
        code, scope, name, function.__defaults__, function.__closure__
    )
    opened.__kwdefaults__ = function.__kwdefaults__
    return lambda is_weight, *args, **options: partial(opened, *args, **options)


def as_rows(
    is_weight: IsWeight,
    input: Tensor,
    weight: Tensor,
    offsets: Tensor | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    mode: str = "mean",
    sparse: bool = False,
    per_sample_weights: Tensor | None = None,
    include_last_offset: bool = False,
    padding_idx: int | None = None,
) -> Made:
    """Return an embedding bag as rows that are looked up and added, or their mean.

    None for maxima, where bags are no rows of the input, and for altered tables.

    Examples
    --------
    >>> as_rows(torch.is_tensor, torch.tensor([[0, 1]]), torch.eye(2), mode="sum")()
    tensor([[1., 1.]])
    """
    bags = offsets is None and input.dim() == 2 and not input.is_floating_point()
    altered = max_norm is not None or scale_grad_by_freq
    linear = mode == "sum" or (mode == "mean" and per_sample_weights is None)
    if not bags or altered or not linear or not is_weight(weight):
        return None

    def added() -> Tensor:
        rows = F.embedding(input, weight, padding_idx)
        shares = torch.ones_like(input, dtype=rows.dtype)
        if padding_idx is not None:
            shares = (input != padding_idx % len(weight)).to(rows.dtype)
        if mode == "mean":
            shares = shares / shares.sum(1, keepdim=True).clamp(min=1)
        if per_sample_weights is not None:
            shares = shares * per_sample_weights
        return (rows * shares[..., None]).sum(1)

    return added


def as_product(is_weight: IsWeight, equation: Any, *operands: Any) -> Made:
    """Return an einsum of inputs and a weight as ``x @ w``; None where it is no product.

    Each axis of the weight is summed over with one of x, or stands in the output alone,
    and the first axis of x, that of the examples, stays.

    Examples
    --------
    >>> x, w = torch.rand(2, 5, 3), torch.rand(3, 4, 6)
    >>> product = as_product(lambda t: t is w, "nti,iho->nhto", x, w)
    >>> torch.allclose(product(), torch.einsum("nti,iho->nhto", x, w))
    True
    """
    if len(operands) == 1 and isinstance(operands[0], list | tuple):
        operands = tuple(operands[0])
    tensors = all(isinstance(one, Tensor) for one in operands)
    if not (isinstance(equation, str) and tensors and len(operands) == 2):
        return None
    if sum(map(is_weight, operands)) != 1:
        return None
    names, out = _axes(equation, operands)
    if [len(name) for name in names] != [one.dim() for one in operands]:
        return None  # what torch itself refuses
    (first, second), (x, weight) = names, operands
    if is_weight(x):
        x, weight, first, second = weight, x, second, first
    sizes = dict(zip(first, x.shape, strict=True))
    if any(sizes.get(axis, n) != n for axis, n in zip(second, weight.shape, strict=True)):
        return None  # an axis of one entry that is repeated
    summed = [axis for axis in second if axis in first and axis not in out]
    left = [axis for axis in first if axis not in summed]
    right = [axis for axis in second if axis not in summed]
    each = all(len(set(axes)) == len(axes) for axes in (first, second, out))
    apart = not set(left) & set(right) and set(out) == {*left, *right}
    if not (each and apart and summed and right and first[0] in left):
        return None
    order = [(left + right).index(axis) for axis in out]

    def product() -> Tensor:
        rows = x.permute([first.index(axis) for axis in left + summed]).flatten(len(left))
        turned = weight.permute([second.index(axis) for axis in summed + right])
        matrix = turned.reshape(turned.shape[: len(summed)].numel(), -1)
        outputs = (rows @ matrix).unflatten(-1, turned.shape[len(summed) :])
        return outputs.permute(order)

    return product


def _axes(equation: str, operands: tuple[Tensor, ...]) -> tuple[list[str], str]:
    """Return the axes of operands and of the output, all spelt out."""
    given, arrow, out = equation.replace(" ", "").partition("->")
    names = given.split(",")
    free = [letter for letter in string.ascii_letters if letter not in equation]
    more = [
        max(0, one.dim() - len(name.replace("...", "")))
        for name, one in zip(names, operands, strict=False)
    ]
    longest = "".join(free[: max(more)]) if "..." in equation else ""
    spelt = [
        name.replace("...", longest[len(longest) - extra :])
        for name, extra in zip(names, more, strict=False)
    ]
    if not arrow:
        once = Counter("".join(names).replace(".", ""))
        out = "..." * ("..." in equation)
        out += "".join(sorted(axis for axis, count in once.items() if count == 1))
    return spelt, out.replace("...", longest)


# Each says how it is called with known calls, or None where it is called as it is.
OPENED: Final[Mapping[Callable[..., Any], Callable[..., Made]]] = {
    F.multi_head_attention_forward: _written_out(F.multi_head_attention_forward),
    F.embedding_bag: as_rows,
    torch.einsum: as_product,
}
