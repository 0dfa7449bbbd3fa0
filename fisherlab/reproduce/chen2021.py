"""Chen 2021, "An iterative K-FAC algorithm for deep learning", arXiv 2101.00218.

Only the abstract could be read: it claims that conjugate gradients without factors take
"much less" time and memory than K-FAC. "Much less" stands here for half.
"""

from __future__ import annotations

from typing import Final

import xarray as xr

from fisherlab.analysis.wording import number, percent
from fisherlab.reproduce.claims import CONTROL, Bound, Claim
from fisherlab.reproduce.rows import Row

PAPER: Final = "chen2021"
HALF: Final = 0.5
HALVED: Final = 'half, for "much less"'


def _time(ds: xr.Dataset) -> dict[str, float]:
    return {"share of settings": float((ds["time_ratio"] <= HALF).mean())}


def _memory(ds: xr.Dataset) -> dict[str, float]:
    return {"share of settings": float((ds["memory_ratio"] <= HALF).mean())}


def _accurate(ds: xr.Dataset) -> dict[str, float]:
    worst = ds["error"].max(("width", "batch", "alpha"))
    return {f"tolerance {t:g}": float(worst.sel(residual=t)) for t in ds["residual"].values}


def _where(ds: xr.Dataset) -> str:
    few, many = ds["batch"].values[[0, -1]]
    rows = [
        f"{number(float(ds['time_ratio'].sel(batch=m).median()))} at m = {m}"
        for m in (few, many)
    ]
    return (
        "The median time over widths, dampings and tolerances, that of K-FAC being one: "
        f"{' and '.join(rows)}; half the numbers are held in "
        f"{percent(float((ds['memory_ratio'] <= HALF).mean()))} of the settings, where "
        "examples are few beside the width."
    )


ROWS: Final = (
    Row(
        PAPER,
        "Abstract",
        "Time and memory of CG-FAC beside K-FAC, over width, batch and tolerance.",
        "cg-fac-cost",
        (
            Claim(
                "Much less time.",
                {"share of settings": Bound(at_least=1.0)},
                _time,
                "settings that take at most half of K-FAC's processor time for a refresh "
                "and a step",
                basis=HALVED,
                reason=_where,
            ),
            Claim(
                "Much less memory.",
                {"share of settings": Bound(at_least=1.0)},
                _memory,
                "settings that hold at most half the numbers: samples, against factors and "
                "their inverses",
                basis=HALVED,
                reason=_where,
            ),
            Claim(
                "The same step.",
                {
                    "tolerance 0.01": Bound(at_most=0.05),
                    "tolerance 1e-06": Bound(at_most=1e-4),
                },
                _accurate,
                "largest distance of the two solutions over their size",
                basis=CONTROL,
            ),
        ),
        "what is stated of training; only the abstract was at hand",
    ),
    Row(
        PAPER,
        "Algorithm",
        "CG-FAC as an optimiser.",
        missing="`fisherlab follow --optimizer cg-fac`; its settings could not be read",
    ),
)
