r"""Bahamou, Goldfarb & Ren 2022 (arXiv 2202.04124), Theorem 1: linear convergence.

For one output, n data and K mini-blocks with :math:`J_b J_b^T` positive definite,

.. math:: θ \leftarrow θ - η (F_{MB} + λI)^{-1} J^T (u - y) / n

is claimed to satisfy :math:`\|u_k - y\|^2 \le (1 - η)^k \|u_0 - y\|^2` for λ in an
interval and η small enough. In the linearised model the contraction is
:math:`(1 - ηK)^2` at small λ, which leaves much room for η K ≤ 1/2; at η = 1/K the
residual can grow at first.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Final, final

import numpy as np
import seaborn as sns
import torch
import xarray as xr
from matplotlib.figure import Figure as Drawing
from torch import Tensor, nn

from fisherlab.approximators import MiniBlock
from fisherlab.layers import blocks
from fisherlab.likelihoods import Gaussian
from fisherlab.numerics.linalg import factorised
from fisherlab.plots.style import publication
from fisherlab.reproduce.experiment import Experiment, Setting
from fisherlab.statistics import Exact, Statistics, collect

WIDTH: Final = 24  # inputs, of norm √24
SETTINGS: Final = {  # examples, units, scale of the targets
    "n=6, m=16": (6, 16, 1.0),
    "n=8, m=24, far targets": (8, 24, 3.0),
}
RATES: Final = (0.1, 0.25, 0.5, 1.0)  # ηK
DAMPINGS: Final = (1.0, 10.0)  # λ in units of λ₀/n
RUNS: Final = 12  # networks and data drawn for a seed


@final
@dataclass(frozen=True, eq=False)
class Regression:
    """A network with one tanh layer and one output, on data it can fit.

    Parameters
    ----------
    model
        Linear (WIDTH, m), tanh, Linear (m, 1), no biases: m + 1 mini-blocks.
    x, y
        n inputs and n targets.
    probes
        What `collect` found out about the model, kept from step to step.
    """

    model: nn.Sequential
    x: Tensor
    y: Tensor
    probes: dict[Any, Any] = field(default_factory=dict)

    @classmethod
    def drawn(cls, examples: int, units: int, scale: float, seed: int) -> Regression:
        """Draw inputs on a sphere, targets and weights from the normal distribution."""
        generator = torch.Generator().manual_seed(seed)
        normal = partial(torch.randn, generator=generator, dtype=torch.float64)
        x = normal(examples, WIDTH)
        x = x * (WIDTH**0.5 / x.norm(dim=1, keepdim=True))
        layers = [
            nn.utils.skip_init(nn.Linear, i, o, bias=False, dtype=torch.float64)
            for i, o in ((WIDTH, units), (units, 1))
        ]
        model = nn.Sequential(layers[0], nn.Tanh(), layers[1])
        with torch.no_grad():
            for weight in model.parameters():
                weight.copy_(normal(*weight.shape) / weight.shape[1] ** 0.5)
        return cls(model, x, scale * normal(examples, 1))

    def residual(self) -> Tensor:
        """Return u − y."""
        with torch.no_grad():
            return (self.model(self.x) - self.y)[:, 0]

    def smallest(self) -> float:
        """Return λ₀, the smallest eigenvalue of any J_b J_bᵀ."""
        found = []
        for layer in self._statistics().values():
            rows = layer.example_gradients()[0]  # (n, units, inputs)
            grams = torch.einsum("nbk,mbk->bnm", rows, rows)
            found.append(factorised("eigvalsh", grams, "J_b J_bᵀ")[:, 0].min())
        return float(min(found))

    def step(self, rate: float, damping: float) -> None:
        """Move by −η (F_MB + λI)⁻¹ Jᵀ (u − y) / n."""
        residual, statistics = self.residual(), self._statistics()
        parts, parameters = blocks(self.model), dict(self.model.named_parameters())
        for name, layer in statistics.items():
            weights = (residual / len(residual))[None, None]
            gradient = layer.samples.combine(weights)[0]
            change = MiniBlock()(layer).solve(gradient, damping)
            with torch.no_grad():
                for parameter, part in parts[name].unpack(change).items():
                    parameters[parameter].sub_(rate * part)

    def _statistics(self) -> Statistics:
        data = self.x, None
        return collect(self.model, data, Gaussian(), Exact(), probes=self.probes)


def theorem(setting: Setting) -> xr.Dataset:
    """Return residuals step by step, and the bound, over seeds, rates and dampings.

    Twelve drawings a seed, 40 steps and both dampings; two drawings, 10 steps and the
    smaller damping if quick. Of the first twelve one breaks the bound at η = 1/K where
    the targets are far from the outputs.

    Returns
    -------
    xarray.Dataset
        ``residual(setting, damping, rate, run, step)`` = ‖u_k − y‖² / ‖u_0 − y‖²,
        ``bound(setting, rate, step)`` = (1 − η)ᵏ, ``holds(setting, damping, rate, run)``
        and the worst ratio of both.
    """
    first, quick = RUNS * setting.seed, setting.quick
    seeds = [first, first + 10] if quick else list(range(first, first + RUNS))
    steps, dampings = (10, DAMPINGS[:1]) if quick else (40, DAMPINGS)
    sizes = (len(SETTINGS), len(dampings), len(RATES), len(seeds))
    values, smallest = np.empty((*sizes, steps + 1)), np.empty((sizes[0], sizes[3]))
    for a, d in np.ndindex(*smallest.shape):
        examples, units, scale = list(SETTINGS.values())[a]
        least = Regression.drawn(examples, units, scale, seeds[d]).smallest()
        smallest[a, d] = least
        for b, c in np.ndindex(sizes[1], sizes[2]):
            problem = Regression.drawn(examples, units, scale, seeds[d])
            rate, damping = RATES[c] / (units + 1), dampings[b] * least / examples
            values[a, b, c, d] = _run(problem, rate, damping, steps)
    return _described(values, smallest, dampings, seeds)


def _run(problem: Regression, rate: float, damping: float, steps: int) -> list[float]:
    squares = [float(problem.residual().square().sum())]
    for _ in range(steps):
        problem.step(rate, damping)
        squares.append(float(problem.residual().square().sum()))
    return [square / squares[0] for square in squares]


def _described(
    values: np.ndarray, smallest: np.ndarray, dampings: Sequence[float], seeds: list[int]
) -> xr.Dataset:
    step = np.arange(values.shape[-1])
    rates = [[rate / (units + 1) for rate in RATES] for _, units, _ in SETTINGS.values()]
    coords = {
        "setting": list(SETTINGS),
        "damping": list(dampings),
        "rate": list(RATES),
        "run": seeds,
        "step": step,
    }
    bound = (1 - np.array(rates))[:, :, None] ** step
    residual = xr.DataArray(values, coords, list(coords))
    limit = xr.DataArray(bound, {k: coords[k] for k in ("setting", "rate", "step")})
    ratio = residual / limit
    return xr.Dataset(
        {
            "residual": residual,
            "bound": limit,
            "holds": (ratio <= 1 + 1e-9).all("step"),
            "worst_ratio": ratio.isel(step=slice(1, None)).max("step"),
            "smallest_eigenvalue": (("setting", "run"), smallest),
        },
        attrs={
            "damping_unit": "λ₀/n",
            "rate_unit": "1/K",
            "settings": (
                f"random inputs on a sphere of radius √{WIDTH}, normal targets; one tanh "
                f"layer, one output, float64; {len(seeds)} drawings, {step[-1]} steps"
            ),
        },
    )


def draw(result: xr.Dataset) -> Drawing:
    """Draw every run over the bound; above 1 the theorem's claim fails."""
    ratio = (result["residual"] / result["bound"]).rename("ratio")
    if "seed" in ratio.dims:
        ratio = ratio.stack(every=("seed", "run")).reset_index("every", drop=True)
    else:
        ratio = ratio.rename(run="every")
    rows = ratio.assign_coords(every=range(ratio.sizes["every"])).to_dataframe()
    with publication():
        grid = sns.relplot(
            rows.reset_index(),
            kind="line",
            x="step",
            y="ratio",
            hue="rate",
            units="every",
            estimator=None,
            row="setting",
            col="damping",
            palette=sns.color_palette("viridis", len(RATES)),
            height=2.6,
            aspect=1.3,
        )
        for ax in grid.axes.flat:
            ax.axhline(1.0, ls="--", c="0.3", lw=1.0)
            ax.set(yscale="log", ylim=(1e-3, 10.0))
        grid.set_titles("{row_name}, λ = {col_name:g} λ₀/n")
        grid.set_axis_labels("step k", "‖u_k − y‖² / its bound")
        grid.legend.set_title("ηK")
    return grid.figure


EXPERIMENTS: Final = (
    Experiment(
        "mbf-theorem-1",
        "MBF, theorem 1: the linear rate step by step, and its failure at η = 1/K.",
        theorem,
        draw,
        data=(),
        minutes=(0.1, 3.0),
    ),
)
