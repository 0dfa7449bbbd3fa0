"""Memory budgets: how many bytes a request may take, and how to cut work to fit."""

import ctypes
import re
from collections.abc import Iterator, Sequence
from contextlib import suppress
from itertools import accumulate

import numpy as np
import torch
from torch import Tensor

from fisherlab.errors import BudgetError
from fisherlab.numerics.devices import free_bytes
from fisherlab.settings import require_number

Budget = int | float | str | None

_UNITS = {
    "": 1,
    "b": 1,
    "kb": 10**3,
    "mb": 10**6,
    "gb": 10**9,
    "tb": 10**12,
    "kib": 2**10,
    "mib": 2**20,
    "gib": 2**30,
    "tib": 2**40,
}


def parse_budget(budget: Budget, device: torch.device | str = "cpu") -> int:
    """Turn a budget into bytes: a number, a text such as "4 GiB", or half of what is free.

    Parameters
    ----------
    budget
        Bytes, a text with a unit (B, kB, MB, GB, KiB, MiB, GiB, ...), or None for
        half of the memory that is free on `device`.
    device
        The device whose memory is meant.

    Raises
    ------
    ValueError
        If the text cannot be read or the budget is not positive.

    Examples
    --------
    >>> parse_budget("1.5 KiB")
    1536
    """
    if budget is None:
        return free_bytes(device) // 2
    if isinstance(budget, str):
        match = re.fullmatch(r"\s*([0-9.]+(?:e[+-]?\d+)?)\s*([a-zA-Z]*)\s*", budget)
        unit = None if match is None else _UNITS.get(match[2].lower())
        if match is None or unit is None:
            msg = f"budget={budget!r} is not understood; write e.g. '4 GiB' or bytes."
            raise ValueError(msg)
        budget = float(match[1]) * unit
    require_number(f"budget={budget!r}", budget)
    if not budget > 0:
        raise ValueError(f"budget={budget!r} must be positive.")
    return int(budget)


def readable(count: float) -> str:
    """Write a number of bytes for people.

    Examples
    --------
    >>> readable(3 * 2**30)
    '3.0 GiB'
    """
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(count) < 1024:
            return f"{count:.0f} B" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} TiB"


def require(needed: int, budget: int, what: str, remedy: str) -> None:
    """Raise BudgetError if `needed` bytes exceed the budget.

    Raises
    ------
    BudgetError
        Naming the request, its bytes, the budget and the remedy.
    """
    if needed > budget:
        raise BudgetError(
            f"{what} needs {readable(needed)} ({needed} bytes), more than the budget "
            f"of {readable(budget)}. {remedy}"
        )


def chunks(total: int, size: int) -> Iterator[slice]:
    """Cut range(total) into slices of at most `size`.

    Examples
    --------
    >>> [(s.start, s.stop) for s in chunks(5, 2)]
    [(0, 2), (2, 4), (4, 5)]
    """
    size = max(1, int(size))
    for start in range(0, total, size):
        yield slice(start, min(start + size, total))


def spans(lengths: Sequence[int]) -> list[slice]:
    """Return the places of parts of these lengths that follow each other.

    Examples
    --------
    >>> spans([2, 3])
    [slice(0, 2, None), slice(2, 5, None)]
    """
    ends = list(accumulate(lengths))
    return [slice(end - n, end) for end, n in zip(ends, lengths, strict=True)]


def give_back() -> None:
    """Give memory that is free in this process back to the system.

    The C library of Linux keeps what lies between pieces in use: after a pass through a
    network of a hundred million weights, gigabytes. Elsewhere nothing is done.

    Examples
    --------
    >>> give_back()
    """
    with suppress(OSError, AttributeError, TypeError):
        ctypes.CDLL(None).malloc_trim(0)


def empty(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return an uninitialised tensor, on huge pages where the system has them.

    numpy asks for huge pages and torch does not: the first touch of a large block then
    costs a third.

    Examples
    --------
    >>> empty((2, 3), torch.float64, torch.device("cpu")).shape
    torch.Size([2, 3])
    """
    if device.type != "cpu" or dtype not in (torch.float32, torch.float64):
        return torch.empty(shape, dtype=dtype, device=device)
    kind = np.float32 if dtype == torch.float32 else np.float64
    return torch.from_numpy(np.empty(shape, dtype=kind))
