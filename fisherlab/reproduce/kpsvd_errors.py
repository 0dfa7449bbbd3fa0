r"""Koroko et al. 2022 (arXiv 2201.10285): how far Kronecker sums are from the Fisher.

While Adam (learning rate 1e-3) trains an autoencoder, the sample Fisher of one layer on
the training batch, one sampled label for each example, is held against its approximations:

.. math:: E_1 = \|F - \hat F\|_F / \|F\|_F, \qquad
          E_2 = \|σ(F) - σ(\hat F)\|_2 / \|σ(F)\|_2

with σ the singular values in order. CURVES and FACES are surrogates. TKFAC, which has
F's trace and its partial traces, one power step towards KPSVD, is the control that the
paper lacks; the other one is the number of examples behind F.
"""

from dataclasses import dataclass
from functools import partial
from typing import Any, Final, final

import pandas as pd
import seaborn as sns
import torch
import xarray as xr
from matplotlib.figure import Figure as Drawing

from fisherlab.analysis import compare
from fisherlab.approximators import (
    KFAC,
    KPSVD,
    TKFAC,
    Approximator,
    Deflation,
    KFACCorrected,
    Lanczos,
)
from fisherlab.plots.style import label_powers, publication, styles
from fisherlab.problems.problem import Problem
from fisherlab.reproduce.experiment import Experiment, Setting
from fisherlab.statistics import MonteCarlo, collect
from fisherlab.training.following import follow
from fisherlab.training.probes import Errors, Losses

METHODS: Final[dict[str, Approximator]] = {
    "kfac": KFAC(),
    "kpsvd": KPSVD(),
    "kfac-corrected": KFACCorrected(),
    "lanczos-paper": KPSVD(2, Lanczos(steps=2, reorthogonalise=False)),
    "deflation": Deflation(2),
    "tkfac": TKFAC(),
}
LABELS: Final = {
    "frobenius_error": "error 1: Frobenius norm",
    "spectrum_error": "error 2: singular values",
}
CONTROLS: Final = ("scale_optimal_error", "trace_ratio")
RATE: Final = 1e-3


@final
@dataclass(frozen=True)
class Size:
    """Which layer of which network, how long is trained, and when errors are taken.

    The quick size of steps, and the moments, come first; the published ones after.
    """

    problem: str
    layer: str
    shape: str
    batch: int
    steps: tuple[int, int]
    every: tuple[int, int]


CURVES: Final = Size(
    "curves-surrogate-autoencoder-koroko", "fc5", "50→25", 256, (1000, 2480), (100, 20)
)
MNIST: Final = Size(
    "mnist-autoencoder-koroko", "fc5", "30→250", 512, (300, 2548), (100, 26)
)
FACES: Final = Size(
    "faces-surrogate-autoencoder-koroko", "fc5", "30→500", 1024, (60, 2592), (30, 81)
)
SMALL: Final = Size("digits", "fc3", "20→20", 64, (10, 10), (5, 5))  # for tests


def errors(size: Size, setting: Setting) -> xr.Dataset:
    """Return both errors of all approximations along the training.

    Returns
    -------
    xarray.Dataset
        ``frobenius_error``, ``spectrum_error``, ``scale_optimal_error`` and
        ``trace_ratio`` (step, approximator), ``status`` and the losses.
    """
    problem = setting.load(size.problem, dtype=torch.float32)
    paper = not setting.quick
    probe = Errors(
        METHODS,
        MonteCarlo(1, setting.seed),
        metrics=[*LABELS, *CONTROLS],
        on="batch",
        examples=size.batch,
        layers=[size.layer],
    )
    found = follow(
        problem,
        torch.optim.Adam(problem.model.parameters(), lr=RATE),
        steps=size.steps[paper],
        probes=[probe, Losses(2000)],
        every=size.every[paper],
        batch_size=size.batch,
        seed=setting.seed,
        store=setting.store("kpsvd-errors", size.problem, str(size.every[paper])),
        progress=True,
    )
    told = (
        f"{size.problem}, layer {size.layer} ({size.shape}); Adam {RATE:g}, "
        f"{size.steps[paper]} steps of {size.batch}, float32; F of the batch of the next "
        "step, one sampled label each"
    )
    return found.isel(layer=0, drop=True).assign_attrs(settings=told)


def draw(result: xr.Dataset) -> Drawing:
    """Draw both errors over the steps; bands are all seeds."""
    rows = result[list(LABELS)].rename(LABELS).to_dataframe().reset_index()
    names = list(result["approximator"].values)
    rows = rows.melt(["step", "approximator"], list(LABELS.values()), "error")
    return _lines(rows, names, "step", "error", "log")


def _lines(rows: Any, names: list[str], x: str, col: str, scale: str) -> Drawing:
    looks = styles(names)
    with publication():
        grid = sns.relplot(
            rows,
            kind="line",
            x=x,
            y="value",
            col=col,
            hue="approximator",
            style="approximator",
            palette={name: looks[name].color for name in names},
            dashes={name: looks[name].dash for name in names},
            size="approximator",  # of lines that coincide the first is the wider one
            sizes={name: 3.0 - 0.35 * k for k, name in enumerate(names)},
            errorbar=("pi", 100),
            facet_kws={"sharex": False, "sharey": False},
            height=3.0,
            aspect=1.2,
            sort=False,
        )
        grid.set(yscale=scale)
        if scale == "log":
            for ax in grid.axes.flat:
                label_powers(ax.yaxis)
        grid.set_titles("{col_name}")
        grid.set_axis_labels(None, "relative error")
    return grid.figure


SAMPLES: Final = (128, 512, 2048)
TRAINED: Final = (300, 2548)  # steps before the controls are taken: quick, published


def controls(setting: Setting) -> xr.Dataset:
    """Return errors over the number of examples, and of every layer, of one iterate.

    The weights stay; only what F is the mean of changes. Quick: error 1 only.

    Returns
    -------
    xarray.Dataset
        ``by_examples(examples, approximator)`` of the layer 30→250 and
        ``by_layer(layer, approximator)`` at 512 examples, both error 1;
        ``scaled_by_examples``, the first with the best scale of each approximation.
    """
    problem = setting.load(MNIST.problem, dtype=torch.float32)
    steps = TRAINED[not setting.quick]
    follow(
        problem,
        torch.optim.Adam(problem.model.parameters(), lr=RATE),
        steps=steps,
        probes=[Losses(2000)],
        every=steps,
        batch_size=MNIST.batch,
        seed=setting.seed,
        store=setting.store("kpsvd-controls", str(steps)),
        progress=True,
    )
    rows = [_errors(problem, n, [MNIST.layer], setting.seed) for n in SAMPLES]
    counts = xr.DataArray(list(SAMPLES), dims="examples", name="examples")
    over = xr.concat(rows, counts).isel(layer=0, drop=True)
    layers = _errors(problem, MNIST.batch, None, setting.seed)
    found = xr.Dataset(
        {
            "by_examples": over["frobenius_error"],
            "scaled_by_examples": over["scale_optimal_error"],
            "by_layer": layers["frobenius_error"],
        }
    )
    told = (
        f"{MNIST.problem} after {steps} steps of Adam {RATE:g}, batch {MNIST.batch}, "
        f"float32; one sampled label each; layer {MNIST.layer} ({MNIST.shape}), and all at "
        f"{MNIST.batch} examples"
    )
    return found.assign_attrs(settings=told)


def _errors(
    problem: Problem, examples: int, layers: list[str] | None, seed: int
) -> xr.Dataset:
    x, y = problem.train
    data = x[:examples], y[:examples]
    fisher = MonteCarlo(1, seed)
    stats = collect(problem.model, data, problem.likelihood, fisher, layers=layers)
    return compare(stats, METHODS, metrics=["frobenius_error", "scale_optimal_error"])


def draw_controls(result: xr.Dataset) -> Drawing:
    """Draw error 1 over the number of examples, and layer by layer."""
    names = list(result["approximator"].values)
    parts = {"by_examples": "examples", "by_layer": "layer"}
    titles = {
        "examples": f"layer {MNIST.shape}, by examples",
        "layer": f"{MNIST.batch} examples, by layer",
    }
    frames = [
        result[name]
        .rename("value")
        .to_dataframe()
        .reset_index()
        .rename(columns={x: "of what"})
        .assign(of=titles[x])
        for name, x in parts.items()
    ]
    rows = pd.concat(frames, ignore_index=True)
    rows["of what"] = rows["of what"].astype(str)
    figure = _lines(rows, names, "of what", "of", "linear")
    for ax, label in zip(figure.axes, parts.values(), strict=True):
        ax.set_xlabel(label)
    return figure


def _along(name: str, of: str, size: Size, minutes: tuple[float, float]) -> Experiment:
    text = f"KPSVD: Frobenius and singular-value errors of one layer along training, {of}"
    return Experiment(
        name, text, partial(errors, size), draw, (size.problem,), minutes=minutes
    )


EXPERIMENTS: Final = (
    _along("kpsvd-errors", "CURVES surrogate", CURVES, (1.5, 7.0)),
    _along("kpsvd-errors-mnist", "MNIST", MNIST, (1.5, 35.0)),
    _along("kpsvd-errors-faces", "FACES surrogate", FACES, (6.0, 80.0)),
    Experiment(
        "kpsvd-controls",
        "KPSVD, controls: error 1 over the number of examples and by layer, MNIST",
        controls,
        draw_controls,
        (MNIST.problem,),
        minutes=(0.7, 5.0),
    ),
)
