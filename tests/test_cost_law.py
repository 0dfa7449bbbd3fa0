"""What every call costs: within its budget, within its count, and not more in float32.

Each question is asked in a process of its own, on one thread: processor time and the
peak of resident memory above the start. Slow.
"""

import gc
import json
import os
import resource
import time
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import fisherlab as fl
from fisherlab.analysis import counts
from fisherlab.catalogue import Needs
from fisherlab.numerics.linalg import decomposed_once
from fisherlab.operators import Operator
from fisherlab.statistics import LayerStatistics

STATUS = Path("/proc/self/status")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not STATUS.exists(), reason="peak memory is read from /proc"),
]

MIB = 2**20
# d_in, d_out, examples, positions, columns
SHAPES = {
    "one position": (300, 200, 128, 1, 1),
    "many columns": (200, 150, 96, 1, 10),
    "positions": (144, 64, 32, 36, 1),
    "few long": (96, 96, 4, 256, 1),
}
TINY = 4, 3, 5, 2, 1
PARTS: tuple[Needs, ...] = "matrix", "gradient", "damping"
MOMENT = 0.05  # seconds that any call may take
# Builders that iterate end where the data let them: what is counted is the usual number.
ITERATED = dict.fromkeys(("kl-shampoo", "kpsvd", "deflation", "kfac-corrected"), 20.0)
ITERATED |= dict.fromkeys(("kpsvd-2", "kpsvd-3", "kpsvd-4"), 20.0)
ITERATED |= dict.fromkeys(("lanczos-2", "lanczos-paper"), 100.0)  # by gaps of the spectrum
# Indefinite sums whose smallest eigenvalue has many neighbours: some 300 products find it,
# of which each takes longer in Python than in its multiply-adds.
SOUGHT = {"lanczos-paper": 12.0, "kfac-corrected": 12.0}


def _memory(field: str) -> float:
    line = next(x for x in STATUS.read_text().splitlines() if x.startswith(field))
    return int(line.split()[1]) * 1024


def alone(work: Callable[[], dict[str, float]]) -> dict[str, float]:
    """Return what `work` returns in a fork of one thread, and its peak of memory."""
    end, start = os.pipe()
    child = os.fork()
    if not child:
        try:
            torch.set_num_threads(1)
            gc.collect()
            limit = int(_memory("VmSize") + 6 * 2**30)
            resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
            Path("/proc/self/clear_refs").write_text("5")
            before = _memory("VmRSS")
            found = work() | {"peak": 0.0}
            found["peak"] = _memory("VmHWM") - before
        except BaseException as error:
            found = {"error": f"{type(error).__name__}: {error}"}
        os.write(start, json.dumps(found).encode())
        os._exit(0)
    os.close(start)
    with os.fdopen(end) as pipe:
        answer = pipe.read()
    os.waitpid(child, 0)
    return json.loads(answer or '{"error": "killed"}')


def spent(question: Callable[..., object], *given: Any) -> float:
    """Return the processor seconds of a question."""
    before = time.process_time()
    question(*given)
    return time.process_time() - before


@cache
def rate() -> float:
    """Return the multiply-adds a second of a product in float64 on one thread."""

    def measured() -> dict[str, float]:
        a = torch.randn(700, 700, dtype=torch.float64)
        return {"rate": 700**3 / min(spent(torch.matmul, a, a) for _ in range(5))}

    return alone(measured)["rate"]


def layer(shape: tuple[int, ...], dtype: torch.dtype) -> LayerStatistics:
    """Return statistics of random inputs whose covariance decays, as activations' do."""
    inputs, outputs, examples, positions, columns = shape
    at = () if positions == 1 else (positions,)
    net = nn.Linear(inputs, outputs, bias=False).to(dtype)
    scale = torch.arange(1, inputs + 1, dtype=dtype).rsqrt()
    data = scale * torch.randn(examples, *at, inputs, dtype=dtype), None
    fisher = fl.MonteCarlo(columns)
    return fl.collect(net, data, fl.Gaussian(), fisher, compress=False)["weight"]


def ask(exact: Operator, approx: Operator, part: Needs, w: torch.Tensor) -> None:
    """Compute the numbers of one part, as a comparison does."""
    with suppress(fl.NumericalError):  # an indefinite sum is an answer, too
        if part == "matrix":
            fl.metrics.frobenius_error(exact, approx)
            fl.metrics.trace_ratio(exact, approx)
        elif part == "gradient":
            fl.metrics.direction_cosine(exact, approx, w, damping=1e-2)
        else:
            exact.inverse(1e-2).frobenius_norm()  # kept for all methods
            fl.metrics.inverse_error(exact, approx, damping=1e-2)


def costs(name: str, shape: tuple[int, ...]) -> dict[str, float]:
    """Return the seconds of every part in both precisions, beside what is counted."""
    found = {}
    for bits, dtype in (("64", torch.float64), ("32", torch.float32)):
        stats = layer(shape, dtype)
        w = torch.randn(stats.block.weight_shape, dtype=dtype)
        exact, method = fl.ExactBlock()(stats), fl.approximators()[name]
        for part in PARTS:
            shared = spent(ask, exact, exact, part, w)  # by all methods
            with decomposed_once(*stats.rows):  # as a comparison does
                building = spent(method, stats) if part == "matrix" else 0.0
                approx = method(stats)
                own = building + spent(ask, exact, approx, part, w)
            found[f"{part} {bits}"], found[f"{part} {bits} in all"] = own, own + shared
            found[f"{part} counted"] = counts.own(exact.samples, method, part).flops
    return found


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", [n for n in fl.approximators() if n != "exact"])
def test_methods_cost_what_is_counted(name: str, shape: str) -> None:
    def work() -> dict[str, float]:
        costs(name, TINY)  # what is loaded at the first call
        return costs(name, SHAPES[shape])

    found = alone(work)
    assert "error" not in found, found
    for part in PARTS:
        wide, single = found[f"{part} 64"], found[f"{part} 32"]
        counted = found[f"{part} counted"] / rate()
        factor = (ITERATED if part == "matrix" else SOUGHT).get(name, 4.0)
        assert wide <= factor * counted + MOMENT, part
        if factor <= 4.0 or part == "matrix":
            assert single <= 1.5 * found[f"{part} 64 in all"] + MOMENT, part


BUDGET = 192 * MIB
LOADED = 96 * MIB  # libraries' own, and the pages that an allocator keeps
METHODS = ["kfac", "ekfac", "kpsvd-2", "mini-block", "diagonal"]


def network() -> nn.Module:
    """Return a network with a layer whose dense block takes 3.4 GB."""
    return nn.Sequential(nn.Linear(160, 128), nn.Tanh(), nn.Linear(128, 100)).double()


CALLS: dict[str, Callable[[nn.Module, Any, Any, int], object]] = {
    "collect": lambda net, data, _, b: fl.collect(
        net, data, fl.Categorical(), fl.Exact(), budget=b, compress=False
    ),
    "approximate": lambda net, data, _, b: fl.approximate(
        net, data, fl.Categorical(), METHODS, fl.Exact(), budget=b
    ),
    "compare": lambda _, __, stats, b: fl.compare(stats, METHODS, damping=0.1, budget=b),
    "compare of a model": lambda net, data, _, b: fl.compare(
        net, data, fl.Categorical(), approximators=METHODS, damping=0.1, budget=b
    ),
    "pareto": lambda _, __, stats, b: fl.pareto(stats, METHODS, repeats=1, budget=b),
    "inverse_blocks": lambda _, __, stats, b: fl.inverse_blocks(
        stats, METHODS, 0.1, budget=b
    ),
    "density": lambda _, __, stats, b: fl.density(stats, METHODS, budget=b),
    "full_matrix": lambda _, __, stats, b: fl.full_matrix(stats, budget=b),
}


@pytest.mark.parametrize("call", CALLS)
def test_calls_stay_within_their_budget_or_refuse(call: str) -> None:
    net, data = network(), (torch.randn(300, 160, dtype=torch.float64), None)
    stats = fl.collect(net, data, fl.Categorical(), fl.MonteCarlo(1))

    def work() -> dict[str, float]:
        with suppress(fl.BudgetError):
            CALLS[call](net, data, stats, BUDGET)
        return {}

    found = alone(work)
    assert "error" not in found, found
    assert found["peak"] <= 1.1 * BUDGET + LOADED


WIDE = "kfac", "kpsvd", "kpsvd-2", "kfac-corrected", "ekfac", "tekfac", "shampoo"
WIDE = *WIDE, "kl-shampoo", "soap", "tkfac"


@pytest.mark.parametrize("name", WIDE)
@pytest.mark.parametrize("tied", [False, True])
def test_tables_and_heads_stay_within_their_budget_or_are_refused(
    name: str, tied: bool
) -> None:
    tokens, budget = 3000, 256 * MIB
    net = nn.Sequential(nn.Embedding(tokens, 32), nn.Linear(32, tokens, bias=False))
    if tied:
        net[1].weight = net[0].weight
    x, y = torch.randint(0, tokens, (2, 2, 8))
    stats = fl.collect(net, (x, y), fl.Categorical(), fl.MonteCarlo(1))

    def work() -> dict[str, float]:
        fl.compare(stats, [name], metrics=["frobenius_error"], budget=budget)
        return {}

    found = alone(work)
    assert "error" not in found, found
    assert found["peak"] <= 1.1 * budget + LOADED


PASSES: dict[str, Callable[..., Any]] = {
    "collect": lambda net, data: fl.collect(net, data, fl.Categorical(), fl.MonteCarlo(1)),
    "mean_gradient": lambda net, data: fl.mean_gradient(net, data, fl.Categorical()),
}


@pytest.mark.parametrize("call", PASSES)
def test_gradients_of_a_large_network_are_held_twice_at_most(call: str) -> None:
    net = nn.Sequential(*(nn.Linear(1000, 1000) for _ in range(24)))
    data = torch.randn(2, 1000), torch.zeros(2, dtype=torch.long)

    def work() -> dict[str, float]:
        PASSES[call](net, data)
        return {}

    found = alone(work)
    assert "error" not in found, found
    assert found["peak"] <= 2 * 4 * sum(p.numel() for p in net.parameters()) + LOADED


def test_variances_of_wide_layers_are_solved_for_in_parts() -> None:
    net = nn.Sequential(nn.Linear(2000, 1000), nn.Tanh(), nn.Linear(1000, 10))
    x, y = torch.randn(30, 2000), torch.randint(0, 10, (30,))
    stats = fl.collect(net, (x[:24], y[:24]), fl.Categorical(), fl.MonteCarlo(1))
    held_out = fl.purposes.HeldOut.of(net, (x[24:], y[24:]))  # 60 matrices of 16 MB

    def work() -> dict[str, float]:
        asked = [fl.Laplace(1.0, 1000, held_out)]
        fl.compare(stats, ["kfac", "ekfac"], purpose=asked)
        return {}

    found = alone(work)
    assert "error" not in found, found
    assert found["peak"] <= 2 * 2**30
