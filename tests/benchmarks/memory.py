"""Peak memory of a piece of work above what was there before it."""

import threading
import time
from collections.abc import Callable
from typing import Any

import psutil


def peak_above_base(action: Callable[[], Any], every: float = 0.005) -> int:
    """Bytes of resident memory at the peak of `action`, above its start."""
    process = psutil.Process()
    base = process.memory_info().rss
    peak, running = base, True

    def watch() -> None:
        nonlocal peak
        while running:
            peak = max(peak, process.memory_info().rss)
            time.sleep(every)

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        result = action()
        peak = max(peak, process.memory_info().rss)
        del result
    finally:
        running = False
        watcher.join()
    return peak - base
