"""Numbers, names and small tables as text, the same way everywhere."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from fisherlab.catalogue import below_floor

BELOW_FLOOR: Final = "< 1e-6 (numerical floor)"


def number(value: float) -> str:
    """Write a number with three digits that count.

    Examples
    --------
    >>> number(0.25), number(0.99987), number(12.3456), number(3.2e-5), number(144.2)
    ('0.250', '1.00', '12.3', '3.20e-05', '144')
    """
    if not np.isfinite(value):
        return "not available"
    if value == 0:
        return "0"
    if 1e-4 <= abs(value) < 1e4:
        rounded = abs(float(f"{value:.2e}"))  # 0.9999 has the digits of 1
        digits = max(2 - int(np.floor(np.log10(rounded))), 0)
        return f"{value:.{digits}f}"
    return f"{value:.2e}"


def error_text(value: float) -> str:
    """Write a relative error; below the numerical floor it is not a measurement.

    Examples
    --------
    >>> error_text(3e-9), error_text(0.25)
    ('< 1e-6 (numerical floor)', '0.250')
    """
    return BELOW_FLOOR if below_floor(value) else number(value)


def percent(share: float) -> str:
    """Write a share in per cent with two digits that count.

    Examples
    --------
    >>> percent(0.00923), percent(0.5), percent(1.0)
    ('0.92 %', '50 %', '100 %')
    """
    if not np.isfinite(share):
        return "not available"
    value = 100 * share
    return f"{value:.0f} %" if value >= 9.95 else f"{value:#.2g} %"


def span(values: NDArray[Any], write: Callable[[float], str] | None = None) -> str:
    """Write the range of some numbers, those that are not finite left out.

    Examples
    --------
    >>> import numpy as np
    >>> span(np.array([0.5, float("nan"), 0.25]))
    '0.250–0.500'
    """
    known = values[np.isfinite(values)]
    if not known.size:
        return "not available"
    low, high = ((write or number)(float(end)) for end in (known.min(), known.max()))
    return low if low == high else f"{low}–{high}"


def quoted(names: Sequence[str]) -> str:
    """List names in backticks.

    Examples
    --------
    >>> quoted(["kfac", "ekfac", "kpsvd"])
    '`kfac`, `ekfac` and `kpsvd`'
    """
    marked = [f"`{name}`" for name in names]
    if len(marked) < 2:
        return "".join(marked)
    return f"{', '.join(marked[:-1])} and {marked[-1]}"


def layers(names: Sequence[str]) -> str:
    """List layers, at most six by name.

    Examples
    --------
    >>> layers(["0", "2"]), layers(["fc"])
    ('layers 0, 2', 'layer fc')
    """
    listed = ", ".join(names[:6]) + (" …" if len(names) > 6 else "")
    return f"{'layer' if len(names) == 1 else 'layers'} {listed}"


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
