"""Statistics held as they are: the state of methods that need every sample at the end."""

from dataclasses import dataclass
from typing import final

from fisherlab.statistics import LayerStatistics
from fisherlab.statistics.gathered import own_bytes, too_many_columns
from fisherlab.statistics.values import join_columns, join_examples

Run = tuple[LayerStatistics, ...]


@final
@dataclass(frozen=True, eq=False)
class Held:
    """Statistics of the runs of examples seen, each in chunks of columns as they came."""

    runs: tuple[Run, ...] = ()

    def add(self, statistics: LayerStatistics) -> "Held":
        """Add a chunk: further columns join the last run, examples begin a new one."""
        if statistics.count or not self.runs:
            return Held((*self.runs, (statistics,)))
        run = (*self.runs[-1], statistics)
        if too_many_columns(run):
            run = (join_columns(run),)
        return Held((*self.runs[:-1], run))

    def __add__(self, other: "Held") -> "Held":
        """Put two parts of the data after each other."""
        return Held(self.runs + other.runs)

    @property
    def pieces(self) -> Run:
        """All chunks in order."""
        return tuple(piece for run in self.runs for piece in run)

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return sum(own_bytes(piece) for piece in self.pieces)

    def joined(self) -> LayerStatistics:
        """Return all runs as one."""
        return join_examples([join_columns(run) for run in self.runs])
