"""All rows and experiments; published beside measured as Markdown, written to a folder."""

import importlib
import pkgutil
import shlex
import textwrap
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from math import isinf
from pathlib import Path
from typing import Final, final

import matplotlib.pyplot as plt
import xarray as xr
from matplotlib.figure import Figure as Drawing

import fisherlab.reproduce as package
from fisherlab.analysis import open as opened
from fisherlab.analysis import save
from fisherlab.analysis.executors import Workers, filled
from fisherlab.durable import write_durably
from fisherlab.plots import saving
from fisherlab.report.folder import whole_folder
from fisherlab.reproduce.experiment import (
    PUBLISHED,
    VERDICTS,
    Bound,
    Experiment,
    Judged,
    Result,
    Row,
    Setting,
    judged,
)
from fisherlab.showing import number

PAPERS: Final = {
    "martens2015": "Martens & Grosse 2015, K-FAC, arXiv 1503.05671",
    "koroko2022": "Koroko et al. 2022, KPSVD, arXiv 2201.10285",
    "bahamou2022": "Bahamou, Goldfarb & Ren 2022, MBF, arXiv 2202.04124",
    "chen2021": "Chen 2021, CG-FAC, arXiv 2101.00218",
    "beyond": "Beyond the papers: controls that none of them shows",
}
_HEAD: Final = (
    "| where | claim | published | measured | tolerance | verdict |\n"
    "|---|---|---|---|---|---|"
)


@final
@dataclass(frozen=True)
class Outcome:
    """What came of an experiment: its settings and every claim judged, or a failure."""

    settings: str = ""
    judged: Mapping[str, Sequence[Judged]] = field(default_factory=dict)  # by row
    failure: str = ""


def comparison(experiment: Experiment, rows: Sequence[Row], outcome: Outcome) -> str:
    """Write the page of one experiment."""
    lines = [
        f"# {experiment.name}",
        experiment.summary,
        f"![{experiment.summary}]({experiment.name}.png)",
        f"Settings: {outcome.settings}.",
    ]
    for row in rows:
        lines += [f"## {PAPERS[row.paper]}: {row.place}", row.shows]
        lines += _claims([row], outcome.judged)
        lines += [f"Left out: {row.missing}"] if row.missing else []
    return "\n\n".join(lines) + "\n"


def overview(
    rows: Sequence[Row],
    known: Mapping[str, Experiment],
    outcomes: Mapping[str, Outcome],
    made_by: str,
) -> str:
    """Write the page of all papers: every row, and every claim with its verdict.

    Examples
    --------
    >>> note = Row("Note", "CG.", paper="chen2021")
    >>> print(overview([note], {}, {}, "`a`").split("##")[0])
    # The papers, published beside measured
    <BLANKLINE>
    Written by `a`. Every verdict is computed from the numbers beside it.
    <BLANKLINE>
    1 rows, 0 with a command; no claim was judged.
    <BLANKLINE>
    A command that is "not run" has no result in the folder of this page.
    <BLANKLINE>
    <BLANKLINE>
    """
    with_command = sum(row.experiment is not None for row in rows)
    lines = [
        "# The papers, published beside measured",
        f"Written by {made_by}. Every verdict is computed from the numbers beside it.",
        f"{len(rows)} rows, {with_command} with a command; {_tally(outcomes)}.",
        'A command that is "not run" has no result in the folder of this page.',
    ]
    for paper, title in PAPERS.items():
        own = [row for row in rows if row.paper == paper]
        if own:
            lines += [f"## {title}", _table(own, known, outcomes)]
            judged = {
                name: found
                for outcome in outcomes.values()
                for name, found in outcome.judged.items()
            }
            lines += _claims(own, judged)
            lines += _settings(own, outcomes)
    return "\n\n".join(lines) + "\n"


def state(row: Row, known: Mapping[str, Experiment]) -> str:
    """Say whether a row can be run, and why not or what is left out."""
    if row.experiment is None:
        return f"no command: {row.missing or 'not written'}"
    assert row.experiment in known, row.experiment
    return f"command; {row.missing}" if row.missing else "command"


def _table(
    rows: Sequence[Row], known: Mapping[str, Experiment], outcomes: Mapping[str, Outcome]
) -> str:
    head = "| place | what it shows | command | verdicts |\n|---|---|---|---|"
    lines = []
    for row in rows:
        outcome = outcomes.get(row.experiment or "")
        if row.experiment is None:
            said = state(row, known)
        elif outcome is None:
            said = "not run"
        elif outcome.failure:
            said = f"failed: {outcome.failure}"
        else:
            said = _counted(outcome.judged.get(row.name, ())) or "drawn; no number claimed"
        command = f"`{row.experiment}`" if row.experiment else ""
        cells = (row.place, row.shows, command, said)
        lines.append(f"| {' | '.join(map(_cell, cells))} |")
    return "\n".join([head, *lines])


def _claims(rows: Sequence[Row], judged: Mapping[str, Sequence[Judged]]) -> list[str]:
    found = [(row, one) for row in rows for one in judged.get(row.name, ())]
    if not found:
        return []
    lines = [_HEAD, *(_line(row, one) for row, one in found)]
    return ["\n".join(lines)]


def _line(row: Row, one: Judged) -> str:
    claim = one.claim
    published = ", ".join(
        f"{label} {told if isinstance(told, Bound) else number(told)}"
        for label, told in claim.published.items()
    )
    if claim.basis != PUBLISHED:
        published = f"none; {claim.basis}: {published}"
    measured = ", ".join(f"{k} {_spread(values)}" for k, values in one.measured.items())
    order = f" Order: {' < '.join(claim.order)}." if claim.order else ""
    statement = f"{claim.statement} *{claim.how}*" if claim.how else claim.statement
    cells = [
        row.place,
        f"{statement}{order}",
        published,
        measured,
        claim.allowed,
        f"**{one.verdict}**{'. ' if one.reason else ''}{one.reason}",
    ]
    return f"| {' | '.join(map(_cell, cells))} |"


def _spread(values: Sequence[float]) -> str:
    if any(map(isinf, values)):
        return "none, it failed"
    mean = number(sum(values) / len(values))
    if len(values) == 1:
        return mean
    return f"{mean} ({number(min(values))}–{number(max(values))})"


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


def _settings(rows: Sequence[Row], outcomes: Mapping[str, Outcome]) -> list[str]:
    names = dict.fromkeys(row.experiment for row in rows if row.experiment in outcomes)
    lines = [
        f"- `{n}`: {outcomes[n].settings}" for n in names if n and outcomes[n].settings
    ]
    return ["Settings:\n\n" + "\n".join(lines)] if lines else []


def _counted(judged: Sequence[Judged]) -> str:
    counts = Counter(one.verdict for one in judged)
    return ", ".join(
        f"{counts[verdict]} {verdict}" for verdict in VERDICTS if verdict in counts
    )


def _tally(outcomes: Mapping[str, Outcome]) -> str:
    every = [one for o in outcomes.values() for found in o.judged.values() for one in found]
    return f"claims: {_counted(every)}" if every else "no claim was judged"


GAP: Final = 0.1  # inches between a figure and its caption
TABLE: Final = 100_000  # numbers of a variable that go into a table for people


def experiments() -> dict[str, Experiment]:
    """Return the experiments of all modules of this folder, by name.

    Examples
    --------
    >>> "mbf-theorem-1" in experiments()
    True
    """
    found: dict[str, Experiment] = {}
    for module in sorted(pkgutil.iter_modules(package.__path__), key=lambda m: m.name):
        held = importlib.import_module(f"{package.__name__}.{module.name}")
        found |= {one.name: one for one in getattr(held, "EXPERIMENTS", ())}
    return found


def rows() -> list[Row]:
    """Return every figure, table, algorithm and theorem of the papers.

    Examples
    --------
    >>> {row.paper for row in rows()} == set(PAPERS)
    True
    """
    held = {p: importlib.import_module(f"{package.__name__}.{p}") for p in PAPERS}
    return [replace(row, paper=p) for p, module in held.items() for row in module.ROWS]


def experiment(name: str) -> Experiment:
    """Return the experiment of this name, or that of the row of this name.

    Raises
    ------
    ValueError
        If the name is unknown, or the row has no command.

    Examples
    --------
    >>> experiment("martens2015-figure-3").name
    'kfac-figure-3'
    """
    known, every = experiments(), {row.name: row for row in rows()}
    row = every.get(name)
    if row is not None and row.experiment is None:
        msg = f"{name} has no command: {row.missing}. `fisherlab reproduce list` names all."
        raise ValueError(msg)
    found = known.get(name if row is None or row.experiment is None else row.experiment)
    if found is None:
        raise ValueError(
            f"There is no {name!r} to reproduce. The commands are {', '.join(known)}; "
            "`fisherlab reproduce list` tells what they show."
        )
    return found


def write(
    name: str,
    setting: Setting,
    seeds: int,
    out: Path | None,
    executor: Workers = None,
) -> Path:
    """Compute an experiment and write its numbers, its drawing and the comparison.

    Parameters
    ----------
    name
        One of `experiments()`, or the name of a row.
    setting
        With the first seed.
    seeds
        How many seeds, each one more than the last; whole matrices are those of the
        first.
    out
        The folder, new or empty; a new one ``reproduced/<name>`` if None.
    executor
        What does the seeds, as for `fl.tune`.

    Returns
    -------
    Path
        The folder, with ``results.nc``, ``comparison.md``, ``<name>.png``, ``<name>.pdf``
        and ``<name>.csv`` (without variables of whole matrices): all of them or none.

    Raises
    ------
    ValueError
        If the name is unknown, the folder not empty, `seeds` below 1, or the experiment
        takes no such problem or number of steps.
    DataError
        If data files are missing.
    """
    if seeds < 1:
        raise ValueError(f"--seeds must be at least 1, but is {seeds}.")
    chosen = experiment(name)
    _require_taken(chosen, setting)
    with whole_folder(out, Path("reproduced") / chosen.name) as (scratch, target):
        joined = _computed(chosen, setting, seeds, executor)
        joined.attrs |= {"experiment": chosen.name, **_marks(joined, setting, seeds)}
        if setting.steps is not None:
            joined.attrs["asked_steps"] = setting.steps
        save(joined, scratch / "results.nc")
        outcome = _outcome(chosen, joined)
        drawing = chosen.draw(joined)
        _caption(drawing, outcome.settings)
        saving.save(drawing, scratch / chosen.name, _csv(joined))
        plt.close(drawing)
        page = comparison(chosen, _rows_of(chosen), outcome)
        write_durably(scratch / "comparison.md", partial(_put, page))
    return target


def write_all(
    setting: Setting,
    seeds: int,
    out: Path | None,
    progress: Callable[[str], object] = print,
    executor: Workers = None,
) -> Path:
    """Run each experiment that has no results in the folder, and write REPRODUCTION.md.

    An experiment that fails is a row that says so. The page is written anew after each.
    An executor, as of `fl.tune`, does the experiments, those of most minutes first.

    Returns
    -------
    Path
        The page; beside it a folder for each experiment.

    Raises
    ------
    ValueError
        If the setting names a problem or steps, which not all experiments take.
    """
    _require_taken(None, setting)
    folder = Path("reproduced") / "all" if out is None else out
    page = folder / "REPRODUCTION.md"
    every, known, found = rows(), experiments(), dict[str, Outcome]()
    paper = not setting.quick
    longest = sorted(known, key=lambda name: known[name].minutes[paper], reverse=True)
    cells = {
        name: partial(_failed, name, setting, seeds, folder / name, progress)
        for name in longest
    }
    for name, failure in filled("reproduce", cells, executor):
        found[name] = (
            Outcome(failure=failure)
            if failure
            else _taken(known[name], setting, seeds, folder / name)
        )
        outcomes = {name: found[name] for name in known if name in found}
        text = overview(every, known, outcomes, _command(setting, seeds))
        folder.mkdir(parents=True, exist_ok=True)
        write_durably(page, partial(_put, text))
    return page


def _require_taken(chosen: Experiment | None, setting: Setting) -> None:
    """Refuse a problem or steps that an experiment, or all together, cannot take."""
    who, every = chosen.name if chosen else "all", experiments().items()
    if setting.problem is not None:
        others = chosen.problems if chosen else ()
        if setting.problem not in others:
            takes = f"one of {', '.join(others)}" if others else "no other problem"
            able = ", ".join(name for name, one in every if one.problems)
            raise ValueError(
                f"reproduce {who} takes {takes}, but --problem is {setting.problem!r}. "
                f"Leave it out; it is for {able}."
            )
    if setting.steps is not None:
        if chosen is None or not chosen.trains:
            able = ", ".join(name for name, one in every if one.trains)
            raise ValueError(f"reproduce {who} has no --steps; it is for {able}.")
        if setting.steps < 1:
            raise ValueError(f"--steps must be at least 1, but is {setting.steps}.")


def _failed(
    name: str,
    setting: Setting,
    seeds: int,
    folder: Path,
    progress: Callable[[str], object],
) -> str:
    """Compute what the folder does not hold; return how that failed, or nothing."""
    if (folder / "results.nc").exists():
        return ""
    minutes = experiment(name).minutes[not setting.quick]
    progress(f"{name}: about {minutes:g} minutes a seed")
    began = time.perf_counter(), time.process_time()
    try:
        write(name, setting, seeds, folder)
    except Exception as error:  # a row of the page, not its end
        return f"{type(error).__name__}: {error}"
    ended = time.perf_counter(), time.process_time()
    wall, own = (after - before for before, after in zip(began, ended, strict=True))
    progress(f"{name}: {wall:.0f} s, {own:.0f} s of the processor")
    return ""


def _taken(chosen: Experiment, setting: Setting, seeds: int, folder: Path) -> Outcome:
    """Take what the folder holds, if it is of the same setting."""
    results = folder / "results.nc"
    held = opened(results)
    wanted = _marks(held, setting, seeds)
    kept = {name: int(held.attrs[name]) for name in wanted}
    if kept != wanted:
        return Outcome(failure=f"{results} holds {kept}; remove it to run {wanted}")
    try:
        return _outcome(chosen, held)
    except KeyError as error:  # of another version, which measured something else
        lacks = str(error.args[0]).partition(". ")[0]
        return Outcome(failure=f"{results} is not enough: {lacks}; remove it to run anew")


def _put(text: str, at: Path) -> None:
    at.write_text(text, encoding="utf-8")


def _marks(result: Result, setting: Setting, seeds: int) -> dict[str, int]:
    """Return what a stored result must agree in to be taken for this setting's."""
    count = 1 if isinstance(result, xr.DataTree) else seeds
    return {"quick": int(setting.quick), "first_seed": setting.seed, "seeds": count}


def _command(setting: Setting, seeds: int) -> str:
    size = "--quick" if setting.quick else "--paper"
    words = ["fisherlab", "reproduce", "all", size, "--seeds", str(seeds)]
    return f"`{shlex.join(words)}`"


def _rows_of(chosen: Experiment) -> list[Row]:
    return [row for row in rows() if row.experiment == chosen.name]


def _outcome(chosen: Experiment, joined: Result) -> Outcome:
    """Judge all claims on an experiment by its result."""
    ds = joined.to_dataset() if isinstance(joined, xr.DataTree) else joined
    count = ds.sizes.get("seed", 1)
    parts = [ds.isel(seed=k) for k in range(count)] if "seed" in ds.dims else [ds]
    found = {
        row.name: [judged(claim, parts) for claim in row.claims]
        for row in _rows_of(chosen)
        if row.claims
    }
    first, seeds = (int(joined.attrs[name]) for name in ("first_seed", "seeds"))
    size = "quick size" if joined.attrs["quick"] else "paper size"
    if "asked_steps" in joined.attrs:
        size = f"{int(joined.attrs['asked_steps']):,} steps asked for"
    said = str(joined.attrs.get("settings", "none told"))
    numbers = ", ".join(str(first + k) for k in range(seeds))
    return Outcome(f"{said}; {size}; seed {numbers}", found)


def _computed(
    chosen: Experiment, setting: Setting, seeds: int, executor: Workers
) -> Result:
    """Return the results of several seeds along a dimension; matrices of the first."""
    numbers = list(range(setting.seed, setting.seed + seeds))
    cells = {
        str(seed): partial(_seeded, chosen.name, setting.seeded(seed)) for seed in numbers
    }
    found: dict[str, Result] = {}
    for name, one in filled("reproduce", cells, executor):
        found[name] = one
        first = found.get(str(setting.seed))
        if isinstance(first, xr.DataTree):
            return first
    several = [one for s in cells if isinstance(one := found[s], xr.Dataset)]
    return xr.concat(
        several,
        xr.DataArray(numbers, dims="seed", name="seed"),
        combine_attrs="override",
    )


def _seeded(name: str, setting: Setting) -> Result:
    return experiment(name).compute(setting)


def _csv(joined: Result) -> xr.Dataset | None:
    if not isinstance(joined, xr.Dataset):
        return None
    large = [name for name, values in joined.data_vars.items() if values.size > TABLE]
    return joined.drop_vars(large)


def _caption(drawing: Drawing, text: str) -> None:
    """Write the settings below all that a figure shows, as wide as it is."""
    drawing.canvas.draw()
    low = drawing.get_tightbbox().y0 - GAP
    drawing.text(
        0.0,
        low / drawing.get_figheight(),
        textwrap.fill(text, int(drawing.get_figwidth() * 17)),
        ha="left",
        va="top",
        fontsize=7,
        color="0.3",
    )
