"""The jobs behind `fisherlab report` and `sweep`: check, load, analyse, write."""

from __future__ import annotations

import json
import sys
from contextlib import ExitStack
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import Any

import xarray as xr

import fisherlab as fl
from fisherlab.analysis.allowances import parse_time
from fisherlab.analysis.damping_ranges import damping_verdict
from fisherlab.analysis.executors import Workers
from fisherlab.analysis.intervals import with_noise
from fisherlab.analysis.wording import aligned
from fisherlab.approximators.ranks import require_same_weights
from fisherlab.errors import NumericalError, meant
from fisherlab.numerics.devices import require_device
from fisherlab.numerics.memory import parse_budget
from fisherlab.numerics.ranks import live
from fisherlab.problems import Problem
from fisherlab.report import own
from fisherlab.report.analysis import (
    Analysis,
    analyse,
    attributes_of,
    by_first,
    checkpoints,
    collected,
    count_phases,
)
from fisherlab.report.config import ReportConfig
from fisherlab.report.direct import PARTS, single, write_parts
from fisherlab.report.folder import in_reports, whole_folder
from fisherlab.report.page import write_page
from fisherlab.report.record import Phases, describe_run
from fisherlab.report.sizes import Size, fitted


def run(config: ReportConfig, command: str = "") -> Path:
    """Write a report and return the path of its page.

    The folder holds `report.html`, `results.nc`, `inverse_blocks.nc`, `run.json` and
    `figures/`, and appears only when all is written. An interrupt after the first
    checkpoint, or a training that diverges there, ends the analysis early: what is done
    is written, and the interrupt or the error is raised again. Where a process group is
    live, its ranks train together; the first analyses and writes.

    Parameters
    ----------
    config
        What to do.
    command
        The command line, for the record.

    Raises
    ------
    ValueError
        If a name, a device or the folder is refused; nothing is written then.
    DataError
        If a data file is missing or damaged.
    NumericalError
        If the training diverges or a factorisation fails.

    Examples
    --------
    >>> run(ReportConfig(problem="digit"))  # doctest: +ELLIPSIS
    Traceback (most recent call last):
    ValueError: There is no problem 'digit'. The problems are digits, mnist, ...
    """
    started = datetime.now().astimezone()
    check(config)
    phase = Phases(0, quiet=config.quiet)
    # Before the bar appears, so that a complaint about the input stands alone.
    ranks = live()
    with phase("load"):
        problem = load(config) if ranks is None else ranks.together(lambda: load(config))
        size = fitted(problem, config)
    if ranks is not None:
        require_same_weights(ranks, problem.model)
        size = ranks.gathered(size)[0]
    phase.total = count_phases(replace(config, checkpoints=size.moments)) + 2
    fallback = in_reports(config.subject, started)
    folder = whole_folder(config.out, fallback, overwrite=config.overwrite, owned=PARTS)
    with ExitStack() as stack:
        places = by_first(stack.enter_context, folder)
        if not config.quiet:
            _tell(size, config)
        with phase:
            analysis = analyse(problem, config, size, phase)
            by_first(_written, analysis, config, command, started, places, phase, stack)
    if analysis is None or places is None:
        return Path()
    page = places[1] / "report.html"
    if not config.quiet:
        print(summary_table(analysis.results), end="\n\n")
    if isinstance(analysis.ended, KeyboardInterrupt):
        raise KeyboardInterrupt(f"what was finished is in {page}")
    if analysis.ended is not None:
        raise NumericalError(f"{analysis.ended} What was finished is in {page}.")
    return page


def _tell(size: Size, config: ReportConfig) -> None:
    """Say on stderr what is left out, and by which limits."""
    if size.told:
        told = "\n  ".join(size.told)
        limits = f"--time {config.time} and --budget {config.budget}"
        print(f"left out for size, to stay within {limits}:\n  {told}", file=sys.stderr)


def check(config: ReportConfig) -> None:
    """Refuse unknown names before anything is loaded."""
    own.check_problem(config)
    _check_known("approximator", config.approximators, tuple(fl.approximators()))
    require_device(config.device)
    parse_budget(config.budget)
    parse_time(config.time)


def _check_known(kind: str, names: tuple[str, ...], known: tuple[str, ...]) -> None:
    for name in names:
        if name not in known:
            raise ValueError(
                f"There is no {kind} {name!r} here. Choose from {', '.join(known)}."
                + meant(name, known)
            )


def load(config: ReportConfig) -> Problem:
    """Load the problem, and try one example so that mistakes show before training."""
    problem = own.named(config)
    x, y = problem.train
    with fl.frozen(problem.model) as model:
        stats = fl.collect(model, (x[:1], y[:1]), problem.likelihood, fl.Empirical())
    _check_known("layer", config.layers, tuple(stats))
    return problem.to(config.device)


def _written(
    analysis: Analysis,
    config: ReportConfig,
    command: str,
    started: datetime,
    places: tuple[Path, Path],
    phase: Phases,
    stack: ExitStack,
) -> None:
    """Write a report, and let its folder appear."""
    _write(analysis, describe_run(config, command, started), places[0], phase)
    stack.close()


def _write(analysis: Analysis, record: dict[str, Any], folder: Path, phase: Phases) -> None:
    record |= {"interrupted": analysis.ended is not None, "seconds": phase.seconds}
    with phase("save"):
        fl.save(analysis.results, folder / "results.nc")
        if analysis.inverses is not None:
            fl.save(single(analysis.inverses), folder / "inverse_blocks.nc")
    with phase("page"):
        write_page(analysis.results, analysis.inverses, folder, record)
    (folder / "run.json").write_text(json.dumps(record, indent=2) + "\n")


def summary_table(results: xr.Dataset) -> str:
    """Return the relative errors at the last step as text, a row for each layer.

    Examples
    --------
    >>> import xarray as xr
    >>> errors = xr.DataArray(
    ...     [[[0.0, 0.51234]]],
    ...     {"step": [9], "layer": ["fc1"], "approximator": ["exact", "kfac"]},
    ... )
    >>> print(summary_table(xr.Dataset({"frobenius_error": errors})))
    Relative Frobenius error at step 9
    layer   exact    kfac
    fc1    0.0000  0.5123
    """
    last = results["frobenius_error"].isel(step=-1).transpose("layer", "approximator")
    head = ["layer", *map(str, last["approximator"].values)]
    rows = [
        [str(layer), *(f"{value:.4f}" for value in values)]
        for layer, values in zip(last["layer"].values, last.values, strict=True)
    ]
    title = f"Relative Frobenius error at step {int(last['step'])}"
    return f"{title}\n{aligned([head, *rows], numbers=True)}"


def run_sweep(config: ReportConfig, command: str = "", executor: Workers = None) -> Path:
    """Write the page of a damping sweep after the training, and return its path.

    The folder holds `report.html`, `results.nc` (`fl.sweep`, and `fl.compare`'s metrics
    that need no damping), `run.json` and `figures/`.

    Raises
    ------
    ValueError
        If a name, a device or the folder is refused; nothing is written then.

    Examples
    --------
    >>> run_sweep(ReportConfig(problem="digit"))  # doctest: +ELLIPSIS
    Traceback (most recent call last):
    ValueError: There is no problem 'digit'. The problems are digits, mnist, ...
    """
    started = datetime.now().astimezone()
    config = replace(config, checkpoints=(config.training_steps,))
    check(config)
    phase = Phases(5, quiet=config.quiet)
    with phase("load"):
        problem = load(config)
        size = fitted(problem, config)
    fallback = in_reports(f"sweep-{config.subject}", started)
    folder = whole_folder(config.out, fallback, overwrite=config.overwrite, owned=PARTS)
    with folder as (scratch, place), phase:
        for step, model in checkpoints(problem, config, size, phase):
            stats, gradient = collected(problem, model, step, config, size, phase)
        ds = _swept(stats, gradient, config, phase, executor)
        ds = ds.assign_coords(step=config.training_steps)
        ds = ds.assign_attrs(attributes_of(problem, config, size))
        record = describe_run(config, command, started) | {"seconds": phase.seconds}
        with phase("page"):
            write_parts(ds, None, record, scratch)
    if not config.quiet:
        print("\n".join(damping_verdict(ds)), end="\n\n")
    return place / "report.html"


def _swept(
    stats: fl.statistics.Statistics,
    gradient: Any,
    config: ReportConfig,
    phase: Phases,
    executor: Workers,
) -> xr.Dataset:
    with phase("compare"):
        plain = with_noise(fl.compare(stats, config.approximators), stats)
    with phase("sweep"):
        asked = {"damping": config.dampings, "gradient": gradient, "executor": executor}
        ds = fl.sweep(stats, config.approximators, **asked)
    ds["status"] = ds["status"].where(ds["status"] != "ok", plain["status"])
    return ds.assign({n: plain[n] for n in plain.data_vars if n not in ds})
