"""The blocks themselves at an iterate: their spectra and their inverses."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import final

import numpy as np
import torch
import xarray as xr

from fisherlab.analysis import inverse_blocks
from fisherlab.analysis.cells import tried
from fisherlab.approximators import Approximator, ExactBlock
from fisherlab.approximators.register import by_name
from fisherlab.operators import Operator
from fisherlab.operators.dampings import Damping, RelativeDamping
from fisherlab.settings import numeric
from fisherlab.statistics import Exact, Fisher, LayerStatistics
from fisherlab.training.probes.errors import Approximators, Moment, Source


@numeric
@final
@dataclass(frozen=True)
class Spectra:
    """The largest eigenvalues of the exact block and of approximations.

    Gives `eigenvalue(layer, approximator, index)`, descending from index 1, NaN beyond
    the size of a block, and `spectrum_status(layer, approximator)`.

    Parameters
    ----------
    approximators
        Names, or a mapping of names to values; the exact block always comes first.
    count
        How many eigenvalues.
    fisher, on, examples, layers
        As in `Errors`.

    Examples
    --------
    >>> import fisherlab as fl
    >>> probe = fl.probes.Spectra(["kfac"], count=3, examples=20, layers=["fc6"])
    >>> ds = fl.follow(fl.problems.load("digits"), steps=1, probes=[probe])
    >>> dict(ds.eigenvalue.sizes)
    {'step': 2, 'layer': 1, 'approximator': 2, 'index': 3}
    """

    approximators: Approximators = ()
    count: int = 50
    fisher: Fisher = field(default_factory=Exact)
    on: Source = "train"
    examples: int | None = 2000
    layers: Sequence[str] | None = None

    def __call__(self, moment: Moment) -> xr.Dataset:
        """Take the largest eigenvalues of every block."""
        stats = moment.statistics(self.fisher, self.on, self.examples, self.layers)
        chosen = {"exact": ExactBlock(), **by_name(self.approximators)}
        values = np.full((len(stats), len(chosen), self.count), np.nan)
        status = np.full(values.shape[:2], "ok", dtype=object)
        for row, layer in enumerate(stats.values()):
            for column, method in enumerate(chosen.values()):
                found, status[row, column] = tried(_largest, method, layer, self.count)
                if found is not None:
                    values[row, column, : len(found)] = found
        dims = ("layer", "approximator", "index")
        return xr.Dataset(
            {
                "eigenvalue": (dims, values, {"long_name": "eigenvalue", "units": "1"}),
                "spectrum_status": (dims[:2], status),
            },
            {
                "layer": list(stats),
                "approximator": list(chosen),
                "index": np.arange(1, self.count + 1),
            },
        )


def _largest(method: Approximator, layer: LayerStatistics, count: int) -> np.ndarray:
    wide: Operator = method(layer).to(torch.float64)
    found = wide.top_eigenvalues(min(count, wide.shape[0]))
    return np.asarray(found.detach().cpu().numpy())


@numeric
@final
@dataclass(frozen=True)
class InverseBlocks:
    """The damped inverses of blocks, entry by entry.

    Gives for every layer `inverse_<layer>(approximator, row_<layer>, col_<layer>)`, rows
    in the order of ``vec(w)`` by rows, since layers differ in size. A block of p
    parameters takes 8p² bytes for each approximation and moment.

    Parameters
    ----------
    approximators
        Names, or a mapping of names to values; the exact block always comes first.
    damping
        One λ, or `RelativeDamping(α)`.
    layers
        Block names; by default those with at most 2,000 parameters.
    fisher, on, examples
        As in `Errors`.

    Examples
    --------
    >>> import fisherlab as fl
    >>> probe = fl.probes.InverseBlocks(["kfac"], 0.1, layers=["fc6"], examples=20)
    >>> ds = fl.follow(fl.problems.load("digits"), steps=1, probes=[probe])
    >>> ds.inverse_fc6.shape
    (2, 2, 210, 210)
    """

    approximators: Approximators = ()
    damping: Damping = field(default_factory=lambda: RelativeDamping(1.0))
    layers: Sequence[str] | None = None
    fisher: Fisher = field(default_factory=Exact)
    on: Source = "train"
    examples: int | None = 2000

    def __call__(self, moment: Moment) -> xr.Dataset:
        """Invert."""
        stats = moment.statistics(self.fisher, self.on, self.examples, self.layers)
        chosen = by_name(self.approximators)
        tree = inverse_blocks(stats, chosen, self.damping, layers=self.layers)
        nodes = []
        for name, node in tree.children.items():
            both = {"row": f"row_{name}", "col": f"col_{name}"}
            inverse = node.to_dataset()["inverse"].rename(both)
            nodes.append(inverse.rename(f"inverse_{name}").to_dataset())
        return xr.merge(nodes, join="exact", combine_attrs="drop_conflicts")
