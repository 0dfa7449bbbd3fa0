"""The job behind `fisherlab sweep`: one moment of training, many dampings."""

from __future__ import annotations

from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import Any

import xarray as xr

import fisherlab as fl
from fisherlab.report import job
from fisherlab.report.analysis import attributes_of, checkpoints, collected
from fisherlab.report.config import ReportConfig
from fisherlab.report.direct import PARTS, write_parts
from fisherlab.report.folder import whole_folder
from fisherlab.report.noise import with_noise
from fisherlab.report.phases import Phases
from fisherlab.report.provenance import describe_run
from fisherlab.report.sizes import fitted


def run(config: ReportConfig, command: str = "") -> Path:
    """Write the page of a damping sweep after the training, and return its path.

    The folder holds `report.html`, `results.nc` (`fl.sweep`, and `fl.compare`'s metrics
    that need no damping), `run.json` and `figures/`.

    Raises
    ------
    ValueError
        If a name, a device or the folder is refused; nothing is written then.

    Examples
    --------
    >>> run(ReportConfig(problem="digit"))  # doctest: +ELLIPSIS
    Traceback (most recent call last):
    ValueError: There is no problem 'digit'. The problems are digits, mnist, ...
    """
    started = datetime.now().astimezone()
    config = replace(config, checkpoints=(config.training_steps,))
    job.check(config)
    phase = Phases(5, quiet=config.quiet)
    with phase("load"):
        problem = job.load(config)
        size = fitted(problem, config)
    fallback = Path("reports") / f"sweep-{config.subject}-{started:%Y%m%d-%H%M%S}"
    folder = whole_folder(config.out, fallback, overwrite=config.overwrite, owned=PARTS)
    with folder as (scratch, place), phase:
        for step, model in checkpoints(problem, config, phase):
            stats, gradient = collected(problem, model, step, config, size, phase)
        ds = _swept(stats, gradient, config, phase)
        ds = ds.assign_coords(step=config.training_steps)
        ds = ds.assign_attrs(attributes_of(problem, config))
        record = describe_run(config, command, started) | {"seconds": phase.seconds}
        with phase("page"):
            write_parts(ds, None, record, scratch)
    return place / "report.html"


def _swept(
    stats: fl.statistics.Statistics, gradient: Any, config: ReportConfig, phase: Phases
) -> xr.Dataset:
    with phase("compare"):
        plain = with_noise(fl.compare(stats, config.approximators), stats)
    with phase("sweep"):
        levels = config.dampings
        ds = fl.sweep(stats, config.approximators, damping=levels, gradient=gradient)
    ds["status"] = ds["status"].where(ds["status"] != "ok", plain["status"])
    return ds.assign({n: plain[n] for n in plain.data_vars if n not in ds})
