"""Two saved results side by side: what differs, and which approximations gained."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import xarray as xr

import fisherlab as fl
from fisherlab import plots
from fisherlab.catalogue import QUANTITIES, Quantity, below_floor, quantity
from fisherlab.plots import frames
from fisherlab.report import tables
from fisherlab.report.folder import in_reports, whole_folder
from fisherlab.report.job import load_result, located, read_run
from fisherlab.report.page import looks, render
from fisherlab.report.plates import Drawing, Plate, closing, write_plate
from fisherlab.report.rankings import moment
from fisherlab.report.summary import SOURCES, Sentence, judgements
from fisherlab.showing import error_text, number

PARTS: Final = ("report.html", "runs.nc", "figures")
_UNTOLD: Final = {"created_at", "approximators", "conventions", "creation_library"}
_LISTED: Final = {"layer": "layers", "approximator": "approximations"}


@dataclass(frozen=True)
class Run:
    """One of the two: its label, where it lies, its result and what it recorded.

    Examples
    --------
    >>> Run("A", "reports/a", xr.Dataset(), {}).label
    'A'
    """

    label: str
    place: str
    ds: xr.Dataset
    record: Mapping[str, Any]


@dataclass(frozen=True)
class Row:
    """One cell of both runs: A, B, B − A, which is closer, and what the layer is.

    Examples
    --------
    >>> Row("fc1", "kfac", (), "A").closer
    'A'
    """

    layer: str
    approximator: str
    cells: tuple[tables.Cell, ...]
    closer: str
    kind: str = ""


def compare_runs(
    first: str | Path,
    second: str | Path,
    out: str | Path | None = None,
    *,
    overwrite: bool = False,
) -> Path:
    """Set two results side by side on a page, and return its path.

    Each is taken at its last step and at a damping they share. What only one of them
    holds is named, not compared; the numbers compared are kept in `runs.nc`.

    Parameters
    ----------
    first, second
        Files of `fl.save`, or folders of reports.
    out
        The folder of the page; by default a new one in `reports`.
    overwrite
        Replace an earlier page in `out`.

    Raises
    ------
    ValueError
        If the two have no layer, approximation and metric in common.
    DataError
        If a file is missing or not readable.

    Examples
    --------
    >>> import tempfile
    >>> dims = ("layer", "approximator")
    >>> coords = {"layer": ["0"], "approximator": ["kfac"]}
    >>> ds = xr.Dataset({"frobenius_error": (dims, [[0.4]])}, coords)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     one = fl.save(ds, Path(folder) / "one.nc")
    ...     two = fl.save(ds / 2, Path(folder) / "two.nc")
    ...     compare_runs(one, two, Path(folder) / "out").name
    'report.html'
    """
    runs = _runs(Path(first), Path(second))
    pair = together(runs)
    fallback = in_reports("compare")
    folder = whole_folder(out, fallback, overwrite=overwrite, owned=PARTS)
    with folder as (scratch, place):
        fl.save(pair, scratch / "runs.nc")
        plates = _plates(pair, scratch / "figures")
        facts = _facts(runs, pair) | {"plates": plates}
        page = render("runs.html.jinja", facts)
        (scratch / "report.html").write_text(page, "utf-8")
    return place / "report.html"


def _runs(*paths: Path) -> tuple[Run, ...]:
    files = [located(path) for path in paths]
    names = [_name(file) for file in files]
    alike = names[0] == names[1]
    return tuple(
        Run(letter if alike else name, str(file), load_result(file), read_run(file.parent))
        for letter, name, file in zip("AB", names, files, strict=True)
    )


def _name(file: Path) -> str:
    return file.resolve().parent.name if file.name == "results.nc" else file.stem


def together(runs: Sequence[Run]) -> xr.Dataset:
    """Stack what both runs hold along a dim `run`.

    Examples
    --------
    >>> dims = ("layer", "approximator")
    >>> coords = {"layer": ["0"], "approximator": ["kfac"]}
    >>> ds = xr.Dataset({"frobenius_error": (dims, [[0.4]])}, coords)
    >>> together([Run("a", "", ds, {}), Run("b", "", ds, {})]).run.values.tolist()
    ['a', 'b']
    """
    common = {dim: _common(runs, dim) for dim in ("layer", "approximator")}
    damping = _shared_damping(runs)
    moments = [
        moment(run.ds.sel(common), damping=damping if "damping" in run.ds.dims else None)
        for run in runs
    ]
    names = [n for n in moments[0].grids if n in moments[1].grids]
    if damping is None:
        # Values at different dampings say nothing about one another.
        names = [n for n in names if not any(n in m.damped for m in moments)]
    if not names:
        raise ValueError(f"{runs[0].place} and {runs[1].place} have no metric in common.")
    cells = ("run", "layer", "approximator")
    variables: dict[str, Any] = {
        n: (cells, np.stack([m.grids[n] for m in moments])) for n in names
    }
    norms = [m.norms for m in moments if m.norms is not None]
    if len(norms) == len(moments):
        variables["fisher_norm"] = (("run", "layer"), np.stack(norms))
    steps = [-1 if m.step is None else m.step for m in moments]
    coords: dict[str, Any] = {
        "run": [run.label for run in runs],
        **common,
        "step": ("run", steps),
    }
    if all("kind" in run.ds.coords for run in runs):
        one, other = (run.ds["kind"].sel(layer=common["layer"]).values for run in runs)
        coords["kind"] = "layer", np.where(one == other, one, "")
    attrs = {} if damping is None else {"damping": damping}
    return xr.Dataset(variables, coords, attrs)


def _common(runs: Sequence[Run], dim: str) -> list[str]:
    first, second = (frames.names(run.ds, dim) for run in runs)
    both = [name for name in first if name in second]
    if not both:
        raise ValueError(
            f"{runs[0].place} and {runs[1].place} have no {dim} in common: "
            f"{', '.join(first)} and {', '.join(second)}."
        )
    return both


def _shared_damping(runs: Sequence[Run]) -> float | str | None:
    if not all("damping" in run.ds.coords for run in runs):
        return None
    kinds = {str(run.ds.attrs.get("damping_kind", "absolute")) for run in runs}
    if len(kinds) > 1:  # α = 0.1 is not λ = 0.1
        return None
    first, second = (np.atleast_1d(run.ds["damping"].values).tolist() for run in runs)
    words = any(isinstance(value, str) for value in [*first, *second])
    both = [v for v in first if (v in second if words else np.isclose(v, second).any())]
    return both[len(both) // 2] if both else None


def _facts(runs: Sequence[Run], pair: xr.Dataset) -> dict[str, Any]:
    steps = [int(step) for step in pair["step"].values]
    shown = [_head(run, step) for run, step in zip(runs, steps, strict=True)]
    metrics = [quantity(str(name)) for name in pair.data_vars]
    metrics = [q for q in metrics if q.name in QUANTITIES and q.best != "none"]
    return {
        "title": f"{runs[0].label} and {runs[1].label}",
        "runs": shown,
        "sentences": _verdict(runs, pair),
        "differences": _differences(runs),
        "tables": [_table(runs, pair, metric) for metric in metrics],
        "looks": looks(frames.names(pair, "approximator")),
    }


def _head(run: Run, step: int) -> dict[str, str]:
    made = str(run.ds.attrs.get("created_at", "undated"))
    when = made if step < 0 else f"{made}, step {step}"
    return {"label": run.label, "place": run.place, "when": when}


def _verdict(runs: Sequence[Run], pair: xr.Dataset) -> tuple[Sentence, ...]:
    told = [_other_blocks(runs), _overall(runs, pair), *_best(runs), _alone(runs)]
    return tuple(sentence for sentence in told if sentence is not None)


def _other_blocks(runs: Sequence[Run]) -> Sentence | None:
    """Warn that errors against different exact blocks are no contest."""
    parts = []
    for name in ("fisher", "likelihood"):
        given = [str(run.ds.attrs.get(name, "")) for run in runs]
        if all(given) and given[0] != given[1]:
            told = [f"{kind} in `{r.label}`" for kind, r in zip(given, runs, strict=True)]
            parts.append(f"the {name} is {' and '.join(told)}")
    if not parts:
        return None
    text = f"The two have different exact blocks ({'; '.join(parts)}): errors against "
    return Sentence("caution", text + "them do not tell which run is better.")


def _overall(runs: Sequence[Run], pair: xr.Dataset) -> Sentence:
    if "frobenius_error" not in pair:
        return Sentence("error", "The two have no relative errors in common.")
    rows = _rows(runs, pair, quantity("frobenius_error"))
    labels = [run.label for run in runs]
    counts = {label: sum(row.closer == label for row in rows) for label in labels}
    rest = len(rows) - sum(counts.values())
    text = (
        f"By the relative error `{labels[1]}` is closer to its exact blocks in "
        f"{counts[labels[1]]} of {len(rows)} cells (layers × approximations), "
        f"`{labels[0]}` in {counts[labels[0]]}; {rest} are equal, within noise or not "
        "available."
    )
    return Sentence("error", text, "frobenius_error")


def _best(runs: Sequence[Run]) -> tuple[Sentence, ...]:
    """Say for every purpose who is closest in each run, by the run's own numbers."""
    found = [judgements(run.ds, moment(run.ds)) for run in runs]
    topics = list(dict.fromkeys(topic for each in found for topic in each))
    return tuple(
        Sentence(
            topic,
            " ".join(
                f"In `{label}`: {one.headline()}"
                if one
                else f"In `{label}` there is nothing of it."
                for label, one in each
            ),
            SOURCES.get(topic, ""),
            " ".join(
                f"In `{label}`: {details}"
                for label, one in each
                if one and (details := one.details())
            ),
        )
        for topic in topics
        for each in [[(r.label, f.get(topic)) for r, f in zip(runs, found, strict=True)]]
    )


def _alone(runs: Sequence[Run]) -> Sentence | None:
    parts = []
    for dim, words in _LISTED.items():
        kinds = [frames.names(run.ds, dim) for run in runs]
        for run, mine, others in zip(runs, kinds, reversed(kinds), strict=True):
            only = [name for name in mine if name not in others]
            if only:
                parts.append(f"{words} only in `{run.label}`: {', '.join(only)}")
    if _shared_damping(runs) is None and any("damping" in run.ds.coords for run in runs):
        parts.append("what depends on the damping, of which the two share none")
    return Sentence("caution", f"Not compared: {'; '.join(parts)}.") if parts else None


def _differences(runs: Sequence[Run]) -> list[tuple[str, str, str]]:
    told = [_settings(run) for run in runs]
    keys = list(dict.fromkeys([*told[0], *told[1]]))
    pairs = [(key, *(each.get(key, "not recorded") for each in told)) for key in keys]
    return [(key, first, second) for key, first, second in pairs if first != second]


def _settings(run: Run) -> dict[str, str]:
    attrs = {str(k): str(v) for k, v in run.ds.attrs.items() if k not in _UNTOLD}
    methods = dict(tables.methods(run.ds))
    config = run.record.get("config") or {}
    rest = {"versions": run.record.get("versions"), "command": run.record.get("command")}
    return attrs | dict(tables.flat({"approximator": methods, "config": config, **rest}))


def _table(runs: Sequence[Run], pair: xr.Dataset, metric: Quantity) -> dict[str, Any]:
    return {
        "id": metric.name,
        "title": metric.title,
        "formula": metric.formula,
        "rows": _rows(runs, pair, metric),
        "origins": [
            f"{metric.name}[run={run.label}, layer={{layer}}, "
            "approximator={approximator}]"
            for run in runs
        ],
    }


def _rows(runs: Sequence[Run], pair: xr.Dataset, metric: Quantity) -> list[Row]:
    rows, kinds = [], frames.kinds(pair)
    for layer in frames.names(pair, "layer"):
        for name in frames.names(pair, "approximator"):
            if name == "exact" and metric.perfect is not None:
                continue
            one = pair.sel(layer=layer, approximator=name)
            values = [float(one[metric.name].sel(run=run.label)) for run in runs]
            cells = [_cell(metric, value) for value in values]
            change = values[1] - values[0]
            known = bool(np.isfinite(change))
            text = f"{change:+.3g}" if known else "not available"
            key = f"{change:.9g}" if known else ""
            cells.append(tables.Cell(text, key, missing=not known))
            closer, kind = _closer(runs, one, metric, values), kinds.get(layer, "")
            rows.append(Row(layer, name, tuple(cells), closer, kind))
    return rows


def _cell(metric: Quantity, value: float) -> tables.Cell:
    if not np.isfinite(value):
        return tables.Cell("not available", missing=True)
    text = error_text(value) if metric.floor is not None else number(value)
    return tables.Cell(text, f"{value:.9g}")


def _closer(
    runs: Sequence[Run], one: xr.Dataset, metric: Quantity, values: Sequence[float]
) -> str:
    if not np.isfinite(values).all():
        return "not available"
    if metric.floor is not None and all(below_floor(value) for value in values):
        return "equal"
    ends = [f"{metric.name}_{end}" for end in ("low", "high")]
    if all(end in one for end in ends):
        low, high = (one[end].values.astype(float) for end in ends)
        if max(low) <= min(high):
            return "within noise"
    away = [{"low": v, "high": -v, "one": abs(v - 1)}[metric.best] for v in values]
    if np.isclose(away[0], away[1], rtol=1e-9, atol=0):
        return "equal"
    return runs[int(away[1] < away[0])].label


def _plates(pair: xr.Dataset, folder: Path) -> tuple[Plate, ...]:
    plates = []
    for name in ("frobenius_error", "inverse_error", "direction_cosine"):
        if name not in pair or not np.isfinite(pair[name]).any():
            continue
        caption = (
            f"{quantity(name).title.capitalize()} of each approximation in both runs; "
            "a line joins the two."
        )
        with closing():
            figure = plots.runs(pair, name)
            rows = frames.table(pair[[name]])
            title = quantity(name).title.capitalize()
            drawing = Drawing(name, title, caption, figure, rows)
            plates.append(write_plate(drawing, folder))
    return tuple(plates)
