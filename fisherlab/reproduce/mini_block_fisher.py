"""Bahamou, Goldfarb & Ren 2022 (arXiv 2202.04124): where the inverse Fisher has its mass.

Figures 5, 13 and 14 of the paper are heatmaps of inverse empirical Fisher blocks. Here
they come with the numbers: the share of the entries' sizes and squares that lies inside
mini-blocks, beside the same share of partitions that mean nothing. The diagonal alone, a
random partition into blocks of the same size and the partition by input are the nulls:
the inverse of a matrix of low rank is mostly λ⁻¹ I.
"""

from collections.abc import Callable, Iterator
from dataclasses import replace
from math import prod
from typing import Final

import numpy as np
import seaborn as sns
import torch
import xarray as xr
from matplotlib.figure import Figure as Drawing
from torch import Tensor

from fisherlab import plots
from fisherlab.analysis import RelativeDamping, inverse_blocks
from fisherlab.approximators import ExactBlock
from fisherlab.approximators.mini_block import partition
from fisherlab.layers import Block
from fisherlab.numerics.linalg import factorised
from fisherlab.operators import Partition
from fisherlab.plots.style import publication
from fisherlab.problems.problem import Problem, drawn
from fisherlab.reproduce.experiment import Experiment, Setting
from fisherlab.statistics import (
    Empirical,
    Exact,
    Fisher,
    LayerStatistics,
    Statistics,
    collect,
)
from fisherlab.training import trajectory

DAMPING: Final = 1e-2  # of the mean eigenvalue, where one is shown; the paper gives none
ALPHAS: Final = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)  # λ over the mean eigenvalue
RANK: Final = 1e-10  # of the largest eigenvalue: those below count as zero
CHANNELS: Final = (1, 16, 32)  # input channels of the second convolution, from 1
FISHERS: Final[dict[str, Fisher]] = {"exact": Exact(), "empirical": Empirical()}
GROUPINGS: Final = ("mini-blocks", "by input", "random", "diagonal")


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


def groupings(statistics: LayerStatistics, seed: int) -> dict[str, Partition]:
    """Return the paper's partition of a layer's entries, and three that mean nothing.

    Random blocks are as many and as large as the paper's.
    """
    own, shape = partition(statistics.block), statistics.weight_shape
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(shape[0] * shape[1], generator=generator)
    shuffled = [order[group] for group in own.groups]
    alone = torch.arange(len(order))[:, None]
    found = (
        own,
        Partition.by_column(shape),
        Partition(shape, shuffled),
        Partition(shape, [alone]),
    )
    return dict(zip(GROUPINGS, found, strict=True))


def digits_mass(setting: Setting) -> xr.Dataset:
    """Return the masses of the layers of 256-20⁵-10 on `digits`, the first if not quick.

    Trained for 50 epochs (15 if quick) by SGD with momentum 0.9.
    """
    problem, told = trained_digits(setting)
    chosen = [f"fc{k}" for k in ((2, 4, 6) if setting.quick else range(1, 7))]
    return _masses(
        setting,
        lambda fisher: iter(_collected(problem, fisher, chosen).values()),
        f"{told}; F of {len(problem.train[0])} examples",
    )


def cnn_mass(setting: Setting) -> xr.Dataset:
    """Return the masses of the convolutions of the Simple CNN on Fashion-MNIST.

    The first convolution whole; of the second the weights of input channels 1, 16 and 32.
    One epoch of SGD with momentum 0.9 at batch 128 (60 steps if quick), 2,000 examples
    (200).

    Raises
    ------
    DataError
        If the data files are missing.
    """
    problem, told = _trained_cnn(setting)
    examples = 200 if setting.quick else 2000
    data = replace(problem, train=drawn(problem.train, examples, setting.seed))

    def layers(fisher: Fisher) -> Iterator[LayerStatistics]:
        stats = _collected(data, fisher, ["conv1", "conv2"])
        yield stats["conv1"]
        yield from (_channel(stats["conv2"], channel) for channel in CHANNELS)

    return _masses(setting, layers, f"{told}; F of {examples} examples")


def digits_inverses(setting: Setting) -> xr.DataTree:
    """Return inverse empirical Fisher blocks of the second, middle and last layer."""
    problem, told = trained_digits(setting)
    names = ["fc2", "fc4", "fc6"]
    stats = _collected(problem, Empirical(), names)
    return _inverses(stats, ["mini-block", "kfac"], told)


def cnn_inverses(setting: Setting) -> xr.DataTree:
    """Return inverse empirical Fisher blocks of the first convolution, and by channel.

    The second has 51,264 parameters: its kernels of one input channel are looked at, as
    in the paper.
    """
    problem, told = _trained_cnn(setting)
    examples = 200 if setting.quick else 2000
    data = replace(problem, train=drawn(problem.train, examples, setting.seed))
    stats = _collected(data, Empirical(), ["conv1", "conv2"])
    parts = [stats["conv1"], *(_channel(stats["conv2"], k) for k in CHANNELS)]
    named = Statistics({part.name: part for part in parts}, stats.provenance)
    return _inverses(named, ["mini-block"], f"{told}; F of {examples} examples")


def _inverses(stats: Statistics, methods: list[str], told: str) -> xr.DataTree:
    found = inverse_blocks(stats, methods, RelativeDamping(DAMPING), list(stats))
    found.attrs["settings"] = f"{told}; empirical Fisher, λ = {DAMPING:g} · tr F / p"
    return found


def draw_mass(result: xr.Dataset) -> Drawing:
    """Draw the shares of the inverses over the damping, beside those of the nulls."""
    kept = result["share"].rename({"of": "share of", "layer": "layer"})
    kept = kept.sel(fisher="empirical")
    rows = kept.rename("share").to_dataframe().reset_index()
    with publication():
        grid = sns.relplot(
            rows,
            kind="line",
            x="alpha",
            y="share",
            hue="grouping",
            style="grouping",
            row="share of",
            col="layer",
            markers=True,
            errorbar=("pi", 100),
            height=2.4,
            aspect=1.1,
            facet_kws={"sharey": "row"},
        )
        grid.set(xscale="log")
        grid.set_titles("{col_name}: {row_name} entries")
        grid.set_axis_labels("λ / mean eigenvalue", "share inside, empirical F")
    return grid.figure


def draw_inverses(result: xr.DataTree) -> Drawing:
    """Draw the heatmaps, mini-blocks outlined."""
    return plots.inverse_heatmap(result)


def trained_digits(setting: Setting) -> tuple[Problem, str]:
    """Train 256-20⁵-10 on digits by SGD; return the problem and what was done in words."""
    problem, epochs = setting.load("digits"), 15 if setting.quick else 50
    epoch = len(problem.train[0]) // 64
    train(problem, setting.seed, epochs * epoch)
    return problem, (
        f"digits (scikit-learn), 256-20-20-20-20-20-10, tanh, float64; {epochs} epochs of "
        "SGD 0.01, momentum 0.9, batch 64"
    )


def _trained_cnn(setting: Setting) -> tuple[Problem, str]:
    problem = setting.load("fashion-mnist-cnn", dtype=torch.float32)
    steps = 60 if setting.quick else 469
    train(problem, setting.seed, steps, 128)
    return problem, (
        f"Fashion-MNIST, Simple CNN (32, 64 kernels of 5 x 5), float32; {steps} steps of "
        "SGD 0.01, momentum 0.9, batch 128"
    )


def train(problem: Problem, seed: int, steps: int, batch_size: int = 64) -> None:
    """Train by SGD, rate 0.01 and momentum 0.9, and leave the network to be analysed."""
    optimizer = torch.optim.SGD(problem.model.parameters(), lr=0.01, momentum=0.9)
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
    setting: Setting, layers: Callable[[Fisher], Iterator[LayerStatistics]], told: str
) -> xr.Dataset:
    """Gather the masses of every layer that `layers(fisher)` yields."""
    parts = []
    for kind, fisher in FISHERS.items():
        found = [_of_layer(one, setting.seed) for one in layers(fisher)]
        parts.append(xr.concat(found, "layer").expand_dims(fisher=[kind]))
    joined: xr.Dataset = xr.concat(parts, "fisher")
    joined["share"].attrs = {"long_name": "share of the inverse inside blocks"}
    return joined.assign_attrs(settings=told)


def _of_layer(statistics: LayerStatistics, seed: int) -> xr.Dataset:
    """Return the shares of a block and of its damped inverses, and of its eigenvalues.

    Of these, as shares of all, how many are not zero, and how many λ exceeds.

    The block is diagonalised once: (F + λI)⁻¹ = U (Λ + λ)⁻¹ Uᵀ.
    """
    block = ExactBlock()(statistics).to_dense()
    values, basis = factorised("eigh", block, f"the block of {statistics.name}")
    mean, into = float(values.mean()), groupings(statistics, seed)
    inverses = [(basis / (values + alpha * mean)) @ basis.T for alpha in ALPHAS]
    kinds = ["absolute", "squared"]

    def shares(matrix: Tensor) -> list[list[float]]:
        rows = [mass_inside(matrix, one) for one in into.values()]
        return [[row[kind] for kind in kinds] for row in rows]

    entries = [mass_inside(block, one)["entries"] for one in into.values()]
    coords = {"alpha": list(ALPHAS), "grouping": list(into), "of": kinds}
    damped = [float((values < a * mean).double().mean()) for a in ALPHAS]
    rank = float((values > RANK * float(values[-1])).double().mean())
    return xr.Dataset(
        {
            "share": (
                ("alpha", "grouping", "of"),
                np.array([shares(one) for one in inverses]),
            ),
            "block_share": (("grouping", "of"), np.array(shares(block))),
            "entries": (("grouping",), np.array(entries)),
            "rank_share": rank,
            "damped_share": (("alpha",), damped),
            "mean_eigenvalue": mean,
        },
        coords,
    ).expand_dims(layer=[statistics.name])


EXPERIMENTS: Final = (
    Experiment(
        "mbf-mass-digits",
        "MBF: share of inverse Fisher blocks in mini-blocks, beside nulls, 256-20⁵-10",
        digits_mass,
        draw_mass,
        minutes=(0.3, 4.0),
    ),
    Experiment(
        "mbf-mass-cnn",
        "MBF: the same for the convolutions of the Simple CNN, Fashion-MNIST.",
        cnn_mass,
        draw_mass,
        ("fashion-mnist-cnn",),
        minutes=(0.6, 15.0),
    ),
    Experiment(
        "mbf-inverse-digits",
        "MBF, figures 5 (right) and 13: inverse empirical Fisher blocks, 256-20⁵-10.",
        digits_inverses,
        draw_inverses,
        minutes=(0.2, 1.0),
    ),
    Experiment(
        "mbf-inverse-cnn",
        "MBF, figures 5 (left) and 14: inverse empirical Fisher blocks, Simple CNN.",
        cnn_inverses,
        draw_inverses,
        ("fashion-mnist-cnn",),
        minutes=(0.4, 8.0),
    ),
)
