"""The numbers behind pictures of matrices: spans, pixels, and ends of colour scales."""

from collections.abc import Sequence
from typing import Any, Final, Literal

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
Span = tuple[int, int]
Pooled = Literal["rms", "norm"]
LIMIT: Final = 2000
"""Rows a picture has at most; above it each pixel shows the largest of its entries."""
PANEL_PIXELS: Final = 150  # a picture of a row of inverses, on a screen
_DECADES: Final = 1e-6
"""How far below its upper end a logarithmic colour scale begins at most."""


def kernels(weight_shape: Sequence[int], size: int) -> list[Span]:
    """List the (start, stop) of the kernels of a convolution among the rows of its block.

    Parameters
    ----------
    weight_shape
        (d_out, d_in), the bias as one last column.
    size
        Entries of a kernel, such as 9 for 3×3.

    Raises
    ------
    ValueError
        If a row holds no kernel of that size.

    Examples
    --------
    >>> kernels((2, 5), 2)
    [(0, 2), (2, 4), (5, 7), (7, 9)]
    """
    d_out, d_in = (int(n) for n in weight_shape)
    if not 0 < size <= d_in:
        raise ValueError(
            f"kernels: size={size} was given for a weight of shape {(d_out, d_in)}; "
            f"1 to {d_in} entries are expected."
        )
    starts = [o * d_in + j * size for o in range(d_out) for j in range(d_in // size)]
    return [(start, start + size) for start in starts]


def mini_blocks(attrs: dict[Any, Any]) -> list[tuple[int, int]]:
    """List the (start, stop) of the mini-blocks along the diagonal of a layer.

    With the row-major vec, row o of the weight begins at o·d_in; its bias, where
    the size of a mini-block does not cover it, is left without an outline.

    Examples
    --------
    >>> mini_blocks({"weight_shape": [2, 5], "mini_block_size": 2})
    [(0, 2), (2, 4), (5, 7), (7, 9)]
    """
    shape, size = attrs.get("weight_shape"), int(attrs.get("mini_block_size", 0))
    return [] if shape is None or size < 2 else kernels(shape, size)


def weight_rows(attrs: dict[Any, Any]) -> list[tuple[int, int]]:
    """List the blocks of the rows of a weight whose mini-blocks are smaller."""
    if not mini_blocks(attrs):
        return []
    d_out, d_in = (int(n) for n in attrs["weight_shape"])
    return [(o * d_in, (o + 1) * d_in) for o in range(d_out)]


def visible(
    blocks: list[tuple[int, int]], pixels: int = PANEL_PIXELS
) -> list[tuple[int, int]]:
    """Return blocks whose outlines leave something of the picture: 6 pixels or more.

    Examples
    --------
    >>> visible([(0, 2), (2, 4)]), visible([(k, k + 1) for k in range(90)])
    ([(0, 2), (2, 4)], [])
    """
    if not blocks:
        return []
    size = min(stop - start for start, stop in blocks)
    return blocks if size * pixels >= 6 * blocks[-1][1] else []


def edges_of(spans: Sequence[Span], size: int) -> Array:
    """Return where pixels begin, and the size: spans, and entries beside them alone.

    Raises
    ------
    ValueError
        If spans overlap or leave the matrix.

    Examples
    --------
    >>> edges_of([(0, 2), (2, 4)], 5).tolist()
    [0, 2, 4, 5]
    """
    ordered = sorted((int(start), int(stop)) for start, stop in spans)
    ends = [0, *(stop for _, stop in ordered)]
    apart = all(a >= end and b > a for (a, b), end in zip(ordered, ends, strict=False))
    if not apart or ends[-1] > size:
        raise ValueError(
            f"heatmap: kernels={list(spans)[:3]}… are not (start, stop) pairs apart from "
            f"one another within the {size} rows; fl.plots.kernels makes them."
        )
    inside = [at for start, stop in ordered for at in range(start + 1, stop)]
    return np.setdiff1d(np.arange(size + 1), inside)


def pooled(matrix: Array, edges: Array, how: Pooled = "rms") -> Array:
    """Return a number a pair of kernels: the root mean square of its entries, or the norm.

    Examples
    --------
    >>> pooled(np.diag([3.0, 4.0, 1.0]), np.array([0, 2, 3]), "norm")
    array([[5., 0.],
           [0., 1.]])
    """
    squares = np.abs(matrix) ** 2
    for axis in (0, 1):
        squares = np.add.reduceat(squares, edges[:-1], axis=axis)
    counts = np.outer(np.diff(edges), np.diff(edges)) if how == "rms" else 1.0
    return np.asarray(np.sqrt(squares / counts))


def maxima(
    matrix: Array,
    limit: int = LIMIT,
    borders: Sequence[int] = (),
    corner: tuple[int, int] = (0, 0),
) -> Array:
    """Shrink |matrix| to at most `limit` rows and columns by the maxima of its pixels.

    Pixels are equally large, but for those at a border: they end there. `corner` is where
    the borders count from.

    Examples
    --------
    >>> import numpy as np
    >>> maxima(np.array([[0.0, -3.0], [1.0, 2.0]]), limit=1)
    array([[3.]])
    >>> maxima(np.diag([1.0, 1.0, 1.0, 2.0, 2.0, 2.0]), limit=3, borders=[3])
    array([[1., 0., 0.],
           [0., 2., 0.],
           [0., 0., 2.]])
    """
    shown = np.abs(matrix)
    for axis, size in enumerate(matrix.shape):
        factor = -(-size // limit)
        if factor > 1:
            starts = _pixel_starts(size, factor, [b - corner[axis] for b in borders])
            shown = np.maximum.reduceat(shown, starts, axis=axis)
    return shown


def _pixel_starts(size: int, factor: int, borders: Sequence[int]) -> Array:
    starts = np.arange(0, size, factor)
    inside = np.array(sorted({b for b in borders if 0 < b < size}), dtype=starts.dtype)
    # Blocks of less than two pixels are smaller than what the picture can show.
    if inside.size and np.diff([0, *inside, size]).min() >= 2 * factor:
        nearest = np.minimum(np.rint(inside / factor).astype(int), len(starts) - 1)
        starts[nearest] = inside
    return starts


def typical_maximum(matrix: Array) -> float:
    """Return the 99.5th percentile of |entries|, or their maximum where that is 0.

    Examples
    --------
    >>> import numpy as np
    >>> typical_maximum(np.zeros((2, 2)))
    1.0
    """
    sizes = np.abs(matrix[np.isfinite(matrix)])
    if not sizes.size or not sizes.max():
        return 1.0
    return float(np.percentile(sizes, 99.5)) or float(sizes.max())


def typical_minimum(matrix: Array, top: float) -> float:
    """Return the 5th percentile of positive |entries|, at most six decades below the top.

    Examples
    --------
    >>> typical_minimum(np.array([[0.0, 1e-9]]), 1.0)
    1e-06
    """
    sizes = np.abs(matrix[np.isfinite(matrix) & (matrix != 0)])
    low = float(np.percentile(sizes, 5)) if sizes.size else 0.0
    return min(max(low, top * _DECADES), top / 10)
