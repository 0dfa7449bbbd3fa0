"""Which approximation is closest, what to choose at each cost, and what theory orders."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
import xarray as xr

from fisherlab.catalogue import FLOOR, overall
from fisherlab.plots.costs import undominated
from fisherlab.report.snapshot import Grid, Moment, moment
from fisherlab.report.text import error_text, number, percent


@dataclass(frozen=True)
class Standing:
    """How one approximation does over the layers of one moment.

    `error` is that of the measured layers together, or their median where `pooled` is
    false (see `overall`), `share` and `flops` are relative to the exact blocks, summed
    over those layers. `direction` and `inverse` are medians over the layers that have
    them; `in_all` says that these are all layers.

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
    in_all: bool = False
    pooled: bool = False


def standings(m: Moment) -> tuple[Standing, ...]:
    """Rank the approximations of a moment: most layers measured, then lowest error.

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
    return tuple(sorted(measured, key=lambda s: (-s.measured, s.error)))


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
        _in_all(m, name),
        m.norms is not None,
    )


def _ratio(m: Moment, amount: str, share: str, name: str) -> float:
    # Total over total: a share summed over layers, not a mean of shares.
    cost, relative = m.column(amount, name), m.column(share, name)
    known = np.isfinite(cost) & np.isfinite(relative) & (relative > 0)
    if not known.any():
        return float("nan")
    return float(cost[known].sum() / (cost[known] / relative[known]).sum())


def _median(values: Grid) -> float:
    known = values[np.isfinite(values)]
    return float(np.median(known)) if known.size else float("nan")


def _in_all(m: Moment, name: str) -> bool:
    columns = (m.column(metric, name) for metric in ("direction_cosine", "inverse_error"))
    return all(bool(np.isfinite(column).all()) for column in columns)


def spread(standing: Standing) -> str:
    """Write the range of an approximation's errors and the error of all layers.

    Examples
    --------
    >>> spread(Standing("kfac", 2, 2, 0.4, 0.3, 0.5))
    '0.300–0.500 (median 0.400)'
    """
    if standing.measured == 1:
        return error_text(standing.error)
    low, high = error_text(standing.lowest), error_text(standing.highest)
    average = "all layers together" if standing.pooled else "median"
    return f"{low}–{high} ({average} {error_text(standing.error)})"


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
    as a share of the exact blocks; candidates are those that hold no more.

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
    known = [s for s in ranking if np.isfinite(s.share)]
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
                f"{where}layer={m.layers[i]}: {smaller} {number(low[i])} > "
                f"{larger} {number(high[i])}"
            )
    return Law(smaller, larger, why, checked, tuple(broken))
