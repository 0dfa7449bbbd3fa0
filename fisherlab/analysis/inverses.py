"""Damped inverses of whole blocks, for heatmaps."""

from collections.abc import Mapping, Sequence

import numpy as np
import torch
import xarray as xr

from fisherlab.analysis.cells import attributes, tried
from fisherlab.analysis.damping import Damping, dampings
from fisherlab.analysis.progress import Telling, watched
from fisherlab.approximators import Approximator, ExactBlock
from fisherlab.approximators.blocks.mini_block import partition
from fisherlab.approximators.register import Chosen, by_name
from fisherlab.numerics.memory import Budget, parse_budget, require
from fisherlab.operators import Operator
from fisherlab.operators.dampings import Factored, Tikhonov
from fisherlab.statistics import LayerStatistics, Statistics

LARGEST = 2000  # rows of the blocks taken when none are named


def inverse_blocks(
    stats: Statistics,
    approximators: Chosen,
    damping: Damping,
    layers: Sequence[str] | None = None,
    budget: Budget = None,
    progress: Telling = False,
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
        Block names; by default those with at most 2,000 parameters.
    budget
        Bytes that all inverses together may take.
    progress
        Show a bar, or call a function with a `Done` after every layer.

    Returns
    -------
    xarray.DataTree
        A node a layer with `inverse(approximator, row, col)`, rows in the order of
        ``vec(w)`` by rows; NaN for an approximation whose damped form is indefinite.

    Raises
    ------
    ValueError
        If several dampings are given or a layer is unknown.
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
    levels = dampings(damping)
    levels.require_one("inverse_blocks")
    chosen = {"exact": ExactBlock(), **by_name(approximators)}
    names = _chosen_layers(stats, layers)
    sizes = [int(np.prod(stats[name].weight_shape)) for name in names]
    work = 3 * max(sizes, default=0) ** 2  # a block, its factor, its inverse
    require(
        8 * (sum(len(chosen) * p**2 for p in sizes) + work),
        parse_budget(budget),
        f"inverse_blocks of {len(names)} layers and {len(chosen)} methods",
        "Name fewer layers or methods.",
    )
    nodes = {}
    for name in watched(names, progress):
        exact = ExactBlock()(stats[name])
        (value,) = levels.read(exact)
        nodes[name] = _node(stats[name], chosen, value)
    made = attributes(stats, chosen, damping_kind=levels.kind)
    root = xr.Dataset(attrs=made | {"damping": levels.labels[0]})
    return xr.DataTree.from_dict({"/": root, **nodes})


def _chosen_layers(stats: Statistics, layers: Sequence[str] | None) -> list[str]:
    if layers is None:
        return [n for n, s in stats.items() if np.prod(s.weight_shape) <= LARGEST]
    unknown = [name for name in layers if name not in stats]
    if unknown:
        msg = f"inverse_blocks: layers {unknown} unknown; known: {', '.join(stats)}."
        raise ValueError(msg)
    return list(layers)


def _node(
    statistics: LayerStatistics,
    chosen: Mapping[str, Approximator],
    damping: Tikhonov | Factored,
) -> xr.Dataset:
    p = int(np.prod(statistics.weight_shape))
    cells = [tried(_inverse, one, statistics, damping) for one in chosen.values()]
    inverses = [np.full((p, p), np.nan) if m is None else m for m, _ in cells]
    status = [told for _, told in cells]
    groups = partition(statistics.block).groups
    return xr.Dataset(
        {
            "inverse": (("approximator", "row", "col"), np.stack(inverses)),
            "status": (("approximator",), np.array(status, dtype=object)),
        },
        {"approximator": list(chosen), "row": range(p), "col": range(p)},
        {
            "weight_shape": list(statistics.weight_shape),
            "mini_block_size": int(groups[0].shape[1]),
            "lambda": damping.value,
            "long_name": "damped inverse of the block",
        },
    )


def _inverse(
    approximator: Approximator, statistics: LayerStatistics, damping: Tikhonov | Factored
) -> np.ndarray:
    operator: Operator = approximator(statistics).to(torch.float64)
    alone = isinstance(approximator, ExactBlock)
    dense = operator.inverse(damping.value if alone else damping).to_dense()
    return np.asarray(dense.detach().cpu().numpy())
