"""MBF over learning rate and damping in short runs: the paper's grid, thinned out.

On a small autoencoder of digits, all mini-blocks kept; a training that fails is NaN.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import product
from typing import Final

import matplotlib.pyplot as plt
import seaborn as sns
import xarray as xr
from matplotlib.figure import Figure as Drawing

from fisherlab.plots.style import publication
from fisherlab.reproduce.experiment import Experiment, Setting
from fisherlab.reproduce.training_races import RACES, raced

RATES: Final = (1e-5, 1e-4, 1e-3)
DAMPINGS: Final = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)
STEPS: Final = (30, 1_000)  # after 20 an inverse may be stale


def settings(setting: Setting) -> xr.Dataset:
    """Train with every rate and damping.

    Returns
    -------
    xarray.Dataset
        ``loss`` of the training examples at the end (lr, damping), NaN where it is not
        finite or the training failed; ``start``, that of the first weights.
    """
    steps = setting.steps or STEPS[not setting.quick]
    pairs = list(product(RATES, DAMPINGS))
    base = RACES["mbf-variants"]
    losses = []
    for lr, damping in pairs:
        one = {"mbf": {"lr": lr, "damping": damping}}
        chosen = replace(base, runners=one, looks=1)
        stored = ("mbf-settings", f"lr {lr:g} damping {damping:g}")
        losses.append(
            raced(chosen, steps, setting, *stored)["train_loss"].isel(optimizer=0)
        )
    ends = [float(loss[-1]) for loss in losses]
    table = xr.DataArray(ends, {"pair": range(len(pairs))}, ["pair"])
    table = table.assign_coords(
        lr=("pair", [lr for lr, _ in pairs]), damping=("pair", [d for _, d in pairs])
    )
    start = max(float(loss[0]) for loss in losses if loss[0].notnull())
    told = (
        f"{base.problem}, batch {base.batch}, float32, torch's first weights; MBF of all "
        f"mini-blocks, {steps} steps, T₁ = 1, T₂ = 20{setting.place}"
    )
    return xr.Dataset(
        {"loss": table.set_index(pair=["lr", "damping"]).unstack("pair"), "start": start},
        attrs={"settings": told, "steps": steps},
    )


def draw(result: xr.Dataset) -> Drawing:
    """Draw the loss over rate and damping; a field without a number did not end."""
    loss = result["loss"].mean("seed") if "seed" in result.dims else result["loss"]
    shown = loss.where(loss < 2 * float(result["start"].mean()))
    rows = shown.transpose("lr", "damping").to_pandas()
    with publication():
        figure, ax = plt.subplots(figsize=(4.6, 2.6), layout="constrained")
        sns.heatmap(
            rows,
            annot=True,
            fmt=".4g",
            cmap="viridis_r",
            ax=ax,
            xticklabels=[f"{d:g}" for d in rows.columns],
            yticklabels=[f"{lr:g}" for lr in rows.index],
            cbar_kws={"label": "training loss / nat"},
        )
        ax.set(xlabel="λ", ylabel="learning rate", facecolor="0.85")
    return figure


EXPERIMENTS: Final = {
    "mbf-settings": Experiment(
        "mbf-settings",
        "MBF: training loss over learning rate and damping in short runs",
        settings,
        draw,
        ("digits-autoencoder",),
        (0.8, 20.0),
        trains=True,
    )
}
