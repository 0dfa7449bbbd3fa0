"""A folder that appears whole, or not at all, and the record of the job that fills it."""

from __future__ import annotations

import dataclasses
import os
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from datetime import datetime
from glob import escape
from importlib import metadata
from pathlib import Path
from types import TracebackType
from typing import Any, Final

from tqdm.auto import tqdm

import fisherlab
from fisherlab.durable import claimed, flush, flush_tree
from fisherlab.numerics.devices import give_back
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


def in_reports(subject: str, started: datetime | None = None) -> Path:
    """Return the folder of a report that is given no other: its subject and the time.

    Examples
    --------
    >>> in_reports("digits", datetime(2026, 3, 1, 12, 30)).as_posix()
    'reports/digits-20260301-123000'
    """
    return Path("reports") / f"{subject}-{started or datetime.now():%Y%m%d-%H%M%S}"


@contextmanager
def whole_folder(
    out: str | Path | None,
    fallback: Path,
    *,
    overwrite: bool = False,
    owned: Sequence[str] = (),
) -> Iterator[tuple[Path, Path]]:
    """Give a scratch folder to write into and the folder that its content will become.

    The scratch folder is a hidden sibling. If the block ends well, its content moves to
    the target; if not, it is removed together with every folder made for it.

    Parameters
    ----------
    out
        The target. It may exist if it is empty.
    fallback
        If `out` is None, the target is a new folder of this name, numbered if taken.
    overwrite
        Accept an `out` that is not empty.
    owned
        Names in `out` that go when it is overwritten, besides those written anew. All
        other files stay.

    Raises
    ------
    ValueError
        If a folder cannot be made, or `out` is not empty and `overwrite` is False, or
        cannot be replaced, or another process writes into it. All this is found before
        the block runs.

    Examples
    --------
    >>> import tempfile
    >>> parent = Path(tempfile.mkdtemp())
    >>> with whole_folder(None, parent / "report") as (scratch, target):
    ...     _ = (scratch / "page.html").write_text("done")
    >>> [file.name for file in target.iterdir()]
    ['page.html']
    """
    with _named(fallback if out is None else Path(out)):
        target, made = _new(fallback) if out is None else _taken(Path(out), overwrite)
    try:
        with _alone(target, overwrite) as scratch:
            yield scratch, target
            _move_content(scratch, target, owned)
    except BaseException:
        for folder in made:
            with suppress(OSError):
                folder.rmdir()
        raise


@contextmanager
def _alone(target: Path, overwrite: bool) -> Iterator[Path]:
    """Give a scratch folder beside a target which no other process writes meanwhile."""
    lock = target.with_name(f".{target.name}.lock")
    taken = ValueError(
        f"Another process is writing into {target}. Wait for it, or name another folder "
        "with --out."
    )
    scratch = target.with_name(f".{target.name}.{os.getpid()}")
    with ExitStack() as stack:
        with _named(target):
            stack.enter_context(claimed(lock, taken))
            stack.callback(lock.unlink, missing_ok=True)
            _finish_moves(target)
            _check(target, overwrite)  # the other one may just have ended
            scratch.mkdir()
        stack.callback(shutil.rmtree, scratch, ignore_errors=True)
        yield scratch


@contextmanager
def _named(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise ValueError(
            f"The folder {folder} cannot be written: {error.strerror}. Name another one "
            "with --out."
        ) from error


def _check(out: Path, overwrite: bool) -> None:
    if out.exists() and not out.is_dir():
        raise ValueError(f"--out {out} is a file, not a folder. Name another one.")
    if os.path.ismount(out):
        raise ValueError(
            f"--out {out} is the root of a file system, which cannot be replaced as a "
            "whole. Name a folder below it."
        )
    if out.is_dir() and any(out.iterdir()) and not overwrite:
        raise ValueError(
            f"--out {out} exists and is not empty. Name another folder, or replace the "
            "report in it with --overwrite."
        )


def _taken(out: Path, overwrite: bool) -> tuple[Path, list[Path]]:
    target = out.expanduser().resolve()
    _check(target, overwrite)
    return target, _made(target)


def _made(folder: Path) -> list[Path]:
    """Make a folder and return all folders that had to be made, innermost first."""
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    return missing


def _new(fallback: Path) -> tuple[Path, list[Path]]:
    """Make a folder that no one else has, even one that starts at the same moment."""
    parent = fallback.expanduser().resolve().parent
    made = _made(parent)
    name, number = fallback.name, 1
    while True:
        try:
            (parent / name).mkdir()
        except FileExistsError:
            number += 1
            name = f"{fallback.name}-{number}"
        else:
            return parent / name, [parent / name, *made]


def _move_content(scratch: Path, target: Path, owned: Sequence[str]) -> None:
    flush_tree(scratch)
    if not any(target.iterdir()):
        scratch.replace(target)
        flush(target.parent)
        return
    fresh = [new.name for new in scratch.iterdir()]
    aside = scratch.with_name(f"{scratch.name}.old")
    aside.mkdir()
    try:
        for name in sorted({*owned, *fresh}):
            if os.path.lexists(target / name):
                (target / name).replace(aside / name)
        for name in fresh:
            (scratch / name).replace(target / name)
        flush(target)
    except BaseException:  # Ctrl-C too: what was there comes back
        _restore(aside, target, [name for name in fresh if not (scratch / name).exists()])
        raise
    shutil.rmtree(aside, ignore_errors=True)
    scratch.rmdir()


def _finish_moves(target: Path) -> None:
    """Finish or clear away what a killed process left: nobody else is at work here."""
    for scratch in target.parent.glob(f".{escape(target.name)}.*[0-9]"):
        aside = scratch.with_name(f"{scratch.name}.old")
        if aside.is_dir():  # it died among the moves, when all that is new was whole
            for new in list(scratch.iterdir()):
                _remove(target / new.name)
                new.replace(target / new.name)
            shutil.rmtree(aside)
        shutil.rmtree(scratch)


def _restore(aside: Path, target: Path, moved: Sequence[str]) -> None:
    for name in moved:
        _remove(target / name)
    for old in list(aside.iterdir()):
        old.replace(target / old.name)
    aside.rmdir()


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
