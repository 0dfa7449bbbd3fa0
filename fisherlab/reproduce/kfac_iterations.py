"""The setting of the K-FAC paper's pictures: full-batch iterations of Algorithm 2.

The tanh network 256-20-20-20-20-20-10 on 16 × 16 digits is trained by the full
optimiser (momentum, rescaling, adapted λ and γ) on all training images at once; the paper
tells an error of 5 % after 7 iterations and of 0 % after 22.

Reference: Martens & Grosse 2015, arXiv 1503.05671, caption of Figure 2 and Algorithm 2.
"""

from dataclasses import replace
from typing import Final

import pandas as pd
import seaborn as sns
import torch
import xarray as xr
from matplotlib.figure import Figure as Drawing

from fisherlab.plots.style import publication
from fisherlab.problems import describe
from fisherlab.problems.files import find
from fisherlab.problems.problem import Problem
from fisherlab.reproduce.experiment import Experiment, Setting
from fisherlab.training import AdaptiveKFAC, LevenbergMarquardt, accuracy

LAST: Final = 22
PROBLEMS: Final = ("digits", "mnist", "fashion-mnist")  # all of them 16 × 16
IMAGES: Final = (500, 1_000, 2_000, 5_000, 10_000)  # drawn from the training images
PUBLISHED: Final = {7: 0.05, 22: 0.0}  # training error after so many iterations
START: Final = 1e-3  # λ; with the paper's 150, made for other losses, nothing moves here


def trained(setting: Setting, iterations: int) -> tuple[Problem, AdaptiveKFAC, str]:
    """Train by so many iterations; return the problem, the optimiser and both in words.

    On the problem that the setting names; else at the paper's size on MNIST, where its
    files are there, and on scikit-learn's digits.
    """
    problem, optimiser, told = _begun(setting)
    for _ in range(iterations):
        optimiser.step(batch=problem.train)
    error = 1 - accuracy(problem.model, problem.train)
    said = f"{told}, {iterations} iterations, training error {100 * error:.2g} %"
    return problem, optimiser, said


def _begun(
    setting: Setting, images: int | None = None
) -> tuple[Problem, AdaptiveKFAC, str]:
    """Load the problem, with so many of its images, and make the optimiser."""
    files = describe("mnist").files
    there = all(find(file, setting.data_dir) for file in files)
    name = setting.problem or ("mnist" if there and not setting.quick else "digits")
    problem = setting.load(name)
    if images is not None:
        generator = torch.Generator().manual_seed(setting.seed)
        x, y = problem.train
        drawn = torch.randperm(len(x), generator=generator)[:images].to(x.device)
        problem = replace(problem, train=(x[drawn], y[drawn]))
    optimiser = AdaptiveKFAC(
        problem.model,
        problem.likelihood,
        "kfac",
        statistics_fraction=1.0,
        curvature_fraction=1.0,
        damping=LevenbergMarquardt(START),
    )
    told = (
        f"{name}, 256-20-20-20-20-20-10, tanh, float64, {len(problem.train[0])} images as "
        f"one batch of full K-FAC (λ₀ = {START:g})"
    )
    return problem, optimiser, told


def iterations(setting: Setting) -> xr.Dataset:
    """Return loss, training error, λ and γ after every iteration.

    Returns
    -------
    xarray.Dataset
        ``loss`` before, ``training_error``, ``lambda`` and ``gamma`` after `iteration`;
        ``error_by_images``, the training error where there are fewer `images`.
    """
    problem, optimiser, told = _begun(setting)
    count = len(problem.train[0])
    fewer = {n: _ran(*_begun(setting, n)[:2]) for n in IMAGES if n < count}
    fewer[count] = found = _ran(problem, optimiser)
    parts = [run["training_error"] for run in fewer.values()]
    errors = xr.concat(parts, xr.Variable("images", list(fewer)))
    return found.assign(error_by_images=errors).assign_attrs(settings=told)


def _ran(problem: Problem, optimiser: AdaptiveKFAC) -> xr.Dataset:
    rows = []
    for _ in range(LAST):
        loss = float(optimiser.step(batch=problem.train))
        error = 1 - accuracy(problem.model, problem.train)
        rows.append((loss, error, optimiser.lam, optimiser.gamma))
    names = ("loss", "training_error", "lambda", "gamma")
    return xr.Dataset(
        {
            name: ("iteration", list(column))
            for name, column in zip(names, zip(*rows, strict=True), strict=True)
        },
        {"iteration": range(1, LAST + 1)},
    )


def draw(ds: xr.Dataset) -> Drawing:
    """Draw loss, error and γ over the iterations, the error also of fewer images.

    Bands are all seeds; crosses are the published errors. Below one image in all an
    error is drawn on a linear scale, so that 0 is seen.
    """
    names = {"loss": "loss / nat", "gamma": "γ"}
    rows = ds[list(names)].rename(names).to_dataframe().reset_index()
    rows = rows.melt("iteration", list(names.values()), "quantity")
    rows["images"] = int(ds["images"].max())
    errors = ds["error_by_images"].rename("value").to_dataframe().reset_index()
    rows = pd.concat([errors.assign(quantity="training error"), rows])
    rows["images"] = rows["images"].map("{:,}".format)
    with publication():
        grid = sns.relplot(
            rows,
            kind="line",
            x="iteration",
            y="value",
            hue="images",
            palette="viridis",
            col="quantity",
            col_order=["loss / nat", "training error", "γ"],
            errorbar=("pi", 100),
            facet_kws={"sharey": False},
            height=2.5,
            marker="o",
            ms=4,
        )
        grid.set_titles("{col_name}")
        loss, error, _ = grid.axes.flat
        loss.set_yscale("log")
        error.set_yscale("symlog", linthresh=1 / int(ds["images"].min()))
        error.set_ylim(0, 1)
        error.plot(*zip(*PUBLISHED.items(), strict=True), "kx", clip_on=False, zorder=3)
        grid.set_axis_labels("full-batch iteration", "")
    return grid.figure


EXPERIMENTS: Final = (
    Experiment(
        "kfac-iterations",
        "K-FAC (1503.05671): error after 7 and 22 full-batch iterations of Algorithm 2",
        iterations,
        draw,
        minutes=(0.2, 6.0),
        problems=PROBLEMS,
    ),
)
