"""Where a tensor lies in a parameter, and which axis of a weight runs over the outputs."""

import copy
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fisherlab.numerics.devices import generators_kept

Span = tuple[int, int]


@dataclass(frozen=True)
class Place:
    """Rows and columns of a parameter as a matrix (d_out, ...).

    Parameters
    ----------
    rows, columns
        First, and one past the last.
    turned
        Whether the tensor is their transpose.
    """

    rows: Span
    columns: Span
    turned: bool = False


def place_of(tensor: Tensor, parameter: Tensor) -> Place | None:
    """Return where a tensor lies, None if it is no rectangle of the parameter.

    Strides tell: views, slices, reshapes and transposes are found, whoever made them.

    Examples
    --------
    >>> import torch
    >>> w = torch.zeros(6, 4)
    >>> place_of(w[2:4], w)
    Place(rows=(2, 4), columns=(0, 4), turned=False)
    >>> place_of(w[:, 1:].T, w)
    Place(rows=(0, 6), columns=(1, 4), turned=True)
    >>> place_of(w[::2], w) is None
    True
    """
    if not parameter.dim() or not tensor.dim():
        return None
    height = parameter.shape[0]
    width = parameter.numel() // max(height, 1)
    if tensor is parameter:
        return Place((0, height), (0, width))
    if not parameter.is_contiguous() or not tensor.numel():
        return None
    try:
        found = tensor.view(tensor.shape[0], -1)
    except RuntimeError:  # no matrix without a copy
        return None
    if found.untyped_storage().data_ptr() != parameter.untyped_storage().data_ptr():
        return None
    offset = int(found.storage_offset() - parameter.storage_offset())
    at = divmod(offset, max(width, 1))
    return _rectangle(found, (height, width), at) or _rectangle(
        found.T, (height, width), at, turned=True
    )


def _rectangle(
    found: Tensor, shape: tuple[int, int], at: tuple[int, int], turned: bool = False
) -> Place | None:
    """Return the rows and columns from a corner on, if the strides are the parameter's."""
    (height, width), (row, column) = shape, at
    (rows, columns), (down, right) = found.shape, found.stride()
    aligned = (rows == 1 or down == width) and (columns == 1 or right == 1)
    inside = row >= 0 and row + rows <= height and column + columns <= width
    if not aligned or not inside:
        return None
    return Place((row, row + rows), (column, column + columns), turned)


TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
FIRST = (nn.Linear, nn.Bilinear, nn.Embedding, nn.EmbeddingBag, nn.MultiheadAttention)
RECURRENT = (nn.RNNBase, nn.RNNCellBase)


def output_axis(module: nn.Module, name: str) -> int:
    """Return 1 where the weight is stored (in, out), else 0.

    Modules of one's own that hold a weight (with a bias) and nothing else are tried: the
    gradient of one output for one row of numbers fills a row of F.linear's weight, and a
    column of that of ``x @ W``, which GPT-2's Conv1D has.

    Examples
    --------
    >>> [output_axis(m, "weight") for m in (nn.ConvTranspose1d(2, 3, 1), nn.Linear(2, 2))]
    [1, 0]
    """
    if isinstance(module, TRANSPOSED):
        return int(name == "weight")
    own = module._parameters
    alone = not module._modules and not module._buffers and set(own) <= {"weight", "bias"}
    weight = own.get(name)
    if name != "weight" or weight is None or weight.dim() != 2 or not alone:
        return 0
    known = isinstance(module, FIRST + RECURRENT) or weight.numel() < 2
    return 0 if known else _tried(module, weight)


def _tried(module: nn.Module, weight: Tensor) -> int:
    """Call a copy that shares nothing on one row, of either length."""
    for length in sorted(set(weight.shape)):
        grad = _gradient(module, weight, length)
        if grad is None:
            continue
        rows, columns = int(grad.any(1).sum()), int(grad.any(0).sum())
        if (rows, columns) in ((length, 1), (1, length)):
            return int(columns == 1 and weight.shape[0] == length)
    return 0


def _gradient(module: nn.Module, weight: Tensor, length: int) -> Tensor | None:
    """Return ∂y₀/∂W for a row of ones of this length, or None if it is not taken."""
    twin, small = copy.copy(module), 1 / weight.numel()
    with generators_kept(weight.device), torch.enable_grad():
        try:
            leaf = nn.Parameter(torch.full_like(weight, small))
            twin._parameters = {**module._parameters, "weight": leaf}
            out = type(module).forward(twin, weight.new_ones(1, length))
            (grad,) = torch.autograd.grad(out.flatten()[0], leaf)
        except Exception:  # any failure of somebody else's code: it takes other inputs
            return None
    return grad
