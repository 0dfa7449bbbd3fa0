"""How values show themselves in notebooks, and layers in sentences."""

from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from html import escape
from typing import Any, TypeVar

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
