"""Pictures of matrices: |entries| by pixels, outlines of blocks, one colour scale."""

from collections.abc import Mapping, Sequence
from textwrap import fill, shorten
from typing import Any, Final, Literal

import matplotlib.pyplot as plt
import numpy as np
import xarray as xr
from matplotlib.axes import Axes
from matplotlib.collections import PatchCollection
from matplotlib.colors import LogNorm, Normalize
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.patches import Rectangle
from numpy.typing import NDArray

from fisherlab.plots.frames import nodes, require_result
from fisherlab.plots.style import as_vectors, publication, text
from fisherlab.showing import kind_of

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


COLOURS: Final = "Greys"
Scale = Literal["linear", "log"]
Blocks = Sequence[tuple[int, int]] | Mapping[str, tuple[int, int]]
_CENTRED: Final[dict[str, Any]] = {
    "ha": "center",
    "va": "center",
    "color": "#555555",
    "fontsize": "small",
    "parse_math": False,
}


def heatmap(
    da: xr.DataArray,
    ax: Axes | None = None,
    *,
    vmax: float | None = None,
    vmin: float | None = None,
    outlines: Blocks | None = None,
    scale: Scale = "linear",
    colorbar: bool = True,
    kernels: Sequence[Span] | None = None,
    pool: Pooled = "rms",
    rows: Span | None = None,
    columns: Span | None = None,
) -> Axes:
    """Draw the absolute entries of a matrix, of its pairs of kernels, or a part of it.

    The colours end at `vmax` (default: the 99.5th percentile of the entries) and
    begin at 0, on a log scale at `vmin` (default: the 5th percentile of the positive
    entries, at most six decades below `vmax`). `outlines` are (start, stop) pairs of
    square blocks on the diagonal; as a mapping from names they label the axes too, e.g.
    the layers of a network. Without names they are left out where they would bury the
    picture: below 6 pixels. Matrices of more than 2,000 rows are shown by the largest
    entry of each pixel, so that a single large entry stays visible; pixels end where
    blocks end, so that no block runs into its neighbour. The axes count entries of the
    matrix itself.

    With `kernels`, (start, stop) pairs as `fl.plots.kernels` makes them, a pixel is a pair
    of kernels: the root mean square of its entries, or with `pool="norm"` their norm.
    Entries of no kernel, the biases, are pixels of their own, and the axes count pixels.
    `rows` and `columns`, (first, one past the last) in what the axes count, show a window;
    the colours are those of the whole.

    Raises
    ------
    ValueError
        If `da` has not two dims, or for kernels or a window that are not in it.

    Examples
    --------
    >>> import matplotlib.pyplot as plt
    >>> import numpy as np
    >>> import xarray as xr
    >>> matrix = xr.DataArray(-np.eye(4), dims=("row", "col"))
    >>> ax = heatmap(matrix, vmax=2.0, outlines={"fc1": (0, 3), "fc2": (3, 4)})
    >>> ax.images[0].get_clim(), [t.get_text() for t in ax.get_yticklabels()]
    ((0.0, 2.0), ['fc1', 'fc2'])
    >>> plt.close("all")
    """
    require_result(da, xr.DataArray, "fl.inverse_blocks or xarray.DataArray(matrix)")
    if da.ndim != 2:
        raise ValueError(f"heatmap draws a matrix, got dims {da.dims}: select the rest")
    matrix = np.asarray(da.values)
    named = outlines if isinstance(outlines, Mapping) else {}
    squares = list(outlines.values() if isinstance(outlines, Mapping) else outlines or ())
    entries = int(da.attrs.get("entries", len(matrix)))  # pixels may be given of more
    whole = entries == len(matrix)
    if not whole and any(one is not None for one in (kernels, rows, columns)):
        raise ValueError(
            f"heatmap: {len(matrix)} rows of pixels of a matrix of {entries} were given; "
            "kernels and windows are drawn of matrices with all entries."
        )
    if kernels is not None:
        edges = edges_of(kernels, min(matrix.shape))
        matrix = pooled(matrix, edges, pool)
        places = np.searchsorted(edges, np.reshape(squares, (-1, 2)))
        squares = [(int(start), int(stop)) for start, stop in places]
    top = typical_maximum(matrix) if vmax is None else vmax
    window = (
        _window("rows", rows, len(matrix)),
        _window("columns", columns, matrix.shape[1]),
    )
    corner = window[0][0], window[1][0]
    part = matrix[slice(*window[0]), slice(*window[1])]
    borders = [edge for square in squares for edge in square] if whole else []
    shown = maxima(part, borders=borders, corner=corner)
    with publication():
        ax = _square_axes() if ax is None else ax
        extent = window if whole else ((0, entries), (0, entries))
        image = _draw(ax, shown, extent, _norm(shown, top, vmin, scale))
        pixels = max(PANEL_PIXELS, int(ax.bbox.width)) * len(matrix) // max(len(part), 1)
        outline(ax, squares if named else visible(squares, pixels), bold=bool(named))
        _label_blocks(ax, dict(zip(named, squares, strict=False)), extent)
        if colorbar:
            label = "|entry|" if kernels is None else f"{pool} of a pair of kernels"
            as_vectors(ax.figure.colorbar(image, ax=ax, label=label, shrink=0.8))
    return ax


def inverse_heatmap(
    tree: xr.DataTree,
    layers: Sequence[str] | None = None,
    approximators: Sequence[str] | None = None,
    *,
    scale: Scale = "linear",
    pool: Pooled | None = None,
    rows: Span | None = None,
    columns: Span | None = None,
) -> Figure:
    """Draw |(F̂ + λI)⁻¹| of each layer, the exact one beside the approximations.

    A row is a layer and shares one colour scale, which ends at the 99.5th percentile
    of the exact inverse and is printed with λ. It begins at 0, or with `scale="log"`
    at the 5th percentile of the exact inverse's positive entries. Light squares are
    the mini-blocks: the weights of one output neuron, or of one kernel. With `pool` a
    pixel is a pair of mini-blocks; `rows` and `columns` show a window; see `heatmap`.

    Raises
    ------
    ValueError
        If the tree has no layer, or not those layers or approximators, or that window.

    Examples
    --------
    >>> import matplotlib.pyplot as plt
    >>> import numpy as np
    >>> import xarray as xr
    >>> coords = {"approximator": ["exact"], "row": range(4), "col": range(4)}
    >>> inverse = xr.Dataset(
    ...     {"inverse": (("approximator", "row", "col"), np.eye(4)[None])},
    ...     coords,
    ...     {"weight_shape": [2, 2], "mini_block_size": 2, "lambda": 0.1},
    ... )
    >>> figure = inverse_heatmap(xr.DataTree.from_dict({"fc": inverse}))
    >>> figure.axes[0].get_title()
    'exact'
    >>> plt.close("all")
    """
    chosen = nodes(tree, layers, "inverse_blocks", "inverse")
    names = approximators or _labels(next(iter(chosen.values())))
    part: dict[str, Any] = {"rows": rows, "columns": columns, "scale": scale}
    with publication():
        figure, grid = _row_grid(len(chosen), len(names))
        for row, (layer, ds) in zip(grid, chosen.items(), strict=True):
            _inverse_row(row, layer, ds, names, part | _pixels(ds, pool))
        for ax, name in zip(grid[0], names, strict=True):
            ax.set_title(text(str(name)))
    return figure


def _labels(ds: xr.Dataset) -> list[str]:
    return [str(name) for name in ds["approximator"].values]


def _row_grid(rows: int, columns: int) -> tuple[Figure, Array]:
    size = (1.62 * columns + 1.3, 1.78 * rows + 0.35)
    tight = ConstrainedLayoutEngine(w_pad=0.03, h_pad=0.04, wspace=0.01, hspace=0.02)
    figure, grid = plt.subplots(rows, columns, figsize=size, squeeze=False, layout=tight)
    return figure, grid


def _pixels(ds: xr.Dataset, pool: Pooled | None) -> dict[str, Any]:
    blocks = mini_blocks(ds.attrs)
    return {} if pool is None or not blocks else {"kernels": blocks, "pool": pool}


def _inverse_row(
    axes: Array, layer: str, ds: xr.Dataset, names: Sequence[str], options: dict[str, Any]
) -> None:
    known = _labels(ds)
    # The exact inverse sets the scale of its row, whichever columns are drawn.
    exact = np.asarray(ds["inverse"].isel(approximator=0).values)
    if "kernels" in options:
        exact = pooled(exact, edges_of(options["kernels"], len(exact)), options["pool"])
    top = typical_maximum(exact)
    bottom = typical_minimum(exact, top) if options["scale"] == "log" else 0.0
    within = [] if "kernels" in options else visible(mini_blocks(ds.attrs))
    blocks = within or weight_rows(ds.attrs)
    image = None
    for ax, name in zip(axes, names, strict=True):
        matrix = ds["inverse"].sel(approximator=name) if name in known else None
        if matrix is None or not np.isfinite(matrix).any():
            ax.text(0.5, 0.5, _why(ds, name), transform=ax.transAxes, **_CENTRED)
            ax.spines[:].set_visible(False)
            ax.grid(visible=False)
            ax.set_box_aspect(1)  # as large as the pictures beside it
        else:
            limits = options | {"vmax": top, "vmin": bottom}
            heatmap(matrix, ax, outlines=blocks, colorbar=False, **limits)
            image = ax.images[0]
        ax.set(xticks=[], yticks=[], xlabel="", ylabel="")
    axes[0].set_ylabel(_row_label(layer, ds.attrs))
    if image is not None:
        _row_colorbar(axes, image, (bottom, top), ds.attrs)


def _row_label(layer: str, attrs: dict[Any, Any]) -> str:
    shape = "×".join(str(int(n)) for n in np.atleast_1d(attrs.get("weight_shape", ())))
    told = kind_of(layer, str(attrs.get("kind", ""))).replace(" · ", "\n")
    return f"layer {text(layer)}{told}" + (f"\n{shape}" if shape else "")


def _row_colorbar(
    axes: Array, image: Any, ends: tuple[float, float], attrs: dict[Any, Any]
) -> None:
    figure = axes[0].figure
    extend = "both" if ends[0] else "max"
    bar = figure.colorbar(image, ax=list(axes), fraction=0.05, pad=0.01, extend=extend)
    bar.set_ticks(list(ends), labels=[f"{end:.3g}" for end in ends])
    bar.minorticks_off()
    bar.outline.set_linewidth(0.5)
    as_vectors(bar)
    damping = attrs.get("lambda")
    if damping is not None:
        told = rf"$|(\hat{{F}} + \lambda I)^{{-1}}|$, λ = {float(damping):.3g}"
        bar.set_label(told, labelpad=-8, fontsize="small")


def _why(ds: xr.Dataset, name: str) -> str:
    """Say in a few short lines why an inverse is not there."""
    if name not in _labels(ds) or "status" not in ds:
        return "not\navailable"
    told = str(ds["status"].sel(approximator=name).item())
    told = "indefinite" if "positive definite" in told else told
    return (
        fill(shorten(told, 60, placeholder=" …"), 14) if told != "ok" else "not\navailable"
    )


def outline(ax: Axes, blocks: Sequence[tuple[int, int]], *, bold: bool = False) -> None:
    """Draw squares around blocks of the diagonal: light, or for layers bold.

    Examples
    --------
    >>> import matplotlib.pyplot as plt
    >>> _, ax = plt.subplots()
    >>> outline(ax, [(0, 2), (2, 4)])
    >>> len(ax.collections)
    1
    >>> plt.close("all")
    """
    if not blocks:
        return
    squares = [Rectangle((a, a), b - a, b - a) for a, b in blocks]
    width, alpha = (0.9, 1.0) if bold else (0.35, 0.6)
    look: dict[str, Any] = {"edgecolor": "#56B4E9", "linewidth": width, "alpha": alpha}
    ax.add_collection(PatchCollection(squares, facecolor="none", **look), autolim=False)


def _label_blocks(ax: Axes, blocks: Mapping[str, Span], window: tuple[Span, Span]) -> None:
    if not blocks:
        return
    (down, low), (left, right) = window
    slanted: dict[str, Any] = {"rotation": 40, "ha": "right", "rotation_mode": "anchor"}
    ax.set_yticks(*_ticks(blocks, down, low))
    ax.set_xticks(*_ticks(blocks, left, right), **slanted)
    ax.tick_params(length=0)


def _ticks(
    blocks: Mapping[str, Span], first: int, last: int
) -> tuple[list[float], list[str]]:
    seen = {n: (max(a, first), min(b, last)) for n, (a, b) in blocks.items()}
    seen = {name: ends for name, ends in seen.items() if ends[0] < ends[1]}
    return [sum(ends) / 2 for ends in seen.values()], [text(name) for name in seen]


def _window(what: str, given: Span | None, size: int) -> Span:
    first, last = (0, size) if given is None else (int(given[0]), int(given[1]))
    if not 0 <= first < last <= size:
        raise ValueError(
            f"heatmap: {what}={given} was given; (first, one past the last) within 0 to "
            f"{size} is expected."
        )
    return first, last


def _square_axes() -> Axes:
    _, ax = plt.subplots(figsize=(4.4, 3.8), layout="constrained")
    return ax


def _norm(shown: Array, top: float, vmin: float | None, scale: Scale) -> Normalize:
    if scale == "linear":
        return Normalize(0.0, top, clip=True)
    return LogNorm(vmin or typical_minimum(shown, top), top, clip=True)


def _draw(ax: Axes, shown: Array, window: tuple[Span, Span], norm: Normalize) -> Any:
    (down, low), (left, right) = window
    ax.grid(visible=False)
    ax.spines[["top", "right"]].set_visible(True)
    return ax.imshow(
        shown,
        cmap=COLOURS,
        norm=norm,
        extent=(left, right, low, down),
        interpolation="auto",
    )
