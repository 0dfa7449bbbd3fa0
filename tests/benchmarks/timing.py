"""Interleaved timing: every contestant in turn, round after round, the best of each."""

import gc
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch

from fisherlab.numerics.devices import wait


def once(action: Callable[[], Any]) -> float:
    """Seconds of one call, the result thrown away before the next."""
    gc.collect()
    wait()
    start = time.perf_counter()
    result = action()
    wait()
    seconds = time.perf_counter() - start
    del result
    return seconds


def interleaved(
    contestants: Mapping[str, Callable[[], Any]], rounds: int, patience: float = 20.0
) -> dict[str, float]:
    """Best seconds of each contestant over `rounds`, A A B B C C A A B B C C ...

    Twice in a row, because the first call pays for the memory that the contestant before
    it gave back to the system. One slower than `patience` seconds runs once: its noise is
    small beside its distance.
    """
    best: dict[str, float] = {}
    for _ in range(rounds):
        for name, action in contestants.items():
            for _ in range(2):
                if best.get(name, 0.0) > patience:
                    continue
                best[name] = min(best.get(name, float("inf")), once(action))
    return best


def gemm(shapes: list[tuple[int, int, int]], dtype: torch.dtype) -> Callable[[], Any]:
    """Return an action that multiplies matrices of the given (rows, inner, cols)."""
    pairs = [
        (
            torch.randn(r, k, dtype=dtype),
            torch.randn(k, c, dtype=dtype),
            torch.empty(r, c, dtype=dtype),
        )
        for r, k, c in shapes
    ]

    def multiply() -> None:
        for left, right, out in pairs:
            torch.mm(left, right, out=out)

    return multiply
