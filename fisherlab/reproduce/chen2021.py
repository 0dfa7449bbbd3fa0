"""Chen 2021, "An iterative K-FAC algorithm for deep learning", arXiv 2101.00218.

Only the abstract could be read: it claims that conjugate gradients without factors take
"much less" time and memory than K-FAC. "Much less" stands here for half.

One layer d → d, its factors' samples of m examples, one sampled label each. Both solve
(F̂ + λI) p = ∇ for the same F̂, K-FAC through its factors, CG-FAC by conjugate gradients on
products with the samples; K-FAC's cost holds the sums and decompositions of one refresh.
What the note leaves open, the tolerance, is an axis, and the error of the solution stands
beside the time.
"""

import time
from collections.abc import Callable
from functools import partial
from typing import Final

import numpy as np
import seaborn as sns
import torch
import xarray as xr
from matplotlib.figure import Figure as Drawing
from torch import Tensor, nn

from fisherlab.approximators import CGFAC, KFAC
from fisherlab.likelihoods import Categorical
from fisherlab.plots.style import publication
from fisherlab.reproduce.experiment import CONTROL, Bound, Claim, Experiment, Row, Setting
from fisherlab.reproduce.training_races import ends_below
from fisherlab.showing import number, percent
from fisherlab.statistics import LayerStatistics, MonteCarlo, collect, mean_gradient

WIDTHS: Final = ((50, 200), (100, 400, 1000, 2000))  # quick, and the full size
BATCHES: Final = ((16, 64, 256), (16, 64, 256, 1024))
ALPHAS: Final = (1.0, 1e-2)  # λ over the mean eigenvalue
TOLERANCES: Final = (1e-2, 1e-6)
REPEATS: Final = 3  # the quickest counts


def costs(setting: Setting) -> xr.Dataset:
    """Return times, numbers held and errors over widths, batches, dampings, tolerances.

    Returns
    -------
    xarray.Dataset
        ``time_ratio`` and ``memory_ratio``, of CG-FAC over K-FAC; ``error``, the distance
        of the two solutions over their size; ``kfac_seconds`` of the processor.
    """
    full = not setting.quick
    widths, batches = WIDTHS[full], BATCHES[full]
    shape = (len(widths), len(batches), len(ALPHAS), len(TOLERANCES))
    times, errors = np.empty(shape), np.empty(shape)
    plain = np.empty(shape[:3])
    memory = np.empty(shape[:2])
    for a, b in np.ndindex(*shape[:2]):
        statistics, gradient = _layer(widths[a], batches[b], setting.seed)
        mean = KFAC()(statistics).trace() / gradient.numel()
        d, m = statistics.weight_shape, batches[b]
        memory[a, b] = m * sum(d) / sum(2 * n * n for n in d)  # factors and inverses
        for c, alpha in enumerate(ALPHAS):
            plain[a, b, c], known = _timed(KFAC(), statistics, gradient, alpha * mean)
            for e, tolerance in enumerate(TOLERANCES):
                method = CGFAC(tolerance=tolerance)
                seconds, found = _timed(method, statistics, gradient, alpha * mean)
                times[a, b, c, e] = seconds / plain[a, b, c]
                errors[a, b, c, e] = float((found - known).norm() / known.norm())
    dims = ("width", "batch", "alpha", "residual")  # `sel` has a tolerance of its own
    coords = {
        "width": list(widths),
        "batch": list(batches),
        "alpha": list(ALPHAS),
        "residual": list(TOLERANCES),
    }
    told = (
        "random normal data, one layer d → d and tanh before ten classes, float64, one "
        f"thread of the processor's time, quickest of {REPEATS}; one sampled label each"
    )
    return xr.Dataset(
        {
            "time_ratio": (dims, times),
            "error": (dims, errors),
            "kfac_seconds": (dims[:3], plain),
            "memory_ratio": (dims[:2], memory),
        },
        coords,
        {"settings": told},
    )


def _layer(width: int, batch: int, seed: int) -> tuple[LayerStatistics, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    normal = partial(torch.randn, generator=generator, dtype=torch.float64)
    net = nn.Sequential(
        nn.utils.skip_init(nn.Linear, width, width, dtype=torch.float64),
        nn.Tanh(),
        nn.utils.skip_init(nn.Linear, width, 10, dtype=torch.float64),
    )
    with torch.no_grad():
        for weight in net.parameters():
            weight.copy_(normal(*weight.shape) / width**0.5)
    x = normal(batch, width)
    data = x, torch.randint(0, 10, (batch,), generator=generator)
    stats = collect(net, data, Categorical(), MonteCarlo(1, seed), layers=["0"])
    return stats["0"], mean_gradient(net, data, Categorical())["0"].gradient


def _timed(
    method: Callable[[LayerStatistics], object],
    statistics: LayerStatistics,
    gradient: Tensor,
    damping: float,
) -> tuple[float, Tensor]:
    best, found = float("inf"), gradient
    for _ in range(REPEATS):
        started = time.thread_time()
        found = method(statistics).solve(gradient, damping=damping)  # type: ignore[attr-defined]
        best = min(best, time.thread_time() - started)
    return best, found


def draw(result: xr.Dataset) -> Drawing:
    """Draw time and memory of CG-FAC over K-FAC's against the examples; 1 is equal."""
    rows = result["time_ratio"].to_dataframe().reset_index()
    memory = result["memory_ratio"].to_dataframe().reset_index()
    names = {"batch": "examples", "width": "d", "residual": "tolerance"}
    rows = rows.rename(columns=names)
    with publication():
        grid = sns.relplot(
            rows,
            kind="line",
            x="examples",
            y="time_ratio",
            hue="d",
            col="alpha",
            style="tolerance",
            markers=True,
            errorbar=("pi", 100),
            palette="viridis",
            hue_norm=None,
            height=3.0,
        )
        for ax in grid.axes.flat:
            for width, part in memory.groupby("width"):
                ax.plot(part["batch"], part["memory_ratio"], ":", c="0.6", lw=1.0)
                first = part.iloc[0]
                ax.annotate(
                    f"  memory, d = {width}",
                    (first["batch"], first["memory_ratio"]),
                    fontsize=6,
                    color="0.4",
                    va="top",
                )
            ax.axhline(1.0, ls="--", c="0.3", lw=1.0)
            ax.set(xscale="log", yscale="log")
            ax.set_xticks(result["batch"].values, labels=map(str, result["batch"].values))
            ax.minorticks_off()
        grid.set_titles("λ = {col_name:g} · tr F / p")
        grid.set_axis_labels("examples m", "CG-FAC / K-FAC: time, dotted memory")
    return grid.figure


EXPERIMENTS: Final = (
    Experiment(
        "cg-fac-cost",
        "CG-FAC: time, memory and error beside K-FAC over width, batch and tolerance",
        costs,
        draw,
        data=(),
        minutes=(0.3, 30.0),
    ),
)


HALF: Final = 0.5
HALVED: Final = 'half, for "much less"'


def share(ds: xr.Dataset, of: str, most: float) -> dict[str, float]:
    """Return in how many of the settings a ratio is at most so large."""
    return {"share of settings": float((ds[of] <= most).mean())}


def _accurate(ds: xr.Dataset) -> dict[str, float]:
    worst = ds["error"].max(("width", "batch", "alpha"))
    return {f"tolerance {t:g}": float(worst.sel(residual=t)) for t in ds["residual"].values}


def _farthest(ds: xr.Dataset) -> str:
    """Say for every tolerance where the two solutions are the farthest apart."""
    said = []
    for tolerance in ds["residual"].values:
        error = ds["error"].sel(residual=tolerance)
        at = error.isel(error.argmax(...))
        said.append(
            f"at tolerance {tolerance:g} {number(float(at))} with d = {int(at['width'])}, "
            f"m = {int(at['batch'])}, λ = {float(at['alpha']):g} of the mean eigenvalue, "
            f"the median {number(float(error.median()))}"
        )
    return f"The largest distance is {'; '.join(said)}."


def _where(ds: xr.Dataset) -> str:
    few, many = ds["batch"].values[[0, -1]]
    rows = [
        f"{number(float(ds['time_ratio'].sel(batch=m).median()))} at m = {m}"
        for m in (few, many)
    ]
    return (
        "The median time over widths, dampings and tolerances, that of K-FAC being one: "
        f"{' and '.join(rows)}; half the numbers are held in "
        f"{percent(float((ds['memory_ratio'] <= HALF).mean()))} of the settings, where "
        "examples are few beside the width."
    )


ROWS: Final = (
    Row(
        "Abstract",
        "Time and memory of CG-FAC beside K-FAC, over width, batch and tolerance.",
        "cg-fac-cost",
        (
            Claim(
                "Much less time.",
                {"share of settings": Bound(at_least=1.0)},
                partial(share, of="time_ratio", most=HALF),
                "settings that take at most half of K-FAC's processor time for a refresh "
                "and a step",
                basis=HALVED,
                reason=_where,
            ),
            Claim(
                "Much less memory.",
                {"share of settings": Bound(at_least=1.0)},
                partial(share, of="memory_ratio", most=HALF),
                "settings that hold at most half the numbers: samples, against factors and "
                "their inverses",
                basis=HALVED,
                reason=_where,
            ),
            Claim(
                "The same step.",
                {
                    "tolerance 0.01": Bound(at_most=0.05),
                    "tolerance 1e-06": Bound(at_most=1e-4),
                },
                _accurate,
                "largest distance of the two solutions over their size",
                basis=CONTROL,
                reason=_farthest,
            ),
        ),
        "what is stated of training; only the abstract was at hand",
    ),
    Row(
        "Algorithm",
        "CG-FAC as an optimiser, at most ten iterations a solve.",
        "cg-fac-training",
        (
            ends_below(
                "It trains as K-FAC does.",
                {"CG-FAC / K-FAC": ("cg-fac", "kfac-eigen")},
                most=1.05,
                how="last training losses, the same F̂ + λI in every step",
                basis=CONTROL,
            ),
        ),
        "the note's own settings, which could not be read",
    ),
)
