"""Damped inverses of whole blocks, for heatmaps."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
import xarray as xr
from numpy.typing import NDArray

from fisherlab.analysis.cells import (
    Damping,
    Dampings,
    Telling,
    attribute,
    attributes,
    dampings,
    tried,
    watched,
)
from fisherlab.approximators import Approximator, ExactBlock
from fisherlab.approximators.base import operator_of
from fisherlab.approximators.mini_block import partition
from fisherlab.approximators.register import Chosen, by_name
from fisherlab.numerics.devices import Budget, parse_budget, require
from fisherlab.operators import Operator
from fisherlab.operators.base import PANEL_BYTES, unit_weights
from fisherlab.settings import numeric
from fisherlab.statistics import Layers, LayerStatistics, Statistics

LARGEST = 2000  # rows of the blocks taken when none are named


@numeric
def inverse_blocks(
    stats: Layers,
    approximators: Chosen,
    damping: Damping,
    layers: Sequence[str] | None = None,
    budget: Budget = None,
    progress: Telling = False,
    pixels: int | None = None,
) -> xr.DataTree:
    """Return (F̂ + λI)⁻¹ of the exact block and of approximations, layer by layer.

    Parameters
    ----------
    stats
        Statistics of the layers.
    approximators
        Names, or a mapping of names to values; the exact block always comes first.
    damping
        One λ, or `RelativeDamping(α)`.
    layers
        Block names; by default those with at most 2,000 parameters, all with `pixels`.
    budget
        Bytes that all inverses together may take.
    progress
        Show a bar, or call a function with a `Done` after every layer.
    pixels
        Most rows and columns to keep. A larger inverse is not formed: products with
        panels of its columns give the largest |entry| of every pixel, in p numbers
        times a panel. `row` and `col` then say where the pixels begin.

    Returns
    -------
    xarray.DataTree
        A node a layer with `inverse(approximator, row, col)`, rows in the order of
        ``vec(w)`` by rows; NaN for an approximation whose damped form is indefinite.

    Raises
    ------
    ValueError
        If several dampings are given, a layer is unknown or `pixels` is not positive.
    BudgetError
        If the inverses exceed the budget.

    Examples
    --------
    >>> import torch, fisherlab as fl
    >>> data = (torch.rand(20, 3).double(), None)
    >>> stats = fl.collect(torch.nn.Linear(3, 2).double(), data, fl.Categorical())
    >>> tree = fl.inverse_blocks(stats, ["kfac"], damping=0.1)
    >>> dict(tree["weight"].sizes)
    {'approximator': 2, 'row': 8, 'col': 8}
    """
    stats = Statistics.of(stats, "inverse_blocks")
    levels = dampings(damping)
    levels.require_one("inverse_blocks")
    chosen = {"exact": ExactBlock(), **by_name(approximators)}
    if pixels is not None and pixels < 1:
        msg = f"inverse_blocks: pixels={pixels}; a positive number is expected, or None."
        raise ValueError(msg)
    small = [n for n, s in stats.items() if pixels or np.prod(s.weight_shape) <= LARGEST]
    names = chosen_layers("inverse_blocks", stats, small if layers is None else layers)
    sizes = {name: int(np.prod(stats[name].weight_shape)) for name in names}
    kept = {name: len(_starts(p, pixels)) for name, p in sizes.items()}
    work = max((_working_bytes(stats[n], kept[n]) for n in names), default=0)
    require(
        8 * sum(len(chosen) * many**2 for many in kept.values()) + work,
        parse_budget(budget),
        f"inverse_blocks of {len(names)} layers and {len(chosen)} methods",
        "Name fewer layers or methods.",
    )
    nodes = {}
    for name in watched(names, progress):
        starts = _starts(sizes[name], pixels)
        nodes[name] = _node(stats[name], chosen, levels, starts)
    made = attributes(stats, chosen, damping_kind=levels.kind)
    root = xr.Dataset(attrs=made | {"damping": levels.labels[0]})
    return xr.DataTree.from_dict({"/": root, **nodes})


def chosen_layers(call: str, stats: Statistics, layers: Sequence[str] | None) -> list[str]:
    """Return the layers that are asked for, all by default, or say which there are."""
    unknown = [name for name in layers or () if name not in stats]
    if unknown:
        raise ValueError(f"{call}: layers {unknown} unknown; known: {', '.join(stats)}.")
    return list(stats if layers is None else layers)


def _node(
    statistics: LayerStatistics,
    chosen: Mapping[str, Approximator],
    levels: Dampings,
    starts: NDArray[Any],
) -> xr.Dataset:
    exact = ExactBlock()(statistics)
    cells = [
        tried(_inverse, one, statistics, exact, levels, starts) for one in chosen.values()
    ]
    size = len(starts)
    inverses = [np.full((size, size), np.nan) if m is None else m for m, _ in cells]
    entries = {"entries": int(np.prod(statistics.weight_shape))}
    status = [told for _, told in cells]
    groups = partition(statistics.block).groups
    return xr.Dataset(
        {
            "inverse": (("approximator", "row", "col"), np.stack(inverses), entries),
            "status": (("approximator",), np.array(status, dtype=object)),
        },
        {"approximator": list(chosen), "row": starts, "col": starts},
        {
            "weight_shape": list(statistics.weight_shape),
            "kind": statistics.block.kind,
            "mini_block_size": int(groups[0].shape[1]),
            "long_name": "damped inverse of the block",
            **attribute("lambda", lambda: levels.values(exact)[0]),
        },
    )


def _inverse(
    approximator: Approximator,
    statistics: LayerStatistics,
    exact: Operator,
    levels: Dampings,
    starts: NDArray[Any],
) -> NDArray[Any]:
    damping = levels.single("inverse_blocks", exact)
    operator = operator_of(approximator, statistics).to(torch.float64)
    alone = isinstance(approximator, ExactBlock)
    inverse = operator.inverse(damping.value if alone else damping)
    if len(starts) < inverse.shape[0]:
        return maxima(inverse, starts)
    return np.asarray(inverse.to_dense().detach().cpu().numpy())


def maxima(operator: Operator, starts: NDArray[Any]) -> NDArray[Any]:
    """Return the largest |entry| of every pixel of a matrix that is not formed.

    Parameters
    ----------
    operator
        The matrix, p × p.
    starts
        First row, and column, of each pixel.

    Examples
    --------
    >>> from fisherlab.operators import Dense
    >>> matrix = torch.tensor([[1.0, -2.0, 0.0], [-2.0, 1.0, 0.0], [0.0, 0.0, 3.0]])
    >>> maxima(Dense(matrix, (3, 1)), np.array([0, 2]))
    array([[2., 0.],
           [0., 3.]])
    """
    found, first = np.zeros((len(starts), len(starts))), 0
    for units in unit_weights(operator):
        rows = np.abs((operator @ units).flatten(1).detach().cpu().numpy())
        here = np.arange(first, first + len(rows))
        pixels = np.searchsorted(starts, here, side="right") - 1
        np.maximum.at(found, pixels, np.maximum.reduceat(rows, starts, axis=1))
        first += len(rows)
    return found


def _starts(p: int, pixels: int | None) -> NDArray[Any]:
    """Return where pixels begin: every row, or alike pixels of more."""
    return np.arange(0, p, 1 if pixels is None else -(-p // pixels))


def _working_bytes(statistics: LayerStatistics, kept: int) -> int:
    """Return the bytes of an exact block, its factor and its inverse, or of panels."""
    p = int(np.prod(statistics.weight_shape))
    exact = ExactBlock()(statistics)
    if kept == p or not exact.uses_gram:
        return 3 * 8 * p**2
    rows = exact.samples.total
    return 3 * 8 * rows**2 + 6 * max(PANEL_BYTES, 8 * p)
