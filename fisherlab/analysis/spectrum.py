"""Spectra of blocks: all eigenvalues as a tree, and the least error of every rank."""

from collections.abc import Mapping, Sequence

import numpy as np
import torch
import xarray as xr
from torch import Tensor

from fisherlab.analysis.cells import attributes, described, layer_coordinates, tried
from fisherlab.analysis.progress import Telling, watched
from fisherlab.approximators import Approximator, ExactBlock
from fisherlab.approximators.base import operator_of
from fisherlab.approximators.register import Chosen, by_name
from fisherlab.metrics import effective_rank
from fisherlab.metrics.kronecker import kronecker_spectrum, tails
from fisherlab.metrics.spectra import eigenvalues
from fisherlab.operators import FactoredFisher, Operator
from fisherlab.settings import require_number
from fisherlab.statistics import Layers, LayerStatistics, Statistics


def spectra(
    stats: Layers,
    approximators: Chosen = None,
    progress: Telling = False,
) -> xr.DataTree:
    """Return all eigenvalues of the exact block and of approximations, layer by layer.

    Parameters
    ----------
    stats
        Statistics of the layers.
    approximators
        Names, or a mapping of names to values; all named ones by default. The exact block
        always comes first.
    progress
        Show a bar, or call a function with a `Done` after every layer.

    Returns
    -------
    xarray.DataTree
        A node a layer with `eigenvalue(approximator, index)`, descending from index 1,
        `kronecker_value(rank)`, the singular values of the rearranged exact block, and
        `status(approximator)`; attributes `mean_eigenvalue` and `effective_rank`.

    Raises
    ------
    ValueError
        For unknown names.

    Examples
    --------
    >>> import torch, fisherlab as fl
    >>> data = (torch.rand(20, 3).double(), None)
    >>> stats = fl.collect(torch.nn.Linear(3, 2).double(), data, fl.Categorical())
    >>> fl.spectra(stats, ["kfac"])["weight"]["eigenvalue"].shape
    (2, 8)
    """
    stats = Statistics.of(stats, "spectra")
    chosen = {"exact": ExactBlock(), **by_name(approximators)}
    nodes = {name: _node(stats[name], chosen) for name in watched(stats, progress)}
    root = xr.Dataset(attrs=attributes(stats, chosen, analysis="spectra"))
    return xr.DataTree.from_dict({"/": root, **nodes})


def _node(layer: LayerStatistics, chosen: Mapping[str, Approximator]) -> xr.Dataset:
    o, i = layer.weight_shape

    def values(approximator: Approximator) -> np.ndarray:
        operator = operator_of(approximator, layer).to(torch.float64)
        return np.asarray(eigenvalues("spectra", operator).cpu().numpy())

    cells = [tried(values, approximator) for approximator in chosen.values()]
    rows = [np.full(o * i, np.nan) if row is None else row for row, _ in cells]
    status = [told for _, told in cells]
    exact = ExactBlock()(layer).to(torch.float64)
    node = xr.Dataset(
        {
            "eigenvalue": (("approximator", "index"), np.stack(rows)),
            "status": (("approximator",), np.array(status, dtype=object)),
        },
        {
            "approximator": list(chosen),
            "index": np.arange(1, o * i + 1),
            "d_out": o,
            "d_in": i,
        },
        {
            "mean_eigenvalue": exact.trace() / max(o * i, 1),
            "effective_rank": effective_rank(exact),
            "kind": layer.block.kind,
        },
    )
    node["eigenvalue"].attrs = {"long_name": "eigenvalue", "units": "1"}
    node["status"].attrs = {"long_name": "ok, or why a value is missing", "units": "1"}
    return _with_kronecker(node, exact)


def _with_kronecker(node: xr.Dataset, exact: Operator) -> xr.Dataset:
    values, told = tried(kronecker_spectrum, exact)
    if values is None:
        return node.assign_attrs(kronecker_status=told)
    label = {"long_name": "Kronecker singular value", "units": "1"}
    found = xr.DataArray(
        values.cpu().numpy(), {"rank": np.arange(1, len(values) + 1)}, attrs=label
    )
    return node.assign(kronecker_value=found)


RANKS = (1, 2, 3, 4, 6, 8, 12, 16)
FAMILIES = ("kronecker", "eigen")
_LABELS = {
    "error": "least relative error of this rank",
    "stored_numbers": "numbers held",
    "singular_value": "value of this rank over the largest",
}


def rank_curve(
    stats: Layers, ranks: Sequence[int] = RANKS, progress: Telling = False
) -> xr.Dataset:
    """Return the least error of every rank, from one decomposition of each block.

    ``error(family="kronecker", rank=r)`` is the least error of any sum of r Kronecker
    products, reached by ``KPSVD(r)``; ``error(family="eigen", rank=r)`` that of any matrix
    of rank r.

    Parameters
    ----------
    stats
        Statistics of the layers.
    ranks
        Ranks of at least 1.
    progress
        Show a bar, or call a function with a `Done` after every layer.

    Returns
    -------
    xarray.Dataset
        `error`, `stored_numbers` and `singular_value` over (layer, family, rank),
        `status(layer, family)`; NaN where a block is too large for all of its values.

    Raises
    ------
    ValueError
        If a rank is below 1.

    Examples
    --------
    >>> import torch, fisherlab as fl
    >>> data = (torch.rand(20, 3).double(), None)
    >>> stats = fl.collect(torch.nn.Linear(3, 2).double(), data, fl.Categorical())
    >>> curve = fl.rank_curve(stats, ranks=[1, 2])
    >>> bool((curve.error.diff("rank") <= 0).all())
    True
    """
    stats = Statistics.of(stats, "rank_curve")
    for rank in ranks:
        require_number(f"rank_curve(ranks=[… {rank!r} …])", rank, "a whole number")
    chosen = sorted(set(ranks))
    if not chosen or chosen[0] < 1:
        raise ValueError(f"rank_curve: ranks={list(ranks)}; ranks from 1 are expected.")
    shape = len(stats), len(FAMILIES), len(chosen)
    arrays = {name: np.full(shape, np.nan) for name in _LABELS}
    status = np.full(shape[:2], "ok", dtype=object)
    for row, name in enumerate(watched(stats, progress)):
        exact = ExactBlock()(stats[name]).to(torch.float64)
        for column, family in enumerate(FAMILIES):
            values, status[row, column] = tried(_values, exact, family)
            if values is None:
                continue
            at = row, column
            arrays["error"][at] = tails(values, chosen)
            arrays["singular_value"][at] = [_share(values, rank) for rank in chosen]
            each = _numbers(exact.weight_shape, family)
            arrays["stored_numbers"][at] = [rank * each for rank in chosen]
    dims = ("layer", "family", "rank")
    variables = {name: (dims, array) for name, array in arrays.items()}
    coords = layer_coordinates(stats) | {"family": list(FAMILIES), "rank": chosen}
    made = attributes(stats, {}, analysis="rank_curve")
    ds = xr.Dataset({**variables, "status": (dims[:2], status)}, coords, made)
    return described(ds, _LABELS)


def _values(exact: FactoredFisher, family: str) -> Tensor:
    if family == "kronecker":
        return kronecker_spectrum(exact)
    return eigenvalues("rank_curve", exact).abs()


def _share(values: Tensor, rank: int) -> float:
    if rank > len(values):
        return 0.0
    return float(values[rank - 1] / values[0]) if float(values[0]) > 0 else float("nan")


def _numbers(shape: tuple[int, int], family: str) -> int:
    o, i = shape
    return (o * (o + 1) + i * (i + 1)) // 2 if family == "kronecker" else o * i + 1
