"""Small tables for a terminal."""

from __future__ import annotations

from collections.abc import Sequence


def aligned(rows: Sequence[Sequence[str]], *, numbers: bool = False) -> str:
    """Return rows of cells as lines with aligned columns.

    Parameters
    ----------
    rows
        The cells, row by row.
    numbers
        Align all columns but the first to the right.

    Examples
    --------
    >>> print(aligned([("layer", "kfac"), ("fc1", "0.5")], numbers=True))
    layer  kfac
    fc1     0.5
    """
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    sides = ["<", *(">" if numbers else "<") * (len(widths) - 1)]
    return "\n".join(
        "  ".join(
            f"{cell:{side}{width}}"
            for cell, side, width in zip(row, sides, widths, strict=True)
        ).rstrip()
        for row in rows
    )
