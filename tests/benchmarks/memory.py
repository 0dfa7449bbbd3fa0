"""Peak memory of a piece of work above what was there before it, in a fresh process."""

import subprocess
import sys
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


def of_case(name: str) -> int:
    """Peak of one case in a process of its own, where nothing was allocated before."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.benchmarks.memory", name],
        capture_output=True,
        text=True,
        check=True,
    )
    return int(done.stdout.split()[-1])


if __name__ == "__main__":
    from tests.benchmarks.cases import CASES

    print(peak_above_base(CASES[sys.argv[1]]().ours))
