"""All families of methods in all purposes along one training, beside noise floors.

The network 256-20⁵-10 (tanh) is trained on digits by SGD with momentum; at some moments
every method is held against the exact Fisher of the same examples in what it is used for.
The noise floor of a purpose is what the exact Fisher of as many other examples is worth in
it: a smaller difference would not be seen again on other data.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, Final

import numpy as np
import seaborn as sns
import torch
import xarray as xr
from matplotlib.figure import Figure as Drawing

from fisherlab.analysis import RelativeDamping
from fisherlab.analysis.purposes import judge
from fisherlab.approximators import ExactBlock, approximators
from fisherlab.plots.style import publication, styles
from fisherlab.purposes import Influence, Laplace, Matrix, Pruning, Sharpness, Step
from fisherlab.reproduce.error_controls import rank_correlation
from fisherlab.reproduce.experiment import CONTROL, Bound, Claim, Experiment, Row, Setting
from fisherlab.showing import number, percent
from fisherlab.statistics import (
    Empirical,
    Statistics,
    collect,
    mean_gradient,
)
from fisherlab.training.following import follow
from fisherlab.training.probes import Losses, Moment

FAMILIES: Final = (
    "low-rank",
    "kfac",
    "tkfac",
    "ekfac",
    "kpsvd",
    "deflation",
    "shampoo",
    "mini-block",
    "quasi-diagonal",
    "diagonal",
)
MEASURES: Final = {  # of each purpose the one that is drawn and judged
    "matrix.frobenius_error": "matrix: ‖F − F̂‖ / ‖F‖",
    "step.best_f_cosine_squared": "step: missed of the decrease",
    "laplace.kl": "Laplace: divergence / nat",
    "influence.rank_correlation": "influence: 1 − rank correlation",
    "pruning.obs_overlap": "pruning: weights chosen wrongly",
    "sharpness.top_ratio": "sharpness: top eigenvalue",
}
LAYERS: Final = ("fc2", "fc4", "fc6")
EXAMPLES: Final = (200, 700)  # and as many others for the noise floor
QUERIES: Final = 10
MOMENTS: Final = ((0, 60, 330), (0, 30, 60, 120, 330, 660, 1100))  # 22 steps an epoch
ALPHA: Final = 1e-2  # λ over the mean eigenvalue of the network
NOISE: Final = "other examples"
SHOWN: Final = 1e-4  # of the largest number; what is smaller is rounding or nearly none


def along(setting: Setting) -> xr.Dataset:
    """Judge every method in every purpose at the moments of a training.

    Quick: one method a family, three moments.

    Returns
    -------
    xarray.Dataset
        ``missed(step, measure, approximator)``, the distance of a measure from what the
        exact block itself has, all layers together; ``noise(step, measure)``.
    """
    full = not setting.quick
    problem = setting.load("digits")
    moments, count = MOMENTS[full], EXAMPLES[full]
    names = [n for n in approximators() if n != "exact"] if full else list(FAMILIES)
    found = follow(
        problem,
        torch.optim.SGD(problem.model.parameters(), lr=0.01, momentum=0.9),
        steps=moments[-1],
        probes=[partial(_judged, names=names, count=count), Losses()],
        every=moments,
        batch_size=64,
        seed=setting.seed,
        store=setting.store("purposes-along", str(count)),
        progress=True,
    )
    told = (
        "digits (scikit-learn), 256-20-20-20-20-20-10, tanh, float64; SGD 0.01, momentum "
        f"0.9, batch 64; layers {', '.join(LAYERS)} together, exact Fisher of {count} "
        f"examples, λ = {ALPHA:g} of the mean eigenvalue; dashed: the exact Fisher of "
        f"{count} other examples"
    )
    return found.assign_attrs(settings=told)


def _judged(moment: Moment, names: list[str], count: int) -> xr.Dataset:
    x, y = moment.problem.train
    halves = (x[:count], y[:count]), (x[count : 2 * count], y[count : 2 * count])
    model, likelihood = moment.model, moment.problem.likelihood
    first, second = (collect(model, half, likelihood, layers=LAYERS) for half in halves)
    methods: dict[str, Any] = {name: approximators()[name] for name in names}
    methods[NOISE] = lambda layer: ExactBlock()(second[layer.name])
    found = judge(first, methods, _purposes(moment, halves[0], first))
    network = found["network"].sel(measure=list(MEASURES))
    missed = abs(network - network["best"]).drop_vars(
        [n for n in network.coords if n not in ("measure", "approximator")]
    )
    kept = missed.sel(approximator=names)
    return xr.Dataset({"missed": kept, "noise": missed.sel(approximator=NOISE, drop=True)})


def _purposes(moment: Moment, data: Any, stats: Statistics) -> list[Any]:
    model, likelihood = moment.model, moment.problem.likelihood
    blocks = [ExactBlock()(one) for one in stats.values()]
    rows = sum(one.shape[0] for one in blocks)
    damping = ALPHA * float(sum(one.trace() for one in blocks)) / rows
    gradients = mean_gradient(model, data, likelihood)
    tests = tuple(part[:QUERIES] for part in moment.problem.test)
    queries, examples = (
        collect(model, some, likelihood, Empirical(), layers=LAYERS)
        for some in (tests, data)
    )
    return [
        Matrix(),
        Step({name: gradients[name] for name in stats}, RelativeDamping(ALPHA)),
        Laplace(1.0, len(moment.problem.train[0])),
        Influence(damping, queries, examples),
        Pruning(dict(model.named_parameters()), damping),
        Sharpness(),
    ]


def draw(result: xr.Dataset) -> Drawing:
    """Draw every method over the steps, a panel a purpose; dashed is the noise floor."""
    rows = result["missed"].to_dataframe().reset_index()
    rows["measure"] = rows["measure"].map(MEASURES)
    names = list(result["approximator"].values)
    looks = styles(names)
    with publication():
        grid = sns.relplot(
            rows,
            kind="line",
            x="step",
            y="missed",
            hue="approximator",
            style="approximator",
            palette={name: looks[name].color for name in names},
            dashes={name: looks[name].dash for name in names},
            markers=True,
            col="measure",
            col_wrap=3,
            errorbar=("pi", 100),
            facet_kws={"sharey": False},
            height=2.6,
            aspect=1.1,
        )
        grid.set(yscale="log")
        grid.set_titles("{col_name}")
        grid.set_axis_labels("step", "")
        for ax, name in zip(grid.axes.flat, MEASURES, strict=True):
            floor = result["noise"].sel(measure=name)
            floor = floor.mean("seed") if "seed" in floor.dims else floor
            ax.plot(floor["step"], floor, ls="--", c="0.3", lw=1.5)
            top = ax.get_ylim()[1]
            ax.set_ylim(max(ax.get_ylim()[0], SHOWN * top), top)
    return grid.figure


def _winners(ds: xr.Dataset) -> xr.DataArray:
    """Return the method nearest to the exact block in every purpose at every moment."""
    return ds["missed"].idxmin("approximator")


def _most_wins(ds: xr.Dataset) -> dict[str, float]:
    _, counts = np.unique(_winners(ds).values.astype(str), return_counts=True)
    return {"share of purposes and moments": float(counts.max() / counts.sum())}


def _who_wins(ds: xr.Dataset) -> str:
    last = _winners(ds).isel(step=-1)
    said = [
        f"{str(name).partition('.')[0]} `{last.sel(measure=name).item()}`"
        for name in MEASURES
    ]
    return f"The nearest at step {int(ds['step'][-1])}: {', '.join(said)}."


def _above_noise(ds: xr.Dataset) -> dict[str, float]:
    known = ds["missed"].notnull()
    above = (ds["missed"] > ds["noise"]) & known
    return {"share of numbers": float(above.sum() / known.sum())}


def _below_by_purpose(ds: xr.Dataset) -> str:
    known = ds["missed"].notnull()
    below = (ds["missed"] <= ds["noise"]) & known
    over = ("step", "approximator")
    shares = below.sum(over) / known.sum(over)
    said = [
        f"{str(name).partition('.')[0]} {percent(float(shares.sel(measure=name)))}"
        for name in MEASURES
    ]
    return f"Within the noise of the examples are {', '.join(said)} of the numbers."


def _order_kept(ds: xr.Dataset) -> dict[str, float]:
    """Return the least rank correlation of matrix errors with another purpose."""
    return {"least over purposes": min(_correlations(ds).values())}


def _correlations(ds: xr.Dataset) -> dict[str, float]:
    by_matrix, *others = (ds["missed"].sel(measure=name) for name in MEASURES)
    return {
        str(one["measure"].item()).partition(".")[0]: _mean_correlation(by_matrix, one)
        for one in others
    }


def _mean_correlation(first: xr.DataArray, second: xr.DataArray) -> float:
    steps = first["step"].values
    found = [rank_correlation(first.sel(step=k), second.sel(step=k)) for k in steps]
    return float(np.mean(found))


def _correlations_said(ds: xr.Dataset) -> str:
    said = [f"{name} {number(value)}" for name, value in _correlations(ds).items()]
    return f"Rank correlations with the error of the matrix: {', '.join(said)}."


def _claim(
    statement: str,
    measure: Callable[[xr.Dataset], Mapping[str, float]],
    least: Mapping[str, float],
    how: str,
    reason: Callable[[xr.Dataset], str],
) -> Claim:
    bounds = {label: Bound(at_least=value) for label, value in least.items()}
    return Claim(statement, bounds, measure, how, basis=CONTROL, reason=reason)


PURPOSE_ROWS: Final = (
    Row(
        "All purposes along a training",
        "Every family of methods in six purposes at moments of one training, with noise.",
        "purposes-along",
        (
            _claim(
                "One method is the nearest in every purpose at every moment.",
                _most_wins,
                {"share of purposes and moments": 1.0},
                "of the method that is the nearest most often",
                _who_wins,
            ),
            _claim(
                "Methods have the order of their matrix errors in every purpose.",
                _order_kept,
                {"least over purposes": 0.9},
                "rank correlation over methods, mean of moments",
                _correlations_said,
            ),
            _claim(
                "What a method misses is above the noise of the examples.",
                _above_noise,
                {"share of numbers": 1.0},
                "the exact Fisher of as many other examples is the noise",
                _below_by_purpose,
            ),
        ),
        "elastic weight consolidation, which needs a second task",
    ),
)

EXPERIMENTS: Final = (
    Experiment(
        "purposes-along",
        "All families of methods in six purposes along one training, with noise floors",
        along,
        draw,
        minutes=(0.4, 30.0),
    ),
)
