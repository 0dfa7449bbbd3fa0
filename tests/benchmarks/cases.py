"""What is measured: each case builds its work, checks it, and names its rivals."""

import itertools
import os
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import fisherlab as fl
from tests.benchmarks import peers
from tests.benchmarks.timing import gemm

Shape = tuple[int, int, int]


@dataclass(frozen=True)
class Case:
    """One row group of the table.

    Parameters
    ----------
    name, note
        What is measured.
    ours
        Our work.
    arithmetic
        The matrix products of the minimal flop count, or None.
    rivals
        Peers by "name (batch size)".
    targets
        What is aimed for: "gemm" at most, "peer" at least (times faster than the fastest
        peer), a peer's name at least, "seconds" at most, "bytes" at most.
    """

    name: str
    note: str
    ours: Callable[[], Any]
    arithmetic: Callable[[], Any] | None = None
    rivals: dict[str, Callable[[], Any]] = field(default_factory=dict)
    targets: dict[str, float] = field(default_factory=dict)


def mlp(widths: list[int], dtype: torch.dtype) -> nn.Sequential:
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for before, after in itertools.pairwise(widths):
        layers += [nn.Linear(before, after, dtype=dtype), nn.Tanh()]
    return nn.Sequential(*layers[:-1])


def packed_shapes(widths: list[int], n: int) -> list[Shape]:
    """The minimal products of dense blocks: o(o+1)/2 × N × m(m+1)/2 a layer."""
    pairs = itertools.pairwise(widths)
    return [(o * (o + 1) // 2, n, (i + 1) * (i + 2) // 2) for i, o in pairs]


def dense_blocks(model: nn.Module, x: Tensor) -> list[Tensor]:
    stats = fl.collect(model, (x, None), fl.Categorical())
    return [fl.ExactBlock()(layer).to_dense() for layer in stats.values()]


def kfac_factors(model: nn.Module, x: Tensor) -> Any:
    return fl.approximate(model, (x, None), fl.Categorical(), ["kfac"])


def _rivals(
    table: dict[str, Any], model: nn.Module, x: Tensor, batches: list[int]
) -> dict[str, Callable[[], Any]]:
    return {
        f"{name} (batch {batch})": partial(build, model, x, batch)
        for name, (package, build) in table.items()
        if peers.installed(package)
        for batch in batches
    }


def _agree(model: nn.Module, x: Tensor) -> None:
    """Blocks equal nngeometry's trace and norm before anybody is timed."""
    if not peers.installed("nngeometry"):
        return
    few = x[:50]
    theirs = peers.nngeometry_blocks(model, few, 50)
    for mine, other in zip(dense_blocks(model, few), theirs, strict=True):
        assert abs(float(mine.trace() / other.trace()) - 1) < 1e-5
        assert abs(float(mine.norm() / other.norm()) - 1) < 1e-5


def dense_mlp(h: int = 64, n: int = 4000, targets: dict[str, float] | None = None) -> Case:
    widths = [h, h, h, 10]
    model, x = mlp(widths, torch.float64), torch.randn(n, h, dtype=torch.float64)
    _agree(model, x)
    return Case(
        f"dense blocks, MLP {h}-{h}-{h}-10, N={n}, float64",
        "from model and data to all dense layer blocks, exact Fisher",
        partial(dense_blocks, model, x),
        gemm(packed_shapes(widths, n), torch.float64),
        _rivals(peers.BLOCKS, model, x, [500, 2000]),
        targets or {"gemm": 1.5, "nngeometry": 25, "peer": 22},
    )


def classifier(
    name: str, n: int, targets: dict[str, float], rival_batches: list[int]
) -> Case:
    problem = fl.problems.load(name)
    x = torch.cat([problem.train[0], problem.test[0]])[:n]
    widths = [256, 20, 20, 20, 20, 20, 10]
    model = mlp(widths, torch.float64)
    _agree(model, x)
    rivals = {"nngeometry": peers.BLOCKS["nngeometry"]}
    return Case(
        f"dense blocks, 256-20-20-20-20-20-10, {name}, N={len(x)}, float64",
        "all six layers, exact Fisher",
        partial(dense_blocks, model, x),
        gemm(packed_shapes(widths, len(x)), torch.float64),
        _rivals(rivals, model, x, rival_batches),
        targets,
    )


def conv_network(n: int) -> tuple[nn.Sequential, Tensor]:
    torch.manual_seed(0)
    dtype = torch.float64
    model = nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1, dtype=dtype),
        nn.ReLU(),
        nn.Conv2d(16, 32, 3, padding=1, dtype=dtype),
        nn.ReLU(),
        nn.MaxPool2d(4),
        nn.Flatten(),
        nn.Linear(32 * 16, 10, dtype=dtype),
    )
    return model, torch.randn(n, 3, 16, 16, dtype=dtype)


def conv(n: int = 512) -> Case:
    model, x = conv_network(n)

    def ours() -> list[Tensor]:
        stats = fl.collect(model, (x, None), fl.Categorical(), layers=["0", "2"])
        return [fl.ExactBlock()(layer).to_dense() for layer in stats.values()]

    frozen = nn.Sequential(*model)
    for p in frozen[6].parameters():
        p.requires_grad_(False)
    half = [(p, 9 * n // 2, p) for p in (16 * 28, 32 * 145)]  # the SYRK floor
    rivals = _rivals(peers.BLOCKS, frozen, x, [128, 512])
    targets = {"peer": 1.8, "BackPACK": 5, "vmap(jacrev)": 5}
    return Case(
        f"dense blocks, Conv2d 3-16-32, 3x3, 16x16, N={n}, float64",
        "two convolutions",
        ours,
        gemm(half, x.dtype),
        rivals,
        targets,
    )


def kfac(
    dtype: torch.dtype, target: float, n: int = 8000, widths: list[int] | None = None
) -> Case:
    widths = widths or [784, 256, 64, 10]
    model, x = mlp(widths, dtype), torch.randn(n, widths[0], dtype=dtype)
    name = str(dtype).removeprefix("torch.")
    pairs = list(itertools.pairwise(widths))
    shapes = [(i + 1, n // 2, i + 1) for i, _ in pairs] + [
        (o, 9 * n // 2, o) for _, o in pairs
    ]
    return Case(
        f"KFAC factors, {'-'.join(map(str, widths))}, N={n}, {name}",
        "exact Fisher, all columns",
        partial(kfac_factors, model, x),
        gemm(shapes, dtype),
        _rivals(peers.KFAC, model, x, [500, 2000, 8000]),
        {"peer": 1 / target},
    )


AUTOENCODER = [784, 1000, 500, 250, 30, 250, 500, 1000, 784]


def mnist_available() -> bool:
    folder = os.environ.get("FISHERLAB_DATA")
    return bool(folder) and (Path(folder) / "mnist").is_dir()


def autoencoder_statistics(n: int, layers: list[str] | None = None) -> Any:
    """Statistics of the MNIST autoencoder on real MNIST, one sampled label an example."""
    problem = fl.problems.load("mnist-autoencoder")
    x = problem.train[0][:n].double()
    model = problem.model.double()
    names = layers or [next(iter(fl.blocks(model)))]
    return fl.collect(model, (x, None), problem.likelihood, fl.MonteCarlo(1), layers=names)


def five_errors(stats: Any) -> dict[str, float]:
    (layer,) = stats.values()
    fresh = _fresh(layer)
    exact = fl.ExactBlock()(fresh)
    methods = {
        "kfac": fl.KFAC(),
        "kpsvd": fl.KPSVD(1),
        "kpsvd-2": fl.KPSVD(2),
        "ekfac": fl.EKFAC(),
        "mini-block": fl.MiniBlock(),
    }
    return {
        name: fl.metrics.frobenius_error(exact, method(fresh))
        for name, method in methods.items()
    }


def _fresh(layer: Any) -> Any:
    """The same statistics without anything kept from an earlier round."""
    return replace(layer)


def errors(n: int, seconds: float, size: float) -> Case:
    stats = autoencoder_statistics(n)
    return Case(
        f"five relative errors, 784→1000 layer of the MNIST autoencoder, N={n}, float64",
        "KFAC, KPSVD-1, KPSVD-2, EKFAC, mini-block: built and measured, nothing formed",
        partial(five_errors, stats),
        targets={"seconds": seconds, "bytes": size * 2**30},
    )


def solve(n: int, seconds: float) -> Case:
    stats = autoencoder_statistics(n)
    (layer,) = stats.values()
    torch.manual_seed(0)
    w = torch.randn(layer.weight_shape, dtype=torch.float64)

    def ours() -> float:
        exact = fl.ExactBlock()(_fresh(layer))
        damping = 1e-2 * exact.trace() / exact.shape[0]
        x = exact.solve(w, damping)
        residual = float((exact @ x + damping * x - w).norm() / w.norm())
        assert residual <= 1e-9, residual
        return residual

    return Case(
        f"damped solve with the exact block, same layer, N={n}, float64",
        "residual at most 1e-9, checked",
        ours,
        targets={"seconds": seconds},
    )


CASES: dict[str, Callable[[], Case]] = {
    "dense": dense_mlp,
    "digits": partial(
        classifier,
        "digits",
        1797,
        {"gemm": 1.5, "nngeometry": 20, "bytes": 0.5 * 2**30},
        [500, 1797],
    ),
    "mnist": partial(
        classifier,
        "mnist",
        10_000,
        {"gemm": 1.6, "nngeometry": 18, "bytes": 0.5 * 2**30},
        [500, 2000],
    ),
    "conv": conv,
    "kfac64": partial(kfac, torch.float64, 0.6),
    "kfac32": partial(kfac, torch.float32, 0.5),
    "errors": partial(errors, 1000, 2.0, 0.5),
    "errors10k": partial(errors, 10_000, 40.0, 1.5),
    "solve": partial(solve, 1000, 0.4),
    "solve10k": partial(solve, 10_000, 20.0),
}
NEEDS_MNIST = ("mnist", "errors", "errors10k", "solve", "solve10k")
