"""Statistics on their way into memory: chunks of columns and runs of examples."""

from collections.abc import Mapping, Sequence

from fisherlab.statistics.values import LayerStatistics, join_columns, join_examples


class Gathered:
    """Chunks of every block as they come; columns are compressed as soon as it pays."""

    def __init__(self, compress: bool) -> None:
        self.nbytes = 0
        self._compress = compress
        self._runs: dict[str, list[list[LayerStatistics]]] = {}

    def add(self, name: str, piece: LayerStatistics) -> None:
        """Add a chunk: further columns join the last run, examples begin a new one."""
        runs = self._runs.setdefault(name, [])
        if piece.count or not runs:
            runs.append([])
        runs[-1].append(piece)
        self.nbytes += own_bytes(piece)
        if self._compress and too_many_columns(runs[-1]):
            joined = join_columns(runs[-1])
            self.nbytes += own_bytes(joined) - sum(map(own_bytes, runs[-1]))
            runs[-1] = [joined]

    def foretold(
        self, pieces: Mapping[str, LayerStatistics], columns: int, examples: int
    ) -> int:
        """Return the bytes that there will be, from the first chunks of a run."""
        size = sum(_run_bytes(p, columns, self._compress) for p in pieces.values())
        count = max(1, *(piece.count for piece in pieces.values()))
        return max(self.nbytes + size, size * examples // count)

    def joined(self) -> dict[str, LayerStatistics]:
        """Return every block as one, letting go of the chunks block by block."""
        return {name: self._join(self._runs.pop(name)) for name in list(self._runs)}

    def _join(self, runs: list[list[LayerStatistics]]) -> LayerStatistics:
        return join_examples([join_columns(run, self._compress) for run in runs])


def own_bytes(piece: LayerStatistics) -> int:
    """Count the bytes of a chunk; the inputs are those of the run's first one."""
    if piece.parts:
        return sum(map(own_bytes, piece.parts))
    held = [piece.gradients, piece.matrices]
    held += [piece.inputs, piece.tokens] if piece.count else []
    return sum(tensor.nbytes for tensor in held if tensor is not None)


def _run_bytes(piece: LayerStatistics, columns: int, compress: bool) -> int:
    """Count the bytes of a run, from its first chunk, once it has all its columns."""
    if piece.parts:
        return sum(_run_bytes(part, columns, False) for part in piece.parts)
    held = piece.matrices if piece.gradients is None else piece.gradients
    if held is None or not len(held):
        return own_bytes(piece)
    single = piece.gradients is not None and held.shape[2] == 1
    kept = min(columns, held.shape[3]) if compress and single else columns
    return own_bytes(piece) + held.nbytes * (kept - len(held)) // len(held)


def too_many_columns(run: Sequence[LayerStatistics]) -> bool:
    """Tell whether fewer columns than those of a run's chunks have the same sum."""
    gradients = [piece.gradients for piece in run if piece.gradients is not None]
    if not gradients or gradients[0].shape[2] != 1:
        return False
    return sum(g.shape[0] for g in gradients) > gradients[0].shape[3]
