"""What better Kronecker sums cost beside KFAC, beside svds, and CG-FAC beside KFAC.

Every row is one run in which all contestants take turns, so that ratios hold whatever
else the machine does.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from scipy.sparse.linalg import LinearOperator, svds
from torch import Tensor

import fisherlab as fl
from fisherlab.samples.base import column_product, row_product
from tests.benchmarks.cases import AUTOENCODER, autoencoder_statistics, mnist_available
from tests.benchmarks.timing import interleaved

EXAMPLES = 1000
ACCURACY = 1e-6  # relative residual, where no other is said
VALUES = 1e-4  # residual that gives singular values to 1e-6: their errors are squares
Row = dict[str, object]


def statistics(dtype: torch.dtype, n: int = EXAMPLES) -> list[Any]:
    """Statistics of all layers of the MNIST autoencoder, one column an example.

    On MNIST where it is there, else on numbers of the same shapes.
    """
    if mnist_available():
        problem = fl.problems.load("mnist-autoencoder")
        names = list(fl.blocks(problem.model))
        stats = autoencoder_statistics(n, names)
        return [layer.to(dtype) for layer in stats.values()]
    widths = pairwise(AUTOENCODER)
    return [_synthetic(o, i + 1, n, dtype) for i, o in widths]


def _synthetic(o: int, i: int, n: int, dtype: torch.dtype) -> Any:
    generator = torch.Generator("cpu").manual_seed(o + i)
    drawn: Any = {"generator": generator, "dtype": torch.float64, "device": "cpu"}
    inputs, gradients = torch.rand(n, 1, i, **drawn), torch.randn(1, n, 1, o, **drawn)
    block = fl.blocks(torch.nn.Linear(i, o, bias=False, device="meta"))["weight"]
    held = fl.LayerStatistics(block, n, inputs=inputs, gradients=gradients, positions=n)
    return held.to(dtype)


def against_kfac(dtype: torch.dtype, rounds: int) -> Row:
    """Time KPSVD of rank 1 and 2 against KFAC's factors, layer by layer and in total."""
    layers = statistics(dtype)
    methods = {
        "KFAC factors": fl.KFAC(),
        "KPSVD rank 1": fl.KPSVD(1, fl.Auto(tolerance=ACCURACY)),
        "KPSVD rank 2": fl.KPSVD(2, fl.Auto(tolerance=VALUES)),
        "KPSVD rank 2, residual 1e-6": fl.KPSVD(2, fl.Auto(tolerance=ACCURACY)),
    }
    _check(layers, methods)
    work = {
        (name, k): partial(_fresh_call, method, layer)
        for k, layer in enumerate(layers)
        for name, method in methods.items()
    }
    best = interleaved(work, rounds)
    totals = {name: sum(best[name, k] for k in range(len(layers))) for name in methods}
    base = totals["KFAC factors"]
    targets: dict[str, object] = {}
    totals_aim = {1: 3.0, 2: 5.0 if dtype == torch.float64 else 6.0}
    for rank, aim, layer_aim in ((1, totals_aim[1], 10.0), (2, totals_aim[2], 25.0)):
        name = f"KPSVD rank {rank}"
        ratios = [best[name, k] / best["KFAC factors", k] for k in range(len(layers))]
        targets[f"{name} / KFAC, all layers"] = _at_most(totals[name] / base, aim)
        targets[f"{name} / KFAC, worst layer"] = _at_most(max(ratios), layer_aim)
    return {
        "case": f"KPSVD and KFAC, MNIST autoencoder, N={len(layers[0].inputs)}, {dtype}",
        "note": "8 layers, MonteCarlo(1); residual 1e-6 of rank 1, singular values to 1e-6 "
        "of rank 2; 'times ours': KFAC's time over theirs",
        "seconds": {name: round(value, 4) for name, value in totals.items()},
        "times_ours": {name: round(base / value, 3) for name, value in totals.items()},
        "targets": targets,
    }


def _check(layers: list[Any], methods: dict[str, Any]) -> None:
    """Nobody is timed who is not right: errors in order, and converged."""
    layer = layers[3].to(torch.float64)
    exact = fl.ExactBlock()(layer)
    first, second, third, fourth = (
        fl.metrics.frobenius_error(exact, method(layer)) for method in methods.values()
    )
    assert first >= second >= third >= fourth * (1 - 1e-9)
    two, accurate = list(methods.values())[2:]
    for one in layers:
        ours, better = two(replace(one)), accurate(replace(one))
        off = (ours.singular_values - better.singular_values).abs().max()
        assert ours.converged, one
        assert float(off / better.singular_values[0]) < 2e-6, one


def _fresh_call(method: Callable[[Any], Any], layer: Any) -> Any:
    """Call on statistics without anything kept from an earlier round."""
    return method(replace(layer))


def _at_most(value: float, aim: float) -> dict[str, object]:
    return {"measured": round(value, 3), "aim": aim, "met": bool(value <= aim)}


def against_svds(rounds: int) -> Row:
    """Time KPSVD against scipy's svds on stored per-example gradients."""
    layers = {
        "251x30": statistics(torch.float64)[3],
        "251x500": statistics(torch.float64)[5],
    }
    method = fl.KPSVD(1, fl.Auto(tolerance=ACCURACY))
    work: dict[str, Callable[[], Any]] = {}
    for name, layer in layers.items():
        work[f"KPSVD {name}"] = partial(_fresh_call, method, layer)
        work[f"svds {name}"] = partial(leading_by_svds, layer.example_gradients()[0])
    for layer in layers.values():  # both are right before anybody is timed
        few = replace(layer, inputs=layer.inputs[:50], gradients=layer.gradients[:, :50])
        few = replace(few, count=50, positions=50)
        theirs = leading_by_svds(few.example_gradients()[0])
        assert abs(float(method(few).singular_values[0]) / theirs - 1) < 1e-5
    best = interleaved(work, rounds, patience=5.0)
    targets = {
        f"svds / KPSVD, {name}": {
            "measured": round(best[f"svds {name}"] / best[f"KPSVD {name}"], 1),
            "aim": 300.0,
            "met": best[f"svds {name}"] >= 300 * best[f"KPSVD {name}"],
        }
        for name in layers
    }
    return {
        "case": "leading Kronecker product by KPSVD and scipy svds, N=1000, float64",
        "note": "svds multiplies stored per-example gradients, as curvlinops does",
        "seconds": {name: round(value, 5) for name, value in best.items()},
        "times_ours": {},
        "targets": targets,
    }


def leading_by_svds(gradients: Tensor) -> float:
    """Return σ₁ of the rearranged (1/N) Σ D ⊗ D by scipy, D stored, (n, o, i)."""
    n, o, i = gradients.shape

    def apply(v: Any) -> Any:
        middle = torch.as_tensor(v).reshape(i, i)
        return (row_product(gradients, middle) / n).flatten().numpy()

    def adjoint(u: Any) -> Any:
        middle = torch.as_tensor(u).reshape(o, o)
        return (column_product(gradients, middle) / n).flatten().numpy()

    linear = LinearOperator((o * o, i * i), matvec=apply, rmatvec=adjoint, dtype="float64")
    return float(svds(linear, k=1, tol=ACCURACY, return_singular_vectors=False)[0])


def cg_fac(rounds: int) -> Row:
    """Time a damped step of CG-FAC against KFAC's, from statistics to the answer."""
    layer = statistics(torch.float64)[0]
    w = torch.randn(layer.weight_shape, generator=torch.Generator().manual_seed(0)).double()
    damping = fl.KFAC()(layer).trace() / w.numel()
    methods = {
        "KFAC": fl.KFAC(),
        "CG-FAC, 10 iterations": fl.CGFAC(max_iterations=10),
        "CG-FAC, 20 iterations": fl.CGFAC(max_iterations=20),
        "CG-FAC to 1e-6": fl.CGFAC(tolerance=1e-6),
    }
    work = {
        name: partial(lambda m: m(replace(layer)).solve(w, damping), method)
        for name, method in methods.items()
    }
    best = interleaved(work, rounds)
    held = {name: method(layer).stored_numbers for name, method in methods.items()}
    reached = methods["CG-FAC, 20 iterations"](layer).solution(w, damping)
    note = ", ".join(f"{name} holds {numbers:,} numbers" for name, numbers in held.items())
    return {
        "case": "one damped step, 784→1000 layer, N=1000, float64: CG-FAC and KFAC",
        "note": f"{note}; 20 iterations leave a residual of {reached.residual:.1e}",
        "seconds": {name: round(value, 4) for name, value in best.items()},
        "times_ours": {
            name: round(best["KFAC"] / value, 3) for name, value in best.items()
        },
        "targets": {},
    }


TABLES: dict[str, Callable[[int], Row]] = {
    "kpsvd64": partial(against_kfac, torch.float64),
    "kpsvd32": partial(against_kfac, torch.float32),
    "kpsvd-svds": against_svds,
    "cg-fac": cg_fac,
}
