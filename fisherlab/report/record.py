"""What happened in a job: how long its phases took, and what it takes to repeat it."""

from __future__ import annotations

import dataclasses
import platform
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from importlib import metadata
from pathlib import Path
from types import TracebackType
from typing import Any, Final

from tqdm.auto import tqdm

import fisherlab
from fisherlab.numerics.memory import give_back
from fisherlab.report.config import ReportConfig


class Phases:
    """Time named phases and, inside of a `with` block, show them on stderr.

    Parameters
    ----------
    total
        Number of phases to come in the block.
    quiet
        Show nothing.

    Attributes
    ----------
    seconds
        Wall time by phase; a phase that comes again adds to its time.

    Examples
    --------
    >>> with Phases(total=2, quiet=True) as phase:
    ...     with phase("load"):
    ...         pass
    ...     with phase("train", "step 10"):
    ...         pass
    >>> list(phase.seconds)
    ['load', 'train']
    """

    def __init__(self, total: int, *, quiet: bool = False) -> None:
        self.seconds: dict[str, float] = {}
        self.total = total
        self._bar: tqdm[Any] = tqdm(disable=True)
        self._quiet = quiet

    @contextmanager
    def __call__(self, name: str, detail: str = "") -> Iterator[None]:
        """Time what happens in the block, under a name."""
        self._bar.set_postfix_str("", refresh=False)
        self._bar.set_description(f"{name} {detail}".strip())
        start = time.perf_counter()
        try:
            yield
        finally:
            spent = time.perf_counter() - start
            self.seconds[name] = self.seconds.get(name, 0.0) + spent
            give_back()  # what the next phase begins with
            self._bar.update()

    def note(self, text: str) -> None:
        """Show a word about the phase that is running."""
        self._bar.set_postfix_str(text, refresh=False)
        self._bar.update(0)

    def __enter__(self) -> Phases:
        self._bar = tqdm(
            total=self.total,
            disable=self._quiet,
            file=sys.stderr,
            unit="phase",
            leave=False,
        )
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._bar.close()


_PACKAGES: Final = (
    "torch",
    "numpy",
    "scipy",
    "xarray",
    "h5netcdf",
    "matplotlib",
    "seaborn",
    "scikit-learn",
)


def describe_run(config: ReportConfig, command: str, started: datetime) -> dict[str, Any]:
    """Return what `run.json` says besides times: command, settings, versions, machine.

    Examples
    --------
    >>> now = datetime(2026, 1, 2, 3, 4, 5)
    >>> run = describe_run(ReportConfig(seed=3), "fisherlab report --seed 3", now)
    >>> run["command"], run["seed"], run["device"]
    ('fisherlab report --seed 3', 3, 'cpu')
    """
    return {
        "command": command,
        "started_at": started.isoformat(timespec="seconds"),
        "seed": config.seed,
        "device": config.device,
        "config": {
            name: str(value) if isinstance(value, Path) else value
            for name, value in dataclasses.asdict(config).items()
        },
        **environment(),
    }


def environment() -> dict[str, Any]:
    """Return what ran: versions, machine, and the commit of a checkout.

    Examples
    --------
    >>> environment()["versions"]["fisherlab"] == fisherlab.__version__
    True
    """
    return {
        "versions": {
            "fisherlab": fisherlab.__version__,
            "python": platform.python_version(),
            **{name: metadata.version(name) for name in _PACKAGES},
        },
        "platform": platform.platform(),
        "git_commit": git_commit(Path(__file__).resolve().parents[2]),
    }


def git_commit(folder: Path) -> str | None:
    """Return the commit checked out in a folder, or None if git does not manage it.

    Examples
    --------
    >>> git_commit(Path("/")) is None
    True
    """
    # An installed package may lie inside the checkout of another project.
    if not (folder / ".git").exists():
        return None
    try:
        done = subprocess.run(
            ["git", "rev-parse", "HEAD"],
            cwd=folder,
            capture_output=True,
            text=True,
            check=True,
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()
