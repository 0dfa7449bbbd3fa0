"""What every command's parser shares, and the processes that a command may go over."""

from __future__ import annotations

import argparse
import json
import math
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from importlib.util import find_spec
from itertools import chain
from pathlib import Path
from typing import Any, Final, NoReturn, TypeVar

from fisherlab.errors import meant
from fisherlab.report.config import LIKELIHOODS, ReportConfig

Rows = Sequence[Sequence[Any]]


class Parser(argparse.ArgumentParser):
    """Report a mistake in one line instead of printing the usage first."""

    def error(self, message: str) -> NoReturn:
        """Raise instead of printing and leaving."""
        near = self._near(message)
        raise ValueError(f"{message}.{near} See `{self.prog} --help`.")

    def _near(self, message: str) -> str:
        """Find what may have been meant: a choice that argparse lists, or an option."""
        given, listed, choices = message.partition("(choose from ")
        if listed:
            word = given.rpartition("invalid choice: ")[2].strip(" '")
            return meant(word, (one.strip(" '") for one in choices.rstrip(")").split(",")))
        given = message.removeprefix("unrecognized arguments: ")
        return meant(given.split()[0], self._options()) if given != message else ""

    def _options(self) -> set[str]:
        """Return the options of this parser and of its commands."""
        commands = (
            command
            for action in self._actions
            if isinstance(action.choices, dict)
            for command in action.choices.values()
        )
        return {
            option for one in (self, *commands) for option in one._option_string_actions
        }


class _Help(argparse.HelpFormatter):
    """Say the default of every option, where its help does not."""

    def _get_help_string(self, action: argparse.Action) -> str:
        text, given = action.help or "", action.default
        values = given if isinstance(given, list | tuple) else [given]
        words = [str(v) for v in values if not (v is None or v is False or v == "")]
        told = not words or given is argparse.SUPPRESS or "(default: " in text
        return text if told else f"{text} (default: {' '.join(words)})"


def add_command(
    commands: Any, name: str, act: Callable[..., None], text: str, example: str
) -> argparse.ArgumentParser:
    """Add a command that calls `act(arguments, command line)`, with an example of it."""
    parser: argparse.ArgumentParser = commands.add_parser(
        name,
        help=text,
        description=text,
        epilog=f"example: fisherlab {example}",
        allow_abbrev=False,
        formatter_class=_Help,
    )
    parser.set_defaults(act=act)
    return parser


DATA_DIR: Final = "folder of the data files (default: $FISHERLAB_DATA, then the cache)"
OWN: Final = {
    "problem": "problem, see `fisherlab problems`, or a function that returns one",
    "model": "your own model: its name, or that of a function that returns it",
    "data": "its data: an .npz or .pt file with x and y, or the name of a pair (x, y), a "
    "DataLoader, or a function that returns one",
    "likelihood": f"what its output means: {', '.join(LIKELIHOODS)}, or a function that "
    "returns a fl.Likelihood",
}
"""What is computed with, by options that every command has: name and help."""
METAVARS: Final = {
    "problem": "NAME|MODULE:FUNCTION",
    "model": "MODULE:FUNCTION",
    "data": "FILE|MODULE:FUNCTION",
    "likelihood": "NAME|MODULE:FUNCTION",
}


def add_subject(group: Any) -> None:
    """Add what says which problem, or which model of one's own, is computed with."""
    for name, text in OWN.items():
        default = getattr(ReportConfig(), name)
        group.add_argument(f"--{name}", default=default, metavar=METAVARS[name], help=text)


def subject(arguments: argparse.Namespace, seed: int = 0) -> ReportConfig:
    """Return which problem or model the options name, with the weights of a seed."""
    given = {name: getattr(arguments, name) for name in (*OWN, "data_dir")}
    return ReportConfig(**given, seed=seed)


def add_json(parser: Any) -> None:
    """Add the option of every command that prints a table; `show` heeds it."""
    parser.add_argument("--json", action="store_true", help="print the table as JSON")


def show(rows: Rows, arguments: argparse.Namespace, *, numbers: bool = False) -> None:
    """Print a table, whose first row is its head: as lines of text, or as JSON.

    Examples
    --------
    >>> rows = [("layer", "error"), ("fc", 0.51234), ("out", float("nan"))]
    >>> show(rows, argparse.Namespace(json=False))
    layer  error
    fc     0.5123
    out    nan
    >>> show(rows[:2], argparse.Namespace(json=True))
    [
     {
      "layer": "fc",
      "error": 0.51234
     }
    ]
    """
    from fisherlab.showing import aligned

    if arguments.json:
        head, *body = rows
        print(as_json([dict(zip(head, row, strict=True)) for row in body]))
        return
    text = [[f"{v:.4g}" if isinstance(v, float) else str(v) for v in row] for row in rows]
    print(aligned(text, numbers=numbers))


def as_json(found: Any) -> str:
    """Write what was found as JSON, which has null for numbers that are not finite.

    Examples
    --------
    >>> as_json({"a": (1.5, float("nan"), 3)}).split()
    ['{', '"a":', '[', '1.5,', 'null,', '3', ']', '}']
    """

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {name: plain(one) for name, one in value.items()}
        if isinstance(value, list | tuple):
            return [plain(one) for one in value]
        return None if isinstance(value, float) and not math.isfinite(value) else value

    return json.dumps(plain(found), indent=1, ensure_ascii=False, allow_nan=False)


def listed(kind: Callable[[str], Any]) -> dict[str, Any]:
    """Return how argparse reads a list of values, apart by spaces or by commas.

    Examples
    --------
    >>> parser = Parser()
    >>> _ = parser.add_argument("--lr", **listed(float))
    >>> parser.parse_args(["--lr", "0.1,0.2", "0.3"]).lr
    [0.1, 0.2, 0.3]
    """

    def read(text: str) -> list[Any]:
        return [kind(part) for part in text.split(",") if part]

    # argparse names the reader when it complains.
    read.__name__ = f"list of {getattr(kind, '__name__', 'values')}"
    return {"nargs": "+", "type": read, "action": _Flat}


class _Flat(argparse.Action):
    def __call__(self, parser: Any, namespace: Any, values: Any, _: Any = None) -> None:
        """Keep what stood between the commas of all words as one list."""
        setattr(namespace, self.dest, list(chain.from_iterable(values)))


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
        with _terminated_as_interrupted():
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


@contextmanager
def _terminated_as_interrupted() -> Iterator[None]:
    """Let SIGTERM, the first that a batch system sends, do what Ctrl-C does."""

    def stop(_: int, frame: Any) -> None:
        interrupt = signal.getsignal(signal.SIGINT)
        if not callable(interrupt):  # ignored in what a script began with `&`
            raise KeyboardInterrupt
        interrupt(signal.SIGINT, frame)

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


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
