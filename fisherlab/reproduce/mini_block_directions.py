"""Bahamou, Goldfarb & Ren 2022 (arXiv 2202.04124), Algorithm 5 and Figure 6.

At the same iterates and batches every method keeps its own moving average and gives a
direction; its cosine with that of dense layer blocks (BDF), which moves the network, is
recorded layer by layer. The paper names neither damping, step size nor batch: the ranking
depends on the damping, so it is swept and printed.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Final, final

import matplotlib.pyplot as plt
import numpy as np
import seaborn as sns
import torch
import xarray as xr
from matplotlib.figure import Figure as Drawing
from torch import Tensor

from fisherlab.approximators import (
    KFAC,
    AdamPreconditioner,
    ExactBlock,
    MiniBlock,
    ShampooPreconditioner,
    average,
)
from fisherlab.approximators.mean_gradients import mean_of
from fisherlab.layers import blocks
from fisherlab.operators import Factored, Operator
from fisherlab.plots.style import publication
from fisherlab.problems.problem import Pair, Problem
from fisherlab.reproduce.experiment import Experiment, Setting
from fisherlab.statistics import Empirical, LayerStatistics, MonteCarlo, Statistics, collect
from fisherlab.training.schedules import Order

BATCH: Final = 128
RATE: Final = 1e-2
KEPT: Final = 0.9  # of averages and of the gradient
DAMPINGS: Final = (1e-4, 1e-3, 1e-2, 1e-1)
MIDDLE: Final = ("fc2", "fc3", "fc4", "fc5")


@final
@dataclass(frozen=True)
class Method:
    """What a method averages, from which labels, and how it solves.

    Parameters
    ----------
    state
        From the statistics of a layer to its matrix; None has none.
    sampled
        Whether labels are drawn from the model.
    solve
        From (matrix, gradient, λ) to the direction.
    """

    state: Callable[[LayerStatistics], Operator] | None
    sampled: bool
    solve: Callable[[Any, Tensor, float], Tensor]


def _tikhonov(op: Operator, gradient: Tensor, damping: float) -> Tensor:
    return op.solve(gradient, damping)


def methods(damping: float) -> dict[str, Method]:
    """Return the methods compared; "BDF" is the one that the others are held against."""
    mean = MiniBlock("mean_gradient")
    shampoo = ShampooPreconditioner(damping)
    return {
        "BDF": Method(ExactBlock(), False, _tikhonov),
        "SGD-m": Method(None, False, lambda op, gradient, damping: gradient),
        "Adam": Method(AdamPreconditioner(), False, _tikhonov),
        "MBF": Method(mean, False, _tikhonov),
        "MBF-True": Method(mean, True, _tikhonov),
        "mini-block": Method(MiniBlock(), False, _tikhonov),
        "Shampoo": Method(shampoo, False, lambda op, g, _: op.solve(g, 0.0)),
        "KFAC, √λ on each factor": Method(
            KFAC(), True, lambda op, g, damping: op.solve(g, Factored(damping, pi=1.0))
        ),
        "KFAC, λI": Method(KFAC(), True, _tikhonov),
    }


class Follower:
    """The moving averages of all methods along one trajectory."""

    def __init__(self, problem: Problem, damping: float, seed: int) -> None:
        self.problem, self.damping, self.seed = problem, damping, seed
        self.methods = methods(damping)
        self.states: dict[tuple[str, str], Operator] = {}
        self.gradients: dict[str, Tensor] = {}
        self._probes: dict[Any, Any] = {}

    def observe(self, batch: Pair, step: int, share: float) -> None:
        """Average a batch into every state; `share` is the weight of the old one."""
        drawn = {False: self._statistics(batch, None), True: self._statistics(batch, step)}
        for label, method in self.methods.items():
            if method.state is None:
                continue
            for layer, statistics in drawn[method.sampled].items():
                if layer == "fc1" and label != "mini-block":
                    continue  # its dense block would have 5,140 rows
                new, old = method.state(statistics), self.states.get((label, layer))
                self.states[label, layer] = new if old is None else average(old, new, share)
        for layer, statistics in drawn[False].items():
            mean = mean_of(statistics, "momentum").gradient
            known = self.gradients.get(layer)
            self.gradients[layer] = mean if known is None else KEPT * known + mean

    def _statistics(self, batch: Pair, step: int | None) -> Statistics:
        fisher = Empirical() if step is None else MonteCarlo(1, self.seed, step)
        model, likelihood = self.problem.model, self.problem.likelihood
        return collect(model, batch, likelihood, fisher, probes=self._probes)

    def direction(self, label: str, layer: str) -> Tensor:
        """Return a method's direction for one layer."""
        method, state = self.methods[label], self.states.get((label, layer))
        return method.solve(state, self.gradients[layer], self.damping)

    def cosines(self) -> list[list[float]]:
        """Return the cosines with BDF, a row a method, for the middle layers."""
        best = {layer: self.direction("BDF", layer).flatten() for layer in MIDDLE}
        others = [label for label in self.methods if label != "BDF"]
        return [
            [
                float(torch.cosine_similarity(self.direction(o, n).flatten(), best[n], 0))
                for n in MIDDLE
            ]
            for o in others
        ]

    def move(self) -> None:
        """Step along BDF; the first layer along its mini-blocks."""
        parameters = dict(self.problem.model.named_parameters())
        for layer, block in blocks(self.problem.model).items():
            label = "mini-block" if layer == "fc1" else "BDF"
            change = block.unpack(self.direction(label, layer))
            with torch.no_grad():
                for name, part in change.items():
                    parameters[name].sub_(part, alpha=RATE)


def cosines(setting: Setting) -> xr.Dataset:
    """Return the cosines with BDF over steps, layers, methods and dampings.

    256-20⁵-10 on `digits`, batch 128, averages 0.9 begun with one pass over the data,
    step 0.01; 200 steps at four dampings (25 steps at three of them if quick).
    """
    dampings, steps = (DAMPINGS[:3], 25) if setting.quick else (DAMPINGS, 200)
    values = [list(_trajectory(setting, damping, steps)) for damping in dampings]
    names = [label for label in methods(0.0) if label != "BDF"]
    cosine = xr.DataArray(
        np.array(values),
        {
            "damping": list(dampings),
            "step": range(steps),
            "approximator": names,
            "layer": list(MIDDLE),
        },
        attrs={"long_name": "cosine with BDF"},
    )
    told = (
        f"digits (scikit-learn), 256-20-20-20-20-20-10, tanh, float64; batch {BATCH}, step "
        f"{RATE:g} along BDF, averages {KEPT:g} begun with a pass over the data; layers "
        f"{MIDDLE[0]}–{MIDDLE[-1]}"
    )
    return xr.Dataset({"cosine": cosine}, attrs={"settings": told})


def _trajectory(
    setting: Setting, damping: float, steps: int
) -> Iterator[list[list[float]]]:
    problem, seed = setting.load("digits"), setting.seed
    x, y = problem.train
    follower = Follower(problem, damping, seed)
    order = Order(len(x), BATCH, seed)
    passed = len(x) // BATCH  # the warm start: a plain mean over the data
    for number in range(passed):
        chosen = order.indices(number)
        follower.observe((x[chosen], y[chosen]), number, number / (number + 1))
    follower.gradients.clear()
    for step in range(steps):
        chosen = order.indices(passed + step)
        follower.observe((x[chosen], y[chosen]), passed + step, KEPT)
        yield follower.cosines()
        follower.move()


def draw(result: xr.Dataset) -> Drawing:
    """Draw every method over the damping, and over the steps at each damping.

    Means over the layers; on the left also over the steps. Bands are all seeds.
    """
    rows = result["cosine"].mean("layer").rename("cosine").to_dataframe().reset_index()
    means = result["cosine"].mean(("layer", "step")).rename("cosine").to_dataframe()
    names = list(result["approximator"].values)
    with publication():
        columns = 1 + result.sizes["damping"]
        figure, grid = plt.subplots(
            1, columns, figsize=(3.1 * columns, 3.2), sharey=True, layout="constrained"
        )
        line = {"hue": "approximator", "style": "approximator", "hue_order": names}
        line |= {"errorbar": ("pi", 100), "y": "cosine"}
        left = means.reset_index()
        sns.lineplot(left, x="damping", ax=grid[0], legend=False, markers=True, **line)
        grid[0].set(xscale="log", xlabel="damping λ", title="mean over steps")
        for ax, damping in zip(grid[1:], result["damping"].values, strict=True):
            part = rows[rows["damping"] == damping]
            last = damping == result["damping"].values[-1]
            sns.lineplot(part, x="step", ax=ax, legend=last, **line)
            ax.set_title(f"λ = {damping:g}")
        grid[0].set_ylabel("cosine with BDF")
        sns.move_legend(grid[-1], "center left", bbox_to_anchor=(1.02, 0.5), title=None)
    return figure


EXPERIMENTS: Final = (
    Experiment(
        "mbf-figure-6",
        "MBF, figure 6: cosines of directions with dense blocks, over the damping.",
        cosines,
        draw,
        minutes=(0.3, 3.0),
    ),
)
