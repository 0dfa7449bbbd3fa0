"""How a weight is used: the functional calls that are known, whoever makes them.

A layer is a call such as ``F.linear(x, weight, bias)``, and its gradient for one example is
``D_n = Σ_t g_nt a_ntᵀ``, whatever the class of the module around it. One function reads the
arguments of each known call; after that, linear layers, sequences and convolutions are the
same code.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import product
from typing import Any, Final, Literal

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from fisherlab.layers.blocks import Block, Span
from fisherlab.numerics.devices import empty

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
    spare: int = 0,
) -> Float[Tensor, "n t k"]:
    """Unfold the input of a convolution: one row per output position.

    Features run over (channel, kernel positions), the order of ``weight.flatten(1)``.
    The first `positions` along each axis are taken, all by default. After the features
    come `spare` columns that are left to be filled.

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
    short = 1 < kernel[-1] <= _SHORT
    if not short and not spare:
        return (
            _windows(x, reaches, stride, dilation, counts)
            .flatten(1 + dims)
            .flatten(1, dims)
        )
    width = x.shape[1] * math.prod(kernel)
    found = empty((len(x), *counts, width + spare), x.dtype, x.device)
    features = found[..., :width].unflatten(-1, (x.shape[1], *kernel))
    if short:
        _copy_shifted(features, x, stride, dilation, counts)
    else:
        features.copy_(_windows(x, reaches, stride, dilation, counts))
    return found.flatten(1, dims)


def _windows(
    x: Tensor,
    reaches: Sequence[int],
    stride: tuple[int, ...],
    dilation: tuple[int, ...],
    counts: tuple[int, ...],
) -> Tensor:
    """View x as (n, *positions, channel, *kernel)."""
    dims = len(reaches)
    for axis, reach in enumerate(reaches):
        x = x.unfold(2 + axis, reach, stride[axis])[..., :: dilation[axis]]
        x = x.narrow(2 + axis, 0, counts[axis])
    return x.permute([0, *range(2, 2 + dims), 1, *range(2 + dims, 2 + 2 * dims)])


def _copy_shifted(
    features: Tensor,
    x: Tensor,
    stride: tuple[int, ...],
    dilation: tuple[int, ...],
    counts: tuple[int, ...],
) -> None:
    """Fill (n, *positions, channel, *kernel) by kernel positions.

    One copy of the whole moves runs as long as the kernel's last axis: short ones take
    twice the time of a shifted copy of the image for every kernel position.
    """
    last = x.movedim(1, -1).contiguous()
    for offset in product(*map(range, features.shape[2 + len(counts) :])):
        places = [
            slice(o * d, o * d + s * (count - 1) + 1, s)
            for o, d, s, count in zip(offset, dilation, stride, counts, strict=True)
        ]
        there: tuple[Any, ...] = (..., *offset)
        features[there] = last[(slice(None), *places)]


Kind = Literal["linear", "convolution", "transposed convolution", "embedding", "bias"]
Rows = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Form:
    """What the gradient of a weight is made of.

    Parameters
    ----------
    looked_up
        Whether the inputs are the rows of a table, (n, t), -1 for padding.
    turned
        Whether the rows of the weight belong to the inputs, ``D = Σ a gᵀ``, as in
        ``x @ W``; else ``D = Σ g aᵀ``.
    groups
        Groups of outputs, each with features of its own, one after the other.
    """

    looked_up: bool = False
    turned: bool = False
    groups: int = 1


@dataclass(frozen=True, eq=False)
class Reading:
    """One call that may use a weight, a bias or both.

    Parameters
    ----------
    kind
        The rule that reads the call.
    input, weight, bias
        What was given to the call.
    rows
        From the input (n, ...) to features (n, t, d_in without bias), or the rows (n, t)
        that an embedding looks up.
    outputs
        From gradients of the output (v, n, ...) to (v, n, t, d_out).
    flipped
        Whether the weight is given as (in, out).
    bias_outputs
        As `outputs`, for the bias, where that is another.
    roomy
        As `rows`, with a last column left to be filled, where that spares a copy.
    """

    kind: Kind
    input: Tensor
    weight: Tensor | None
    bias: Tensor | None
    rows: Rows
    outputs: Rows
    flipped: bool = False
    groups: int = 1
    bias_outputs: Rows | None = None
    roomy: Rows | None = None


@dataclass(frozen=True, eq=False)
class Use:
    """How one call uses the parameters of one block.

    Parameters
    ----------
    reading
        The call.
    block, parameter
        Whose, and one of its parameters (for precision and device).
    form
        What the gradient is made of.
    rows
        Rows of the block's weight that are used.
    columns
        Columns of it without the bias, None where the bias alone is used.
    ones
        Whether the bias is used too.
    shape
        Of the call's output.
    """

    reading: Reading
    block: Block
    parameter: Tensor
    form: Form
    rows: Span
    columns: Span | None
    ones: bool
    shape: tuple[int, ...] = ()

    def features(self, rows: Span | None = None) -> Tensor:
        """Return what the gradients are multiplied by, as the block has it.

        (n, t, d_in) with the bias column, or the rows (n, t) of a table; of a turned form
        (n, t, rows), zero where they are not used.
        """
        reading, block = self.reading, self.block
        if self.columns is None:
            return self._ones()
        if reading.roomy and self.columns == self._all_columns and block.bias is not None:
            found = reading.roomy(reading.input.detach().to(self.parameter.dtype))
            found[..., -1] = float(self.ones)
            return found
        found = reading.rows(reading.input.detach())
        if self.form.looked_up:
            return torch.where(found >= 0, found + self.rows[0], found)
        found = found.to(self.parameter.dtype)
        if self.form.turned:
            return _within(found, self.rows, rows or self.rows)
        found = _within(found, self.columns, self._all_columns)
        if block.bias is None:
            return found
        return _with_last_column(found, float(self.ones), self.form.groups)

    @property
    def positions(self) -> int:
        """How many outputs the call has, of all examples."""
        return self.features().shape[:2].numel()

    def evidence(self) -> Tensor:
        """Return rows (n, t, ...) that tell examples apart; of a bias the layer's input."""
        reading = self.reading
        if self.columns is None and reading.bias_outputs is None:
            return reading.rows(reading.input.detach())
        return self.features()

    def gradients(self, outputs: Tensor, rows: Span | None = None) -> Tensor:
        """Return gradients (v, n, ...) of the output as rows (v, n, t, d_out).

        Of a turned form (v, n, t, columns), zero where they are not used.
        """
        reading = self.reading
        if self.columns is None:
            found = (reading.bias_outputs or reading.outputs)(outputs)
            return _within(found, self.rows, rows or self.rows)
        found = reading.outputs(outputs)
        if not (self.form.looked_up or self.form.turned):
            return _within(found, self.rows, rows or self.rows)
        if self.form.groups > 1:
            return found
        first, last = self._all_columns
        return _within(found, self.columns, (first, last + (self.block.bias is not None)))

    @property
    def _all_columns(self) -> Span:
        return 0, self.block.weight_shape[1] - (self.block.bias is not None)

    def _ones(self) -> Tensor:
        """Return the inputs of a bias: ones in the last column."""
        outputs = self.reading.bias_outputs or self.reading.outputs
        n, t = outputs(torch.empty(1, *self.shape, device="meta")).shape[1:3]
        found = self.parameter.new_zeros(n, t, self.block.weight_shape[1])
        found[..., -1] = 1
        return found


def _within(tensor: Tensor, span: Span, whole: Span) -> Tensor:
    """Put the last axis, a span of some whole, into it, among zeros."""
    sides = span[0] - whole[0], whole[1] - span[1]
    return F.pad(tensor, sides) if any(sides) else tensor


def _with_last_column(
    features: Float[Tensor, "n t i"], value: float, groups: int = 1
) -> Float[Tensor, "n t j"]:
    """Append the column that multiplies the bias, to each group of features."""
    grouped = features.unflatten(2, (groups, -1))
    *sizes, width = grouped.shape
    out = empty((*sizes, width + 1), features.dtype, features.device)
    out[..., :-1] = grouped
    out[..., -1] = value
    return out.flatten(2)


def _linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Iterator[Reading]:
    if weight.dim() == 2 and input.dim() > 1:
        yield Reading("linear", input, weight, bias, _all_positions, _last_axis)


def _product(input: Tensor, other: Tensor) -> Iterator[Reading]:
    yield from _added_product(None, input, other)


def _added_product(
    bias: Tensor | None, input: Tensor, other: Tensor, *, beta: Any = 1, alpha: Any = 1
) -> Iterator[Reading]:
    """Read ``bias + input @ other``: x @ W, or W @ X with positions last."""
    if beta != 1 or alpha != 1 or min(input.dim(), other.dim()) < 2:
        return
    if other.dim() == 2:
        yield Reading("linear", input, other, bias, _all_positions, _last_axis, True)
    if input.dim() == 2 and other.dim() < 4:  # a bias has the outputs first: unknown
        yield Reading("linear", other, input, None, _positions_last, _second_to_last)


def _reflected(other: Tensor, input: Tensor) -> Iterator[Reading]:
    yield from _product(input, other)


def _sum(input: Any, other: Any, *, alpha: Any = 1) -> Iterator[Reading]:
    """Read ``outputs + bias``, in either order."""
    if alpha != 1 or not (isinstance(input, Tensor) and isinstance(other, Tensor)):
        return
    for outputs, bias in ((input, other), (other, input)):
        if bias.dim() == 1 and outputs.dim() > 1 and outputs.shape[-1] == len(bias):
            yield Reading("bias", outputs, None, bias, _all_positions, _last_axis)


def _embedding(
    input: Tensor,
    weight: Tensor,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> Iterator[Reading]:
    if max_norm is not None or scale_grad_by_freq:  # the call or its gradient is another
        return
    padding = None if padding_idx is None else padding_idx % len(weight)
    rows = partial(_tokens, padding=padding)
    yield Reading("embedding", input, weight, None, rows, _last_axis)


def _convolution(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> Iterator[Reading]:
    if input.dim() != weight.dim():
        return
    kernel = tuple(weight.shape[2:])
    dilations = per_axis(dilation, kernel)
    rows = partial(
        patches,
        kernel=kernel,
        stride=per_axis(stride, kernel),
        sides=zeros_around(padding, kernel, dilations),
        dilation=dilations,
    )
    roomy = partial(rows, spare=1) if groups == 1 else None
    yield Reading(
        "convolution", input, weight, bias, rows, _second_axis, groups=groups, roomy=roomy
    )


def _transposed_convolution(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    output_padding: Any = 0,
    groups: int = 1,
    dilation: Any = 1,
) -> Iterator[Reading]:
    """Read the adjoint of a convolution: its output gradient is what is unfolded."""
    if input.dim() != weight.dim():
        return
    kernel = tuple(weight.shape[2:])
    unfold = partial(
        patches,
        kernel=kernel,
        stride=per_axis(stride, kernel),
        sides=zeros_around(padding, kernel, ()),
        dilation=per_axis(dilation, kernel),
        positions=tuple(input.shape[2:]),
    )
    yield Reading(
        "transposed convolution",
        input,
        weight,
        bias,
        _channels_second,
        partial(_unfolded, unfold=unfold),
        flipped=True,
        groups=groups,
        bias_outputs=_second_axis,
    )


# What a call of each known function may be; a product has two candidates, as either side
# may be the weight.
READERS: Mapping[Callable[..., Any], Callable[..., Iterator[Reading]]] = {
    F.linear: _linear,
    F.embedding: _embedding,
    **dict.fromkeys((F.conv1d, F.conv2d, F.conv3d), _convolution),
    **dict.fromkeys(
        (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d),
        _transposed_convolution,
    ),
    **dict.fromkeys((torch.matmul, Tensor.matmul, torch.mm, Tensor.mm), _product),
    Tensor.__matmul__: _product,
    Tensor.__rmatmul__: _reflected,
    **dict.fromkeys((torch.addmm, Tensor.addmm), _added_product),
    **dict.fromkeys((torch.add, Tensor.add, Tensor.add_, Tensor.__add__), _sum),
}


def _all_positions(x: Tensor) -> Tensor:
    return x[:, None] if x.dim() == 2 else x.flatten(1, -2)


def _positions_last(x: Tensor) -> Tensor:
    return x.mT if x.dim() > 2 else x.T[None]


def _channels_second(x: Tensor) -> Tensor:
    return x.flatten(2).mT


def _last_axis(gradients: Tensor) -> Float[Tensor, "v n t o"]:
    return gradients[:, :, None] if gradients.dim() == 3 else gradients.flatten(2, -2)


def _second_axis(gradients: Tensor) -> Float[Tensor, "v n t o"]:
    return gradients.flatten(3).transpose(2, 3)


def _second_to_last(gradients: Tensor) -> Float[Tensor, "v n t o"]:
    return (gradients if gradients.dim() > 3 else gradients[:, None]).mT


def _unfolded(gradients: Tensor, unfold: Rows) -> Float[Tensor, "v n t o"]:
    return unfold(gradients.flatten(0, 1)).unflatten(0, gradients.shape[:2])


def _tokens(x: Tensor, padding: int | None) -> Tensor:
    """Return the rows looked up; the padding row has no gradient, so it counts as none."""
    rows = x[:, None] if x.dim() == 1 else x.flatten(1)
    return rows if padding is None else rows.masked_fill(rows == padding, -1)
