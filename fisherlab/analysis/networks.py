"""Approximations of a whole network beside its exact Fisher, as one labelled Dataset."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import xarray as xr

from fisherlab.analysis.cells import Cells, reason
from fisherlab.analysis.damping import Damping, dampings
from fisherlab.analysis.filling import begin, fill
from fisherlab.analysis.provenance import attributes
from fisherlab.analysis.questions import Metrics, mean_gradients, question
from fisherlab.approximators.network.base import NetworkApproximator
from fisherlab.approximators.network.register import network_by_name
from fisherlab.approximators.network.two_level_kfac import ExactNetwork
from fisherlab.errors import FisherlabError
from fisherlab.metrics.pairs import Pair, paired
from fisherlab.numerics.memory import Budget, parse_budget
from fisherlab.statistics import Statistics

NETWORK = "network"


def compare_networks(
    stats: Statistics,
    approximators: Sequence[str] | Mapping[str, NetworkApproximator] | None = None,
    *,
    metrics: Metrics | None = None,
    damping: Damping = None,
    gradient: Mapping[str, Any] | None = None,
    k: int = 10,
    budget: Budget = None,
) -> xr.Dataset:
    """Hold approximations that couple layers against the exact Fisher of the network.

    Parameters
    ----------
    stats
        Statistics of matching columns: collected with ``compress=False`` where an output
        has more columns than a layer has outputs.
    approximators
        Names of `network_approximators`, or a mapping of names to values; all by default.
    metrics, damping, gradient, k, budget
        As for `compare`; the gradient of every block is joined to one.

    Returns
    -------
    xarray.Dataset
        The schema of `compare` with the one layer "network".

    Raises
    ------
    ValueError
        For unknown names, what `compare` refuses, or columns that do not match.

    Examples
    --------
    >>> import torch, fisherlab as fl
    >>> model = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.Linear(2, 3)).double()
    >>> data = (torch.rand(20, 3).double(), None)
    >>> stats = fl.collect(model, data, fl.Gaussian(), compress=False)
    >>> ds = fl.compare_networks(stats, ["kfac-block-diagonal", "khatri-rao"])
    >>> ds.frobenius_error.sizes["approximator"]
    2
    """
    chosen = network_by_name(approximators)
    exact = ExactNetwork()(stats).to(torch.float64)
    joined = {}
    if gradient is not None:
        joined = {NETWORK: exact.join(mean_gradients(gradient, stats))}
    levels = dampings(damping)
    asked = question(metrics, levels, None, stats, False, k, joined)
    cells = Cells([NETWORK], list(chosen), levels)
    begin(cells, asked)
    pairs: dict[str, Pair] = {}
    for method, approximator in chosen.items():
        try:
            approx = approximator(stats)
            pairs[method] = paired("compare_networks", exact, approx, mixed=False)
        except FisherlabError as error:
            cells.blame(NETWORK, method, reason(error))
    fill(cells, asked, (NETWORK, exact), pairs, parse_budget(budget, exact.device))
    made = attributes(stats, chosen, analysis="compare_networks", damping_kind=levels.kind)
    rows = {
        "layer": [NETWORK],
        "d_out": ("layer", [exact.shape[0]]),
        "d_in": ("layer", [1]),
        "positions": ("layer", [1]),
    }
    return cells.dataset(rows, made)
