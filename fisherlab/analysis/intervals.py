"""Confidence intervals over seeds, and the noise of the reference itself."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch
import xarray as xr
from scipy.special import stdtrit
from torch import nn

from fisherlab.analysis.cells import Damping, Telling, described
from fisherlab.analysis.comparison import compare
from fisherlab.analysis.executors import Folder, Workers, told
from fisherlab.analysis.layerwise import Source
from fisherlab.approximators import Approximator, ExactBlock
from fisherlab.approximators.register import Chosen, by_name
from fisherlab.catalogue import FLOOR, METRICS
from fisherlab.codes import checksum
from fisherlab.codes import described as code_of
from fisherlab.errors import BudgetError
from fisherlab.likelihoods import Likelihood
from fisherlab.metrics.pairs import noise_floors
from fisherlab.numerics.devices import tensors
from fisherlab.settings import numeric, require_number
from fisherlab.statistics import Layers, MonteCarlo, Statistics, collect
from fisherlab.statistics.fishers import Fisher

SAMPLED = MonteCarlo(1)
SEEDS = tuple(range(5))
ERROR = "frobenius_error"
SPLITS = 8  # random halvings of the examples
FLOORS = ("noise_floor", "noise_floor_low", "noise_floor_high")
_LABELS = {
    "noise_floor": "relative distance of the reference from its limit, ½‖F_A − F_B‖/‖F‖",
    "noise_floor_low": "smallest over the splits",
    "noise_floor_high": "largest over the splits",
    "below_noise": "1 if the error is within the noise of the reference, -1 unknown",
    "tied_with_best": "1 if not distinguishable from the best, 0 if worse, -1 unknown",
}


@numeric
def uncertainty(
    model: nn.Module,
    data: Any,
    likelihood: Likelihood,
    approximators: Chosen = None,
    *,
    fisher: Fisher = SAMPLED,
    seeds: Sequence[int] | int = SEEDS,
    reference: Fisher | None = None,
    metrics: Sequence[str] | None = None,
    damping: Damping = None,
    gradient: Mapping[str, Any] | None = None,
    layers: Sequence[str] | None = None,
    level: float = 0.95,
    splits: int = SPLITS,
    executor: Workers = None,
    store: str | os.PathLike[str] | None = None,
    progress: Telling = False,
) -> xr.Dataset:
    """Repeat a comparison over seeds and say which differences are larger than noise.

    Parameters
    ----------
    model, data, likelihood
        As for `collect`; the data are gone through once a seed.
    approximators, metrics, damping, gradient
        As for `compare`; `frobenius_error` is always among the metrics.
    fisher
        Which Fisher the approximations are made from. Only a `MonteCarlo` one is repeated
        over the seeds; any other has no noise of sampling and is taken once.
    seeds
        Seeds of the sampled labels, or how many: 0, 1, …
    reference
        The Fisher that is called exact, e.g. ``Exact()``; each seed's own by default.
    layers
        Block names or module prefixes; all by default.
    level
        Of the confidence intervals.
    splits
        Random halves of the examples for the noise floor.
    executor
        What does the seeds: anything with ``submit``, such as a `ProcessPoolExecutor` or
        a ``dask.distributed.Client``, or a function that begins one. The numbers are the
        same.
    store
        A folder that keeps every seed that is done, from where more seeds go on;
        `fl.open` reads it.
    progress
        Show a bar, or call a function with a `Done` after every seed.

    Returns
    -------
    xarray.Dataset
        Each metric with a dim `seed`, and its `_mean`, `_low` and `_high` (Student's
        interval of the mean; NaN for one seed). `noise_floor(layer)`: how far the
        reference itself is from its limit of infinitely many examples, from halves of the
        data. `below_noise(layer, approximator)`: whether the error is within that.
        `tied_with_best(layer, approximator)`: whether its paired difference to the
        layer's best approximation can be told from zero.

    Raises
    ------
    ValueError
        For no seeds, a level outside of (0, 1), or what `compare` refuses.
    StoreError
        If the store holds other repeats.
    ExecutorError
        If the executor loses seeds.

    Examples
    --------
    >>> import torch, fisherlab as fl
    >>> data = torch.rand(20, 3).double(), None
    >>> model = torch.nn.Linear(3, 4).double()
    >>> ds = fl.uncertainty(model, data, fl.Categorical(), ["kfac", "diagonal"])
    >>> ds.frobenius_error.dims, ds.frobenius_error_mean.dims
    (('seed', 'layer', 'approximator'), ('layer', 'approximator'))
    """
    if isinstance(seeds, str) or not isinstance(seeds, Sequence):
        require_number(f"uncertainty(seeds={seeds!r})", seeds, "a whole number")
        seeds = range(seeds)
    if not seeds or not 0 < level < 1:
        msg = f"uncertainty: seeds={list(seeds)}, level={level}; seeds and 0 < level < 1."
        raise ValueError(msg)
    wanted = metrics if metrics is None or ERROR in metrics else [ERROR, *metrics]
    chosen = by_name(approximators)
    asked = {"metrics": wanted, "damping": damping, "gradient": gradient}
    repeats = _repeats(fisher, seeds)
    names = [f"seed {seed}" for _, seed in repeats]
    names[0] += f" and the noise of {splits} halves"
    source = Source(model, data, likelihood, fisher, layers, None)
    request = partial(_request, source, reference, chosen, asked)
    kept = Folder.of("uncertainty", store, request, names, "seed")
    fixed = None
    if reference is not None and not all(map(kept.holds, names)):
        fixed = collect(model, data, likelihood, reference, layers=layers)
    repeat = partial(_repeated, source, chosen, {**asked, "reference": fixed})
    cells = {
        name: partial(repeat, one, seed, 0 if k else splits)
        for k, (name, (one, seed)) in enumerate(zip(names, repeats, strict=True))
    }
    runs = kept.filled("uncertainty", cells, executor, progress, "seed")
    floors = {name: runs[0][name] for name in FLOORS}
    ds = _joined([run.drop_vars(FLOORS, errors="ignore") for run in runs])
    ds = ds.assign(floors).assign(_intervals(ds, level))
    ds["below_noise"] = _below_noise(ds[f"{ERROR}_mean"], ds["noise_floor"])
    ds["tied_with_best"] = _tied(ds, level)
    made = {"analysis": "uncertainty", "confidence": level, "splits": splits}
    return described(ds.assign_attrs(made), _LABELS | _interval_labels(ds))


def _request(
    source: Source,
    reference: Fisher | None,
    chosen: Mapping[str, Approximator],
    asked: Mapping[str, Any],
) -> dict[str, str]:
    """Return what all repeats depend on."""
    labels = source.fisher
    if isinstance(labels, MonteCarlo):
        source = replace(source, fisher=replace(labels, seed=0))
    about = {**asked, "gradient": checksum(*tensors(asked["gradient"]))}
    about |= {"reference": reference, "layers": source.layers}
    plain = {name: code_of(value) for name, value in about.items()}
    return {**source.identity(), **plain, **told(chosen)}


def _repeated(
    source: Source,
    chosen: Mapping[str, Approximator],
    asked: Mapping[str, Any],
    fisher: Fisher,
    seed: int,
    splits: int,
) -> xr.Dataset:
    """Return the comparison of one seed; with splits also the noise of the reference."""
    stats = collect(
        source.model, source.data, source.likelihood, fisher, layers=source.layers
    )
    found = compare(stats, chosen, **asked).expand_dims(seed=[seed])
    return found.assign(_floors(asked["reference"] or stats, splits)) if splits else found


def _repeats(fisher: Fisher, seeds: Sequence[int]) -> list[tuple[Fisher, int]]:
    if isinstance(fisher, MonteCarlo):
        return [(replace(fisher, seed=seed), seed) for seed in seeds]
    return [(fisher, seeds[0])]


def _joined(runs: Sequence[xr.Dataset]) -> xr.Dataset:
    """Stack the seeds; what is the same for all of them loses the dim."""
    ds = xr.concat(runs, "seed", data_vars="all", join="exact", combine_attrs="override")
    for name in ("stored_numbers", "solve_flops"):
        if name in ds:
            ds[name] = ds[name].isel(seed=0, drop=True)
    ds["status"] = _first_reason(ds["status"], "ok")
    ds["floored"] = _first_reason(ds["floored"], "")
    ds["converged"] = ds["converged"].min("seed").astype("int8")
    return ds.drop_attrs(deep=False).assign_attrs(
        {k: v for k, v in runs[0].attrs.items() if k != "seed"}
    )


def _first_reason(texts: xr.DataArray, fine: str) -> xr.DataArray:
    """Return what the first seed with something to say says."""
    every = texts.transpose("seed", ...).values
    told = every[0].copy()
    for row in every[1:]:
        told = np.where(told == fine, row, told)
    return xr.DataArray(told, dims=texts.isel(seed=0).dims)


def _floors(stats: Statistics, splits: int) -> dict[str, Any]:
    each = []
    for layer in stats.values():
        exact = ExactBlock()(layer).to(torch.float64)
        each.append(noise_floors(exact, splits))
    table = np.array(each).reshape(len(stats), splits)
    found = np.sqrt(np.square(table).mean(1)), table.min(1), table.max(1)
    return {name: ("layer", values) for name, values in zip(FLOORS, found, strict=True)}


def _intervals(ds: xr.Dataset, level: float) -> dict[str, xr.DataArray]:
    found = {}
    for name in METRICS:
        if name in ds:
            middle, reach = _student(ds[name], level)
            found[f"{name}_mean"] = middle
            found[f"{name}_low"] = middle - reach
            found[f"{name}_high"] = middle + reach
    return found


def _student(values: xr.DataArray, level: float) -> tuple[xr.DataArray, xr.DataArray]:
    """Return the mean over seeds and the half width of its confidence interval."""
    count = values.sizes["seed"]
    middle = values.mean("seed", skipna=False)
    if count < 2:
        return middle, xr.full_like(middle, np.nan)
    spread = values.std("seed", ddof=1, skipna=False)
    factor = float(stdtrit(count - 1, (1 + level) / 2))
    return middle, factor * spread / count**0.5


def _interval_labels(ds: xr.Dataset) -> dict[str, str]:
    ends = {"mean": "mean over seeds", "low": "lower end", "high": "upper end"}
    return {
        f"{name}_{end}": f"{METRICS[name].attrs['long_name']}, {words}"
        for name in METRICS
        for end, words in ends.items()
        if name in ds
    }


def _below_noise(error: xr.DataArray, floor: xr.DataArray) -> xr.DataArray:
    known = np.isfinite(error) & np.isfinite(floor)
    return (error <= floor).astype("int8").where(known, -1).transpose(*error.dims)


def _tied(ds: xr.Dataset, level: float) -> xr.DataArray:
    """Compare each method with the best of its layer, seed by seed."""
    errors = ds[ERROR]
    means = errors.mean("seed", skipna=False)
    rivals = means.where(means["approximator"] != "exact")
    best = rivals.min("approximator")
    place = rivals.fillna(np.inf).argmin("approximator")
    middle, reach = _student(errors - errors.isel(approximator=place, drop=True), level)
    tied = middle <= np.maximum(reach.fillna(-1.0), FLOOR)
    known = np.isfinite(means) & np.isfinite(best)
    if errors.sizes["seed"] < 2:  # only the best itself is known to be as good
        known = known & (means <= best)
    return tied.astype("int8").where(known, -1).transpose(*means.dims)


def with_noise(ds: xr.Dataset, stats: Layers) -> xr.Dataset:
    """Add `noise_floor(layer)` from random halves, and which errors lie below it.

    NaN, and -1 in `below_noise`, where the halves do not fit the free memory.

    Examples
    --------
    >>> import torch, fisherlab as fl
    >>> data = (torch.rand(20, 3).double(), None)
    >>> stats = fl.collect(torch.nn.Linear(3, 2).double(), data, fl.Categorical())
    >>> ds = with_noise(fl.compare(stats, ["kfac"]), stats)
    >>> 0 < float(ds.noise_floor[0]) < 0.5
    True
    """
    stats = Statistics.of(stats, "with_noise")
    floors = xr.DataArray(
        [_floor(stats, name) for name in stats],
        {"layer": list(stats)},
        "layer",
        attrs={
            "long_name": "relative distance of the exact block from its limit, "
            "½‖F_A − F_B‖/‖F‖ of random halves",
            "units": "1",
        },
    )
    ds = ds.assign(noise_floor=floors)
    if ERROR not in ds:
        return ds
    words = "1 if the error is within the noise of the exact block, -1 unknown"
    below = _below_noise(ds[ERROR], floors).assign_attrs(long_name=words, units="1")
    return ds.assign(below_noise=below)


def _floor(stats: Statistics, name: str) -> float:
    try:
        halves = noise_floors(ExactBlock()(stats[name]), SPLITS)
    except BudgetError:
        return float("nan")
    return float(np.sqrt(np.mean(np.square(halves))))
