"""What MBF, KFAC and Shampoo hold and take, measured over the width of a layer.

The paper's tables count operations and memory in O() of the numbers of inputs and outputs.
One layer d → d, or a convolution of d channels with 3 × 3 kernels: what grows as d^k in
the tables is held against the exponent between the two largest widths.
"""

import time
from collections.abc import Mapping
from functools import partial
from itertools import product
from typing import Any, Final

import numpy as np
import seaborn as sns
import torch
import xarray as xr
from matplotlib.figure import Figure as Drawing
from torch import nn

from fisherlab.approximators import KFAC, MiniBlock
from fisherlab.approximators.mean_gradients import ShampooPreconditioner
from fisherlab.likelihoods import Categorical
from fisherlab.plots.style import publication
from fisherlab.reproduce.experiment import Experiment, Setting
from fisherlab.statistics import Empirical, LayerStatistics, collect

KERNEL: Final = 3
DAMPING: Final = 0.1
REPEATS: Final = 3  # the quickest counts
WIDTHS: Final = {  # quick, and the full size
    "dense": ((48, 96, 192), (64, 128, 256, 512)),
    "convolution": ((16, 32, 64), (32, 64, 128, 256)),
}
METHODS: Final[Mapping[str, Any]] = {
    "MBF": MiniBlock(statistic="mean_gradient"),
    "MBF, shared": MiniBlock(statistic="mean_gradient", spatial_average=True),
    "KFAC": KFAC(),
    "Shampoo": ShampooPreconditioner(1e-3),
}
PHASES: Final = ("curvature", "inverse", "step")


def costs(setting: Setting) -> xr.Dataset:
    """Return numbers held and times of the processor over kinds, widths and methods.

    Returns
    -------
    xarray.Dataset
        ``numbers`` of the matrix and ``seconds`` (approximator, kind, size, phase), NaN
        where a method has no such layer; ``width(kind, size)``; ``weights`` of the layer.
    """
    sizes = len(WIDTHS["dense"][not setting.quick])
    shape = (len(METHODS), len(WIDTHS), sizes)
    numbers, seconds = np.full(shape, np.nan), np.full((*shape, len(PHASES)), np.nan)
    weights = np.empty(shape[1:])
    for (b, kind), c in product(enumerate(WIDTHS), range(sizes)):
        stats = _layer(kind, WIDTHS[kind][not setting.quick][c], setting.seed)
        weights[b, c] = stats.weight_shape[0] * stats.weight_shape[1]
        for a, (name, method) in enumerate(METHODS.items()):
            if kind == "dense" or name != "MBF, shared":
                numbers[a, b, c], seconds[a, b, c] = _measured(method, stats)
    dims = ("approximator", "kind", "size", "phase")
    widths = [WIDTHS[kind][not setting.quick] for kind in WIDTHS]
    return xr.Dataset(
        {
            "numbers": (dims[:3], numbers),
            "seconds": (dims, seconds),
            "weights": (dims[1:3], weights),
            "width": (dims[1:3], widths),
        },
        {"approximator": list(METHODS), "kind": list(WIDTHS), "phase": list(PHASES)},
        {
            "settings": "random normal data of 128 examples, one layer of d inputs and "
            "outputs, or d channels of 8 × 8 under kernels of 3 × 3, no bias; labels of "
            f"the data, float64, time of one thread, quickest of {REPEATS}"
        },
    )


def _layer(kind: str, width: int, seed: int) -> LayerStatistics:
    generator = torch.Generator().manual_seed(seed)
    normal = partial(torch.randn, generator=generator, dtype=torch.float64)
    first: nn.Module = nn.Linear(width, width, bias=False)
    x, features = normal(128, width), width
    if kind == "convolution":
        first = nn.Conv2d(width, width, KERNEL, padding=1, bias=False)
        x, features = normal(128, width, 8, 8), width * 64
    net = nn.Sequential(first, nn.Tanh(), nn.Flatten(), nn.Linear(features, 10))
    net = net.double()
    with torch.no_grad():
        for weight in net.parameters():
            weight.copy_(normal(*weight.shape) / weight[0].numel() ** 0.5)
    data = x, torch.randint(0, 10, (128,), generator=generator)
    return collect(net, data, Categorical(), Empirical(), layers=["0"])["0"]


def _measured(method: Any, stats: LayerStatistics) -> tuple[float, np.ndarray]:
    """Return the numbers of the matrix, and the times to make, to invert and to apply.

    A matrix may wait with its roots until they are used: the time of the inverse holds
    the first product.
    """
    shift = 0.0 if isinstance(method, ShampooPreconditioner) else DAMPING
    gradient = torch.ones(stats.weight_shape, dtype=torch.float64)
    times = np.full(len(PHASES), np.inf)
    for _ in range(REPEATS):
        marks = [time.thread_time()]
        operator = method(stats)
        marks.append(time.thread_time())
        inverse = operator.inverse(shift)
        inverse @ gradient
        marks.append(time.thread_time())
        inverse @ gradient
        marks.append(time.thread_time())
        times = np.minimum(times, np.diff(marks))
    return operator.stored_numbers, times


def exponents(ds: xr.Dataset, of: xr.DataArray) -> xr.DataArray:
    """Return k of d^k between the two largest widths."""
    last, before = (np.log(of.isel(size=k)) for k in (-1, -2))
    wide, less = (np.log(ds["width"].isel(size=k)) for k in (-1, -2))
    found: xr.DataArray = (last - before) / (wide - less)
    return found


def draw(result: xr.Dataset) -> Drawing:
    """Draw numbers held and the times of inverses and steps over the width."""
    ds = result.mean("seed") if "seed" in result.dims else result
    shown = {
        "numbers held": ds["numbers"],
        "seconds of an inverse": ds["seconds"].sel(phase="inverse", drop=True),
        "seconds of a step": ds["seconds"].sel(phase="step", drop=True),
    }
    table = xr.concat(shown.values(), xr.Variable("of", list(shown)), coords="minimal")
    rows = xr.Dataset({"value": table, "width": ds["width"]}).to_dataframe().reset_index()
    with publication():
        grid = sns.relplot(
            rows.dropna(),
            kind="line",
            x="width",
            y="value",
            hue="approximator",
            style="approximator",
            markers=True,
            col="of",
            row="kind",
            facet_kws={"sharey": "col", "sharex": "row"},
            height=2.3,
            aspect=1.2,
        )
        grid.set(xscale="log", yscale="log", ylabel="")
        for (kind, _), ax in grid.axes_dict.items():
            widths = ds["width"].sel(kind=kind).values.astype(int)
            ax.set_xticks(widths, labels=map(str, widths))
            ax.minorticks_off()
        grid.set_titles("{row_name}: {col_name}")
        grid.set_xlabels("d")
    return grid.figure


EXPERIMENTS: Final = (
    Experiment(
        "mbf-cost",
        "MBF: numbers held and times beside KFAC and Shampoo over the width",
        costs,
        draw,
        data=(),
        minutes=(0.3, 10.0),
    ),
)
