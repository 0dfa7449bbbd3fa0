"""Options of commands that have many cells to fill: local processes, dask, Slurm."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

_MISSING = "{option} needs {package}: pip install 'fisherlab[cluster]'."


def add_workers(parser: Any) -> None:
    """Add what says which workers fill the cells."""
    group = parser.add_mutually_exclusive_group()
    group.add_argument("--jobs", type=int, metavar="N", help="so many processes here")
    group.add_argument("--scheduler", metavar="ADDRESS", help="workers of a dask cluster")
    group.add_argument(
        "--slurm",
        nargs="+",
        metavar="KEY=VALUE",
        help="Slurm jobs with these settings, e.g. partition=cpu time=60 (by submitit)",
    )


def executor_of(arguments: argparse.Namespace, logs: Path) -> Callable[[], Any] | None:
    """Return what begins the executor that the options name; None for this process.

    Parameters
    ----------
    logs
        Folder that Slurm jobs write to.

    Raises
    ------
    ValueError
        If a package is missing, or a value is none.
    """
    if arguments.jobs is not None:
        if arguments.jobs < 1:
            raise ValueError(f"--jobs must be at least 1, but is {arguments.jobs}.")
        return partial(_processes, arguments.jobs) if arguments.jobs > 1 else None
    if arguments.scheduler is not None:
        _require("distributed", "--scheduler")
        return partial(_dask, arguments.scheduler)
    if arguments.slurm is not None:
        _require("submitit", "--slurm")
        return partial(_slurm, logs, dict(map(_pair, arguments.slurm)))
    return None


def _require(package: str, option: str) -> None:
    if find_spec(package) is None:
        raise ValueError(_MISSING.format(option=option, package=package))


def _pair(text: str) -> tuple[str, Any]:
    key, equal, value = text.partition("=")
    if not (key and equal and value):
        raise ValueError(f"--slurm {text!r} is no KEY=VALUE, such as partition=cpu.")
    return f"slurm_{key}", int(value) if value.isdecimal() else value


def _processes(jobs: int) -> Any:
    """Begin processes that share the cores: fresh ones, as torch's threads do not fork."""
    from concurrent.futures import ProcessPoolExecutor
    from multiprocessing import get_context

    import torch

    threads = max(1, min(torch.get_num_threads(), (os.cpu_count() or 1) // jobs))
    spawn = get_context("spawn")
    return ProcessPoolExecutor(jobs, spawn, torch.set_num_threads, (threads,))


def _dask(address: str) -> Any:
    from distributed import Client

    return Client(address)


def _slurm(logs: Path, settings: dict[str, Any]) -> Any:
    import submitit

    executor = submitit.AutoExecutor(logs, cluster="slurm")
    executor.update_parameters(**settings)
    return executor
