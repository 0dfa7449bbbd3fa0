"""One moment of a result as plain arrays: what summaries and tables read from."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import xarray as xr
from numpy.typing import NDArray

from fisherlab.analysis.verdicts import titles
from fisherlab.plots import frames
from fisherlab.plots.costs import storage_share

Grid = NDArray[Any]


@dataclass(frozen=True)
class Moment:
    """All metrics at one step and one damping, as grids of layer by approximation.

    Examples
    --------
    >>> import numpy as np
    >>> grid = {"frobenius_error": np.array([[0.4]])}
    >>> m = Moment(10, 0.01, ("0",), ("kfac",), ("20×21",), grid, np.array([["ok"]]))
    >>> m.cell("frobenius_error", "0", "kfac")
    'frobenius_error[step=10, layer=0, approximator=kfac]'
    """

    step: int | None
    damping: float | str | None
    layers: tuple[str, ...]
    approximators: tuple[str, ...]
    shapes: tuple[str, ...]
    grids: Mapping[str, Grid]
    status: Grid
    damped: frozenset[str] = frozenset()
    floored: Grid | None = None
    norms: Grid | None = None
    told: tuple[str, ...] = ()

    @property
    def titles(self) -> tuple[str, ...]:
        """The layers as sentences name them: a number with its kind."""
        return self.told or self.layers

    @property
    def alive(self) -> Grid:
        """Say of every layer whether its exact block is more than zero."""
        if self.norms is None:
            return np.ones(len(self.layers), dtype=bool)
        return np.asarray(self.norms != 0)

    @property
    def average(self) -> str:
        """Say how the errors of layers are put together, see `overall`."""
        if self.norms is None:
            return "median over the layers"
        return "of all layers together, √(Σ‖F − F̂‖² / Σ‖F‖²)"

    @property
    def level(self) -> str:
        """Return the damping as text; of several kinds it is a text that names its kind."""
        return self.damping if isinstance(self.damping, str) else f"{self.damping:g}"

    def is_bound(self, metric: str, layer: int, approximator: str) -> bool:
        """Say whether a value is only a bound: a difference below its known floor."""
        if self.floored is None:
            return False
        told = str(self.floored[layer, self.approximators.index(approximator)])
        names = {word.strip() for word in told.split(",")}
        at = "" if self.damping is None else f"{metric}[damping={self.level}]"
        return metric in names or at in names

    def grid(self, metric: str) -> Grid:
        """Return the values of a metric, all NaN where the result has none."""
        empty = np.full((len(self.layers), len(self.approximators)), np.nan)
        return self.grids.get(metric, empty)

    def column(self, metric: str, approximator: str) -> Grid:
        """Return the values of one approximation, a number per layer."""
        if approximator not in self.approximators:
            return np.full(len(self.layers), np.nan)
        return np.asarray(self.grid(metric)[:, self.approximators.index(approximator)])

    def cell(self, metric: str, layer: str, approximator: str) -> str:
        """Name the cell of `results.nc` that holds a value."""
        where = [] if self.step is None else [f"step={self.step}"]
        where += [f"layer={layer}", f"approximator={approximator}"]
        if metric in self.damped and self.damping is not None:
            where.append(f"damping={self.level}")
        return f"{metric}[{', '.join(where)}]"


def moment(
    ds: xr.Dataset, step: int | None = None, damping: float | str | None = None
) -> Moment:
    """Take one moment of a result: the last step and the middle damping by default.

    Several seeds are averaged. Metrics that are absent stay absent.

    Raises
    ------
    ValueError
        If the result has no dims or coordinates layer and approximator, or not
        that step or damping.

    Examples
    --------
    >>> import xarray as xr
    >>> dims = ("layer", "approximator")
    >>> coords = {"layer": ["0"], "approximator": ["kfac"]}
    >>> moment(xr.Dataset({"frobenius_error": (dims, [[0.4]])}, coords)).layers
    ('0',)
    """
    for dim in ("layer", "approximator"):
        if dim not in ds.coords:
            raise ValueError(f"the result has no coordinate {dim!r}: {list(ds.coords)}")
    if "value" in ds and "measure" in ds["value"].dims:
        raise ValueError(
            "report: a table of purposes alone was given; a page shows it beside metrics. "
            "fl.report.of_model(model, data, likelihood, purpose=[...]) makes both, and "
            "fl.plots.purposes(table) and fl.analysis.verdict(table) show it by itself."
        )
    numbers = [str(n) for n in ds.data_vars if _is_cell(ds[n])]
    grids = {
        name: _grid(frames.values(ds, name, step=step, damping=damping)) for name in numbers
    }
    if "stored_numbers" in grids:
        grids["storage_share"] = _grid(storage_share(ds, step))
    grids |= _flops_share(ds, grids)
    norms, status = _norms(ds, step), _words(ds, "status", "ok", step)
    if norms is not None and "frobenius_error" in grids:  # relative to nothing
        grids["frobenius_error"][norms == 0] = np.nan
        status = np.where((norms == 0)[:, None], "the exact block is zero", status)
    return Moment(
        _chosen(ds, "step", step),
        _chosen(ds, "damping", damping),
        tuple(frames.names(ds, "layer")),
        tuple(frames.names(ds, "approximator")),
        _shapes(ds),
        grids,
        status,
        frozenset(n for n in numbers if "damping" in ds[n].dims),
        _words(ds, "floored", "", step),
        norms,
        titles(ds),
    )


def _norms(ds: xr.Dataset, step: int | None) -> Grid | None:
    norms = frames.norms(ds, "frobenius_error", step)
    if norms is None:
        return None
    found = np.asarray(norms.mean([d for d in norms.dims if d != "layer"]).values)
    return found if np.isfinite(found).all() else None


def damping_kind(ds: xr.Dataset, label: float | str) -> str:
    """Return the kind of one damping of a result: absolute, relative or factored.

    Examples
    --------
    >>> import xarray as xr
    >>> damping_kind(xr.Dataset(attrs={"damping_kind": "mixed"}), "factored 0.1")
    'factored'
    """
    kind = str(ds.attrs.get("damping_kind", "absolute"))
    if kind != "mixed":
        return kind
    return next(
        (k for k in ("relative", "factored") if k in str(label).lower()), "absolute"
    )


def _is_cell(variable: xr.DataArray) -> bool:
    known = {"layer", "approximator", "step", "seed", "damping"}
    numeric = np.issubdtype(variable.dtype, np.number)
    return (
        numeric
        and {"layer", "approximator"} <= set(variable.coords)
        and {str(dim) for dim in variable.dims} <= known
        and bool({"layer", "approximator"} & set(variable.dims))
    )


def _grid(data: xr.DataArray) -> Grid:
    data = data.mean("seed") if "seed" in data.dims else data
    return np.array(data.transpose("layer", "approximator").values, dtype=float)


def _words(ds: xr.Dataset, name: str, absent: str, step: int | None) -> Grid:
    shape = tuple(len(frames.names(ds, dim)) for dim in ("layer", "approximator"))
    if name not in ds:
        return np.full(shape, absent, dtype=object)
    words = frames.values(ds, name, step=step)
    words = words.isel(seed=0) if "seed" in words.dims else words
    return np.asarray(words.transpose("layer", "approximator").values, dtype=object)


def _flops_share(ds: xr.Dataset, grids: Mapping[str, Grid]) -> dict[str, Grid]:
    names = frames.names(ds, "approximator")
    if "solve_flops" not in grids or "exact" not in names:
        return {}
    flops = grids["solve_flops"]
    exact = flops[:, [names.index("exact")]]
    return {"flops_share": flops / np.where(exact > 0, exact, np.nan)}


def _chosen(ds: xr.Dataset, dim: str, value: float | int | str | None) -> Any:
    if dim not in ds.coords:
        return None
    return frames.pick(ds[dim], dim, value).item()


def _shapes(ds: xr.Dataset) -> tuple[str, ...]:
    kinds, names = frames.kinds(ds), frames.names(ds, "layer")
    told = [kinds.get(name, "").removeprefix(" · ") for name in names]
    if {"d_out", "d_in"} <= set(ds.coords):
        d_out, d_in = (np.atleast_1d(ds[end].values) for end in ("d_out", "d_in"))
        sizes = zip(told, d_out, d_in, strict=True)
        told = [f"{kind} {int(o)}×{int(i)}".strip() for kind, o, i in sizes]
    return tuple(told)
