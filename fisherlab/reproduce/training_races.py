"""Training curves of the papers' networks at the published settings, resumable.

Every optimiser runs with the learning rate and damping that its paper chose, in the
paper's units; one that fails is NaN and a status. The settings of Koroko et al. are for
losses that are means over the outputs: recipes translate those of their methods, and the
rate of SGD is divided here. Weights of Bahamou et al. begin as torch's layers do. Martens
& Grosse's logistic units, sparse first weights, λ = 150 and growing batches come from a
public code of Algorithm 2; the rate of SGD is the best of a grid.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Final, final

import numpy as np
import seaborn as sns
import torch
import xarray as xr
from matplotlib.figure import Figure as Drawing
from matplotlib.ticker import LogFormatter, MaxNLocator
from torch import nn

from fisherlab.analysis.wording import number
from fisherlab.errors import FisherlabError
from fisherlab.likelihoods import Categorical
from fisherlab.plots.style import publication
from fisherlab.problems.problem import Problem
from fisherlab.reproduce.experiment import PUBLISHED, Bound, Claim, Experiment, Setting
from fisherlab.training import optimizer
from fisherlab.training.following import follow
from fisherlab.training.probes import Losses
from fisherlab.training.schedules import (
    BatchSize,
    ExponentialBatches,
    LevenbergMarquardt,
)

FRESH: Final = "mbf-shared, inverses of every step"  # a control; the paper has T₂ = 20
Runners = Mapping[str, Mapping[str, Any]]


@final
@dataclass(frozen=True)
class Race:
    """Optimisers at their settings on one problem.

    Parameters
    ----------
    problem, outputs
        By name; the losses are divided by so many outputs, 1 where the paper sums.
    batch
        Examples in a minibatch.
    runners
        Settings by the name of the recipe, up to a comma; ``batch`` there is its own.
        Where ``lr`` is several rates, that of the lowest last training loss is taken.
    steps
        Quick, and the paper's.
    default_weights
        Begin with torch's weights instead of the problem's.
    dtype
        Of weights and data.
    looks
        How often losses are measured.
    others
        Problems that it can take instead, each with what else is another there.
    falls
        After how many epochs a rate falls to its tenth, by optimiser.
    """

    problem: str
    outputs: int
    batch: BatchSize
    runners: Runners
    steps: tuple[int, int]
    default_weights: bool = False
    dtype: torch.dtype = torch.float32
    looks: int = 20
    others: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    falls: Mapping[str, int] = field(default_factory=dict)

    def of(self, problem: str) -> Race:
        """Return the race on another problem."""
        return replace(self, problem=problem, **self.others.get(problem, {}))


def _koroko(kfac: tuple[float, ...], sgd: float) -> Runners:
    """Return the tuned (lr, λ) of KFAC, KPSVD, DEFLATION, CORRECTED and LANCZOS."""
    names = ("kfac", "kpsvd", "deflation", "kfac-corrected", "lanczos")
    pairs = zip(kfac[::2], kfac[1::2], strict=True)
    found: dict[str, Mapping[str, float]] = {
        f"{name}-koroko": {"lr": lr, "damping": damping}
        for name, (lr, damping) in zip(names, pairs, strict=True)
    }
    return found | {"adam": {"lr": 1e-3}, "sgd-momentum": {"lr": sgd}}


def _goldfarb(
    problem: str,
    tuned: Mapping[str, tuple[float, float]],
    adam: tuple[float, float],
    sgd: float,
    steps: tuple[int, int],
) -> Race:
    """Return the race of Bahamou et al. at the tuned (lr, λ), (lr, ε) and lr."""
    names = {"mbf": "mbf-shared", "kfac": "kfac-goldfarb", "shampoo": "shampoo"}
    found: dict[str, Mapping[str, Any]] = {
        names[name]: {"lr": lr, "damping": damping} for name, (lr, damping) in tuned.items()
    }
    found[FRESH] = {**found["mbf-shared"], "inverse_every": 1}
    found["adam"] = {"lr": adam[0], "eps": adam[1]}
    found["sgd-momentum"] = {"lr": sgd}
    return Race(problem, 1, 1000, found, steps, default_weights=True)


RATES: Final = (3e-4, 3e-3, 3e-2)  # of SGD
START: Final = 150.0  # λ of K-FAC
ADAPTIVE: Final[Runners] = {
    "kfac-full": {"damping": START},
    "kfac-full-tridiagonal": {"damping": START},
    "sgd-nesterov": {"lr": RATES},
}
NO_MOMENTUM: Final = "kfac-full, no momentum"
SMALL: Final = ", batch 250"  # beside the race's own, four times as large
FAMILIES: Final = ("kfac-full", "sgd-nesterov")
BATCHES: Final[Runners] = {
    f"{name}{said}": {**ADAPTIVE[name], **own}
    for name in FAMILIES
    for said, own in (("", {}), (SMALL, {"batch": 250}))
}
_MBF: Final = {"lr": 1e-3, "damping": 0.1}  # the best of `mbf-settings` there
VARIANTS: Final[Runners] = {
    "mbf": _MBF,
    "mbf-true": _MBF,
    "mbf-shared": _MBF,
    "mbf, inverses of every step": {**_MBF, "inverse_every": 1},
    "mbf, inverses every 100": {**_MBF, "inverse_every": 100},
    "mbf, statistics every 10": {**_MBF, "statistics_every": 10},
}
_RARELY: Final = {"statistics_every": 10, "inverse_every": 100}
_EVERY_STEP: Final = {
    "statistics_every": 1,
    "inverse_every": 1,
    "average": 0.0,
    "burn_in": 0,
}


def _convolutional(lr: float, weight_decay: float) -> Runners:
    """Return MBF at its published rate and decay, and the others at ours."""
    mbf = {"lr": lr, "damping": 3e-3, "weight_decay": weight_decay, **_RARELY}
    return {
        "mbf": mbf,
        "kfac-eigen": {"lr": 1e-2, "damping": 0.03},
        "shampoo": {"lr": 1e-3, "damping": 3e-4, **_RARELY},
        "adam": {"lr": 1e-3},
        "sgd-momentum": {"lr": 0.1, "weight_decay": 5e-4},
    }


def _falls(mbf: int, kronecker: int) -> Mapping[str, int]:
    second = {"mbf": mbf, "kfac-eigen": kronecker, "shampoo": kronecker}
    return {**second, "adam": 40, "sgd-momentum": 40}


RACES: Final = {
    "kpsvd-published-curves": Race(
        "curves-surrogate-autoencoder-koroko",
        784,
        256,
        _koroko((0.1, 0.003, 0.1, 0.003, 0.1, 0.1, 0.1, 0.03, 0.001, 0.001), 0.3 / 784),
        (120, 12_600),
    ),
    "kpsvd-published-mnist": Race(
        "mnist-autoencoder-koroko",
        784,
        512,
        _koroko((0.01, 1e-4, 0.01, 1e-4, 0.003, 0.001, 0.1, 0.01, 0.003, 0.001), 0.3 / 784),
        (60, 19_600),
    ),
    "kpsvd-published-faces": Race(
        "faces-surrogate-autoencoder-koroko",
        625,
        1024,
        _koroko(
            (0.1, 0.001, 0.1, 0.001, 0.003, 0.001, 0.1, 0.03, 0.003, 0.001), 0.3 / 312.5
        ),
        (10, 16_200),
    ),
    "mbf-training-curves": _goldfarb(
        "curves-surrogate-autoencoder",
        {"mbf": (1e-5, 3e-4), "kfac": (1e-2, 1.0), "shampoo": (1e-3, 3e-3)},
        (3e-4, 1e-4),
        1e-2,
        (100, 5_000),
    ),
    "mbf-training-mnist": _goldfarb(
        "mnist-autoencoder",
        {"mbf": (1e-5, 3e-4), "kfac": (3e-3, 0.3), "shampoo": (3e-4, 3e-4)},
        (3e-4, 1e-4),
        3e-3,
        (30, 10_000),
    ),
    "mbf-training-faces": _goldfarb(
        "faces-surrogate-autoencoder",
        {"mbf": (1e-6, 3e-3), "kfac": (0.1, 10.0), "shampoo": (3e-4, 3e-4)},
        (1e-4, 1e-4),
        1e-3,
        (6, 10_000),
    ),
    "mbf-variants": Race(
        "digits-autoencoder", 1, 250, VARIANTS, (45, 1_000), default_weights=True
    ),
    "mbf-training-cnn": Race(
        "cifar10-subset-resnet8",
        1,
        128,
        _convolutional(1e-4, 3.0),
        (24, 78_200),
        looks=3,
        others={
            "cifar10-resnet32": {},
            "cifar100-vgg16": {
                "runners": _convolutional(3e-5, 10.0),
                "steps": (24, 78_200),
                "falls": _falls(50, 60),
            },
            "svhn-vgg11": {
                "runners": _convolutional(1e-3, 0.3),
                "steps": (24, 57_200),
                "falls": _falls(50, 60),
            },
        },
        falls=_falls(60, 80),
    ),
    "cg-fac-training": Race(
        "digits-autoencoder",
        1,
        250,
        {
            name: {"lr": 1e-2, "damping": 0.1, "clip": None, **_EVERY_STEP}
            for name in ("kfac-eigen", "cg-fac")
        },
        (60, 1_000),
    ),
    "kfac-batches": Race(
        "curves-surrogate-autoencoder-martens", 1, 1000, BATCHES, (15, 1_000)
    ),
    "kfac-training-curves": Race(
        "curves-surrogate-autoencoder-martens",
        1,
        ExponentialBatches(1000, 20_000),
        {**ADAPTIVE, NO_MOMENTUM: {"damping": START, "momentum": False}},
        (40, 1_000),
        others={"digits-autoencoder-martens": {}},
    ),
    "kfac-training-mnist": Race(
        "mnist-autoencoder-martens",
        1,
        ExponentialBatches(1000, 60_000),
        ADAPTIVE,
        (10, 1_000),
    ),
    "kfac-training-faces": Race(
        "faces-surrogate-autoencoder-martens",
        1,
        ExponentialBatches(1000, 103_500),
        ADAPTIVE,
        (4, 1_000),
    ),
}


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
            if of == "train_loss":  # all losses may lie within one power of ten
                ax.yaxis.set_major_formatter(LogFormatter())
                ax.yaxis.set_minor_formatter(LogFormatter(minor_thresholds=(1, 0.4)))
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
EXPERIMENTS: Final = {
    name: Experiment(
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
}


def at_end(ds: xr.Dataset, of: str = "train_loss") -> dict[str, float]:
    """Return the last training loss of every optimiser, or another of its numbers.

    That of one which failed is infinite, or 0 where more is better.
    """
    last = ds[of].isel(step=-1)
    failed = 0.0 if of == "test_accuracy" else np.inf
    last = last.where((ds["status"] == "ok") | last.notnull(), failed)
    return {str(name): float(last.sel(optimizer=name)) for name in last["optimizer"].values}


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
            parts.append(f"`{name}` failed: {status}")
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
