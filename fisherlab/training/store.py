"""The folder of a training: how it was made, where it stands, what was found."""

from __future__ import annotations

import errno
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, final

import xarray as xr

from fisherlab.analysis.files import drop_parts, last_step, read_parts, write_part
from fisherlab.durable import PARTIAL, claimed, write_durably
from fisherlab.errors import DataError, StoreError
from fisherlab.training.checkpoints import Checkpoint, load_checkpoint, save_checkpoint

_RECORD: Final = "run.json"
_CHECKPOINT: Final = "checkpoint.pt"
_LOCK: Final = "lock"


@final
@dataclass(frozen=True)
class Store:
    """A folder with `run.json`, `checkpoint.pt` and `results-<first>-<last>.nc`.

    Results are written before the checkpoint that counts them, so what is there when a
    process dies is a whole checkpoint and at least the results up to it. Results that
    come after it are removed when the training goes on, and measured again.

    Parameters
    ----------
    folder
        The folder; `open` makes it.
    """

    folder: Path

    @contextmanager
    def opened(self) -> Iterator[None]:
        """Make the folder and keep other processes out of it.

        Raises
        ------
        StoreError
            If the folder cannot be made or written, or another process works in it.
        """
        missing = [p for p in (self.folder, *self.folder.parents) if not p.exists()]
        with self._writing():
            self.folder.mkdir(parents=True, exist_ok=True)
            (self.folder / _LOCK).touch()
        taken = StoreError(
            f"Another process works in the store {self.folder}. Wait for it, or name "
            "another folder."
        )
        try:
            with claimed(self.folder / _LOCK, taken):
                yield
        except BaseException:
            if missing:
                self._remove_if_bare(missing)
            raise

    def _remove_if_bare(self, made: Sequence[Path]) -> None:
        """Remove folders that were made for a run in which nothing was found."""
        there = self.folder.is_dir()  # or removed by somebody in the meantime
        if there and {path.name for path in self.folder.iterdir()} <= {_LOCK, _RECORD}:
            for name in (_LOCK, _RECORD):
                (self.folder / name).unlink(missing_ok=True)
            for folder in made:
                with suppress(OSError):
                    folder.rmdir()

    def record(self) -> dict[str, Any] | None:
        """Return how the run was made, None for a new folder.

        Raises
        ------
        DataError
            If the record is damaged, or the folder holds something else.
        """
        path = self.folder / _RECORD
        if not path.exists():
            others = sorted(p.name for p in self.folder.iterdir() if p.name != _LOCK)
            others = [name for name in others if not name.startswith(PARTIAL)]
            if others:
                raise DataError(
                    f"The folder {self.folder} holds no training but other files "
                    f"({', '.join(others[:3])}). Name an empty or a new one."
                )
            return None
        try:
            found = json.loads(path.read_text())
        except ValueError as error:
            raise DataError(f"{path} is damaged: {error}") from error
        told = found if isinstance(found, dict) else {}
        kinds = (("settings", dict), ("sessions", list))
        if not all(isinstance(told.get(name), kind) for name, kind in kinds):
            raise DataError(
                f"{path} is not the record of a training: settings and sessions are "
                "expected in it. Put the file back, or name another folder."
            )
        return told

    def write_record(self, record: Mapping[str, Any]) -> None:
        """Write how the run was made."""
        text = json.dumps(record, indent=2, ensure_ascii=False) + "\n"
        with self._writing():
            write_durably(self.folder / _RECORD, lambda path: path.write_text(text))

    def load(self) -> tuple[Checkpoint, xr.Dataset] | None:
        """Return the last checkpoint and the results up to it; nothing is changed.

        Raises
        ------
        DataError
            If the checkpoint or results that it counts are damaged or missing.
        """
        path = self.folder / _CHECKPOINT
        if not path.exists():
            # The first checkpoint is written before the first step is taken.
            if last := last_step(self.folder):
                raise DataError(
                    f"The store {self.folder} has results up to step {last} but no "
                    f"{_CHECKPOINT} to go on from. Put it back, or name another folder; "
                    "`fl.open` reads the results."
                )
            return None
        checkpoint = load_checkpoint(path)
        if not checkpoint.measured:
            return checkpoint, xr.Dataset()
        results = read_parts(self.folder, checkpoint.step)
        found = results["step"].values.tolist()
        if found != list(checkpoint.measured):
            unlike = sorted({*found} ^ {*checkpoint.measured}) or found
            raise DataError(
                f"The store {self.folder} does not hold the results that its checkpoint "
                f"counts: steps {unlike[:5]} are missing, or there against it. Put the "
                "files back, or name another folder."
            )
        return checkpoint, results

    def drop_later(self, step: int) -> None:
        """Remove the results after a step, which are going to be measured again."""
        with self._writing():
            drop_parts(self.folder, after=step)

    def write_rows(self, rows: xr.Dataset) -> None:
        """Write the results of some moments."""
        with self._writing():
            self._check_record()
            write_part(rows, self.folder)

    def write_checkpoint(self, checkpoint: Checkpoint) -> None:
        """Replace the checkpoint."""
        with self._writing():
            self._check_record()
            save_checkpoint(checkpoint, self.folder / _CHECKPOINT)

    def _check_record(self) -> None:
        """Notice that the folder was emptied: what is in it would lack its beginning."""
        if not (self.folder / _RECORD).exists():
            raise FileNotFoundError(errno.ENOENT, f"its {_RECORD} was removed")

    @contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            reason = error.strerror or str(error)
            kept = "The last checkpoint is kept; the training goes on from it when the "
            told = f"{kept}store can be written again."
            if not (self.folder / _CHECKPOINT).exists():
                told = "Name another folder."
            raise StoreError(
                f"The store {self.folder} cannot be written: {reason}. {told}"
            ) from error
