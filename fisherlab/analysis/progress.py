"""How far a call is: a bar, or what a function is told, after each part that is done."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

Telling = bool | Callable[["Done"], Any]
"""What `progress=` may be: no, a bar on stderr, or a function of `Done`."""


class Done(NamedTuple):
    """What a callable given as `progress` is told after every layer, seed or method."""

    layer: str
    done: int
    layers: int
    seconds: float


def teller(progress: Telling, count: int, unit: str = "layer") -> Callable[[str], None]:
    """Return what is called after each part: nothing, a bar, or a callable of `Done`."""
    began, done = time.monotonic(), 0
    bar: Any = None
    if progress is True:
        from tqdm.auto import tqdm

        bar = tqdm(total=count, desc=f"{unit}s", unit=unit)

    def tell(name: str) -> None:
        nonlocal done
        done += 1
        if bar is not None:
            bar.set_postfix_str(name)
            bar.update()
            if done == count:
                bar.close()
        elif callable(progress):
            progress(Done(name, done, count, time.monotonic() - began))

    return tell


def watched(names: Iterable[str], progress: Telling, unit: str = "layer") -> Iterator[str]:
    """Give names in turn, and tell of each when the next one is asked for.

    Examples
    --------
    >>> for name in watched(["fc1", "fc2"], lambda done: print(done[:3])):
    ...     pass
    ('fc1', 1, 2)
    ('fc2', 2, 2)
    """
    known = list(names)
    tell = teller(progress, len(known), unit)
    for name in known:
        yield name
        tell(name)


def say_complete(progress: Any, who: str, what: str) -> None:
    """Say where progress is shown that there is nothing left to do.

    Examples
    --------
    >>> say_complete(True, "sweep", "3 layers in out")
    """
    if progress is True:
        print(f"{who}: already complete, {what}.", file=sys.stderr)
