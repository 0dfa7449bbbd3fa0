"""Eight approximations of eight layers: every metric that needs no spectrum.

The MNIST autoencoder with one sampled label an example. Memory is taken in a process of
its own, in which forming a dense block is an error.
"""

import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from typing import Any
from unittest import mock

import torch

import fisherlab as fl
from fisherlab.operators import Operator
from fisherlab.samples import MatrixSamples, OuterSamples, SharedSamples
from tests.benchmarks.cases import autoencoder_statistics, mnist_available
from tests.benchmarks.memory import peak_above_base
from tests.benchmarks.timing import interleaved

METHODS = [
    "kfac",
    "ekfac",
    "tkfac",
    "kpsvd",
    "kpsvd-2",
    "kfac-corrected",
    "mini-block",
    "diagonal",
]
METRICS = [
    "frobenius_error",
    "scale_optimal_error",
    "optimal_scale",
    "cosine_similarity",
    "trace_ratio",
    "diagonal_correlation",
    "effective_rank",
]
LAYERS = 8
SECONDS, BYTES = 60.0, 3 * 2**30
Row = dict[str, Any]


def statistics(n: int, dtype: torch.dtype) -> Any:
    """The statistics of all eight layers."""
    model = fl.problems.load("mnist-autoencoder").model
    stats = autoencoder_statistics(n, list(fl.blocks(model)))
    assert len(stats) == LAYERS
    layers = {name: layer.to(dtype) for name, layer in stats.items()}
    return fl.statistics.Statistics(layers, stats.provenance)


def compared(stats: Any) -> Any:
    """Build and measure everything, with nothing kept from an earlier round."""
    fresh = {name: replace(layer) for name, layer in stats.items()}
    again = fl.statistics.Statistics(fresh, stats.provenance)
    with without_dense_blocks():
        found = fl.compare(again, METHODS, metrics=METRICS)
    missing = [m for m in METRICS if not bool(found[m].notnull().all())]
    assert not missing, f"{missing}: {set(found['status'].values.flatten())}"
    return found


@contextmanager
def without_dense_blocks() -> Iterator[None]:
    """Make it an error to form a block from the samples or from an operator."""

    def refuse(*_: Any, **__: Any) -> Any:
        raise AssertionError("a dense block was formed")

    with ExitStack() as stack:
        stack.enter_context(mock.patch.object(Operator, "to_dense", refuse))
        for kind in (OuterSamples, SharedSamples, MatrixSamples):
            stack.enter_context(mock.patch.object(kind, "add_dense_", refuse))
        yield


def measure(n: int, dtype: torch.dtype, rounds: int) -> Row:
    """Time the comparison and take its peak memory in a fresh process."""
    name = str(dtype).removeprefix("torch.")
    title = f"seven metrics, 8 layers × 8 approximations, N={n}, {name}"
    note = "MNIST autoencoder, MonteCarlo(1): built and measured, no dense block formed"
    row: Row = {"case": title, "note": note, "seconds": {}, "times_ours": {}, "targets": {}}
    if not mnist_available():
        return row | {"note": "left out, $FISHERLAB_DATA does not hold mnist/"}
    stats = statistics(n, dtype)
    seconds = interleaved({"fisherlab": partial(compared, stats)}, rounds)["fisherlab"]
    command = [sys.executable, "-m", "tests.benchmarks.metrics", str(n), name]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    peak = int(done.stdout.split()[-1])
    aims = {"seconds": (seconds, SECONDS), "bytes": (float(peak), float(BYTES))}
    return row | {
        "seconds": {"fisherlab": round(seconds, 4)},
        "peak_bytes_above_base": peak,
        "targets": {
            aim: {"measured": round(value, 3), "aim": limit, "met": value <= limit}
            for aim, (value, limit) in aims.items()
        },
    }


TABLES: dict[str, Callable[[int], Row]] = {
    "metrics": partial(measure, 1000, torch.float64),
    "metrics32": partial(measure, 1000, torch.float32),
}

if __name__ == "__main__":
    prepared = statistics(int(sys.argv[1]), getattr(torch, sys.argv[2]))
    print(peak_above_base(partial(compared, prepared)))
