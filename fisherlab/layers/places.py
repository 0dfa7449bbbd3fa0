"""Where a tensor that was given to a call lies in a parameter."""

from dataclasses import dataclass

from torch import Tensor

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
