"""Weak scaling of statistics: two ranks, each with as many examples as one alone.

One thread a rank, on as many cores: `OMP_NUM_THREADS=1 python -m tests.benchmarks ranks`.
Two ranks that share nothing, at the same time, show what the machine itself allows.
"""

import itertools
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import distributed, nn

import fisherlab as fl
from tests.rank_jobs import spawned

EXAMPLES, WIDTHS, EFFICIENCY = 30_000, (784, 500, 250, 10), 0.85
METHODS = ("kfac", "diagonal", "ekfac")
RUNS = {"one": (1, False), "two": (2, False), "two that share nothing": (2, True)}


def network() -> nn.Sequential:
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for d_in, d_out in itertools.pairwise(WIDTHS):
        layers += [nn.Linear(d_in, d_out), nn.Tanh()]
    return nn.Sequential(*layers[:-1])


def timed(rank: int, ranks: int, folder: Path, *, alone: bool = False) -> dict[str, float]:
    """Return the best of three times of every method on this rank's examples.

    With `alone` every rank is a group of its own, which sends nothing.
    """
    groups = [distributed.new_group([other]) for other in range(ranks)]
    group = groups[rank] if alone else None
    noise = torch.Generator().manual_seed(rank)
    x = torch.randn(EXAMPLES, WIDTHS[0], generator=noise)
    data, model, best = (x, None), network(), dict[str, float]()
    for method in METHODS * 4:  # of which the first warms up
        distributed.barrier()
        started = time.perf_counter()
        fl.approximate(
            model, data, fl.Categorical(), [method], fl.MonteCarlo(2), group=group
        )
        distributed.barrier()
        seconds = time.perf_counter() - started
        known = best.get(method)
        best[method] = float("inf") if known is None else min(known, seconds)
    return best


def measure(rounds: int = 1) -> dict[str, Any]:
    """Hold two ranks against one; the best of some rounds, one after the other."""
    best: dict[str, dict[str, float]] = {name: {} for name in RUNS}
    for _ in range(rounds):
        for name, (ranks, alone) in RUNS.items():
            with tempfile.TemporaryDirectory() as folder:
                found = spawned(partial(timed, alone=alone), ranks, Path(folder))
            for method in METHODS:
                slowest = max(rank[method] for rank in found)
                before = best[name].get(method, float("inf"))
                best[name][method] = min(before, slowest)
    targets = {}
    for method in METHODS:
        machine = best["one"][method] / best["two that share nothing"][method]
        share = best["one"][method] / best["two"][method]
        targets[f"{method}: weak scaling (of {machine:.2f} where nothing is shared)"] = {
            "measured": round(share, 3),
            "aim": EFFICIENCY,
            "met": share >= EFFICIENCY,
        }
    seconds = {f"{m}, {name}": best[name][m] for m in METHODS for name in RUNS}
    return {
        "case": "statistics over ranks, 784-500-250-10, float32, one thread a rank",
        "note": f"{EXAMPLES} examples a rank, two sampled labels; seconds of the slowest",
        "seconds": {name: round(value, 4) for name, value in seconds.items()},
        "times_ours": {},
        "targets": targets,
    }


TABLES = {"ranks": measure}
