"""Training curves of the papers' networks at the published settings, resumable.

Every optimiser runs with the learning rate and damping that its paper chose; one that fails
is NaN and a status.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any, Final

import numpy as np
import seaborn as sns
import torch
import xarray as xr
from matplotlib.figure import Figure as Drawing
from matplotlib.ticker import MaxNLocator
from torch import nn

from fisherlab.errors import FisherlabError
from fisherlab.likelihoods import Categorical
from fisherlab.plots.style import label_powers, publication
from fisherlab.problems.problem import Problem
from fisherlab.reproduce.experiment import PUBLISHED, Bound, Claim, Experiment, Setting
from fisherlab.reproduce.races import FAMILIES, RACES, SMALL, START, Race
from fisherlab.showing import number
from fisherlab.training import optimizer
from fisherlab.training.following import follow
from fisherlab.training.probes import Losses
from fisherlab.training.schedules import (
    BatchSize,
    ExponentialBatches,
    LevenbergMarquardt,
)


def race(name: str, setting: Setting) -> xr.Dataset:
    """Train by every optimiser of a race, going on with stored runs.

    Returns
    -------
    xarray.Dataset
        ``train_loss`` and ``test_loss`` on 2,000 examples, divided by the outputs where
        the paper does, ``test_accuracy`` of a classifier, and ``seconds`` of steps
        (optimizer, step); ``status`` and ``lr`` (optimizer), NaN where it has none.
    """
    chosen = RACES[name]
    if setting.problem is not None:
        chosen, name = chosen.of(setting.problem), f"{name}-{setting.problem}"
    steps = setting.steps or chosen.steps[not setting.quick]
    joined = raced(chosen, steps, setting, name)
    tuned = "; ".join(
        f"{k} {_said(v, float(joined['lr'].sel(optimizer=k)))}".strip()
        for k, v in chosen.runners.items()
    )
    first = "Glorot's" if "autoencoder" in chosen.problem else "the problem's"
    first = "sparse" if chosen.problem.endswith("-martens") else first
    first = "torch's" if chosen.default_weights else first
    told = (
        f"{chosen.problem}, {_sizes(chosen.batch)}, float32, {first} first weights; "
        f"{steps} of {chosen.steps[1]:,} steps; {tuned}{setting.place}"
    )
    return joined.assign_attrs(
        settings=told, steps=steps, published_steps=chosen.steps[1], problem=chosen.problem
    )


def raced(chosen: Race, steps: int, setting: Setting, *stored: str) -> xr.Dataset:
    """Return what `race` does, for so many steps of a race that need not have a name."""
    runs = [_run(chosen, runner, steps, setting, *stored) for runner in chosen.runners]
    joined: xr.Dataset = xr.concat(runs, "optimizer")
    return joined


def _sizes(batch: BatchSize) -> str:
    if isinstance(batch, ExponentialBatches):
        return f"batch {batch.first} growing to {batch.last} at step {batch.until}"
    return f"batch {batch}"


def _said(settings: Mapping[str, Any], lr: float) -> str:
    return " ".join(f"{name} {_value(value, lr)}" for name, value in settings.items())


def _value(value: Any, lr: float) -> str:
    if isinstance(value, tuple):
        return f"{lr:.3g} of {value[0]:.3g}–{value[-1]:.3g}"
    return "none" if value is None else format(value, ".3g")


def _run(
    chosen: Race, runner: str, steps: int, setting: Setting, *stored: str
) -> xr.Dataset:
    """Train by one optimiser; of several rates, give the run that ended lowest."""
    own = chosen.runners[runner]
    if not isinstance(own.get("lr"), tuple):
        return _trained(chosen, runner, steps, setting, *stored)
    runs = []
    for lr in own["lr"]:
        one = replace(chosen, runners={runner: {**own, "lr": lr}})
        runs.append(_trained(one, runner, steps, setting, *stored, f"lr {lr:g}"))
    return min(runs, key=_last)


def _last(run: xr.Dataset) -> float:
    loss = float(run["train_loss"].isel(step=-1, optimizer=0))
    return loss if np.isfinite(loss) else np.inf


def _trained(
    chosen: Race, runner: str, steps: int, setting: Setting, *stored: str
) -> xr.Dataset:
    every = max(steps // chosen.looks, 1)
    moments = sorted({*range(0, steps + 1, every), steps})
    problem = setting.load(chosen.problem, dtype=chosen.dtype)
    if chosen.default_weights:
        begin_as_torch(problem, setting.seed)
    status = "ok"
    try:
        found = follow(
            problem,
            partial(_made, runner, chosen),
            steps=steps,
            probes=[Losses(2000)],
            every=moments,
            batch_size=chosen.runners[runner].get("batch", chosen.batch),
            seed=setting.seed,
            store=setting.store(*stored, str(steps), runner),
            scheduler=_falling(chosen, runner, len(problem.train[0])),
            progress=True,
        )
    except FisherlabError as error:
        found, status = xr.Dataset(), str(error)
    data: dict[str, Any] = {
        "status": status,
        "lr": float(chosen.runners[runner].get("lr", np.nan)),
    }
    scales = {"train_loss": chosen.outputs, "test_loss": chosen.outputs, "seconds": 1}
    if isinstance(problem.likelihood, Categorical):
        scales["test_accuracy"] = 1
    for key, scale in scales.items():
        nothing = xr.DataArray(np.full(len(moments), np.nan), {"step": moments}, ["step"])
        data[key] = found[key] / scale if key in found else nothing
    return xr.Dataset(data).expand_dims(optimizer=[runner])


def _falling(chosen: Race, runner: str, count: int) -> Callable[[Any], Any] | None:
    if runner not in chosen.falls:
        return None
    assert isinstance(chosen.batch, int)
    every = chosen.falls[runner] * (count // chosen.batch)
    return partial(torch.optim.lr_scheduler.StepLR, step_size=every, gamma=0.1)


def _made(runner: str, chosen: Race, problem: Problem) -> Any:
    own = {key: one for key, one in chosen.runners[runner].items() if key != "batch"}
    return optimizer(runner.partition(",")[0], problem, **own)


def begin_as_torch(problem: Problem, seed: int) -> None:
    """Draw the weights of linear layers as torch does: U(±1/√d_in), also the biases."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for module in problem.model.modules():
            if isinstance(module, nn.Linear):
                bound = module.in_features**-0.5
                for weight in (module.weight, module.bias):
                    drawn = torch.rand(weight.shape, generator=generator)
                    weight.copy_(bound * (2 * drawn - 1))


_SHOWN: Final = {
    "train_loss": "training loss / nat",
    "test_accuracy": "validation accuracy",
}


def draw(result: xr.Dataset) -> Drawing:
    """Draw the training loss, and the accuracy of classifiers, over steps and seconds."""
    shown = [name for name in _SHOWN if name in result]
    ended = result["train_loss"].isel(step=-1)
    there = ended.notnull()
    there = there.any("seed") if "seed" in there.dims else there
    names = [
        f"{name}{'' if one else ' (failed)'}"
        for name, one in zip(result["optimizer"].values, there.values, strict=True)
    ]
    table = (
        result.assign_coords(optimizer=names)[[*shown, "seconds"]]
        .to_dataframe()
        .reset_index()
    )
    kept = [name for name in table if name not in ("step", "seconds")]
    rows = table.melt(kept, ["step", "seconds"], "over", "x")
    kept = [name for name in rows if name not in shown]
    rows = rows.melt(kept, shown, "of", "y")
    with publication():
        grid = sns.relplot(
            rows[rows["x"] > 0],
            kind="line",
            x="x",
            y="y",
            hue="optimizer",
            style="optimizer",
            col="over",
            row="of",
            units="seed" if "seed" in rows else None,
            estimator=None,
            facet_kws={"sharex": "col", "sharey": "row"},
            height=3.2 if len(shown) == 1 else 2.5,
            aspect=1.2 if len(shown) == 1 else 1.5,
        )
        for (of, over), ax in grid.axes_dict.items():
            ax.set_xlabel("step" if over == "step" else "seconds in steps")
            ax.set(ylabel=_SHOWN[of], yscale="log" if of == "train_loss" else "linear")
            ax.xaxis.set_major_locator(MaxNLocator("auto", integer=over == "step"))
            if of == "train_loss":
                label_powers(ax.yaxis)
            ax.label_outer()
        grid.set_titles("")
    return grid.figure


MINUTES: Final = {
    "kpsvd-published-curves": (2.9, 90.0),
    "kpsvd-published-mnist": (2.6, 780.0),
    "kpsvd-published-faces": (3.1, 3000.0),
    "mbf-training-curves": (3.9, 90.0),
    "mbf-training-mnist": (3.3, 900.0),
    "mbf-training-faces": (6.6, 2800.0),
    "mbf-variants": (0.5, 12.0),
    "mbf-training-cnn": (1.4, 3000.0),
    "cg-fac-training": (0.2, 5.0),
    "kfac-batches": (1.3, 90.0),
    "kfac-training-curves": (3.1, 600.0),
    "kfac-training-mnist": (1.0, 4000.0),
    "kfac-training-faces": (1.8, 20000.0),
}
_PAPERS: Final = {"kpsvd": "KPSVD", "mbf": "MBF", "kfac": "K-FAC", "cg": "CG-FAC"}
EXPERIMENTS: Final = tuple(
    Experiment(
        name,
        f"{_PAPERS[name.split('-')[0]]}: training losses over steps and time, "
        f"{chosen.problem}, {len(chosen.runners)} optimisers at their published settings",
        partial(race, name),
        draw,
        (chosen.problem,),
        MINUTES[name],
        tuple(chosen.others),
        trains=True,
    )
    for name, chosen in RACES.items()
)


def at_end(ds: xr.Dataset, of: str = "train_loss") -> dict[str, float]:
    """Return the last training loss of every optimiser, or another of its numbers.

    That of one which failed is infinite, or 0 where more is better.
    """
    last = ds[of].isel(step=-1)
    failed = 0.0 if of == "test_accuracy" else np.inf
    last = last.where((ds["status"] == "ok") | last.notnull(), failed)
    return {str(name): float(last.sel(optimizer=name)) for name in last["optimizer"].values}


def iterations_saved(ds: xr.Dataset) -> dict[str, float]:
    """Return the share of iterations that the tridiagonal form needs for the same loss.

    Infinite where it does not reach it.
    """
    block = ds["train_loss"].sel(optimizer="kfac-full")
    chain = ds["train_loss"].sel(optimizer="kfac-full-tridiagonal")
    reached = chain["step"].values[(chain <= block.isel(step=-1)).values]
    total = float(block["step"].values[-1])
    return {"iterations": float(reached[0]) / total if len(reached) else float("inf")}


def gain_by_batch(ds: xr.Dataset) -> dict[str, float]:
    """Return what four times the batch makes of K-FAC's last loss, over SGD's."""
    last = at_end(ds)
    kfac, sgd = (last[name] / last[f"{name}{SMALL}"] for name in FAMILIES)
    return {"K-FAC / SGD": kfac / sgd}


def short_run(ds: xr.Dataset) -> str:
    """Say how short a run was beside the published one, and which optimisers failed."""
    steps, published = int(ds.attrs["steps"]), int(ds.attrs["published_steps"])
    parts = [f"The run has {steps:,} of the published {published:,} steps."]
    if steps < published and "seconds" in ds:
        taken = float(ds["seconds"].isel(step=-1).sum()) / 3600
        parts.append(f"All take {number(taken * published / steps)} hours at its pace.")
    if "surrogate" in str(ds.attrs.get("problem", "")):
        parts.append(f"Its data, `{ds.attrs['problem']}`, are not the paper's.")
    for name in ds["optimizer"].values:
        status = str(ds["status"].sel(optimizer=name).values)
        if status != "ok":
            parts.append(f"`{name}` failed: {status.partition('. ')[0].rstrip('.')}.")
    return " ".join(parts)


def every_loss(ds: xr.Dataset) -> str:
    """Say where every optimiser of a race ended."""
    said = ", ".join(f"`{name}` {loss:.4g}" for name, loss in at_end(ds).items())
    return f"{short_run(ds)} Last training losses: {said}."


def slow_start(ds: xr.Dataset) -> str:
    """Say where K-FAC and SGD ended, and what is left of the λ that K-FAC begins with."""
    least = START * LevenbergMarquardt().factor ** int(ds.attrs["steps"])
    return (
        f"{every_loss(ds)} K-FAC's λ, {START:g} at first, can have fallen to "
        f"{number(least)} by then."
    )


def ends_below(
    statement: str,
    of: Mapping[str, tuple[str, str]],
    most: float = 1.0,
    how: str = "ratio of the last training losses",
    basis: str = PUBLISHED,
    *,
    reason: Callable[[xr.Dataset], str] = every_loss,
) -> Claim:
    """Claim that one optimiser's last training loss is at most a share of another's.

    Both are given by the label of their ratio.
    """

    def measure(ds: xr.Dataset) -> dict[str, float]:
        ends, found = at_end(ds), dict[str, float]()
        for label, (first, second) in of.items():
            there = np.isfinite(ends[second])
            found[label] = ends[first] / ends[second] if there else np.nan
        return found

    bounds = dict.fromkeys(of, Bound(at_most=most))
    return Claim(statement, bounds, measure, how, basis=basis, reason=reason)
