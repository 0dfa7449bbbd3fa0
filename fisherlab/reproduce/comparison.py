"""Published beside measured, as Markdown: one experiment, or every row of every paper."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import isinf
from typing import Final, final

from fisherlab.analysis.wording import number
from fisherlab.reproduce.experiment import PUBLISHED, Bound, Experiment, Judged, Row

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
    >>> print(overview([Row("chen2021", "Note", "CG.")], {}, {}, "`a`").split("##")[0])
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
    return ", ".join(f"{count} {verdict}" for verdict, count in counts.items())


def _tally(outcomes: Mapping[str, Outcome]) -> str:
    every = [one for o in outcomes.values() for found in o.judged.values() for one in found]
    return f"claims: {_counted(every)}" if every else "no claim was judged"
