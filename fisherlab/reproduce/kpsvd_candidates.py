"""Why two Kronecker terms train better than one in Koroko et al.: candidates, one by one.

The paper gives every method its own learning rate and damping. Their clip bounds Σ⟨d, ∇⟩
of the direction d without the rate η, so that every clipped step has the length η √κ in
the norm of the damped F̂, whatever the method: who has the larger rate goes further.
Each candidate changes one thing; all methods take equally many steps.
"""

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any, Final

import seaborn as sns
import torch
import xarray as xr
from matplotlib.figure import Figure as Drawing

from fisherlab.operators.base import Factored
from fisherlab.plots.style import publication
from fisherlab.reproduce.experiment import Experiment, Setting
from fisherlab.reproduce.races import RACES, Race
from fisherlab.reproduce.training_races import raced
from fisherlab.statistics import Empirical

PUBLISHED: Final = replace(RACES["kpsvd-published-mnist"], looks=4)
TERMS: Final = {
    "kfac-koroko": 1,
    "kpsvd-koroko": 1,
    "deflation-koroko": 2,
    "kfac-corrected-koroko": 2,
}
EXTREMES: Final = ("kfac-koroko", "kfac-corrected-koroko")
STEPS: Final = (40, 3_000)
OWN: Final = "each at its own"
CORRECTED: Final = "all at KFAC-CORRECTED's"
SETTINGS_ALONE: Final = (OWN, CORRECTED, "all at KFAC's", "all at DEFLATION's")


def _all_at(lr: float, added: float, names: Iterable[str] = TERMS, **more: Any) -> Race:
    """Return a race at one rate and one number on both factors, in the paper's units.

    The paper adds λ itself for two terms and √λ for one.
    """
    runners = {
        name: {"lr": lr, "damping": added if TERMS[name] == 2 else added**2, **more}
        for name in names
    }
    return replace(PUBLISHED, runners=runners)


def races() -> dict[str, Race]:
    """Return the candidates: published settings, one setting for all, one change each."""
    two = _all_at(0.1, 0.01, EXTREMES)
    balanced = Factored((PUBLISHED.outputs * 0.01) ** 2, mode="abs")  # π of the traces
    by_traces = {name: {"lr": 0.1, "damping": balanced} for name in EXTREMES}
    often = {"statistics_every": 10, "inverse_every": 10}
    return {
        OWN: replace(PUBLISHED, runners={n: PUBLISHED.runners[n] for n in TERMS}),
        CORRECTED: _all_at(0.1, 0.01),
        SETTINGS_ALONE[2]: _all_at(0.01, 0.01),
        SETTINGS_ALONE[3]: _all_at(0.003, 0.001),
        "damping by the traces": replace(two, runners=by_traces),
        "statistics every 10": _all_at(0.1, 0.01, EXTREMES, **often),
        "labels of the data": _all_at(0.1, 0.01, EXTREMES, fisher=Empirical()),
        "small rate, no clip": _all_at(0.01, 0.01, EXTREMES, clip=None),
        "torch's weights": replace(two, default_weights=True),
        "float64": replace(two, dtype=torch.float64),
    }


def candidates(setting: Setting) -> xr.Dataset:
    """Train the methods under every candidate, going on with stored runs.

    Those after the fourth change `CORRECTED` in one thing, for KFAC and KFAC-CORRECTED.

    Returns
    -------
    xarray.Dataset
        What `race` returns along a dimension ``candidate``, and ``relative``, the loss
        over KFAC's at the same step (candidate, optimizer, step).
    """
    steps = setting.steps or STEPS[not setting.quick]
    found = {name: trained(name, one, steps, setting) for name, one in races().items()}
    table = joined(found)
    return table.assign_attrs(steps=steps, settings=table.settings + setting.place)


def trained(name: str, chosen: Race, steps: int, setting: Setting) -> xr.Dataset:
    """Train by a candidate; those that differ in settings alone share their stored runs."""
    rows = []
    for runner, settings in chosen.runners.items():
        said = "lr {lr:g} damping {damping:.3g}"
        kept = said.format(**settings) if name in SETTINGS_ALONE else name
        one = replace(chosen, runners={runner: settings})
        rows.append(raced(one, steps, setting, "kpsvd-candidates", kept))
    every: xr.Dataset = xr.concat(rows, "optimizer")
    return every


def joined(found: Mapping[str, xr.Dataset]) -> xr.Dataset:
    """Lay candidates along a dimension and hold their losses against KFAC's."""
    table = xr.concat(found.values(), xr.Variable("candidate", list(found)), join="outer")
    loss = table["train_loss"].sel(optimizer=list(TERMS))
    relative = loss / loss.sel(optimizer="kfac-koroko", drop=True)
    told = (
        f"{PUBLISHED.problem}, batch {PUBLISHED.batch}, {int(table['step'][-1]):,} of "
        f"{STEPS[1]:,} steps; from the fifth on one change of lr 0.1 and 0.01 on both "
        "factors"
    )
    return table.assign(relative=relative).assign_attrs(settings=told)


def draw(result: xr.Dataset) -> Drawing:
    """Draw the last losses over KFAC's, a line of points a candidate."""
    ends = result["relative"].isel(step=-1)
    others = ends.drop_sel(optimizer="kfac-koroko")
    ended = others.notnull().any([dim for dim in others.dims if dim != "candidate"])
    names = [
        f"{name}{'' if one else ' (failed)'}"
        for name, one in zip(ends["candidate"].values, ended.values, strict=True)
    ]
    last = ends.assign_coords(candidate=names).to_dataframe().reset_index()
    with publication():
        grid = sns.catplot(
            last,
            kind="point",
            x="relative",
            y="candidate",
            hue="optimizer",
            linestyle="none",
            errorbar=("pi", 100),
            dodge=0.4,
            markersize=4,
            height=4.2,
            aspect=1.4,
        )
        grid.refline(x=1.0)
        grid.set_axis_labels(f"training loss / KFAC's after {result.steps} steps", "")
    return grid.figure


EXPERIMENTS: Final = (
    Experiment(
        "kpsvd-candidates",
        "KPSVD, section 4: which setting puts two terms ahead of one in training.",
        candidates,
        draw,
        (PUBLISHED.problem,),
        (6.3, 1500.0),
        trains=True,
    ),
)
