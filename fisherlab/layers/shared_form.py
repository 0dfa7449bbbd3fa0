"""The [example, position, feature] form of the layers that share one weight.

After this conversion linear layers, sequences and convolutions are the same code: the
gradient of one example is ``D_n = Σ_t g_nt a_ntᵀ``.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from fisherlab.numerics.memory import empty

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


@dataclass(frozen=True)
class SharedForm:
    """How one module's input and output gradient become rows of features.

    Parameters
    ----------
    inputs
        Module input (n, ...) to (n, t, d_in without bias).
    gradients
        Output gradient (v, n, ...) to (v, n, t, d_out).
    groups
        Groups of outputs, each with features of its own, one after the other.
    looked_up
        Whether the inputs are the rows that an embedding looks up, (n, t), -1 for
        padding; the gradients are then those of the rows found.
    """

    inputs: Callable[[Tensor], Tensor]
    gradients: Callable[[Tensor], Float[Tensor, "v n t o"]]
    groups: int = 1
    looked_up: bool = False


def shared_form(module: nn.Module) -> SharedForm | None:
    """Return the shared form of a module, or None if it has none.

    Linear layers on any number of positions, convolutions in one, two or three
    dimensions with any groups, stride, padding, padding mode and dilation, and
    embeddings whose forward pass changes nothing (no max_norm, no frequency scaling).
    """
    if type(module) is nn.Linear:
        return SharedForm(
            lambda x: x.reshape(x.shape[0], -1, x.shape[-1]),
            lambda g: g.reshape(g.shape[0], g.shape[1], -1, g.shape[-1]),
        )
    if isinstance(module, CONVOLUTIONS) and type(module) in CONVOLUTIONS:
        return SharedForm(
            lambda x: patches(module, x),
            lambda g: g.flatten(3).transpose(2, 3),
            module.groups,
        )
    if type(module) is nn.Embedding and _is_plain(module):
        return SharedForm(
            lambda x: _rows(module, x),
            lambda g: g.reshape(g.shape[0], g.shape[1], -1, g.shape[-1]),
            looked_up=True,
        )
    return None


def _is_plain(module: nn.Embedding) -> bool:
    return module.max_norm is None and not module.scale_grad_by_freq


def _rows(module: nn.Embedding, x: Tensor) -> Tensor:
    """Return the rows looked up; the padding row has no gradient, so it counts as none."""
    rows = x.reshape(x.shape[0], -1)
    return (
        rows
        if module.padding_idx is None
        else rows.masked_fill(rows == module.padding_idx, -1)
    )


def patches(module: Any, x: Tensor) -> Float[Tensor, "n t k"]:
    """Unfold the input of a convolution: one row per output position.

    Features run over (channel, kernel positions), the order of ``weight.flatten(1)``.

    Examples
    --------
    >>> import torch
    >>> conv = nn.Conv2d(3, 5, kernel_size=2, stride=2)
    >>> patches(conv, torch.zeros(7, 3, 8, 8)).shape
    torch.Size([7, 16, 12])
    """
    x = _padded(module, x)
    dims = len(module.kernel_size)
    for axis in range(dims):
        reach = module.dilation[axis] * (module.kernel_size[axis] - 1) + 1
        x = x.unfold(2 + axis, reach, module.stride[axis])
        x = x[..., :: module.dilation[axis]]
    # (n, channel, *positions, *kernel) -> (n, positions, channel·kernel)
    order = [0, *range(2, 2 + dims), 1, *range(2 + dims, 2 + 2 * dims)]
    x = x.permute(order)
    return x.flatten(1 + dims).flatten(1, dims)


def _padded(module: Any, x: Tensor) -> Tensor:
    if isinstance(module.padding, str):
        sides = list(module._reversed_padding_repeated_twice)
    else:
        sides = [side for pad in reversed(module.padding) for side in (pad, pad)]
    if not any(sides):
        return x
    mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
    return F.pad(x, sides, mode=mode)


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
