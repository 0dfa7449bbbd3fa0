"""Values, numbers, names and small tables as people read them, the same way everywhere."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import fields, is_dataclass
from html import escape
from math import floor, isfinite, log10
from typing import Any, Final, TypeVar

T = TypeVar("T")
LONGEST = 300  # characters of a value in a table


def html_table(title: str, rows: Mapping[str, Any]) -> str:
    """Render a title and its rows as a folding table, everything escaped.

    Examples
    --------
    >>> "&lt;b&gt;" in html_table("<b>", {})
    True
    """
    body = "".join(
        f"<tr><th style='text-align:left'>{escape(str(key))}</th>"
        f"<td style='text-align:left'>{escape(str(value))}</td></tr>"
        for key, value in rows.items()
        if value not in ("", None)
    )
    summary = f"<summary><b>{escape(title)}</b></summary>"
    return f"<details open>{summary}<table>{body}</table></details>"


def shown(kind: type[T]) -> type[T]:
    """Give a class of small values a folding table: what it is, and its settings.

    Examples
    --------
    >>> from dataclasses import dataclass
    >>> @shown
    ... @dataclass(frozen=True)
    ... class Power:
    ...     '''Iterate.'''
    ...
    ...     steps: int = 3
    >>> "Iterate." in Power()._repr_html_()
    True
    """

    def table(self: Any) -> str:
        rows = {"what it is": (kind.__doc__ or "").strip().partition("\n")[0]}
        return html_table(kind.__name__, rows | _settings(self))

    kind._repr_html_ = table  # type: ignore[attr-defined]
    return kind


def _settings(value: Any) -> dict[str, str]:
    """Return the settings of a dataclass, or the line in which a value shows itself."""
    made = getattr(value, "__dataclass_params__", None)
    if is_dataclass(value) and made is not None and made.repr:
        kept = [field.name for field in fields(value) if field.repr]
        return {name: _short(repr(getattr(value, name))) for name in kept}
    return {"value": _short(repr(value))}


def _short(text: str) -> str:
    return text if len(text) <= LONGEST else f"{text[:LONGEST]} …"


def kind_of(name: str, kind: str = "") -> str:
    """Write what stands behind a layer's name that is a number, as in a Sequential.

    Examples
    --------
    >>> kind_of("0", "Conv2d 3→16"), kind_of("fc1", "Linear 64→10")
    (' · Conv2d 3→16', '')
    """
    return f" · {kind}" if kind and name.rpartition(".")[2].isdigit() else ""


BELOW_FLOOR: Final = "< 1e-6 (numerical floor)"


def number(value: float) -> str:
    """Write a number with three digits that count.

    Examples
    --------
    >>> number(0.25), number(0.99987), number(12.3456), number(3.2e-5), number(144.2)
    ('0.250', '1.00', '12.3', '3.20e-05', '144')
    """
    if not isfinite(value):
        return "not available"
    if value == 0:
        return "0"
    if 1e-4 <= abs(value) < 1e4:
        rounded = abs(float(f"{value:.2e}"))  # 0.9999 has the digits of 1
        digits = max(2 - floor(log10(rounded)), 0)
        return f"{value:.{digits}f}"
    return f"{value:.2e}"


def two_digits(value: float) -> str:
    """Write a number with two digits that count, as a standard error has; whole ones whole.

    Examples
    --------
    >>> two_digits(0.0514), two_digits(21.3), two_digits(114.2), two_digits(3.2e-9)
    ('0.051', '21', '114', '3.2e-09')
    """
    if not 1e-4 <= abs(value) < 1e6:
        return f"{value:.2g}"
    rounded = abs(float(f"{value:.1e}"))  # 0.999 has the digits of 1
    return f"{value:.{max(1 - floor(log10(rounded)), 0)}f}"


def error_text(value: float) -> str:
    """Write a relative error; below the numerical floor it is not a measurement.

    Examples
    --------
    >>> error_text(3e-9), error_text(0.25)
    ('< 1e-6 (numerical floor)', '0.250')
    """
    from fisherlab.catalogue import below_floor  # loads numpy, which parsing does not

    return BELOW_FLOOR if below_floor(value) else number(value)


def percent(share: float) -> str:
    """Write a share in per cent with two digits that count.

    Examples
    --------
    >>> percent(0.00923), percent(0.5), percent(1.0)
    ('0.92 %', '50 %', '100 %')
    """
    if not isfinite(share):
        return "not available"
    value = 100 * share
    return f"{value:.0f} %" if value >= 9.95 else f"{value:#.2g} %"


def span(values: Iterable[float], write: Callable[[float], str] | None = None) -> str:
    """Write the range of some numbers, those that are not finite left out.

    Examples
    --------
    >>> span([0.5, float("nan"), 0.25])
    '0.250–0.500'
    """
    known = [value for value in values if isfinite(value)]
    if not known:
        return "not available"
    low, high = ((write or number)(float(end)) for end in (min(known), max(known)))
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
