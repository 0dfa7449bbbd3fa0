"""Inputs of a convolution as rows: a patch for every output position."""

from collections.abc import Sequence
from itertools import product
from typing import Any, Final

from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from fisherlab.numerics.memory import empty

_SHORT: Final = 3  # kernel entries along the last axis


def per_axis(value: Any, kernel: tuple[int, ...]) -> tuple[int, ...]:
    """Return a number for each axis of the kernel."""
    given = tuple(value) if isinstance(value, Sequence) else (value,)
    return given if len(given) == len(kernel) else given * len(kernel)


def zeros_around(
    padding: Any, kernel: tuple[int, ...], dilation: tuple[int, ...]
) -> tuple[tuple[int, int], ...]:
    """Return the zeros before and after each axis."""
    if padding == "same":
        totals = [d * (k - 1) for d, k in zip(dilation, kernel, strict=True)]
        return tuple((total // 2, total - total // 2) for total in totals)
    numbers = per_axis(0 if padding == "valid" else padding, kernel)
    return tuple((number, number) for number in numbers)


def patches(
    x: Tensor,
    kernel: tuple[int, ...],
    stride: tuple[int, ...],
    sides: tuple[tuple[int, int], ...],
    dilation: tuple[int, ...],
    positions: tuple[int, ...] | None = None,
) -> Float[Tensor, "n t k"]:
    """Unfold the input of a convolution: one row per output position.

    Features run over (channel, kernel positions), the order of ``weight.flatten(1)``.
    The first `positions` along each axis are taken, all by default.

    Examples
    --------
    >>> import torch
    >>> patches(torch.zeros(7, 3, 8, 8), (2, 2), (2, 2), ((0, 0), (0, 0)), (1, 1)).shape
    torch.Size([7, 16, 12])
    """
    flat = [side for pair in reversed(sides) for side in pair]
    x = F.pad(x, flat) if any(flat) else x
    dims = len(kernel)
    reaches = [d * (k - 1) + 1 for d, k in zip(dilation, kernel, strict=True)]
    counts = positions or tuple(
        (size - reach) // s + 1
        for size, reach, s in zip(x.shape[2:], reaches, stride, strict=True)
    )
    if 1 < kernel[-1] <= _SHORT:
        found = _shifted(x, kernel, stride, dilation, counts)
    else:
        for axis, reach in enumerate(reaches):
            x = x.unfold(2 + axis, reach, stride[axis])[..., :: dilation[axis]]
            x = x.narrow(2 + axis, 0, counts[axis])
        # (n, channel, *positions, *kernel) -> (n, *positions, channel, *kernel)
        order = [0, *range(2, 2 + dims), 1, *range(2 + dims, 2 + 2 * dims)]
        found = x.permute(order)
    return found.flatten(1 + dims).flatten(1, dims)


def _shifted(
    x: Tensor,
    kernel: tuple[int, ...],
    stride: tuple[int, ...],
    dilation: tuple[int, ...],
    counts: tuple[int, ...],
) -> Tensor:
    """Return (n, *positions, channel, *kernel), copied by kernel positions.

    One copy of the whole moves runs as long as the kernel's last axis: short ones take
    twice the time of a shifted copy of the image for every kernel position.
    """
    last = x.movedim(1, -1).contiguous()
    found = empty((len(x), *counts, x.shape[1], *kernel), x.dtype, x.device)
    for offset in product(*map(range, kernel)):
        places = [
            slice(o * d, o * d + s * (count - 1) + 1, s)
            for o, d, s, count in zip(offset, dilation, stride, counts, strict=True)
        ]
        there: tuple[Any, ...] = (..., *offset)
        found[there] = last[(slice(None), *places)]
    return found
