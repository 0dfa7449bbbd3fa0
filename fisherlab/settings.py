"""Settings: what is no number is refused in one sentence, what was changed is put back."""

import inspect
import operator
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import wraps
from math import isnan
from typing import Any, Literal, TypeVar, dataclass_transform

from fisherlab.showing import shown

T = TypeVar("T")
C = TypeVar("C", bound=Callable[..., Any])
Kind = Literal["a number", "a whole number"]


def numeric(called: C) -> C:
    """Let a class or a function refuse what is no number where it says that it takes one.

    Parameters that are said to be `int` or `float`, with None or without, take numbers of
    Python, numpy and torch. Texts, truth values, NaN and, for `int`, fractions are a
    ValueError, before anything is done; which numbers fit is for what is called to say.

    Examples
    --------
    >>> @numeric
    ... def draw(count: int) -> range:
    ...     return range(count)
    >>> draw(True)
    Traceback (most recent call last):
    ValueError: draw(count=True): a whole number is expected.
    """
    made = inspect.isclass(called)
    first: Callable[..., Any] = getattr(called, "__init__") if made else called  # noqa: B009
    name = called.__name__
    names = tuple(inspect.signature(first).parameters)
    wanted = _wanted(inspect.signature(first).parameters)
    if not wanted:
        return called

    @wraps(first)
    def checked(*args: Any, **kwargs: Any) -> Any:
        for parameter, given in (*zip(names, args, strict=False), *kwargs.items()):
            if parameter in wanted:
                require_number(f"{name}({parameter}={given!r})", given, *wanted[parameter])
        return first(*args, **kwargs)

    if not made:
        return checked  # type: ignore[return-value]
    setattr(called, "__init__", checked)  # noqa: B010 - the type of a class forbids it
    return called


@dataclass_transform(frozen_default=True, field_specifiers=(field,))
def setting(kind: type[T]) -> type[T]:
    """Make a class a value that people choose: a method, a likelihood, a damping.

    A frozen dataclass that refuses what is no number and shows itself as a table.

    Examples
    --------
    >>> @setting
    ... class Power:
    ...     steps: int = 3
    >>> Power(5)
    Power(steps=5)
    >>> Power(0.5)
    Traceback (most recent call last):
    ValueError: Power(steps=0.5): a whole number is expected.
    """
    return shown(numeric(dataclass(frozen=True)(kind)))


def require_number(
    call: str, given: Any, kind: Kind = "a number", empty: bool = False
) -> None:
    """Refuse what is no number.

    Parameters
    ----------
    call
        What was called with what.
    empty
        Whether None is taken as well.

    Raises
    ------
    ValueError
        Naming the call and the kind of number that is expected.

    Examples
    --------
    >>> require_number("f(1)", 1), require_number("f(None)", None, empty=True)
    (None, None)
    """
    if not ((empty and given is None) or is_number(given, kind)):
        raise ValueError(f"{call}: {kind}{' or None' if empty else ''} is expected.")


def is_number(given: Any, kind: Kind = "a number") -> bool:
    """Tell whether this is a number: no text, no truth value, not NaN.

    Examples
    --------
    >>> is_number(0.5), is_number(True), is_number(0.5, "a whole number")
    (True, False, False)
    """
    kept = str(getattr(given, "dtype", type(given).__name__))
    if "bool" in kept or isinstance(given, str):
        return False
    try:
        if kind == "a whole number":
            operator.index(given)
            return True
        value = float(given)
    except (TypeError, ValueError, RuntimeError):  # torch raises the last
        return False
    return not isnan(value)


def _wanted(parameters: Mapping[str, inspect.Parameter]) -> dict[str, tuple[Kind, bool]]:
    """Return the parameters that take a number, of which kind, and whether None."""
    found: dict[str, tuple[Kind, bool]] = {}
    for name, parameter in parameters.items():
        said = parameter.annotation
        text = said if isinstance(said, str) else inspect.formatannotation(said)
        parts = set(text.split(" | "))
        empty = "None" in parts
        if name == "damping":  # `fisherlab.operators.base` reads them, everywhere
            continue
        if parts - {"None"} == {"int"}:
            found[name] = "a whole number", empty
        elif parts - {"None"} == {"float"}:
            found[name] = "a number", empty
    return found


@contextmanager
def put_back(*undo: Callable[[], object]) -> Iterator[None]:
    """Undo in the end what a block changes, in full even where Ctrl-C falls into it.

    Enter it before the first change: all is undone whether it was made or not, and once
    more where the first time was interrupted.

    Parameters
    ----------
    undo
        Functions that give settings their old values, however often they are called.

    Examples
    --------
    >>> settings = {"fast": True}
    >>> with put_back(lambda: settings.update(fast=True)):
    ...     settings["fast"] = False
    >>> settings
    {'fast': True}
    """
    try:
        try:
            yield
        finally:
            for each in undo:
                each()
    finally:  # not in an except: it may come before the first of them
        for each in undo:
            each()
