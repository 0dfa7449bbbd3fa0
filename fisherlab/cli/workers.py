"""Several processes of a command: cells by an executor, ranks started by torchrun."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any, TypeVar

T = TypeVar("T")
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


def several(parser: argparse.ArgumentParser) -> None:
    """Say that a command may be started by torchrun as several ranks."""
    parser.set_defaults(several=True)


@contextmanager
def group(arguments: argparse.Namespace) -> Iterator[int]:
    """Begin the process group of torchrun, if it started this process; give the rank.

    Raises
    ------
    ValueError
        If the command takes one process.
    """
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if "TORCHELASTIC_RUN_ID" not in os.environ or size == 1:
        yield 0
        return
    if not getattr(arguments, "several", False):
        raise ValueError(
            f"this command takes one process, and torchrun started {size}: start it alone "
            "(tune, sweep and reproduce take --jobs); report and follow take several."
        )
    import torch
    from torch import distributed

    device = getattr(arguments, "device", "cpu")
    if device == "cuda":
        arguments.device = f"cuda:{os.environ['LOCAL_RANK']}"
        torch.cuda.set_device(arguments.device)
    distributed.init_process_group("nccl" if device.startswith("cuda") else "gloo")
    try:
        yield distributed.get_rank()
    finally:
        distributed.destroy_process_group()


def first_of_all() -> bool:
    """Tell whether this is the only process, or the first of several."""
    from fisherlab.numerics.ranks import live

    ranks = live()
    return ranks is None or not ranks.rank


def of_first(work: Callable[[], T]) -> T:
    """Return what the first of several processes finds, on all of them."""
    from fisherlab.numerics.ranks import live

    ranks = live()
    return work() if ranks is None else ranks.of_first(work)


def tells(error: Exception) -> bool:
    """Tell whether this process says an error: what all ranks know, the first alone."""
    shared = any("happened on rank" in note for note in getattr(error, "__notes__", []))
    return os.environ.get("RANK", "0") == "0" or not shared
