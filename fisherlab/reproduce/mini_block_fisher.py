"""Bahamou, Goldfarb & Ren 2022 (arXiv 2202.04124): where the inverse Fisher has its mass.

Figures 5, 13 and 14 of the paper are heatmaps of inverse empirical Fisher blocks. Here
they come with the numbers: the share of the entries' sizes and squares that lies inside
mini-blocks, beside the share of entries that mini-blocks hold.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from math import prod
from typing import Final

import seaborn as sns
import torch
import xarray as xr
from matplotlib.figure import Figure as Drawing
from torch import Tensor

from fisherlab import plots, problems
from fisherlab.analysis import RelativeDamping, inverse_blocks
from fisherlab.approximators import ExactBlock
from fisherlab.approximators.blocks.mini_block import partition
from fisherlab.layers import Block
from fisherlab.operators import Partition
from fisherlab.plots.style import publication
from fisherlab.problems.problem import Problem, drawn
from fisherlab.reproduce.figure import Figure, Result
from fisherlab.statistics import Empirical, Exact, Fisher, LayerStatistics, collect
from fisherlab.statistics.values import Statistics
from fisherlab.training import trajectory

DAMPING: Final = 1e-2  # of the mean eigenvalue; the paper gives none
CHANNELS: Final = (1, 16, 32)  # input channels of the second convolution, from 1
FISHERS: Final[dict[str, Fisher]] = {"exact": Exact(), "empirical": Empirical()}


def mass_inside(matrix: Tensor, blocks: Partition) -> dict[str, float]:
    """Return the shares of |entries| and of entries² that lie inside blocks.

    Parameters
    ----------
    matrix
        Shape (p, p).
    blocks
        The partition.

    Returns
    -------
    dict
        "absolute", "squared", and "entries", the share of entries that blocks hold.

    Examples
    --------
    >>> mass_inside(torch.tensor([[3.0, 1.0], [1.0, 3.0]]), Partition.by_column((1, 2)))
    {'absolute': 0.75, 'squared': 0.9, 'entries': 0.5}
    """
    inside = [matrix[g[:, :, None], g[:, None, :]].double() for g in blocks.groups]
    sizes = sum(float(part.abs().sum()) for part in inside)
    squares = sum(float(part.square().sum()) for part in inside)
    whole = matrix.double()
    return {
        "absolute": sizes / float(whole.abs().sum()),
        "squared": squares / float(whole.square().sum()),
        "entries": sum(part.numel() for part in inside) / matrix.numel(),
    }


def digits_mass(seed: int, quick: bool) -> xr.Dataset:
    """Return the masses of all layers of 256-20⁵-10 on `digits`, first layer if not quick.

    Trained for 50 epochs (5 if quick) by SGD with momentum 0.9. Costs some seconds if
    quick, else a minute and 1 GB.
    """
    problem = _trained_digits(seed, quick)
    chosen = [f"fc{k}" for k in range(2 if quick else 1, 7)]
    return _masses(
        problem,
        seed,
        lambda fisher: iter(_collected(problem, fisher, chosen).values()),
    )


def cnn_mass(seed: int, quick: bool) -> xr.Dataset:
    """Return the masses of the convolutions of the Simple CNN on Fashion-MNIST.

    The first convolution whole; of the second the weights of input channels 1, 16 and 32.
    One epoch of SGD with momentum 0.9 at batch 128 (10 steps if quick), 200 examples (30).

    Raises
    ------
    DataError
        If the data files are missing.
    """
    problem = problems.load("fashion-mnist-cnn", seed=seed, dtype=torch.float32)
    _train(problem, seed, 10 if quick else 469, 128, lr=0.01)
    examples = 30 if quick else 200

    def layers(fisher: Fisher) -> Iterator[LayerStatistics]:
        data = replace(problem, train=drawn(problem.train, examples, seed))
        stats = _collected(data, fisher, ["conv1", "conv2"])
        yield stats["conv1"]
        yield from (_channel(stats["conv2"], channel) for channel in CHANNELS)

    return _masses(problem, seed, layers)


def digits_inverses(seed: int, quick: bool) -> xr.DataTree:
    """Return inverse empirical Fisher blocks of the second, middle and last layer."""
    problem = _trained_digits(seed, quick)
    names = ["fc2", "fc4", "fc6"]
    stats = _collected(problem, Empirical(), names)
    return inverse_blocks(stats, ["mini-block", "kfac"], RelativeDamping(DAMPING), names)


def draw_mass(result: Result) -> Drawing:
    """Draw the shares inside mini-blocks, beside the share of entries."""
    assert isinstance(result, xr.Dataset)
    rows = result["share"].to_series().rename("share").reset_index()
    with publication():
        grid = sns.catplot(
            rows,
            kind="bar",
            x="layer",
            y="share",
            hue="of",
            row="fisher",
            col="matrix",
            height=2.4,
            aspect=1.5,
        )
        grid.set_titles("{row_name} Fisher: {col_name}")
        grid.set_axis_labels("", "share inside mini-blocks")
        grid.legend.set_title("share of")
    return grid.figure


def draw_inverses(result: Result) -> Drawing:
    """Draw the heatmaps, mini-blocks outlined."""
    assert isinstance(result, xr.DataTree)
    return plots.inverse_heatmap(result)


def _trained_digits(seed: int, quick: bool) -> Problem:
    problem = problems.load("digits", seed=seed)
    epoch = len(problem.train[0]) // 64
    _train(problem, seed, (5 if quick else 50) * epoch, 64, lr=0.01)
    return problem


def _train(problem: Problem, seed: int, steps: int, batch_size: int, lr: float) -> None:
    optimizer = torch.optim.SGD(problem.model.parameters(), lr=lr, momentum=0.9)
    for _ in trajectory(
        problem, optimizer, steps, (steps,), batch_size=batch_size, seed=seed
    ):
        problem.model.eval()


def _collected(problem: Problem, fisher: Fisher, layers: list[str]) -> Statistics:
    return collect(
        problem.model,
        problem.train,
        problem.likelihood,
        fisher,
        layers=layers,
        dtype=torch.float64,
    )


def _channel(statistics: LayerStatistics, channel: int) -> LayerStatistics:
    """Return the statistics of the kernels that read one input channel, from 1."""
    block = statistics.block
    kernel = prod(block.shape[2:])
    start = (channel - 1) * kernel
    inputs, _ = statistics.shared("the kernels of one channel")
    shape = (block.shape[0], 1, *block.shape[2:])
    name = f"{block.name} channel {channel}"
    return replace(
        statistics,
        block=Block(name, block.weight, None, shape, block.rows),
        inputs=inputs[:, :, start : start + kernel],
    )


def _masses(
    problem: Problem, seed: int, layers: Callable[[Fisher], Iterator[LayerStatistics]]
) -> xr.Dataset:
    """Gather the masses of every layer that `layers(fisher)` yields."""
    found: dict[str, xr.DataArray] = {}
    lambdas: dict[str, xr.DataArray] = {}
    for kind, fisher in FISHERS.items():
        shares, shifts = {}, {}
        for statistics in layers(fisher):
            shares[statistics.name], shifts[statistics.name] = _of_layer(statistics)
        found[kind] = xr.concat(shares.values(), "layer").assign_coords(layer=list(shares))
        lambdas[kind] = xr.DataArray(list(shifts.values()), {"layer": list(shifts)})
    kinds = list(found)
    share = xr.concat(found.values(), "fisher").assign_coords(fisher=kinds)
    damping = xr.concat(lambdas.values(), "fisher").assign_coords(fisher=kinds)
    share.attrs = {"long_name": "share inside mini-blocks"}
    return xr.Dataset(
        {"share": share, "damping": damping},
        attrs={"problem": problem.name, "seed": seed, "relative_damping": DAMPING},
    )


def _of_layer(statistics: LayerStatistics) -> tuple[xr.DataArray, float]:
    """Return the shares of the block and of its damped inverse, and λ."""
    exact, blocks = ExactBlock()(statistics), partition(statistics.block)
    damping = DAMPING * exact.trace() / exact.shape[0]
    matrices = {"inverse": exact.inverse(damping), "block": exact}
    shares = {name: mass_inside(op.to_dense(), blocks) for name, op in matrices.items()}
    kinds = list(next(iter(shares.values())))
    table = xr.DataArray(
        [[row[kind] for kind in kinds] for row in shares.values()],
        {"matrix": list(shares), "of": kinds},
    )
    return table, damping


FIGURES: Final = {
    figure.name: figure
    for figure in (
        Figure(
            "mbf-mass-digits",
            "MBF: share of inverse Fisher blocks inside mini-blocks, 256-20⁵-10.",
            digits_mass,
            draw_mass,
        ),
        Figure(
            "mbf-mass-cnn",
            "MBF: the same for the convolutions of the Simple CNN, Fashion-MNIST.",
            cnn_mass,
            draw_mass,
        ),
        Figure(
            "mbf-inverse-digits",
            "MBF, figures 13 and 14: inverse empirical Fisher blocks, 256-20⁵-10.",
            digits_inverses,
            draw_inverses,
        ),
    )
}
