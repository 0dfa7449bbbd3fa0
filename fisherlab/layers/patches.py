"""Inputs of a convolution as rows: a patch for every output position."""

from collections.abc import Sequence
from typing import Any

from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F


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
    for axis in range(dims):
        reach = dilation[axis] * (kernel[axis] - 1) + 1
        x = x.unfold(2 + axis, reach, stride[axis])
        x = x[..., :: dilation[axis]]
        if positions is not None:
            x = x.narrow(2 + axis, 0, positions[axis])
    # (n, channel, *positions, *kernel) -> (n, positions, channel·kernel)
    order = [0, *range(2, 2 + dims), 1, *range(2 + dims, 2 + 2 * dims)]
    return x.permute(order).flatten(1 + dims).flatten(1, dims)
