"""Pictures of matrices: |entries|, layer and mini-block outlines, one colour scale."""

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

from fisherlab.plots.frames import require_result
from fisherlab.plots.style import as_vectors, publication, text

Array = NDArray[Any]
LIMIT: Final = 2000
"""Rows a picture has at most; above it each pixel shows the largest of its entries."""
COLOURS: Final = "Greys"
Scale = Literal["linear", "log"]
Blocks = Sequence[tuple[int, int]] | Mapping[str, tuple[int, int]]
_DECADES: Final = 1e-6
"""How far below its upper end a logarithmic colour scale begins at most."""
_CENTRED: Final[dict[str, Any]] = {
    "ha": "center",
    "va": "center",
    "color": "#555555",
    "fontsize": "small",
    "parse_math": False,
}
PANEL_PIXELS: Final = 150  # a picture of a row of inverses, on a screen


def heatmap(
    da: xr.DataArray,
    ax: Axes | None = None,
    *,
    vmax: float | None = None,
    vmin: float | None = None,
    outlines: Blocks | None = None,
    scale: Scale = "linear",
    colorbar: bool = True,
) -> Axes:
    """Draw the absolute entries of a matrix.

    The colours end at `vmax` (default: the 99.5th percentile of the entries) and
    begin at 0, on a log scale at `vmin` (default: the 5th percentile of the positive
    entries, at most six decades below `vmax`). `outlines` are (start, stop) pairs of
    square blocks on the diagonal; as a mapping from names they label the axes too, e.g.
    the layers of a network. Without names they are left out where they would bury the
    picture: below 6 pixels. Matrices of more than 2,000 rows are shown by the largest
    entry of each pixel, so that a single large entry stays visible; pixels end where
    blocks end, so that no block runs into its neighbour. The axes count entries of the
    matrix itself.

    Raises
    ------
    ValueError
        If `da` has not two dims.

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
    if da.ndim != 2:
        raise ValueError(f"heatmap draws a matrix, got dims {da.dims}: select the rest")
    matrix = np.asarray(da.values)
    named = outlines if isinstance(outlines, Mapping) else {}
    squares = list(outlines.values() if isinstance(outlines, Mapping) else outlines or ())
    entries = da.attrs.get("entries")  # rows of a matrix of which pixels are given
    shape = matrix.shape if entries is None else (int(entries),) * 2
    edges = [edge for one in squares for edge in one] if shape == matrix.shape else []
    shown = maxima(matrix, borders=edges)
    top = typical_maximum(matrix) if vmax is None else vmax
    with publication():
        ax = _square_axes() if ax is None else ax
        image = _draw(ax, shown, shape, _norm(shown, top, vmin, scale))
        pixels = max(PANEL_PIXELS, int(ax.bbox.width))
        outline(ax, squares if named else visible(squares, pixels), bold=bool(named))
        _label_blocks(ax, named)
        if colorbar:
            as_vectors(ax.figure.colorbar(image, ax=ax, label="|entry|", shrink=0.8))
    return ax


def inverse_heatmap(
    tree: xr.DataTree,
    layers: Sequence[str] | None = None,
    approximators: Sequence[str] | None = None,
    *,
    scale: Scale = "linear",
) -> Figure:
    """Draw |(F̂ + λI)⁻¹| of each layer, the exact one beside the approximations.

    A row is a layer and shares one colour scale, which ends at the 99.5th percentile
    of the exact inverse and is printed with λ. It begins at 0, or with `scale="log"`
    at the 5th percentile of the exact inverse's positive entries. Light squares are
    the mini-blocks: the weights of one output neuron, or of one kernel.

    Raises
    ------
    ValueError
        If the tree has no layer, or not those layers or approximators.

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
    chosen = _children(tree, layers)
    names = approximators or _labels(next(iter(chosen.values())))
    with publication():
        figure, grid = _row_grid(len(chosen), len(names))
        for row, (layer, ds) in zip(grid, chosen.items(), strict=True):
            _inverse_row(row, layer, ds, names, scale)
        for ax, name in zip(grid[0], names, strict=True):
            ax.set_title(text(str(name)))
    return figure


def _children(tree: xr.DataTree, layers: Sequence[str] | None) -> dict[str, xr.Dataset]:
    require_result(tree, xr.DataTree, "fl.inverse_blocks")
    known = {str(name): child.to_dataset() for name, child in tree.children.items()}
    known = {name: ds for name, ds in known.items() if "inverse" in ds}
    if not known:
        raise ValueError("the tree holds no inverse blocks; make it by inverse_blocks")
    unknown = [name for name in layers or () if name not in known]
    if unknown:
        raise ValueError(f"no layer {unknown} in the tree; it has: {sorted(known)}")
    return {name: known[name] for name in (layers or known)}


def _labels(ds: xr.Dataset) -> list[str]:
    return [str(name) for name in ds["approximator"].values]


def _row_grid(rows: int, columns: int) -> tuple[Figure, Array]:
    size = (1.62 * columns + 1.3, 1.78 * rows + 0.35)
    tight = ConstrainedLayoutEngine(w_pad=0.03, h_pad=0.04, wspace=0.01, hspace=0.02)
    figure, grid = plt.subplots(rows, columns, figsize=size, squeeze=False, layout=tight)
    return figure, grid


def _inverse_row(
    axes: Array, layer: str, ds: xr.Dataset, names: Sequence[str], scale: Scale
) -> None:
    known = _labels(ds)
    # The exact inverse sets the scale of its row, whichever columns are drawn.
    exact = np.asarray(ds["inverse"].isel(approximator=0).values)
    top = typical_maximum(exact)
    bottom = _typical_minimum(exact, top) if scale == "log" else 0.0
    blocks = visible(mini_blocks(ds.attrs)) or visible(_rows(ds.attrs))
    image = None
    for ax, name in zip(axes, names, strict=True):
        matrix = ds["inverse"].sel(approximator=name) if name in known else None
        if matrix is None or not np.isfinite(matrix).any():
            ax.text(0.5, 0.5, _why(ds, name), transform=ax.transAxes, **_CENTRED)
            ax.spines[:].set_visible(False)
            ax.grid(visible=False)
            ax.set_box_aspect(1)  # as large as the pictures beside it
        else:
            limits: dict[str, Any] = {"vmax": top, "vmin": bottom, "scale": scale}
            heatmap(matrix, ax, outlines=blocks, colorbar=False, **limits)
            image = ax.images[0]
        ax.set(xticks=[], yticks=[], xlabel="", ylabel="")
    axes[0].set_ylabel(_row_label(layer, ds.attrs))
    if image is not None:
        _row_colorbar(axes, image, (bottom, top), ds.attrs)


def _row_label(layer: str, attrs: dict[Any, Any]) -> str:
    shape = "×".join(str(int(n)) for n in np.atleast_1d(attrs.get("weight_shape", ())))
    return f"layer {text(layer)}" + (f"\n{shape}" if shape else "")


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
    if shape is None or size < 2:
        return []
    d_out, d_in = (int(n) for n in shape)
    starts = [o * d_in + j * size for o in range(d_out) for j in range(d_in // size)]
    return [(start, start + size) for start in starts]


def _rows(attrs: dict[Any, Any]) -> list[tuple[int, int]]:
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


def _why(ds: xr.Dataset, name: str) -> str:
    """Say in a few short lines why an inverse is not there."""
    if name not in _labels(ds) or "status" not in ds:
        return "not\navailable"
    told = str(ds["status"].sel(approximator=name).item())
    told = "indefinite" if "positive definite" in told else told
    return (
        fill(shorten(told, 60, placeholder=" …"), 14) if told != "ok" else "not\navailable"
    )


def maxima(matrix: Array, limit: int = LIMIT, borders: Sequence[int] = ()) -> Array:
    """Shrink |matrix| to at most `limit` rows and columns by the maxima of its pixels.

    Pixels are equally large, but for those at a border: they end there.

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
            starts = _pixel_starts(size, factor, borders)
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


def _typical_minimum(matrix: Array, top: float) -> float:
    sizes = np.abs(matrix[np.isfinite(matrix) & (matrix != 0)])
    low = float(np.percentile(sizes, 5)) if sizes.size else 0.0
    return min(max(low, top * _DECADES), top / 10)


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
    ax.add_collection(PatchCollection(squares, facecolor="none", **look))


def _label_blocks(ax: Axes, blocks: Mapping[str, tuple[int, int]]) -> None:
    if not blocks:
        return
    middles = [(start + stop) / 2 for start, stop in blocks.values()]
    names = [text(name) for name in blocks]
    ax.set_yticks(middles, names)
    ax.set_xticks(middles, names, rotation=40, ha="right", rotation_mode="anchor")
    ax.tick_params(length=0)


def _square_axes() -> Axes:
    _, ax = plt.subplots(figsize=(4.4, 3.8), layout="constrained")
    return ax


def _norm(shown: Array, top: float, vmin: float | None, scale: Scale) -> Normalize:
    if scale == "linear":
        return Normalize(0.0, top, clip=True)
    return LogNorm(vmin or _typical_minimum(shown, top), top, clip=True)


def _draw(ax: Axes, shown: Array, shape: tuple[int, ...], norm: Normalize) -> Any:
    rows, columns = shape
    ax.grid(visible=False)
    ax.spines[["top", "right"]].set_visible(True)
    return ax.imshow(
        shown,
        cmap=COLOURS,
        norm=norm,
        extent=(0, columns, rows, 0),
        interpolation="auto",
    )
