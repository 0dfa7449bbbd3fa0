"""What a single step of K-FAC gains over the damping of its factors, raw and rescaled.

The network of the K-FAC paper's pictures after 7 full-batch iterations. Δ = −F̂⁻¹ ∇h with
the block-tridiagonal F̂ of factors damped by γ is taken as it is, and as αΔ with the α that
minimises the quadratic model of the exact Fisher and (λ + η) I.

Reference: Martens & Grosse 2015, arXiv 1503.05671, sections 6.2 to 6.4 and Figure 7, whose
network is MNIST's autoencoder at iteration 500.
"""

from typing import Final

import numpy as np
import seaborn as sns
import torch
import xarray as xr
from matplotlib.figure import Figure as Drawing
from torch import Tensor

from fisherlab.approximators import KFACTridiagonal
from fisherlab.approximators.network import ExactNetwork
from fisherlab.layers import blocks
from fisherlab.operators import Factored
from fisherlab.plots.style import publication
from fisherlab.problems.problem import Problem, drawn
from fisherlab.reproduce.experiment import PICTURE, Bound, Claim, Experiment, Setting
from fisherlab.reproduce.kfac_iterations import PROBLEMS, trained
from fisherlab.reproduce.kfac_matrices import EXAMPLES, ITERATIONS
from fisherlab.showing import number
from fisherlab.statistics import collect, mean_gradient

GAMMAS: Final = tuple(10 ** (k / 4) for k in range(-14, 5))  # 3e-4 to 10
QUICK_GAMMAS: Final = GAMMAS[::2]
STEPS: Final = ("raw", "rescaled")


def rescaling(setting: Setting) -> xr.Dataset:
    """Return what raw and rescaled steps gain over γ.

    Returns
    -------
    xarray.Dataset
        ``gain(step, gamma)``, h(θ) − h(θ + δ) in nats on the examples of F, h without η;
        ``alpha(gamma)``.
    """
    problem, optimiser, told = trained(setting, ITERATIONS)
    data = drawn(problem.train, EXAMPLES, setting.seed)
    stats = collect(problem.model, data, problem.likelihood, compress=False)
    exact, chain = ExactNetwork()(stats), KFACTridiagonal()(stats)
    slopes = mean_gradient(problem.model, data, problem.likelihood)
    gradient = torch.cat([slopes[name].gradient.flatten() for name in stats])
    gradient = gradient + optimiser.l2 * _point(problem)
    shift = optimiser.lam + optimiser.l2
    before, gains, alphas = _loss(problem, data), [], []
    gammas = QUICK_GAMMAS if setting.quick else GAMMAS
    for gamma in gammas:
        step = -(chain.inverse(Factored(gamma**2)) @ gradient[:, None])[:, 0]
        curved = float(step @ (exact @ step[:, None])[:, 0] + shift * step @ step)
        alpha = -float(gradient @ step) / curved
        gains.append([before - _after(problem, data, s * step) for s in (1.0, alpha)])
        alphas.append(alpha)
    settings = (
        f"{told}; h of {len(data[0])} examples, tridiagonal F̂ of all layers, λ + η = "
        f"{shift:.3g}, γ in use {optimiser.gamma:.3g}"
    )
    return xr.Dataset(
        {"gain": (("gamma", "step"), np.array(gains)), "alpha": ("gamma", alphas)},
        {"gamma": list(gammas), "step": list(STEPS)},
        {"settings": settings},
    )


def _point(problem: Problem) -> Tensor:
    """Return all parameters as the blocks of the Fisher have them."""
    weights = dict(problem.model.named_parameters())
    parts = [b.pack(weights).flatten() for b in blocks(problem.model).values()]
    return torch.cat(parts).detach()


def _loss(problem: Problem, data: tuple[Tensor, Tensor]) -> float:
    with torch.no_grad():
        return float(problem.likelihood.loss(problem.model(data[0]), data[1]).mean())


def _after(problem: Problem, data: tuple[Tensor, Tensor], step: Tensor) -> float:
    """Return the loss after a step, which is taken back."""
    weights = dict(problem.model.named_parameters())
    kept = {name: weight.detach().clone() for name, weight in weights.items()}
    start = 0
    with torch.no_grad():
        for block in blocks(problem.model).values():
            like = block.pack(kept)
            part = step[start : start + like.numel()].view_as(like)
            start += like.numel()
            for name, change in block.unpack(part).items():
                weights[name].add_(change)
    found = _loss(problem, data)
    with torch.no_grad():
        for name, weight in weights.items():
            weight.copy_(kept[name])
    return found


def draw(result: xr.Dataset) -> Drawing:
    """Draw what the steps gain over γ; bands are all seeds. Losses are cut off."""
    rows = result["gain"].to_dataframe().reset_index()
    top = float(result["gain"].max())
    with publication():
        grid = sns.relplot(
            rows,
            kind="line",
            x="gamma",
            y="gain",
            hue="step",
            style="step",
            markers=True,
            errorbar=("pi", 100),
            height=3.2,
            aspect=1.3,
        )
        grid.set(xscale="log", ylim=(-0.5 * top, 1.1 * top))
        grid.refline(y=0.0)
        grid.set_axis_labels("γ", "h(θ) − h(θ + δ) / nat")
    return grid.figure


def _best(ds: xr.Dataset) -> dict[str, tuple[float, float]]:
    """Return the largest gain of each kind of step, and its γ."""
    best = ds["gain"].max("gamma"), ds["gain"].idxmax("gamma")
    return {s: (float(best[0].sel(step=s)), float(best[1].sel(step=s))) for s in STEPS}


def _gains(ds: xr.Dataset) -> dict[str, float]:
    (raw, _), (rescaled, _) = _best(ds).values()
    return {"raw / rescaled": raw / rescaled}


def _dampings(ds: xr.Dataset) -> dict[str, float]:
    (_, raw), (_, rescaled) = _best(ds).values()
    return {"rescaled / raw": rescaled / raw}


def _weakly_damped(ds: xr.Dataset) -> dict[str, float]:
    least = ds["gain"].isel(gamma=0)
    return {s: float(least.sel(step=s)) for s in STEPS}


def _told(ds: xr.Dataset) -> str:
    said = [
        f"{name} {number(gain)} nat at γ = {number(gamma)}"
        for name, (gain, gamma) in _best(ds).items()
    ]
    least = [f"{name} {number(gain)}" for name, gain in _weakly_damped(ds).items()]
    return (
        f"The best gains are {' and '.join(said)}; at γ = {float(ds['gamma'][0]):.3g} they "
        f"are {' and '.join(least)} nat."
    )


CLAIMS: Final = (
    Claim(
        "The best rescaled step gains more than the best raw one.",
        {"raw / rescaled": Bound(at_most=1.0)},
        _gains,
        "largest gains over γ",
        basis=PICTURE,
        reason=_told,
    ),
    Claim(
        "Rescaled, the best γ is the smaller one.",
        {"rescaled / raw": Bound(at_most=1.0)},
        _dampings,
        "γ of the largest gains",
        basis=PICTURE,
        reason=_told,
    ),
    Claim(
        "Where factors are hardly damped a raw step loses, a rescaled one gains.",
        {"raw": Bound(at_most=0.0), "rescaled": Bound(at_least=0.0)},
        _weakly_damped,
        "gains in nats at the smallest γ",
        basis=PICTURE,
        reason=_told,
    ),
)
EXPERIMENTS: Final = (
    Experiment(
        "kfac-rescaling",
        "K-FAC (1503.05671) Figure 7: what one step gains over γ, raw and rescaled",
        rescaling,
        draw,
        minutes=(0.2, 4.0),
        problems=PROBLEMS,
    ),
)
