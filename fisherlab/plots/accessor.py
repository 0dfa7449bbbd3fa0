"""The accessor `.fisherlab` of results: `ds.fisherlab.errors()` and the like."""

from typing import Any

import pandas as pd
import seaborn as sns
import xarray as xr
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from fisherlab.plots import (
    costs,
    curves,
    decomposition,
    frames,
    matrices,
    profiles,
    tables,
    trajectories,
)


@xr.register_dataset_accessor("fisherlab")  # type: ignore[no-untyped-call]
class DatasetAccessor:
    """Draw and lay out a result of `fl.compare`; options are those of `fl.plots`.

    Examples
    --------
    >>> import matplotlib.pyplot as plt
    >>> import xarray as xr
    >>> import fisherlab.plots
    >>> dims = ("layer", "approximator")
    >>> ds = xr.Dataset(
    ...     {"frobenius_error": (dims, [[0.3]])},
    ...     coords={"layer": ["0"], "approximator": ["kfac"]},
    ... )
    >>> ds.fisherlab.errors().get_xlabel()
    'layer (in the order of the network)'
    >>> plt.close("all")
    """

    def __init__(self, ds: xr.Dataset) -> None:
        self._ds = ds

    def table(self) -> pd.DataFrame:
        """Lay the result out as one tidy table, a row per cell and damping."""
        return frames.table(self._ds)

    def errors(self, metric: str = "frobenius_error", **options: Any) -> Axes:
        """Draw a metric per layer; see `fisherlab.plots.errors`."""
        return profiles.errors(self._ds, metric, **options)

    def direction_cosines(self, **options: Any) -> Axes:
        """Draw the direction cosines; see `fisherlab.plots.direction_cosines`."""
        return profiles.direction_cosines(self._ds, **options)

    def trajectory(self, metric: str = "frobenius_error", **options: Any) -> sns.FacetGrid:
        """Draw a metric along training; see `fisherlab.plots.trajectory`."""
        return trajectories.trajectory(self._ds, metric, **options)

    def damping_sweep(self, metric: str = "inverse_error", **options: Any) -> sns.FacetGrid:
        """Draw a metric against λ or α; see `fisherlab.plots.damping_sweep`."""
        return trajectories.damping_sweep(self._ds, metric, **options)

    def losses(self, **options: Any) -> Axes:
        """Draw the losses along training; see `fisherlab.plots.losses`."""
        return trajectories.losses(self._ds, **options)

    def cost(self, **options: Any) -> Axes:
        """Draw the error against the storage; see `fisherlab.plots.cost`."""
        return costs.cost(self._ds, **options)

    def pareto(self, **options: Any) -> Axes:
        """Draw the error against one cost; see `fisherlab.plots.pareto`."""
        return costs.pareto(self._ds, **options)

    def rank_curve(self, **options: Any) -> sns.FacetGrid:
        """Draw the best error by rank; see `fisherlab.plots.rank_curve`."""
        return curves.rank_curve(self._ds, **options)

    def decomposition(self, **options: Any) -> Axes:
        """Draw the parts of the squared error; see `fisherlab.plots.decomposition`."""
        return decomposition.decomposition(self._ds, **options)

    def error_sources(self, **options: Any) -> sns.FacetGrid:
        """Draw the error by statistics; see `fisherlab.plots.error_sources`."""
        return decomposition.error_sources(self._ds, **options)

    def layer_table(self, name: str = "coupling", **options: Any) -> Axes:
        """Draw a layer × layer variable; see `fisherlab.plots.layer_table`."""
        return tables.layer_table(frames.metric_of(self._ds, name), **options)


@xr.register_datatree_accessor("fisherlab")  # type: ignore[no-untyped-call]
class TreeAccessor:
    """Draw the inverse blocks of `fl.inverse_blocks` and the trees of `fl.spectra`.

    Examples
    --------
    >>> import xarray as xr
    >>> import fisherlab.plots
    >>> xr.DataTree().fisherlab.inverse_heatmap()
    Traceback (most recent call last):
        ...
    ValueError: the tree holds no inverse blocks; make it by fl.inverse_blocks
    """

    def __init__(self, tree: xr.DataTree) -> None:
        self._tree = tree

    def inverse_heatmap(self, **options: Any) -> Figure:
        """Draw |(F̂ + λI)⁻¹| per layer; see `fisherlab.plots.inverse_heatmap`."""
        return matrices.inverse_heatmap(self._tree, **options)

    def spectra(self, **options: Any) -> sns.FacetGrid:
        """Draw the eigenvalues per layer; see `fisherlab.plots.spectra`."""
        return curves.spectra(self._tree, **options)
