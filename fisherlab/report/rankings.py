"""Which approximation is closest: a ranking over the layers of one moment."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from fisherlab.catalogue import FLOOR, overall
from fisherlab.report.moments import Grid, Moment
from fisherlab.report.words import error_text


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
