"""The page of a report: one self-contained HTML file, and the figures beside it."""

import os
import re
import shlex
from collections.abc import Iterable, Mapping
from importlib.resources import files
from itertools import pairwise
from pathlib import Path
from typing import Any, Final

import jinja2
import numpy as np
import xarray as xr
from markupsafe import Markup, escape

from fisherlab.catalogue import Quantity, below_floor, quantity
from fisherlab.durable import write_durably
from fisherlab.plots.style import styles
from fisherlab.report import rankings, summary, tables
from fisherlab.report.figures import write_figures
from fisherlab.report.plates import in_the_dark
from fisherlab.report.rankings import Moment, moment
from fisherlab.showing import percent

STEPS: Final = 12
"""Steps that get a table of their own at most; `results.nc` holds all."""
EXPECTED: Final = (
    "frobenius_error",
    "direction_cosine",
    "inverse_error",
    "stored_numbers",
    "solve_flops",
)
# No line ends here: before units, after an equals sign, in short brackets, at a slash.
_KEPT: Final = r"(?<=\d) (?=[%λ])|(?<=[λμαδ]) (?==)|(?<=[=≤<>]) (?=[\dλ.])"
_SUM: Final = r"\([^()]{1,4} [+−] [^()]{1,4}\)"
_OWN: Final = ("--problem", "--model", "--data", "--likelihood")
_GLYPHS: Final = {
    "o": "●", "s": "■", "D": "◆", "^": "▲", "P": "✚", "X": "✖", "v": "▼", "*": "★",
    "<": "◀", ">": "▶",
}  # fmt: skip


def write_page(
    ds: xr.Dataset,
    tree: xr.DataTree | None,
    out_dir: str | os.PathLike[str],
    run: Mapping[str, Any],
) -> Path:
    """Write `report.html` and `figures/` into a folder and return the page's path.

    The page needs no other file and no network. `tree` holds the inverse blocks, if
    there are any; `run` is shown as it is: command, versions, times.

    Raises
    ------
    ValueError
        If the result has no coordinates layer and approximator.

    Examples
    --------
    >>> import tempfile
    >>> import xarray as xr
    >>> dims = ("layer", "approximator")
    >>> coords = {"layer": ["0"], "approximator": ["kfac"]}
    >>> ds = xr.Dataset({"frobenius_error": (dims, [[0.4]])}, coords)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     write_page(ds, None, folder, {"command": "fisherlab report"}).name
    'report.html'
    """
    folder = Path(out_dir)
    m = moment(ds)
    plates = write_figures(ds, tree, m, folder / "figures")
    told = {"run": tables.flat(run), "again": _again(run)}
    facts = _facts(ds, m) | {"plates": plates} | told
    page = render("page.html.jinja", facts)
    return write_durably(
        folder / "report.html", lambda scratch: scratch.write_text(page, "utf-8")
    )


def _subject(ds: xr.Dataset) -> str:
    """Say what was analysed, and how well it classifies where that is known."""
    told = [str(ds.attrs["model"])] if "model" in ds.attrs else []
    for name, label in (("train_accuracy", "training"), ("test_accuracy", "test")):
        if name in ds:
            value = ds[name].isel(step=-1) if "step" in ds[name].dims else ds[name]
            count = value.attrs.get("examples")
            over = f" of {int(count):,} examples" if count else ""
            told.append(f"{label} accuracy {percent(float(value.mean()))}{over}")
    return ", ".join(told)


def render(template: str, facts: Mapping[str, Any]) -> str:
    """Fill a template; every text is escaped.

    Examples
    --------
    >>> import jinja2
    >>> try:
    ...     render("page.html.jinja", {})
    ... except jinja2.UndefinedError as error:
    ...     print(error)
    'title' is undefined
    """
    environment = jinja2.Environment(
        loader=jinja2.FunctionLoader(_resource),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["prose"] = prose
    page = environment.get_template(template)
    return page.render(
        css=Markup(_resource("page.css")), js=Markup(_resource("page.js")), **facts
    )


def prose(text: str) -> Markup:
    """Escape a sentence, set what stands in backticks, and options, as code.

    What stands before a % or after an =, and a short sum in brackets, stays in its line.

    Examples
    --------
    >>> prose("`kfac` < 1")
    Markup('<code>kfac</code> &lt; 1')
    """
    marked = re.sub(r"`([^`]+)`", r"<code>\1</code>", str(escape(text)))
    marked = re.sub(_KEPT, "\N{NO-BREAK SPACE}", marked)
    marked = re.sub(_SUM, lambda sum: sum[0].replace(" ", "\N{NO-BREAK SPACE}"), marked)
    marked = re.sub(r"(?<=\de)-(?=\d)", "\N{NON-BREAKING HYPHEN}", marked)
    marked = marked.replace("μ/λ", "μ/\N{WORD JOINER}λ")
    return Markup(re.sub(r"(?<![\w-])(--[a-z][a-z-]*)", r"<code>\1</code>", marked))


def _resource(name: str) -> str:
    return files("fisherlab.report").joinpath(name).read_text("utf-8")


def _facts(ds: xr.Dataset, m: Moment) -> dict[str, Any]:
    ranking = rankings.standings(m)
    return {
        "title": str(ds.attrs.get("problem", "")) or "a network",
        "model": _subject(ds),
        "m": m,
        "damping": summary.damping_words(ds, m).strip(),
        "sentences": summary.verdict(ds),
        "standings": tables.standing_rows(ranking, m),
        "choices": rankings.choices(m, ranking),
        "looks": looks(m.approximators),
        "provenance": tables.provenance(ds),
        "left_out": tables.left_out(ds),
        "methods": tables.methods(ds),
        "errors": tables.error_table(m, _columns(ds, m)),
        "metrics": tables.metric_table(m),
        "earlier": _earlier(ds, m),
        "laws": rankings.laws(ds),
        "unavailable": summary.unavailable(m),
        "absent": _absent(ds),
        "definitions": _definitions(ds, m),
    }


def _again(run: Mapping[str, Any]) -> list[str]:
    """Say in commands how the result comes about again: environment, then program."""
    told = run.get("versions")
    versions = told if isinstance(told, Mapping) else {}
    packages = [  # no index of packages has what stands behind +, e.g. +cpu
        f"{name}=={str(number).partition('+')[0]}"
        for name, number in versions.items()
        if name != "python"
    ]
    lines = [f"pip install {' '.join(packages)}"] if packages else []
    return lines + (command_again(str(run["command"])) if run.get("command") else [])


def command_again(command: str) -> list[str]:
    """Return a command that writes elsewhere, below where it is to be run.

    Examples
    --------
    >>> command_again("fisherlab report --model my.py:net --out here --overwrite")
    ['# in the folder where my.py:net can be found', \
'fisherlab report --model my.py:net']
    """
    try:
        words = shlex.split(command)
    except ValueError:  # no command of a shell
        return [command]
    kept, own = [], []
    for before, word in pairwise(["", *words]):
        name, _, value = word.partition("=")
        if "--out" in (before, name) or word == "--overwrite":
            continue
        kept.append(word)
        given = word if before in _OWN else value if name in _OWN else ""
        own += [given] * (":" in given or given.endswith((".npz", ".pt")))
    place = [f"# in the folder where {' and '.join(own)} can be found"] if own else []
    return [*place, shlex.join(kept)]


def looks(names: Iterable[str]) -> dict[str, tuple[str, str, str]]:
    """Return the colours, light and dark, and the sign of each approximation on the page.

    Examples
    --------
    >>> looks(["kfac"])
    {'kfac': ('#0072B2', '#0093e5', '●')}
    """
    found = {
        name: (look.color, in_the_dark(look.color), _GLYPHS.get(look.marker, "●"))
        for name, look in styles(names).items()
    }
    return {
        name: ("currentColor", "currentColor", look[2]) if name == "exact" else look
        for name, look in found.items()
    }


def _columns(ds: xr.Dataset, m: Moment) -> tuple[str, ...]:
    # The exact block is the reference: a column of zeros says nothing.
    errors = m.column("frobenius_error", "exact")
    perfect = not np.isfinite(errors).any() or below_floor(float(np.nanmax(errors)))
    return tuple(n for n in m.approximators if n != "exact" or not perfect)


def _earlier(ds: xr.Dataset, m: Moment) -> list[tuple[int, tables.Table]]:
    if "step" not in ds.dims:
        return []
    steps = [int(step) for step in ds["step"].values if int(step) != m.step]
    chosen = np.unique(np.linspace(0, len(steps) - 1, STEPS).round().astype(int))
    picked = steps if len(steps) <= STEPS else [steps[i] for i in chosen]
    return [(step, tables.metric_table(moment(ds, step))) for step in picked]


def _absent(ds: xr.Dataset) -> list[str]:
    expected = (
        "frobenius_error",
        "direction_cosine",
        "inverse_error",
        "stored_numbers",
    )
    return [quantity(name).title for name in expected if name not in ds.data_vars]


def _definitions(ds: xr.Dataset, m: Moment) -> list[Quantity]:
    """Return what the page's numbers mean: those of purposes first, then the metrics."""
    told = []
    if "meaning" in ds.coords:
        facts = (ds[name].values for name in ("measure", "title", "of_purpose", "meaning"))
        for name, title, purpose, meaning in zip(*facts, strict=True):
            told += [Quantity(name, title, formula=purpose, meaning=meaning)] * bool(
                meaning
            )
    return told + [quantity(name) for name in m.grids if quantity(name).meaning]
