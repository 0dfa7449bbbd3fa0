"""The tables of a report: numbers as text, each naming the cell it comes from."""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import xarray as xr

from fisherlab.catalogue import QUANTITIES, Quantity, below_floor, quantity
from fisherlab.report.rankings import Grid, Moment, Standing, damping_kind
from fisherlab.showing import error_text, number, percent, span

HIDDEN: Final = {
    "storage_share",
    "flops_share",
    "converged",
    "below_noise",
    "tied_with_best",
}


@dataclass(frozen=True)
class Cell:
    """One number of a table: text, nine digits, and whether it is the best or given.

    Examples
    --------
    >>> Cell("0.400", "0.4").best
    False
    """

    text: str
    key: str = ""
    best: bool = False
    missing: bool = False
    given: bool = False  # known by definition
    why: str = ""  # it is missing


@dataclass(frozen=True)
class Row:
    """One row: its layer, the layer's shape, its approximation, its cells.

    `why` is the reason of all cells that are missing; a row without any number has no
    cells.

    Examples
    --------
    >>> Row("0", "20×21", "kfac", ()).layer
    '0'
    """

    layer: str
    shape: str
    approximator: str
    cells: tuple[Cell, ...]
    why: str = ""


@dataclass(frozen=True)
class Table:
    """A table: the heads of its columns, what each means, and the rows.

    `origins` name the cells of `results.nc` behind a column, with the layer and the
    approximation of a row to be filled in.

    Examples
    --------
    >>> Table(("relative error",), ("‖F − F̂‖ / ‖F‖",), ()).rows
    ()
    """

    heads: tuple[str, ...]
    hints: tuple[str, ...]
    rows: tuple[Row, ...]
    origins: tuple[str, ...] = ()


def error_table(m: Moment, approximators: tuple[str, ...]) -> Table:
    """Set the relative errors out as layers by approximations.

    Examples
    --------
    >>> import numpy as np
    >>> grid = {"frobenius_error": np.array([[0.4, 0.8]])}
    >>> names, ok = ("kfac", "diagonal"), np.array([["ok", "ok"]])
    >>> m = Moment(None, None, ("0",), names, ("",), grid, ok)
    >>> [(c.text, c.best) for c in error_table(m, names).rows[0].cells]
    [('0.400', True), ('0.800', False)]
    """
    metric = quantity("frobenius_error")
    rows = tuple(
        Row(layer, shape, "", tuple(_cell(m, metric, i, name) for name in approximators))
        for i, (layer, shape) in enumerate(zip(m.layers, m.shapes, strict=True))
    )
    hints = tuple(f"{metric.formula} of {name}" for name in approximators)
    origins = tuple(m.cell(metric.name, "{layer}", name) for name in approximators)
    return Table(approximators, hints, rows, origins)


def metric_table(m: Moment) -> Table:
    """Set all metrics out, one row per layer and approximation.

    Examples
    --------
    >>> import numpy as np
    >>> grid = {"trace_ratio": np.array([[1.0]]), "converged": np.array([[-1.0]])}
    >>> m = Moment(None, None, ("0",), ("kfac",), ("",), grid, np.array([["ok"]]))
    >>> metric_table(m).heads
    ('trace ratio',)
    """
    metrics = [quantity(name) for name in _ordered(m)]
    rows = tuple(
        _row(m, metrics, i, name) for i in range(len(m.layers)) for name in m.approximators
    )
    heads = tuple(metric.title for metric in metrics)
    origins = tuple(m.cell(each.name, "{layer}", "{approximator}") for each in metrics)
    return Table(heads, tuple(metric.formula for metric in metrics), rows, origins)


def _row(m: Moment, metrics: Sequence[Quantity], layer: int, name: str) -> Row:
    cells = tuple(_cell(m, metric, layer, name) for metric in metrics)
    why = next((cell.why for cell in cells if cell.missing), "")
    known = () if all(cell.missing for cell in cells) else cells
    return Row(m.layers[layer], m.shapes[layer], name, known, why)


def _ordered(m: Moment) -> list[str]:
    known = [name for name in QUANTITIES if name in m.grids]
    others = [name for name in m.grids if name not in QUANTITIES]
    return [name for name in known + others if name not in HIDDEN]


def _cell(m: Moment, metric: Quantity, layer: int, name: str) -> Cell:
    row, column = m.grid(metric.name)[layer], m.approximators.index(name)
    value = float(row[column])
    if not np.isfinite(value):
        why = str(m.status[layer, column])
        why = "no value was recorded" if why == "ok" else why
        return Cell("not available", missing=True, why=why)
    text = _text(m, metric, layer, name, value)
    own = name == "exact" or _is_given(metric, value)
    best = not own and _is_best(m, metric, row, value)
    return Cell(text, f"{value:.9g}", best, given=own)


def _is_given(metric: Quantity, value: float) -> bool:
    """Whether a ratio is that of the exact block, as many methods have by definition."""
    return metric.perfect == 1 and abs(value - 1) <= _DIGITS


def _is_best(m: Moment, metric: Quantity, row: Grid, value: float) -> bool:
    others = row[[name != "exact" for name in m.approximators]]
    known = others[np.isfinite(others)]
    if metric.best == "none" or len(known) < 2:
        return False
    nearest = min(_distance(metric, float(each)) for each in known)
    # Ties share the mark, and all errors below the floor are ties.
    return _distance(metric, value) <= max(nearest + 1e-9, metric.floor or -np.inf)


def _distance(metric: Quantity, value: float) -> float:
    return {"low": value, "high": -value, "one": abs(value - 1)}[metric.best]


def _text(m: Moment, metric: Quantity, layer: int, name: str, value: float) -> str:
    if metric.floor is not None and below_floor(value):
        return error_text(value)
    if m.is_bound(metric.name, layer, name):
        return f"< {number(value)}"
    if metric.floor is not None:
        return number(value)
    if metric.name in {"cosine_similarity", "direction_cosine", "trace_ratio"}:
        return f"{value:.4f}"
    share = {"stored_numbers": "storage_share", "solve_flops": "flops_share"}
    if metric.name in share:
        relative = float(m.column(share[metric.name], name)[layer])
        count = f"{value:,.0f}"
        return f"{count} ({percent(relative)})" if np.isfinite(relative) else count
    return number(value)


def standing_rows(ranking: tuple[Standing, ...], m: Moment) -> list[dict[str, Any]]:
    """Write the ranking as text, a row per approximation.

    Examples
    --------
    >>> import numpy as np
    >>> m = Moment(None, None, ("0",), ("kfac",), ("",), {}, np.array([["ok"]]))
    >>> standing_rows((Standing("kfac", 1, 1, 0.4, 0.4, 0.4),), m)[0]["won"]
    '1 of 1'
    """
    return [
        {
            "name": s.name,
            "won": f"{s.won} of {s.measured}",
            "error": error_text(s.error),
            "complete": s.complete,
            "measured": s.measured,
            "span": span(np.array([s.lowest, s.highest]), error_text),
            "share": percent(s.share),
            "flops": percent(s.flops),
            "direction": f"{s.direction:.4f}" if np.isfinite(s.direction) else _NONE,
            "inverse": error_text(s.inverse) if np.isfinite(s.inverse) else _NONE,
            "direction_of": _of(m, "direction_cosine", s),
            "inverse_of": _of(m, "inverse_error", s),
            "source": m.cell("frobenius_error", "*", s.name),
        }
        for s in ranking
    ]


def _of(m: Moment, metric: str, row: Standing) -> str:
    """Say over how many layers a median is, where they are fewer than the errors."""
    count = int(np.isfinite(m.column(metric, row.name)).sum())
    few = 0 < count < row.measured
    return f"of {count} layer{'s' * (count > 1)}" if few else ""


_DIGITS: Final = 1e-7
_NONE: Final = "not available"
_LABELS: Final = {
    "problem": "Problem",
    "model": "Model",
    "fisher": "Fisher",
    "likelihood": "Likelihood",
    "examples": "Examples N",
    "dtype": "Precision",
    "device": "Device",
    "seed": "Seed",
    "torch_version": "PyTorch",
    "conventions": "Conventions",
    "subset": "Examples",
    "created_at": "Created",
}


def provenance(ds: xr.Dataset) -> list[tuple[str, str]]:
    """Say how the Fisher was made: (what, value) in words.

    Examples
    --------
    >>> import xarray as xr
    >>> provenance(xr.Dataset(attrs={"fisher": "Exact()", "examples": 100}))
    [('Fisher', 'Exact()'), ('Examples N', '100')]
    """
    rows = [
        (label, str(ds.attrs[key]))
        for key, label in _LABELS.items()
        if str(ds.attrs.get(key, "")) != ""
    ]
    rows[4:4] = _damping(ds)
    if "step" in ds.coords:
        steps = np.atleast_1d(ds["step"].values)
        told = ", ".join(f"{int(s)}" for s in steps[:12])
        rows.append(("Steps examined", told + (" …" if len(steps) > 12 else "")))
    version = ds.attrs.get("creation_library_version")
    return rows + ([("fisherlab", str(version))] if version else [])


_ASKED: Final = re.compile(r"; ask with ([^;(]*?)(?: \(now [^)]*\))?$")
_USUAL: Final = "--budget and --time"


def left_out(ds: xr.Dataset) -> list[tuple[str, list[str]]]:
    r"""List what is left out for size: (how to ask for it, what).

    Examples
    --------
    >>> told = ["damped inverses: kfac in 1 layer (fc)", "variances; ask with --time"]
    >>> for how, what in left_out(xr.Dataset(attrs={"left_out": "\n".join(told)})):
    ...     print(how, what)
    --budget and --time ['damped inverses: kfac in 1 layer (fc)']
    --time ['variances']
    """
    groups: dict[str, list[str]] = {}
    for line in filter(None, str(ds.attrs.get("left_out", "")).splitlines()):
        asked = _ASKED.search(line)
        words = asked[1] if asked else "" if line.startswith("later steps") else _USUAL
        groups.setdefault(words, []).append(line[: asked.start()] if asked else line)
    return list(groups.items())


def _damping(ds: xr.Dataset) -> list[tuple[str, str]]:
    if "damping" not in ds.coords:
        return []
    told: dict[str, list[str]] = {}
    for label in np.atleast_1d(ds["damping"].values).tolist():
        size = label.split()[-1] if isinstance(label, str) else f"{label:g}"
        told.setdefault(damping_kind(ds, label), []).append(size)
    rows = [
        (_KINDS[kind][0], ", ".join(sizes) + _KINDS[kind][1])
        for kind, sizes in told.items()
    ]
    if "relative" in told and "lambda" in ds:
        lam = span(np.asarray(ds["lambda"].values, dtype=float).ravel())
        rows.append(("Damping λ", f"{lam} (over layers, steps and dampings)"))
    return rows


_KINDS: Final = {
    "absolute": ("Damping λ", ""),
    "relative": ("Damping α", " (relative to the mean eigenvalue tr F / p)"),
    "factored": ("Factored damping λ", " (on the factors of Kronecker products)"),
}


def methods(ds: xr.Dataset) -> list[tuple[str, str]]:
    """List the approximations with the values that made them.

    Examples
    --------
    >>> import xarray as xr
    >>> methods(xr.Dataset(attrs={"approximators": '{"kfac": "KFAC()"}'}))
    [('kfac', 'KFAC()')]
    """
    try:
        told = json.loads(str(ds.attrs.get("approximators", "{}")))
    except json.JSONDecodeError:
        return []
    if not isinstance(told, Mapping):
        return []
    return [(str(name), str(value)) for name, value in told.items()]


def flat(run: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """Lay nested facts of a run out as (path, value) rows.

    Examples
    --------
    >>> flat({"command": "fisherlab report", "versions": {"torch": "2.13.0"}})
    [('command', 'fisherlab report'), ('versions · torch', '2.13.0')]
    """
    rows: list[tuple[str, str]] = []
    for key, value in run.items():
        path = f"{prefix} · {key}" if prefix else str(key)
        if isinstance(value, Mapping):
            rows += flat(value, path)
        elif isinstance(value, list | tuple) and value:
            rows.append((path, ", ".join(str(item) for item in value)))
        elif value not in (None, "", [], ()):
            rows.append((path, f"{value:.4g}" if isinstance(value, float) else str(value)))
    return rows
