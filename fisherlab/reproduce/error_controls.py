"""What the error of a matrix says of its inverse, and a sampled Fisher of the exact one.

The network 256-20⁵-10 (tanh) is trained on digits; its layers 20 → 20 are looked at. The
papers draw errors of F against a sampled F, made of the same labels as the approximation,
and use the damped inverse: both steps are measured here.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Final

import numpy as np
import pandas as pd
import seaborn as sns
import torch
import xarray as xr
from matplotlib.figure import Figure as Drawing

from fisherlab import metrics
from fisherlab.analysis import RelativeDamping, compare, sweep
from fisherlab.analysis.intervals import with_noise
from fisherlab.approximators import (
    EKFAC,
    KFAC,
    KPSVD,
    TKFAC,
    Approximator,
    Diagonal,
    ExactBlock,
    MiniBlock,
)
from fisherlab.plots.style import publication, styles
from fisherlab.problems.problem import drawn
from fisherlab.purposes.base import spearman
from fisherlab.reproduce.experiment import CONTROL, Bound, Claim, Experiment, Row, Setting
from fisherlab.reproduce.mini_block_fisher import trained_digits
from fisherlab.showing import number, percent
from fisherlab.statistics import Empirical, Exact, Fisher, MonteCarlo, Statistics, collect

METHODS: Final[dict[str, Approximator]] = {
    "kfac": KFAC(),
    "tkfac": TKFAC(),
    "ekfac": EKFAC(),
    "kpsvd": KPSVD(),
    "mini-block": MiniBlock(),
    "diagonal": Diagonal(),
}
LAYERS: Final = ("fc2", "fc3", "fc4", "fc5")
ALPHAS: Final = (
    (1e-4, 1e-2, 1.0),
    (1e-6, 1e-4, 1e-2, 1.0, 1e2),
)  # over the mean eigenvalue
EXAMPLES: Final = (500, 1_400)


def _collected(
    setting: Setting, fishers: Mapping[str, Fisher]
) -> tuple[dict[str, Statistics], str]:
    """Train, and return the statistics of every Fisher and the settings in words."""
    problem, told = trained_digits(setting)
    data = drawn(problem.train, EXAMPLES[not setting.quick], setting.seed)
    stats = {
        name: collect(problem.model, data, problem.likelihood, one, layers=LAYERS)
        for name, one in fishers.items()
    }
    return stats, f"{told}; layers {LAYERS[0]}–{LAYERS[-1]}, F of {len(data[0])} examples"


def inverses(setting: Setting) -> xr.Dataset:
    """Return errors of matrices, and of their damped inverses over λ.

    Returns
    -------
    xarray.Dataset
        ``matrix_error(layer, approximator)``, ``inverse_error(layer, approximator,
        damping)``, with λ over the mean eigenvalue.
    """
    collected, told = _collected(setting, {"exact": Exact()})
    stats = collected["exact"]
    matrix = compare(stats, METHODS, metrics=["frobenius_error"])["frobenius_error"]
    damping = RelativeDamping(ALPHAS[not setting.quick])
    found = sweep(stats, METHODS, damping=damping, metrics=["inverse_error"])
    data = {"matrix_error": matrix, "inverse_error": found["inverse_error"]}
    return xr.Dataset(data, attrs={"settings": f"{told}; exact Fisher"})


def draw_inverses(result: xr.Dataset) -> Drawing:
    """Draw every layer's error of the inverse over that of the matrix, a panel a λ."""
    rows = result.to_dataframe().reset_index()
    names = list(result["approximator"].values)
    looks = styles(names)
    with publication():
        grid = sns.relplot(
            rows,
            x="matrix_error",
            y="inverse_error",
            hue="approximator",
            style="approximator",
            palette={name: looks[name].color for name in names},
            col="damping",
            s=45,
            height=2.9,
        )
        grid.set(xscale="log", yscale="log")
        grid.set_titles("λ = {col_name:g} · tr F / p")
        grid.set_axis_labels("‖F − F̂‖ / ‖F‖", "error of (F̂ + λI)⁻¹")
    return grid.figure


def rank_correlation(first: xr.DataArray, second: xr.DataArray) -> float:
    """Return Spearman's correlation of numbers along one dimension, of those finite.

    Examples
    --------
    >>> one = xr.DataArray([0.1, 5.0, 2.0, float("nan")])
    >>> rank_correlation(one, one**2), rank_correlation(one, -one)
    (1.0, -1.0)
    """
    pair = np.stack([first.values, second.values])
    known = torch.from_numpy(pair[:, np.isfinite(pair).all(axis=0)])
    return round(spearman(*known), 12)


def _agreement(ds: xr.Dataset) -> dict[float, float]:
    """Return the rank correlation of the two errors over methods, mean of layers, by λ."""
    return {
        float(one["damping"]): float(
            np.mean(
                [
                    rank_correlation(ds["matrix_error"].sel(layer=n), one.sel(layer=n))
                    for n in ds["layer"].values
                ]
            )
        )
        for one in ds["inverse_error"].transpose("damping", ...)
    }


def _least_agreement(ds: xr.Dataset) -> dict[str, float]:
    return {"least over λ": min(_agreement(ds).values())}


def _two_orders(ds: xr.Dataset) -> str:
    agreement = _agreement(ds)
    damping = min(agreement, key=lambda one: agreement[one])
    said = ", ".join(f"{number(one)} at λ = {at:g}" for at, one in agreement.items())
    return (
        f"The correlation is {said} of the mean eigenvalue. From the nearest: by matrix "
        f"{_order(ds['matrix_error'])}; by inverse at {damping:g} "
        f"{_order(ds['inverse_error'].sel(damping=damping))}."
    )


def _order(errors: xr.DataArray) -> str:
    means = errors.mean("layer")
    return ", ".join(map(str, means["approximator"].values[np.argsort(means.values)]))


KINDS: Final[dict[str, Callable[[int], Fisher]]] = {
    "1 label": lambda seed: MonteCarlo(1, seed),
    "10 labels": lambda seed: MonteCarlo(10, seed),
    "labels of the data": lambda _: Empirical(),
}


def fishers(setting: Setting) -> xr.Dataset:
    """Return errors of approximations made of sampled labels, of those of data and of all.

    Returns
    -------
    xarray.Dataset
        ``own(fisher, layer, approximator)``, against the F of the same labels;
        ``true``, against the exact F; ``distance(fisher, layer)`` of the two, and
        ``noise_floor(layer)`` of the exact F, for what its examples leave open.
    """
    kinds: dict[str, Fisher] = {"exact": Exact()}
    kinds |= {name: make(setting.seed) for name, make in KINDS.items()}
    stats, told = _collected(setting, kinds)
    exact = {name: ExactBlock()(one) for name, one in stats["exact"].items()}
    error = partial(metrics.frobenius_error, mixed=True)  # from different labels
    rows = []
    for one in stats.values():
        own = compare(one, METHODS, metrics=["frobenius_error"])["frobenius_error"]
        true = [
            [error(exact[n], method(one[n])) for method in METHODS.values()] for n in LAYERS
        ]
        apart = [error(exact[n], ExactBlock()(one[n])) for n in LAYERS]
        distance = ("layer", apart)
        rows.append(
            xr.Dataset({"own": own, "true": own.copy(data=true), "distance": distance})
        )
    joined: xr.Dataset = xr.concat(rows, xr.Variable("fisher", list(stats)))
    plain = compare(stats["exact"], ["kfac"], metrics=["frobenius_error"])
    floor = with_noise(plain, stats["exact"])["noise_floor"]
    told += "; dashed: the noise floor of the exact F"
    return joined.assign(noise_floor=floor).assign_attrs(settings=told)


def draw_fishers(result: xr.Dataset) -> Drawing:
    """Draw means over layers, against the F of the same labels and the exact one.

    The dashed line is the noise floor of the exact F.
    """
    titles = {"own": "against the F of the same labels", "true": "against the exact F"}
    frames = [
        result[name]
        .mean("layer")
        .rename("error")
        .to_dataframe()
        .reset_index()
        .assign(of=of)
        for name, of in titles.items()
    ]
    names = list(result["approximator"].values)
    looks = styles(names)
    with publication():
        grid = sns.catplot(
            pd.concat(frames, ignore_index=True),
            kind="point",
            x="fisher",
            y="error",
            hue="approximator",
            palette={name: looks[name].color for name in names},
            col="of",
            errorbar=("pi", 100),
            markersize=4,
            linewidth=1.0,
            height=3.2,
            aspect=1.2,
        )
        grid.refline(y=float(result["noise_floor"].mean()))
        grid.set_titles("{col_name}")
        grid.set_axis_labels("", "‖F − F̂‖ / ‖F‖")
        grid.tick_params(axis="x", rotation=20)
    return grid.figure


def _over_exact(of: str, fisher: str) -> Callable[[xr.Dataset], Mapping[str, float]]:
    """Measure errors over those of the method made of all labels, means of layers."""

    def measure(ds: xr.Dataset) -> Mapping[str, float]:
        found = ds[of].mean("layer")
        ratio = found.sel(fisher=fisher) / found.sel(fisher="exact")
        return {str(n): float(ratio.sel(approximator=n)) for n in METHODS}

    return measure


def _apart(ds: xr.Dataset) -> str:
    said = [
        f"{percent(float(one))} of ‖F‖ with {one['fisher'].values!s}"
        for one in ds["distance"].mean("layer")
        if one["fisher"] != "exact"
    ]
    return (
        f"The sampled F is away from the exact one by {', '.join(said)}; the examples "
        f"alone leave {percent(float(ds['noise_floor'].mean()))} open."
    )


def _claim(statement: str, of: str, fisher: str, how: str) -> Claim:
    bounds = dict.fromkeys(METHODS, Bound(at_least=0.9, at_most=1.1))
    measure = _over_exact(of, fisher)
    return Claim(statement, bounds, measure, how, basis=CONTROL, reason=_apart)


CONTROL_ROWS: Final = (
    Row(
        "Error of the inverse beside error of the matrix",
        "Which methods are near by the matrix, and which by the damped inverse in use.",
        "inverse-beside-matrix",
        (
            Claim(
                "Methods have one order by matrix and by inverse.",
                {"least over λ": Bound(at_least=0.9)},
                _least_agreement,
                "rank correlation of six methods, mean of layers",
                basis=CONTROL,
                reason=_two_orders,
            ),
        ),
    ),
    Row(
        "Exact beside sampled Fisher",
        "The errors that are drawn with one sampled label, and those against the exact F.",
        "exact-beside-sampled",
        (
            _claim(
                "Errors against an F of one sampled label are those against the exact F.",
                "own",
                "1 label",
                "error of a method against F, both of one label, over that of all labels",
            ),
            _claim(
                "A method made of one sampled label is as near to the exact F.",
                "true",
                "1 label",
                "error against the exact F, made of one label over made of all",
            ),
            _claim(
                "So is one made of the labels of the data.",
                "true",
                "labels of the data",
                "error against the exact F, made of labels of the data over made of all",
            ),
        ),
    ),
)

EXPERIMENTS: Final = (
    Experiment(
        "inverse-beside-matrix",
        "Error of the damped inverse beside that of the matrix, six methods",
        inverses,
        draw_inverses,
        minutes=(0.2, 1.0),
    ),
    Experiment(
        "exact-beside-sampled",
        "Errors with the exact Fisher, with sampled labels and with those of the data",
        fishers,
        draw_fishers,
        minutes=(0.2, 1.0),
    ),
)
