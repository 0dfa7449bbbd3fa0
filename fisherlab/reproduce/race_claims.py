"""What is measured on a race of optimisers, whichever paper it is of."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import xarray as xr

from fisherlab.analysis.wording import percent

Measure = Callable[[xr.Dataset], Mapping[str, float]]


def final(ds: xr.Dataset, of: str = "train_loss") -> dict[str, float]:
    """Return the last training loss of every optimiser, or another of its numbers."""
    last = ds[of].isel(step=-1)
    return {str(name): float(last.sel(optimizer=name)) for name in last["optimizer"].values}


def ratio(label: str, first: str, second: str) -> Measure:
    """Return what measures the ratio of two last training losses."""
    return lambda ds: {label: final(ds)[first] / final(ds)[second]}


def short_run(ds: xr.Dataset) -> str:
    """Say how short a run was beside the published one, and which optimisers failed."""
    share = float(ds.attrs["steps"]) / float(ds.attrs["published_steps"])
    parts = [f"The run is {percent(share)} of the published length."]
    for name in ds["optimizer"].values:
        status = str(ds["status"].sel(optimizer=name).values)
        if status != "ok":
            parts.append(f"`{name}` failed: {status}")
    return " ".join(parts)


def every_loss(ds: xr.Dataset) -> str:
    """Say where every optimiser of a race ended."""
    said = ", ".join(f"`{name}` {loss:.4g}" for name, loss in final(ds).items())
    return f"{short_run(ds)} Last training losses: {said}."
