r"""Koroko et al. 2022 (arXiv 2201.10285): how far Kronecker sums are from the Fisher.

While Adam (learning rate 1e-3, minibatches of 256) trains the CURVES autoencoder
784-400-200-100-50-25-6 and back, the sample Fisher of the layer 50 → 25 on the training
batch, one sampled label for each example, is held against its approximations:

.. math:: E_1 = \|F - \hat F\|_F / \|F\|_F, \qquad
          E_2 = \|σ(F) - σ(\hat F)\|_2 / \|σ(F)\|_2

with σ the singular values in order. The curves are the surrogate of CURVES, which needs
no download.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, final

import matplotlib.pyplot as plt
import torch
import xarray as xr
from matplotlib.figure import Figure as Drawing

from fisherlab.approximators import (
    KFAC,
    KPSVD,
    Approximator,
    Deflation,
    KFACCorrected,
    Lanczos,
)
from fisherlab.plots.style import publication, styles
from fisherlab.problems import load
from fisherlab.problems.problem import Problem
from fisherlab.reproduce.figure import Figure, Result
from fisherlab.statistics import MonteCarlo
from fisherlab.training.following import follow
from fisherlab.training.probes import Errors, Losses

METHODS: Final[dict[str, Approximator]] = {
    "kfac": KFAC(),
    "kpsvd": KPSVD(),
    "kfac-corrected": KFACCorrected(),
    "lanczos-paper": KPSVD(2, Lanczos(steps=2, reorthogonalise=False)),
    "deflation": Deflation(2),
}
LABELS: Final = {
    "frobenius_error": "error 1: Frobenius norm",
    "spectrum_error": "error 2: singular values",
}


@final
@dataclass(frozen=True)
class Size:
    """How long is trained, and how often the errors are taken."""

    steps: int
    every: int
    batch: int
    examples: int
    layer: str


def errors(seed: int, quick: bool) -> xr.Dataset:
    """Return both errors of five approximations along the training.

    Parameters
    ----------
    seed
        Of weights, batches and sampled labels.
    quick
        A layer of a small network on digits, 10 steps. The full figure takes 2,480 steps
        (40 epochs), looks every 20, and runs for some minutes on two cores.

    Returns
    -------
    xarray.Dataset
        ``frobenius_error`` and ``spectrum_error`` (step, layer, approximator), and the
        losses.
    """
    if quick:
        return _followed(load("digits", seed=seed), Size(10, 5, 64, 64, "fc3"), seed)
    problem = load("curves-surrogate-autoencoder-koroko", seed=seed)
    return _followed(problem, Size(2480, 20, 256, 256, "fc5"), seed)


def _followed(problem: Problem, size: Size, seed: int) -> xr.Dataset:
    probe = Errors(
        METHODS,
        MonteCarlo(1, seed),
        metrics=list(LABELS),
        on="batch",
        examples=size.examples,
        layers=[size.layer],
    )
    return follow(
        problem,
        torch.optim.Adam(problem.model.parameters(), lr=1e-3),
        steps=size.steps,
        probes=[probe, Losses(2000)],
        every=size.every,
        batch_size=size.batch,
        seed=seed,
        progress=True,
    )


def draw(result: Result) -> Drawing:
    """Draw both errors over the steps."""
    assert isinstance(result, xr.Dataset)
    looks = styles(METHODS)
    with publication():
        figure, axes = plt.subplots(1, 2, figsize=(7.2, 3.0), layout="constrained")
        for ax, (name, label) in zip(axes, LABELS.items(), strict=True):
            rows = result[name].isel(layer=0)
            for method, look in looks.items():
                line = {"color": look.color, "linestyle": look.linestyle, "lw": 1.0}
                ax.plot(rows["step"], rows.sel(approximator=method), label=method, **line)
            ax.set_yscale("log")
            ax.set_xlabel("step")
            ax.set_ylabel(label)
        axes[1].legend()
    return figure


FIGURES: Final = {
    "kpsvd-errors": Figure(
        "kpsvd-errors",
        "KPSVD: Frobenius and singular-value errors of one layer along a training.",
        errors,
        draw,
    )
}
