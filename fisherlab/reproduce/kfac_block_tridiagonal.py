"""How near layers are to being uncoupled: Figures 2, 3, 5 and 6 of the K-FAC paper.

A tanh network 256-20-20-20-20-20-10 on 16 × 16 digits, of which the four middle layers
are looked at (4 · 420 = 1680 parameters). F is the exact Fisher, F̃ its Kronecker
approximation of all pairs of layers, F̆ the block diagonal of F̃, and F̂ the matrix that
agrees with F̃ on the block tridiagonal and has a block-tridiagonal inverse. The paper
trained by K-FAC on MNIST; here SGD with momentum trains on scikit-learn's digits, which
need no download.

Reference: Martens & Grosse 2015, arXiv 1503.05671, sections 3, 4.2 and 4.3.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import matplotlib.pyplot as plt
import numpy as np
import torch
import xarray as xr
from matplotlib.figure import Figure as Drawing
from torch import Tensor

from fisherlab.approximators import KFACTridiagonal, KhatriRao, block_diagonal
from fisherlab.approximators.network import ExactNetwork
from fisherlab.numerics.linalg import factorised
from fisherlab.operators import BlockTridiagonal, Factored, KroneckerBlocks
from fisherlab.plots import heatmap, publication
from fisherlab.problems import load
from fisherlab.problems.problem import drawn
from fisherlab.reproduce.figure import Figure, Result
from fisherlab.statistics import Statistics, collect
from fisherlab.training import accuracy, trajectory

LAYERS: Final = ("fc2", "fc3", "fc4", "fc5")
DAMPING: Final = 0.01  # λ; the paper's γ = √λ = 0.1 is split between the factors
DAMPINGS: Final = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)
BATCH: Final = 128
RATE, MOMENTUM = 0.05, 0.9


@dataclass(frozen=True)
class Middle:
    """Statistics of the middle layers, and how well the network was trained."""

    stats: Statistics
    attrs: dict[str, Any]


def middle_layers(seed: int, quick: bool) -> Middle:
    """Train the network and collect the exact Fisher of its four middle layers.

    Fifteen epochs on 1,438 digits; if `quick` two epochs, and statistics of 100 random
    digits.
    """
    problem = load("digits", seed=seed)
    x, _ = problem.train
    epochs, examples = (2, 100) if quick else (15, len(x))
    sgd = torch.optim.SGD(problem.model.parameters(), lr=RATE, momentum=MOMENTUM)
    steps = epochs * (len(x) // BATCH)
    run = trajectory(problem, sgd, steps, (steps,), batch_size=BATCH, seed=seed)
    ((_, model),) = run
    data = drawn(problem.train, examples, seed)
    stats = collect(model, data, problem.likelihood, layers=LAYERS, compress=False)
    attrs = {
        "problem": "digits, 256-20-20-20-20-20-10, tanh",
        "training": f"SGD, momentum {MOMENTUM}, rate {RATE}, batch {BATCH}",
        "epochs": epochs,
        "examples": examples,
        "seed": seed,
        "training_error": 1 - accuracy(model, problem.train),
        "fisher": str(stats.provenance.fisher),
    }
    return Middle(stats, attrs)


def factorisation(seed: int, quick: bool) -> xr.DataTree:
    """Compute Figure 2: F, F̃ and F − F̃."""
    middle = middle_layers(seed, quick)
    exact = ExactNetwork()(middle.stats)
    pairs = KhatriRao()(middle.stats)
    left, right = exact.to_dense(), pairs.to_dense()
    matrices = {"F": left, "F̃": right, "F − F̃": left - right}
    error = float((left - right).norm() / left.norm())
    return _tree(matrices, middle, pairs, {"relative_error": error})


def inverse(seed: int, quick: bool) -> xr.DataTree:
    """Compute Figure 3: the damped F̃⁻¹, and the mean |entry| of each pair of layers."""
    middle = middle_layers(seed, quick)
    pairs = KhatriRao()(middle.stats)
    damped = pairs.damped(Factored(DAMPING)).to_dense()
    matrices = {"F̃": damped, "F̃⁻¹": factorised("inv", damped, "F̃")}
    return _tree(matrices, middle, pairs, {"lambda": DAMPING})


def structures(seed: int, quick: bool) -> xr.DataTree:
    """Compute Figure 5: F̃ beside F̆ and F̂, and what each leaves out."""
    return _structures(seed, quick, inverted=False)


def inverse_structures(seed: int, quick: bool) -> xr.DataTree:
    """Compute Figure 6: F̃⁻¹ beside F̆⁻¹ and F̂⁻¹, and what each leaves out."""
    return _structures(seed, quick, inverted=True)


def _structures(seed: int, quick: bool, *, inverted: bool) -> xr.DataTree:
    middle = middle_layers(seed, quick)
    pairs = KhatriRao()(middle.stats)
    tilde, breve, hat = _three(middle.stats, DAMPING, inverted=inverted)
    power = "⁻¹" if inverted else ""
    matrices = {
        f"F̃{power}": tilde,
        f"F̆{power}": breve,
        f"F̂{power}": hat,
        f"F̃{power} − F̆{power}": tilde - breve,
        f"F̃{power} − F̂{power}": tilde - hat,
    }
    size = float(tilde.norm())
    errors = {
        "lambda": DAMPING,
        "relative_error_block_diagonal": float((tilde - breve).norm()) / size,
        "relative_error_block_tridiagonal": float((tilde - hat).norm()) / size,
    }
    return _tree(matrices, middle, pairs, errors)


def _three(
    stats: Statistics, damping: float, *, inverted: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Return F̃, F̆ and F̂ with damped factors, or their inverses."""
    factored = Factored(damping)
    pairs = KhatriRao()(stats).damped(factored)
    assert isinstance(pairs, KroneckerBlocks)
    chain = KFACTridiagonal()(stats)
    assert isinstance(chain, BlockTridiagonal)
    if inverted:
        own = block_diagonal("kfac", stats).inverse(factored).to_dense()
        return pairs.inverse(0.0).to_dense(), own, chain.inverse(factored).to_dense()
    blocks = [pairs.diagonal_block(name).to_dense() for name in stats]
    return pairs.to_dense(), torch.block_diag(*blocks), chain.damped(factored).to_dense()


def damping_table(seed: int, quick: bool) -> xr.Dataset:
    """Compute how far F̆ and F̂ are from F̃ as the damping grows.

    Relative Frobenius errors of the matrices and of their inverses, and the divergence
    KL(N(0, F̃) ‖ N(0, ·)), in nats.
    """
    middle = middle_layers(seed, quick)
    dampings = DAMPINGS[::2] if quick else DAMPINGS
    rows = [_distances(middle.stats, damping) for damping in dampings]
    names = ("error", "inverse_error", "divergence")
    table = np.array(rows)  # damping, structure, quantity
    data = {name: (("damping", "structure"), table[..., k]) for k, name in enumerate(names)}
    coords = {"damping": list(dampings), "structure": ["block diagonal", "tridiagonal"]}
    return xr.Dataset(data, coords, middle.attrs)


def _distances(stats: Statistics, damping: float) -> list[list[float]]:
    tilde, *forward = _three(stats, damping, inverted=False)
    inverse, *inverses = _three(stats, damping, inverted=True)
    logdet = factorised("slogdet", tilde, "F̃").logabsdet
    found = []
    for matrix, inverted in zip(forward, inverses, strict=True):
        logs = factorised("slogdet", matrix, "F̂").logabsdet - logdet
        inside = (inverted * tilde).sum() - len(tilde)
        found.append(
            [
                float((tilde - matrix).norm() / tilde.norm()),
                float((inverse - inverted).norm() / inverse.norm()),
                float((inside + logs) / 2),
            ]
        )
    return found


def _tree(
    matrices: Mapping[str, Tensor],
    middle: Middle,
    pairs: KroneckerBlocks,
    attrs: Mapping[str, Any],
) -> xr.DataTree:
    """Label matrices by entry, and their mean |entry| by pair of layers.

    A tree, because whole matrices are no table for people.
    """
    places = list(pairs.offsets.values())
    means = [
        [[float(m[row, column].abs().mean()) for column in places] for row in places]
        for m in matrices.values()
    ]
    stacked = np.stack([m.float().numpy() for m in matrices.values()])
    names = list(pairs.offsets)
    size = stacked.shape[1]
    labelled = xr.Dataset(
        {
            "entry": (("matrix", "row", "col"), stacked),
            "mean_entry": (("matrix", "layer", "with_layer"), np.array(means)),
            "start": (("layer",), [at.start for at in places]),
            "stop": (("layer",), [at.stop for at in places]),
        },
        {
            "matrix": list(matrices),
            "row": range(size),
            "col": range(size),
            "layer": names,
            "with_layer": names,
        },
        {**middle.attrs, **attrs},
    )
    return xr.DataTree(labelled)


def _outlines(ds: xr.Dataset) -> dict[str, tuple[int, int]]:
    edges = zip(ds["layer"].values, ds["start"].values, ds["stop"].values, strict=True)
    return {str(name): (int(a), int(b)) for name, a, b in edges}


def _typical(ds: xr.Dataset, name: str) -> float:
    return float(np.percentile(np.abs(ds["entry"].sel(matrix=name)), 99.5))


def _draw_grid(
    ds: xr.Dataset, rows: Sequence[Sequence[str]], tops: Sequence[float]
) -> tuple[Drawing, Any]:
    """Draw |entries| of matrices, each column of the grid on a scale of its own."""
    shape = len(rows), len(tops)
    size = (3.3 * shape[1] + 1.0, 3.1 * shape[0])
    figure, grid = plt.subplots(*shape, figsize=size, squeeze=False, layout="constrained")
    for axes, names in zip(grid, rows, strict=True):
        for ax, name, top in zip(axes, names, tops, strict=True):
            one = ds["entry"].sel(matrix=name)
            heatmap(one, ax, vmax=top, outlines=_outlines(ds), colorbar=False)
            ax.set_title(_title(name))
    return figure, grid


def _title(name: str) -> str:
    plain = name.replace("⁻¹", "")
    words = {"F": "exact", "F̃": "all pairs", "F̆": "block diagonal", "F̂": "tridiagonal"}
    said = f", {words[plain]}" if plain in words else ""
    return f"|{name}|{said}"


def draw_factorisation(result: Result) -> Drawing:
    """Draw Figure 2, one grey scale."""
    ds = _as_dataset(result)
    names = [str(name) for name in ds["matrix"].values]
    with publication():
        figure, grid = _draw_grid(ds, [names], [_typical(ds, names[0])] * len(names))
        figure.colorbar(grid[0, 0].images[0], ax=grid, label="|entry|", shrink=0.8)
    return figure


def draw_inverse(result: Result) -> Drawing:
    """Draw Figure 3: |F̃⁻¹| and its mean |entry| for each pair of layers."""
    ds = _as_dataset(result).isel(matrix=[1])
    name = str(ds["matrix"].values[0])
    with publication():
        figure, (left, right) = plt.subplots(1, 2, figsize=(7.6, 3.6), layout="constrained")
        heatmap(ds["entry"].sel(matrix=name), left, outlines=_outlines(ds))
        left.set_title(_title(name))
        table = ds["mean_entry"].sel(matrix=name)
        heatmap(table, right, vmax=float(table.max()), colorbar=False)
        for (row, column), value in np.ndenumerate(table.values):
            shade = "white" if value > 0.5 * float(table.max()) else "black"
            where = (column + 0.5, row + 0.5)
            right.annotate(
                f"{value:.2g}", where, ha="center", va="center", color=shade, fontsize=7
            )
        names = [str(layer) for layer in ds["layer"].values]
        middles = [k + 0.5 for k in range(len(names))]
        right.set_xticks(middles, names)
        right.set_yticks(middles, names)
        right.set_title("mean |entry| by layers")
    return figure


def draw_structures(result: Result) -> Drawing:
    """Draw Figure 5 or 6: the block diagonal above, the chain below.

    The differences have a scale of their own: on that of the matrices those of the
    inverses cannot be seen.
    """
    ds = _as_dataset(result)
    tilde, breve, hat, first, second = (str(name) for name in ds["matrix"].values)
    tops = [_typical(ds, tilde)] * 2 + [_typical(ds, first)]
    with publication():
        figure, grid = _draw_grid(ds, [[tilde, breve, first], [tilde, hat, second]], tops)
        figure.colorbar(grid[0, 0].images[0], ax=grid[:, :2], label="|entry|", shrink=0.7)
        figure.colorbar(grid[0, 2].images[0], ax=grid[:, 2], label="|entry|", shrink=0.7)
    return figure


def draw_damping_table(result: Result) -> Drawing:
    """Draw the three distances over the damping."""
    ds = _as_dataset(result)
    titles = {
        "error": "‖F̃ − ·‖ / ‖F̃‖",
        "inverse_error": "‖F̃⁻¹ − ·⁻¹‖ / ‖F̃⁻¹‖",
        "divergence": "KL(F̃ ‖ ·), nats",
    }
    with publication():
        figure, grid = plt.subplots(1, 3, figsize=(9.6, 3.0), layout="constrained")
        for ax, (name, title) in zip(grid, titles.items(), strict=True):
            for structure, mark in zip(ds["structure"].values, "os", strict=True):
                values = ds[name].sel(structure=structure)
                ax.loglog(ds["damping"], values, marker=mark, label=str(structure))
            ax.set_xlabel("damping λ")
            ax.set_title(title)
        grid[0].legend()
    return figure


def _as_dataset(result: Result) -> xr.Dataset:
    return result if isinstance(result, xr.Dataset) else result.to_dataset()


FIGURES: Final = {
    figure.name: figure
    for figure in (
        Figure(
            "kfac-figure-2",
            "K-FAC (1503.05671) Figure 2: |F|, |F̃| and |F − F̃| of the middle layers",
            factorisation,
            draw_factorisation,
        ),
        Figure(
            "kfac-figure-3",
            "K-FAC (1503.05671) Figure 3: |F̃⁻¹| and its mean |entry| by layers",
            inverse,
            draw_inverse,
        ),
        Figure(
            "kfac-figure-5",
            "K-FAC (1503.05671) Figure 5: F̃ beside its block diagonal and its chain",
            structures,
            draw_structures,
        ),
        Figure(
            "kfac-figure-6",
            "K-FAC (1503.05671) Figure 6: F̃⁻¹ beside those of block diagonal and chain",
            inverse_structures,
            draw_structures,
        ),
        Figure(
            "kfac-tridiagonal-damping",
            "Errors and divergence of block diagonal and chain from F̃ over the damping",
            damping_table,
            draw_damping_table,
        ),
    )
}
