"""How long the phases of a job take, and a bar that shows them pass."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Any

from tqdm import tqdm


class Phases:
    """Time named phases and, inside of a `with` block, show them on stderr.

    Parameters
    ----------
    total
        Number of phases to come in the block.
    quiet
        Show nothing.

    Attributes
    ----------
    seconds
        Wall time by phase; a phase that comes again adds to its time.

    Examples
    --------
    >>> with Phases(total=2, quiet=True) as phase:
    ...     with phase("load"):
    ...         pass
    ...     with phase("train", "step 10"):
    ...         pass
    >>> list(phase.seconds)
    ['load', 'train']
    """

    def __init__(self, total: int, *, quiet: bool = False) -> None:
        self.seconds: dict[str, float] = {}
        self._total = total
        self._bar: tqdm[Any] = tqdm(disable=True)
        self._quiet = quiet

    @contextmanager
    def __call__(self, name: str, detail: str = "") -> Iterator[None]:
        """Time what happens in the block, under a name."""
        self._bar.set_postfix_str("", refresh=False)
        self._bar.set_description(f"{name} {detail}".strip())
        start = time.perf_counter()
        try:
            yield
        finally:
            spent = time.perf_counter() - start
            self.seconds[name] = self.seconds.get(name, 0.0) + spent
            self._bar.update()

    def note(self, text: str) -> None:
        """Show a word about the phase that is running."""
        self._bar.set_postfix_str(text, refresh=False)
        self._bar.update(0)

    def __enter__(self) -> Phases:
        self._bar = tqdm(
            total=self._total,
            disable=self._quiet,
            file=sys.stderr,
            unit="phase",
            leave=False,
        )
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._bar.close()
