"""How a weight is used: the functional calls that are known, whoever makes them.

A layer is a call such as ``F.linear(x, weight, bias)``, and its gradient for one example is
``D_n = Σ_t g_nt a_ntᵀ``, whatever the class of the module around it. One function reads the
arguments of each known call; after that, linear layers, sequences and convolutions are the
same code.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from fisherlab.numerics.memory import empty

Kind = Literal["linear", "convolution", "embedding"]


@dataclass(frozen=True)
class Form:
    """What the gradient of a weight is made of.

    Parameters
    ----------
    kind
        The rule that reads the call.
    groups
        Groups of outputs, each with features of its own, one after the other.
    """

    kind: Kind
    groups: int = 1

    @property
    def looked_up(self) -> bool:
        """Whether the inputs are the rows of a table, (n, t), -1 for padding."""
        return self.kind == "embedding"

    def gradients(self, outputs: Tensor) -> Float[Tensor, "v n t o"]:
        """Return output gradients (v, n, ...) as rows, positions between n and features."""
        if self.kind == "convolution":
            return outputs.flatten(3).transpose(2, 3)
        return outputs.reshape(*outputs.shape[:2], -1, outputs.shape[-1])


@dataclass(frozen=True, eq=False)
class Use:
    """One call that uses a weight.

    Parameters
    ----------
    form
        What its gradient is made of.
    input, weight, bias
        What was given to the call.
    rows
        From the input (n, ...) to features (n, t, d_in without bias), or the rows (n, t)
        that an embedding looks up.
    """

    form: Form
    input: Tensor
    weight: Tensor
    bias: Tensor | None
    rows: Callable[[Tensor], Tensor]

    def features(self) -> Tensor:
        """Return the rows of the input, in the precision of the weight."""
        found = self.rows(self.input.detach())
        return found if self.form.looked_up else found.to(self.weight.dtype)


def read(
    function: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]
) -> Use | None:
    """Return the use of a weight that a call is, or None if it is no known one.

    Examples
    --------
    >>> import torch
    >>> x, weight = torch.ones(2, 3), torch.ones(4, 3)
    >>> use = read(F.linear, (x, weight), {})
    >>> use.form, use.features().shape
    (Form(kind='linear', groups=1), torch.Size([2, 1, 3]))
    >>> read(torch.sin, (x,), {}) is None
    True
    """
    reader = _READERS.get(function)
    return None if reader is None else reader(*args, **kwargs)


def _linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Use | None:
    if weight.dim() != 2 or input.dim() < 2:
        return None
    return Use(_LINEAR, input, weight, bias, _all_positions)


def _embedding(
    input: Tensor,
    weight: Tensor,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> Use | None:
    if max_norm is not None or scale_grad_by_freq:  # the call or its gradient is another
        return None
    padding = None if padding_idx is None else padding_idx % len(weight)
    return Use(_EMBEDDING, input, weight, None, partial(_tokens, padding=padding))


def _convolution(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> Use | None:
    if input.dim() != weight.dim():
        return None
    kernel = tuple(weight.shape[2:])
    dilations = _each(dilation, kernel)
    rows = partial(
        patches,
        kernel=kernel,
        stride=_each(stride, kernel),
        sides=_sides(padding, kernel, dilations),
        dilation=dilations,
    )
    return Use(Form("convolution", groups), input, weight, bias, rows)


_LINEAR, _EMBEDDING = Form("linear"), Form("embedding")
_READERS: dict[Callable[..., Any], Callable[..., Use | None]] = {
    F.linear: _linear,
    F.embedding: _embedding,
    F.conv1d: _convolution,
    F.conv2d: _convolution,
    F.conv3d: _convolution,
}


def _all_positions(x: Tensor) -> Tensor:
    return x.reshape(x.shape[0], -1, x.shape[-1])


def _tokens(x: Tensor, padding: int | None) -> Tensor:
    """Return the rows looked up; the padding row has no gradient, so it counts as none."""
    rows = x.reshape(x.shape[0], -1)
    return rows if padding is None else rows.masked_fill(rows == padding, -1)


def _each(value: Any, kernel: tuple[int, ...]) -> tuple[int, ...]:
    """Return a number for each axis of the kernel."""
    given = tuple(value) if isinstance(value, Sequence) else (value,)
    return given if len(given) == len(kernel) else given * len(kernel)


def _sides(
    padding: Any, kernel: tuple[int, ...], dilation: tuple[int, ...]
) -> tuple[tuple[int, int], ...]:
    """Return the zeros before and after each axis."""
    if padding == "same":
        totals = [d * (k - 1) for d, k in zip(dilation, kernel, strict=True)]
        return tuple((total // 2, total - total // 2) for total in totals)
    numbers = _each(0 if padding == "valid" else padding, kernel)
    return tuple((number, number) for number in numbers)


def patches(
    x: Tensor,
    kernel: tuple[int, ...],
    stride: tuple[int, ...],
    sides: tuple[tuple[int, int], ...],
    dilation: tuple[int, ...],
) -> Float[Tensor, "n t k"]:
    """Unfold the input of a convolution: one row per output position.

    Features run over (channel, kernel positions), the order of ``weight.flatten(1)``.

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
    # (n, channel, *positions, *kernel) -> (n, positions, channel·kernel)
    order = [0, *range(2, 2 + dims), 1, *range(2 + dims, 2 + 2 * dims)]
    return x.permute(order).flatten(1 + dims).flatten(1, dims)


def with_bias_column(
    features: Float[Tensor, "n t i"], groups: int = 1
) -> Float[Tensor, "n t j"]:
    """Append the column of ones that multiplies the bias, to each group of features."""
    grouped = features.unflatten(2, (groups, -1))
    *sizes, width = grouped.shape
    out = empty((*sizes, width + 1), features.dtype, features.device)
    out[..., :-1] = grouped
    out[..., -1] = 1
    return out.flatten(2)
