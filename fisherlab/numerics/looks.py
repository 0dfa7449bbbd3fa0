"""Conditions that numbers must meet: looked at at once, or together later.

To look at a number of an accelerator the host waits for it. A step that should not wait
postpones its looks; numbers on the CPU are looked at in any case.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor


@final
@dataclass(frozen=True, eq=False)
class Look:
    """A condition on the device, and the error to raise where it does not hold."""

    good: Tensor
    complaint: Callable[[], Exception]


_LATER: ContextVar[list[Look] | None] = ContextVar("later", default=None)


def require(good: Tensor, complaint: Callable[[], Exception]) -> None:
    """Raise an error unless a condition holds: at once, or when it is looked at.

    Parameters
    ----------
    good
        One boolean.
    complaint
        Makes the error. It should hold few numbers: it may be kept for a while.

    Raises
    ------
    Exception
        The complaint.

    Examples
    --------
    >>> require(torch.ones(2).sum() > 3, lambda: ValueError("too small"))
    Traceback (most recent call last):
    ValueError: too small
    """
    if postponing(good):
        _LATER.get().append(Look(good, complaint))  # type: ignore[union-attr]
    elif not bool(good):
        raise complaint()


def postponing(tensor: Tensor) -> bool:
    """Tell whether conditions on a tensor are looked at later."""
    return _LATER.get() is not None and tensor.device.type != "cpu"


@contextmanager
def postponed(wanted: bool) -> Iterator[list[Look]]:
    """Keep what is required in a `with` block, if wanted, to be looked at later."""
    found: list[Look] = []
    token = _LATER.set(found if wanted else None)
    try:
        yield found
    finally:
        _LATER.reset(token)


def all_good(looks: Sequence[Look]) -> Tensor | None:
    """Return on the device whether all conditions hold, None if there are none."""
    return torch.stack([each.good for each in looks]).all() if looks else None


def look(looks: Sequence[Look]) -> None:
    """Look at all of them at once, and raise the complaint of the first that fails.

    Raises
    ------
    Exception
        The complaint.
    """
    if not looks:
        return
    found = torch.stack([each.good for each in looks]).tolist()
    for each, good in zip(looks, found, strict=True):
        if not good:
            raise each.complaint()
