"""Where the mass of blocks and networks lies, as one labelled Dataset."""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
import xarray as xr
from torch import Tensor

from fisherlab.analysis.cells import (
    Damping,
    Dampings,
    Telling,
    attributes,
    dampings,
    described,
    layer_coordinates,
    tried,
    watched,
)
from fisherlab.approximators import ExactBlock
from fisherlab.approximators.mini_block import partition
from fisherlab.metrics import kronecker_ratio, kronecker_tail, spectra
from fisherlab.metrics import structure as masses
from fisherlab.operators import FactoredFisher, Partition
from fisherlab.statistics import Layers, LayerStatistics, Statistics
from fisherlab.statistics.network import FullMatrix

ABSOLUTE_ROWS = 4000  # blocks whose every entry is looked at
LABELS = {
    "kronecker_ratio": "second over first Kronecker singular value",
    "kronecker_tail": "least error of one Kronecker product",
    "effective_rank": "effective rank tr²/‖·‖² of the block",
    "mini_block_squared_mass": "share of ΣF² inside of the mini-blocks",
    "mini_block_absolute_mass": "share of Σ|F| inside of the mini-blocks",
    "mini_block_entries": "share of the entries inside of the mini-blocks",
    "inverse_mini_block_squared_mass": "share of Σ(P⁻¹)² inside of the mini-blocks",
    "inverse_mini_block_absolute_mass": "share of Σ|P⁻¹| inside of the mini-blocks",
    "coupling": "‖F_ij‖ / √(‖F_ii‖ ‖F_jj‖)",
    "diagonal_squared_mass": "share of ΣF² in the diagonal layer blocks",
    "tridiagonal_squared_mass": "share of ΣF² in the tridiagonal layer blocks",
    "diagonal_entries": "share of the entries in the diagonal layer blocks",
    "tridiagonal_entries": "share of the entries in the tridiagonal layer blocks",
    "mean_absolute": "mean |M_ij| of a pair of layers",
    "squared_mass": "share of ΣM² in a pair of layers",
    "status": "ok, or why a value is missing",
}


def structure(
    stats: Layers,
    *,
    damping: Damping = None,
    matrix: FullMatrix | None = None,
    progress: Telling = False,
) -> xr.Dataset:
    """Return how the mass of each block and of the network is spread.

    Parameters
    ----------
    stats
        Statistics of the layers; collected with ``compress=False`` where layers are to be
        set against each other and an output has more columns than a layer has outputs.
    damping
        One λ, or `RelativeDamping(α)`, for the masses of the inverse blocks.
    matrix
        A matrix over all layers, e.g. ``fl.full_matrix(stats)`` or an inverse with the
        same offsets, for tables layer × layer.
    progress
        Show a bar, or call a function with a `Done` after every layer.

    Returns
    -------
    xarray.Dataset
        Over (layer): `kronecker_ratio`, `kronecker_tail`, `effective_rank`, masses inside
        of the mini-blocks and the share of entries there, with `damping` those of the
        inverse. Over (layer, other_layer): `coupling`, and with `matrix` `mean_absolute`
        and `squared_mass`. Scalars: the mass of the (tri)diagonal layer blocks.

    Raises
    ------
    ValueError
        If several dampings are given, or `matrix` has other layers.

    Examples
    --------
    >>> import torch, fisherlab as fl
    >>> data = (torch.rand(20, 3).double(), None)
    >>> stats = fl.collect(torch.nn.Linear(3, 2).double(), data, fl.Categorical())
    >>> round(float(fl.structure(stats).mini_block_entries[0]), 3)
    0.5
    """
    stats = Statistics.of(stats, "structure")
    levels = dampings(damping)
    if len(levels.labels) > 1:
        raise ValueError(f"structure: one damping is expected, {levels.labels} was given.")
    status = []
    rows: dict[str, list[float]] = {}
    for place in watched(stats, progress):
        layer = stats[place]
        exact = ExactBlock()(layer).to(torch.float64)
        found, reasons = _layer(layer, exact, levels)
        status.append("; ".join(reasons) or "ok")
        for name, value in found.items():
            rows.setdefault(name, []).append(value)
    variables: dict[str, Any] = {name: ("layer", v) for name, v in rows.items()}
    variables["status"] = ("layer", np.array(status, dtype=object))
    pairs, notes = _pairs(stats, matrix)
    coords = layer_coordinates(stats) | {"other_layer": list(stats)}
    made = attributes(stats, {}, analysis="structure", **notes)
    return described(xr.Dataset(variables | pairs, coords, made), LABELS)


def _layer(
    layer: LayerStatistics, exact: FactoredFisher, levels: Dampings
) -> tuple[dict[str, float], list[str]]:
    """Return the numbers of one layer and why some are missing."""
    groups = partition(layer.block)
    asked: dict[str, Callable[[], float]] = {
        "kronecker_ratio": lambda: kronecker_ratio(exact),
        "kronecker_tail": lambda: kronecker_tail(exact),
        "effective_rank": lambda: spectra.effective_rank(exact),
        "mini_block_squared_mass": lambda: masses.squared_mass(exact, groups),
        "mini_block_absolute_mass": lambda: _absolute(exact, groups),
        "mini_block_entries": lambda: masses.entry_share(groups),
    }
    if levels.each:
        asked |= {
            "inverse_mini_block_squared_mass": lambda: masses.squared_mass(
                exact.inverse(levels.values(exact)[0]), groups
            ),
            "inverse_mini_block_absolute_mass": lambda: masses.absolute_mass(
                exact.inverse(levels.values(exact)[0]), groups
            ),
        }
    found, reasons = {}, []
    for name, value in asked.items():
        large = "inverse" in name and exact.shape[0] > ABSOLUTE_ROWS
        number, told = (None, "ok") if large else tried(value)
        found[name] = float("nan") if number is None else number
        reasons += [] if told == "ok" else [told]
    if exact.shape[0] > ABSOLUTE_ROWS:
        limit = f"masses of every entry are taken up to p = {ABSOLUTE_ROWS}"
        reasons.append(limit)
    return found, list(dict.fromkeys(reasons))


def _absolute(exact: FactoredFisher, groups: Partition) -> float:
    if exact.shape[0] > ABSOLUTE_ROWS:
        return float("nan")
    return masses.absolute_mass(exact, groups)


def _pairs(
    stats: Statistics, matrix: FullMatrix | None
) -> tuple[dict[str, Any], dict[str, str]]:
    """Return the tables layer × layer, and why they are missing where they are."""
    notes: dict[str, str] = {}
    count = len(stats)
    try:
        squares = masses.cross_squares(stats)
    except ValueError as error:
        squares = torch.full((count, count), float("nan"), dtype=torch.float64)
        notes["coupling_status"] = str(error)
    dims = ("layer", "other_layer")
    found: dict[str, Any] = {"coupling": (dims, masses.normalised(squares).numpy())}
    entries = _entries(stats)
    for width, name in ((0, "diagonal"), (1, "tridiagonal")):
        found[f"{name}_squared_mass"] = ((), masses.band_mass(squares, width))
        found[f"{name}_entries"] = ((), masses.band_mass(entries, width))
    if matrix is not None:
        found |= _tables(stats, matrix)
    return found, notes


def _entries(stats: Statistics) -> Tensor:
    sizes = [o * i for o, i in (layer.weight_shape for layer in stats.values())]
    table = torch.tensor(sizes, dtype=torch.float64)
    return torch.outer(table, table)


def _tables(stats: Statistics, matrix: FullMatrix) -> Mapping[str, Any]:
    if list(matrix.offsets) != list(stats):
        raise ValueError(
            f"structure: the matrix has the layers {list(matrix.offsets)}, the statistics "
            f"have {list(stats)}."
        )
    dims = ("layer", "other_layer")
    values, offsets = matrix.values, matrix.offsets
    return {
        "mean_absolute": (dims, masses.layer_table(values, offsets).numpy()),
        "squared_mass": (
            dims,
            masses.layer_table(values, offsets, "squared_mass").numpy(),
        ),
    }
