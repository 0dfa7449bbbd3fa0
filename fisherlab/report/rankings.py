"""One moment of a result: which approximation is closest, and what theory orders.

Errors over different layers are no contest: approximations that lack a layer stand in
the table behind those that have all, and are ranked by the layers they win.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import xarray as xr
from numpy.typing import NDArray

from fisherlab.analysis.contests import Contest, in_common
from fisherlab.analysis.verdicts import costs, settled, titles
from fisherlab.catalogue import FLOOR, overall, quantity, total_share
from fisherlab.plots import frames
from fisherlab.plots.costs import storage_share, undominated
from fisherlab.purposes.matrix import ERROR
from fisherlab.showing import error_text, number, percent

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


@dataclass(frozen=True)
class Standing:
    """How one approximation does over the layers of one moment.

    `error` is that of the measured layers together, or their median where no norms are
    known (see `overall`), `share` and `flops` are relative to the exact blocks, summed
    over those layers. `direction` and `inverse` are medians over the layers that have
    them; `complete` says that the errors are those of all layers.

    Examples
    --------
    >>> Standing("kfac", 2, 2, 0.4, 0.3, 0.5).measured
    2
    """

    name: str
    measured: int
    won: int
    error: float
    lowest: float
    highest: float
    share: float = float("nan")
    flops: float = float("nan")
    direction: float = float("nan")
    inverse: float = float("nan")
    complete: bool = True


def standings(m: Moment) -> tuple[Standing, ...]:
    """Rank the approximations of a moment: those with all layers by their error.

    Then those that lack some, by the layers they win.

    Examples
    --------
    >>> import numpy as np
    >>> grid = {"frobenius_error": np.array([[0.0, 0.4, 0.3]])}
    >>> names = ("exact", "kfac", "kpsvd")
    >>> m = Moment(None, None, ("0",), names, ("",), grid, np.array([["ok"] * 3]))
    >>> [(s.name, s.won) for s in standings(m)]
    [('kpsvd', 1), ('kfac', 0)]
    """
    best = winners(m)
    rows = [_standing(m, name, best) for name in m.approximators if name != "exact"]
    measured = [row for row in rows if row.measured]
    whole = [row for row in measured if row.complete]
    rest = [row for row in measured if not row.complete]
    whole.sort(key=lambda row: row.error)
    rest.sort(key=lambda row: (-row.won, row.error))
    return (*whole, *rest)


def winners(m: Moment) -> Mapping[str, tuple[str, ...]]:
    """Name the closest approximations of each layer; ties share the place.

    Errors below the numerical floor are equal to one another. A layer where all others
    failed is won by nobody.

    Examples
    --------
    >>> import numpy as np
    >>> grid = {"frobenius_error": np.array([[1e-9, 2e-9, 0.3]])}
    >>> names = ("kfac", "ekfac", "diagonal")
    >>> winners(Moment(None, None, ("0",), names, ("",), grid, np.array([["ok"] * 3])))
    {'0': ('kfac', 'ekfac')}
    """
    errors = m.grid("frobenius_error")
    others = [i for i, name in enumerate(m.approximators) if name != "exact"]
    best: dict[str, tuple[str, ...]] = {}
    for layer, row in zip(m.layers, errors, strict=True):
        known = [i for i in others if np.isfinite(row[i])]
        if len(known) > 1 or (known and len(others) == 1):  # else nothing was beaten
            limit = max(min(row[i] for i in known) * (1 + 1e-9), FLOOR)
            best[layer] = tuple(m.approximators[i] for i in known if row[i] <= limit)
    return best


def _standing(m: Moment, name: str, best: Mapping[str, tuple[str, ...]]) -> Standing:
    errors = m.column("frobenius_error", name)
    here = np.isfinite(errors)
    if not here.any():
        return Standing(name, 0, 0, float("nan"), float("nan"), float("nan"))
    return Standing(
        name,
        int(here.sum()),
        sum(name in winning for winning in best.values()),
        overall(errors, m.norms),
        float(errors[here].min()),
        float(errors[here].max()),
        _ratio(m, "stored_numbers", "storage_share", name),
        _ratio(m, "solve_flops", "flops_share", name),
        _median(m.column("direction_cosine", name)),
        _median(m.column("inverse_error", name)),
        bool(here[m.alive].all()),
    )


def _ratio(m: Moment, amount: str, share: str, name: str) -> float:
    cost, relative = m.column(amount, name), m.column(share, name)
    with np.errstate(divide="ignore", invalid="ignore"):
        return total_share(cost, cost / relative)


def _median(values: Grid) -> float:
    known = values[np.isfinite(values)]
    return float(np.median(known)) if known.size else float("nan")


def contest(ds: xr.Dataset, m: Moment, metric: str) -> Contest | None:
    """Return the contest of a metric at a moment; None where nothing is known of it.

    Errors of entries are put together by squares, other metrics are won layer by layer.

    Examples
    --------
    >>> dims = ("layer", "approximator")
    >>> coords = {"layer": ["0"], "approximator": ["kfac", "diagonal"]}
    >>> ds = xr.Dataset({"trace_ratio": (dims, [[0.9, 1.0]])}, coords)
    >>> contest(ds, moment(ds), "trace_ratio").winners()
    {'0': ('diagonal',)}
    """
    columns = np.flatnonzero(np.array(m.approximators) != "exact")
    rows, methods = np.flatnonzero(m.alive), [m.approximators[j] for j in columns]
    values = m.grid(metric)[np.ix_(rows, columns)]
    if not np.isfinite(values).any():
        return None
    squares = metric == "frobenius_error" and m.norms is not None
    norms = np.empty(0) if m.norms is None else m.norms[rows]
    shared = in_common(_parameters(ds, m)[rows], np.isfinite(values))
    told = quantity(metric)
    floors = frames.pick(ds["noise_floor"], "step", m.step) if "noise_floor" in ds else None
    noise = float("nan")
    if squares and floors is not None and floors.dims == ("layer",):
        known = floors.values[rows]
        noise = overall(known, norms) if np.isfinite(known).all() else noise
    return Contest(
        told.title,
        0.0 if told.best == "low" else 1.0,
        tuple(m.titles[i] for i in rows),
        tuple(methods),
        _parameters(ds, m)[rows],
        values,
        m.status[np.ix_(rows, columns)],
        _pooled(values, norms) if squares else None,
        {what: (a[rows], b[rows]) for what, (a, b) in costs(ds, methods).items()},
        noise,
        settled(ds, ERROR.assured, ERROR.settles) if metric == ERROR.name else {},
        common=(shared, _pooled(values[shared], norms[shared])) if squares else None,
    )


def _pooled(values: Grid, norms: Grid) -> Grid:
    """Return the errors of methods (columns) over layers that all have one, else NaN."""
    return np.array(
        [
            overall(column, norms) if np.isfinite(column).all() else np.nan
            for column in values.T
        ]
    )


def _parameters(ds: xr.Dataset, m: Moment) -> Grid:
    if not {"d_out", "d_in"} <= set(ds.coords):
        return np.ones(len(m.layers))
    sizes = np.atleast_1d(ds["d_out"].values) * np.atleast_1d(ds["d_in"].values)
    return np.asarray(sizes, dtype=float)


@dataclass(frozen=True)
class Choice:
    """The closest approximation of one layer at one cost.

    Examples
    --------
    >>> Choice("kfac", "0.400", "0.4", "frobenius_error[...] = 0.4").name
    'kfac'
    """

    name: str
    error: str
    key: str
    title: str
    noise: str = ""


@dataclass(frozen=True)
class Choices:
    """Costs in ascending order, and for each layer what to choose at each of them.

    Examples
    --------
    >>> Choices((), ()).limits
    ()
    """

    limits: tuple[str, ...]
    rows: tuple[tuple[str, str, tuple[Choice | None, ...]], ...]


def choices(m: Moment, ranking: Sequence[Standing]) -> Choices:
    """Name the closest approximation at each cost on the front, layer by layer.

    A cost is what an approximation of the front holds over all layers together,
    as a share of the exact blocks; candidates are those that hold no more. Only
    approximations of all layers stand on the front.

    Examples
    --------
    >>> import numpy as np
    >>> from fisherlab.report.rankings import standings
    >>> grids = {
    ...     "frobenius_error": np.array([[0.4, 0.8]]),
    ...     "stored_numbers": np.array([[42.0, 20.0]]),
    ...     "storage_share": np.array([[0.2, 0.1]]),
    ... }
    >>> ok = np.array([["ok", "ok"]])
    >>> m = Moment(None, None, ("0",), ("kfac", "diagonal"), ("",), grids, ok)
    >>> found = choices(m, standings(m))
    >>> found.limits, [c.name for c in found.rows[0][2]]
    (('10 %', '20 %'), ['diagonal', 'kfac'])
    """
    known = [s for s in ranking if np.isfinite(s.share) and s.complete]
    front = undominated([(s.share, s.error) for s in known])
    rows = []
    for index, layer in enumerate(m.layers):
        cells = tuple(
            _closest(m, index, [s.name for s in known if s.share <= share * (1 + 1e-9)])
            for share, _ in front
        )
        rows.append((layer, m.shapes[index], cells))
    return Choices(tuple(percent(share) for share, _ in front), tuple(rows))


def _closest(m: Moment, layer: int, names: Sequence[str]) -> Choice | None:
    errors = {name: float(m.column("frobenius_error", name)[layer]) for name in names}
    errors = {name: error for name, error in errors.items() if np.isfinite(error)}
    if not errors:
        return None
    name = min(errors, key=errors.__getitem__)
    origin = m.cell("frobenius_error", m.layers[layer], name)
    return Choice(
        name,
        error_text(errors[name]),
        f"{errors[name]:.12g}",
        f"{origin} = {errors[name]:.9g}",
        _noise(m, layer, name),
    )


def _noise(m: Moment, layer: int, name: str) -> str:
    """Say how sure the error is: its confidence interval, or that it is within noise."""
    told = []
    low, high = (
        float(m.column(f"frobenius_error_{end}", name)[layer]) for end in ("low", "high")
    )
    if np.isfinite([low, high]).all():
        told.append(f"{number(low)}–{number(high)}")
    if m.column("below_noise", name)[layer] == 1:
        told.append("within noise")
    return ", ".join(told)


@dataclass(frozen=True)
class Law:
    """An inequality that theory guarantees, checked on every cell of a result.

    Examples
    --------
    >>> Law("kpsvd", "kfac", "why", checked=6, broken=()).holds
    True
    """

    smaller: str
    larger: str
    why: str
    checked: int
    broken: tuple[str, ...]

    @property
    def holds(self) -> bool:
        """Say whether no cell breaks the law."""
        return not self.broken


LAWS: Final = (
    ("kpsvd", "kfac", "KPSVD is the best single Kronecker product"),
    ("kpsvd-2", "kpsvd", "a second term cannot hurt the best fit"),
    ("kfac-corrected", "kfac", "the correction is the best fit to what KFAC leaves"),
    ("kpsvd-2", "kfac-corrected", "KPSVD of rank 2 is the best sum of two products"),
    ("kpsvd-2", "deflation", "KPSVD of rank 2 is the best sum of two products"),
    ("deflation", "kpsvd", "deflation adds a best-fitting second term"),
    ("ekfac", "kfac", "EKFAC's scalings are the best in KFAC's eigenbasis"),
    ("kpsvd", "tkfac", "KPSVD is the best single Kronecker product"),
    ("mini-block", "diagonal", "mini-blocks hold the diagonal and more"),
)


def laws(ds: xr.Dataset) -> tuple[Law, ...]:
    """Check the inequalities of theory on every layer and step of a result.

    A law is broken where the smaller error exceeds the larger one by more than
    1e-5 of it and more than the numerical floor.

    Examples
    --------
    >>> import xarray as xr
    >>> dims = ("layer", "approximator")
    >>> coords = {"layer": ["0"], "approximator": ["kfac", "kpsvd"]}
    >>> ds = xr.Dataset({"frobenius_error": (dims, [[0.4, 0.5]])}, coords)
    >>> laws(ds)[0].broken
    ('layer=0: kpsvd 0.500 > kfac 0.400',)
    """
    if "frobenius_error" not in ds:
        return ()
    steps: list[int | None] = (
        [int(s) for s in ds["step"].values] if "step" in ds.dims else [None]
    )
    moments = [moment(ds, step) for step in steps]
    checked = [_law(moments, *law) for law in LAWS]
    return tuple(law for law in checked if law.checked)


def _law(moments: list[Moment], smaller: str, larger: str, why: str) -> Law:
    checked, broken = 0, []
    for m in moments:
        low, high = (m.column("frobenius_error", name) for name in (smaller, larger))
        known = np.isfinite(low) & np.isfinite(high)
        checked += int(known.sum())
        for i in np.flatnonzero(known & (low > high * (1 + 1e-5) + FLOOR)):
            where = "" if m.step is None else f"step={m.step}, "
            broken.append(
                f"{where}layer={m.titles[i]}: {smaller} {number(low[i])} > "
                f"{larger} {number(high[i])}"
            )
    return Law(smaller, larger, why, checked, tuple(broken))
