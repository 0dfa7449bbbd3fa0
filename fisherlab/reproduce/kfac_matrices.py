"""How near layers are to being uncoupled: Figures 2, 3, 5 and 6 of the K-FAC paper.

A tanh network 256-20-20-20-20-20-10 on 16 × 16 digits, of which the four middle layers
are looked at (4 · 420 = 1680 parameters), after 7 full-batch iterations of Algorithm 2 as
published. F is the exact Fisher, F̃ its Kronecker approximation of all pairs of layers,
F̆ the block diagonal of F̃, and F̂ the matrix that agrees with F̃ on the block tridiagonal
and has a block-tridiagonal inverse. Beside F̃ with damped factors, which is what the
figures show, stand F̃ + λI and F + λI: what is the matrix's, and what the damping's?

Reference: Martens & Grosse 2015, arXiv 1503.05671, sections 3, 4.2 and 4.3.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from typing import Any, Final

import matplotlib.pyplot as plt
import numpy as np
import seaborn as sns
import torch
import xarray as xr
from matplotlib.axes import Axes
from matplotlib.figure import Figure as Drawing
from torch import Tensor

from fisherlab.approximators import KhatriRao
from fisherlab.approximators.network import ExactNetwork
from fisherlab.numerics.linalg import factorised
from fisherlab.operators import Factored, KroneckerBlocks
from fisherlab.plots import heatmap, publication
from fisherlab.problems.problem import drawn
from fisherlab.reproduce.experiment import Experiment, Setting
from fisherlab.reproduce.kfac_iterations import PROBLEMS, trained
from fisherlab.statistics import Statistics, collect


def first(ds: xr.Dataset) -> xr.Dataset:
    """Return the result of the first seed."""
    return ds.isel(seed=0) if "seed" in ds.dims else ds


def draw_factorisation(result: xr.Dataset) -> Drawing:
    """Draw Figure 2, one grey scale."""
    ds = first(result)
    names = [str(name) for name in ds["matrix"].values]
    with publication():
        figure, grid = _draw_grid(ds, [names], [_typical(ds, names[0])] * len(names))
        figure.colorbar(grid[0, 0].images[0], ax=grid, label="|entry|", shrink=0.8)
    return figure


def draw_inverse(result: xr.Dataset) -> Drawing:
    """Draw Figure 3: three inverses, the means of the first by layers, and all over λ."""
    ds = first(result)
    names = [str(name) for name in ds["matrix"].values]
    with publication():
        figure, grid = plt.subplots(2, 3, figsize=(10.4, 6.6), layout="constrained")
        for ax, name in zip(grid[0], names, strict=True):
            top = _typical(ds, name)
            one = ds["entry"].sel(matrix=name)
            heatmap(one, ax, vmax=top, outlines=_outlines(ds), colorbar=False)
            figure.colorbar(ax.images[0], ax=ax, label="|entry|", shrink=0.8)
            ax.set_title(f"|{name}|")
        _draw_means(grid[1, 0], ds["mean_entry"].sel(matrix=names[0]))
        falls = result["distance"].to_dataframe().reset_index()
        for ax, apart in zip(grid[1, 1:], (1, 3), strict=True):
            sns.lineplot(
                falls[falls["apart"] == apart],
                x="damping",
                y="distance",
                hue="of",
                style="of",
                markers=True,
                errorbar=("pi", 100),
                ax=ax,
                legend=apart == 3,
            )
            ax.set(xscale="log", ylim=(0, None), xlabel="damping λ (factored: γ²)")
            ax.set_title(f"inverse, layers {apart} apart")
            ax.set_ylabel("mean |entry| / that within a layer")
        shown = grid[1, 2].get_legend_handles_labels()
        grid[1, 2].get_legend().remove()
        figure.legend(*shown, loc="outside right center")  # no room beside the panels above
    return figure


def _draw_means(ax: Axes, table: xr.DataArray) -> None:
    top = float(table.max())
    heatmap(table, ax, vmax=top, colorbar=False)
    for (row, column), value in np.ndenumerate(table.values):
        shade = "white" if value > 0.5 * top else "black"
        where = (column + 0.5, row + 0.5)
        ax.annotate(
            f"{value:.2g}", where, ha="center", va="center", color=shade, fontsize=7
        )
    names = [str(layer) for layer in table["layer"].values]
    middles = [k + 0.5 for k in range(len(names))]
    ax.set_xticks(middles, names)
    ax.set_yticks(middles, names)
    ax.set_title("mean |entry| of the first")


def draw_structures(result: xr.Dataset) -> Drawing:
    """Draw Figure 5 or 6: the block diagonal above, the chain below.

    The differences have a scale of their own: on that of the matrices those of the
    inverses cannot be seen.
    """
    ds = first(result)
    tilde, breve, hat, one, two = (str(name) for name in ds["matrix"].values)
    tops = [_typical(ds, tilde)] * 2 + [_typical(ds, one)]
    with publication():
        figure, grid = _draw_grid(ds, [[tilde, breve, one], [tilde, hat, two]], tops)
        figure.colorbar(grid[0, 0].images[0], ax=grid[:, :2], label="|entry|", shrink=0.7)
        figure.colorbar(grid[0, 2].images[0], ax=grid[:, 2], label="|entry|", shrink=0.7)
    return figure


def draw_over_damping(result: xr.Dataset) -> Drawing:
    """Draw the three distances over the damping, a line a matrix and structure."""
    titles = {
        "error": "‖M − ·‖ / ‖M‖",
        "inverse_error": "‖M⁻¹ − ·⁻¹‖ / ‖M⁻¹‖",
        "divergence": "KL(M ‖ ·), nats",
    }
    rows = result.to_dataframe().reset_index().rename(columns={"of": "M"})
    with publication():
        figure, grid = plt.subplots(1, 3, figsize=(10.4, 3.2), layout="constrained")
        for ax, (name, title) in zip(grid, titles.items(), strict=True):
            sns.lineplot(
                rows,
                x="damping",
                y=name,
                hue="M",
                style="structure",
                markers=True,
                errorbar=("pi", 100),
                ax=ax,
                legend=name == "divergence",
            )
            ax.set(xscale="log", yscale="log", xlabel="damping λ (factored: γ²)")
            ax.set(ylabel="", title=title)
        sns.move_legend(grid[2], "center left", bbox_to_anchor=(1.02, 0.5))
    return figure


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


LAYERS: Final = ("fc2", "fc3", "fc4", "fc5")
ITERATIONS: Final = 7
EXAMPLES: Final = 5000  # of which F is the mean, at most
DAMPINGS: Final = (1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0)
QUICK_DAMPINGS: Final = (1e-6, 1e-4, 1e-2)
STRUCTURES: Final = ("block diagonal", "tridiagonal")


@dataclass(frozen=True, eq=False)
class Middle:
    """F and F̃ of the middle layers, where each layer lies, γ, and how they were made."""

    exact: Tensor
    pairs: KroneckerBlocks
    gamma: float
    settings: str

    @property
    def places(self) -> list[slice]:
        """The rows of every layer."""
        return list(self.pairs.offsets.values())

    def damped(self, damping: float) -> dict[str, Tensor]:
        """Return F̃ with damped factors, F̃ + λI and F + λI."""
        shift = damping * torch.eye(len(self.exact), dtype=self.exact.dtype)
        return {
            "F̃ factored": self.pairs.damped(Factored(damping)).to_dense(),
            "F̃ Tikhonov": self.pairs.to_dense() + shift,
            "F Tikhonov": self.exact + shift,
        }


@lru_cache(maxsize=1)
def middle_layers(setting: Setting) -> Middle:
    """Train as published and collect the exact Fisher of the four middle layers."""
    problem, optimiser, told = trained(setting, ITERATIONS)
    data = drawn(problem.train, EXAMPLES, setting.seed)
    stats: Statistics = collect(
        problem.model, data, problem.likelihood, layers=LAYERS, compress=False
    )
    exact, pairs = ExactNetwork()(stats), KhatriRao()(stats)
    assert isinstance(pairs, KroneckerBlocks)
    gamma = float(optimiser.gamma)
    settings = (
        f"{told}; layers {LAYERS[0]}–{LAYERS[-1]}, exact Fisher of {len(data[0])} "
        f"examples, γ = {gamma:.3g} at the end"
    )
    return Middle(exact.to_dense(), pairs, gamma, settings)


def block_diagonal(matrix: Tensor, places: Sequence[slice]) -> Tensor:
    """Return the blocks on the diagonal, and zero elsewhere."""
    return torch.block_diag(*(matrix[at, at] for at in places))


def chain_inverse(matrix: Tensor, places: Sequence[slice]) -> Tensor:
    """Return the block-tridiagonal inverse of the matrix that agrees near the diagonal.

    That of a Gaussian chain: the inverses of all blocks of two neighbours, less those of
    the inner layers, which were counted twice.

    Examples
    --------
    >>> matrix = torch.tensor([[2.0, 1.0, 0.5], [1.0, 2.0, 1.0], [0.5, 1.0, 2.0]])
    >>> found = chain_inverse(matrix, [slice(0, 1), slice(1, 2), slice(2, 3)])
    >>> torch.allclose(found, torch.linalg.inv(matrix), atol=1e-6)
    True
    """
    out = torch.zeros_like(matrix)
    for at, sign in _cliques(places):
        out[at, at] += sign * factorised("inv", matrix[at, at], "a block of layers")
    return out


def _cliques(places: Sequence[slice]) -> Iterator[tuple[slice, int]]:
    for first, second in pairwise(places):
        yield slice(first.start, second.stop), 1
    for inner in places[1:-1]:
        yield inner, -1


def factorisation(setting: Setting) -> xr.Dataset:
    """Compute Figure 2: F, F̃ and F − F̃."""
    middle = middle_layers(setting)
    left, right = middle.exact, middle.pairs.to_dense()
    matrices = {"F": left, "F̃": right, "F − F̃": left - right}
    found = _labelled(matrices, middle)
    sizes = left.norm() * right.norm()
    found["relative_error"] = float((left - right).norm() / left.norm())
    found["cosine"] = float((left * right).sum() / sizes)
    return found


def inverse(setting: Setting) -> xr.Dataset:
    """Compute Figure 3: F̃⁻¹ with γ, and mean |entry| by distance over the damping.

    ``distance(matrix, damping, apart)`` is the mean |entry| of the inverse between layers
    1, 2 and 3 apart, over that within a layer. Heatmaps: F̃⁻¹ with factors damped by γ as
    published, and the inverses of F̃ + λI and F + λI at the smallest λ.
    """
    middle = middle_layers(setting)
    dampings = QUICK_DAMPINGS if setting.quick else DAMPINGS
    in_use = middle.damped(middle.gamma**2)
    rows = {damping: _inverses(middle.damped(damping)) for damping in dampings}
    least = rows[min(dampings)]
    shown = {
        "F̃⁻¹ factored, γ in use": factorised("inv", in_use["F̃ factored"], "F̃"),
        f"F̃⁻¹ Tikhonov, λ = {min(dampings):g}": least["F̃ Tikhonov"],
        f"F⁻¹ Tikhonov, λ = {min(dampings):g}": least["F Tikhonov"],
    }
    found = _labelled(shown, middle)
    falls = [[_by_distance(m, middle) for m in row.values()] for row in rows.values()]
    dims = ("damping", "of", "apart")
    found["distance"] = xr.DataArray(
        np.array(falls),
        {"damping": list(dampings), "of": list(least), "apart": [1, 2, 3]},
        dims,
    )
    now = _by_distance(shown["F̃⁻¹ factored, γ in use"], middle)
    found["distance_in_use"] = xr.DataArray(now, {"apart": [1, 2, 3]}, ["apart"])
    return found


def _inverses(matrices: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: factorised("inv", m, name) for name, m in matrices.items()}


def _by_distance(matrix: Tensor, middle: Middle) -> list[float]:
    means = _means(matrix, middle)
    apart = np.abs(np.subtract.outer(range(len(means)), range(len(means))))
    return [float(means[apart == k].mean() / means[apart == 0].mean()) for k in (1, 2, 3)]


def structures(setting: Setting) -> xr.Dataset:
    """Compute Figure 5: F̃ beside F̆ and F̂, and what each leaves out."""
    return _structures(setting, inverted=False)


def inverse_structures(setting: Setting) -> xr.Dataset:
    """Compute Figure 6: F̃⁻¹ beside F̆⁻¹ and F̂⁻¹, and what each leaves out."""
    return _structures(setting, inverted=True)


def _structures(setting: Setting, *, inverted: bool) -> xr.Dataset:
    middle = middle_layers(setting)
    tilde = middle.damped(middle.gamma**2)["F̃ factored"]
    breve = block_diagonal(tilde, middle.places)
    hat, power = chain_inverse(tilde, middle.places), ""
    if inverted:
        tilde, breve = (factorised("inv", one, "F̃") for one in (tilde, breve))
        power = "⁻¹"
    else:
        hat = factorised("inv", hat, "F̂⁻¹")
    matrices = {
        f"F̃{power}": tilde,
        f"F̆{power}": breve,
        f"F̂{power}": hat,
        f"F̃{power} − F̆{power}": tilde - breve,
        f"F̃{power} − F̂{power}": tilde - hat,
    }
    found = _labelled(matrices, middle)
    errors = [float((tilde - one).norm() / tilde.norm()) for one in (breve, hat)]
    found["relative_error"] = xr.DataArray(
        errors, {"structure": list(STRUCTURES)}, ["structure"]
    )
    return found


def over_damping(setting: Setting) -> xr.Dataset:
    """Compute how far F̆ and F̂ are from F̃ as the damping grows, of each damped matrix.

    Relative Frobenius errors of the matrices and of their inverses, and the divergence
    KL(N(0, M) ‖ N(0, ·)), in nats, with M one of `Middle.damped`.
    """
    middle = middle_layers(setting)
    dampings = QUICK_DAMPINGS if setting.quick else DAMPINGS
    table = np.array(
        [
            [_distances(matrix, middle.places) for matrix in middle.damped(one).values()]
            for one in dampings
        ]
    )  # damping, matrix, structure, quantity
    names = ("error", "inverse_error", "divergence")
    dims = ("damping", "of", "structure")
    of = ["F̃ factored", "F̃ Tikhonov", "F Tikhonov"]
    coords = {"damping": list(dampings), "of": of, "structure": list(STRUCTURES)}
    data = {name: (dims, table[..., k]) for k, name in enumerate(names)}
    return xr.Dataset(data, coords, {"settings": middle.settings})


def _distances(matrix: Tensor, places: Sequence[slice]) -> list[list[float]]:
    inverse, own = factorised("inv", matrix, "M"), block_diagonal(matrix, places)
    blocks = factorised("inv", own, "the blocks of M")
    chain = chain_inverse(matrix, places)
    hat = factorised("inv", chain, "the chain of M")
    # Both keep the blocks on the diagonal, so that the trace in the divergence is p.
    logs = [_logdet(matrix), sum(_logdet(matrix[at, at]) for at in places)]
    logs.append(sum(sign * _logdet(matrix[at, at]) for at, sign in _cliques(places)))
    rows = zip((own, hat), (blocks, chain), logs[1:], strict=True)
    return [
        [
            float((matrix - kept).norm() / matrix.norm()),
            float((inverse - solved).norm() / inverse.norm()),
            (log - logs[0]) / 2,
        ]
        for kept, solved, log in rows
    ]


def _logdet(matrix: Tensor) -> float:
    return float(factorised("slogdet", matrix, "a damped matrix").logabsdet)


def _means(matrix: Tensor, middle: Middle) -> np.ndarray:
    places = middle.places
    return np.array([[float(matrix[r, c].abs().mean()) for c in places] for r in places])


def _labelled(matrices: Mapping[str, Tensor], middle: Middle) -> xr.Dataset:
    """Label matrices by entry, and their mean |entry| by pair of layers."""
    names, places = list(middle.pairs.offsets), middle.places
    return xr.Dataset(
        {
            "entry": (
                ("matrix", "row", "col"),
                np.stack([m.float().numpy() for m in matrices.values()]),
            ),
            "mean_entry": (
                ("matrix", "layer", "with_layer"),
                np.stack([_means(m, middle) for m in matrices.values()]),
            ),
            "start": (("layer",), [at.start for at in places]),
            "stop": (("layer",), [at.stop for at in places]),
        },
        {"matrix": list(matrices), "layer": names, "with_layer": names},
        {"settings": middle.settings},
    )


EXPERIMENTS: Final = (
    Experiment(
        "kfac-figure-2",
        "K-FAC (1503.05671) Figure 2: |F|, |F̃| and |F − F̃| of the middle layers",
        factorisation,
        draw_factorisation,
        minutes=(0.2, 3.0),
        problems=PROBLEMS,
    ),
    Experiment(
        "kfac-figure-3",
        "K-FAC (1503.05671) Figure 3: |F̃⁻¹|, and by distance of layers over damping",
        inverse,
        draw_inverse,
        minutes=(0.3, 4.0),
        problems=PROBLEMS,
    ),
    Experiment(
        "kfac-figure-5",
        "K-FAC (1503.05671) Figure 5: F̃ beside its block diagonal and its chain",
        structures,
        draw_structures,
        minutes=(0.2, 3.0),
        problems=PROBLEMS,
    ),
    Experiment(
        "kfac-figure-6",
        "K-FAC (1503.05671) Figure 6: F̃⁻¹ beside those of block diagonal and chain",
        inverse_structures,
        draw_structures,
        minutes=(0.2, 3.0),
        problems=PROBLEMS,
    ),
    Experiment(
        "kfac-tridiagonal-damping",
        "Errors and divergence of block diagonal and chain over the damping",
        over_damping,
        draw_over_damping,
        minutes=(0.4, 5.0),
        problems=PROBLEMS,
    ),
)
