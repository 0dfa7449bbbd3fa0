"""Train a problem and set the approximations beside the exact blocks on the way."""

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Final, TypeVar

import torch
import xarray as xr
from torch import nn

import fisherlab as fl
from fisherlab.analysis.files import beside
from fisherlab.analysis.intervals import with_noise
from fisherlab.errors import FisherlabError
from fisherlab.numerics.ranks import live
from fisherlab.problems import Problem
from fisherlab.problems.problem import drawn
from fisherlab.report.config import ReportConfig
from fisherlab.report.folder import Phases
from fisherlab.report.judging import HELD_OUT, Asked, judged
from fisherlab.report.sizes import PROBES, STEPS, WHOLE, Size
from fisherlab.statistics import Statistics
from fisherlab.training import trajectory
from fisherlab.training.probes import measured

T = TypeVar("T")
_MOMENTUM: Final = 0.9
_RATE: Final = 0.05


@dataclass(frozen=True)
class Analysis:
    """Hold what was found along a training.

    Attributes
    ----------
    results
        The metrics of every analysed step, in the schema of `fl.compare`.
    inverses
        Inverses and spectra of blocks at the last analysed step; None if every block is
        too large.
    ended
        What ended the work early, so that checkpoints are missing: the user, or an error.
    """

    results: xr.Dataset
    inverses: xr.DataTree | None
    ended: KeyboardInterrupt | FisherlabError | None


def count_phases(config: ReportConfig) -> int:
    """Return how many phases `analyse` goes through.

    Examples
    --------
    >>> count_phases(ReportConfig(checkpoints=(0, 10)))
    10
    """
    return 4 * len(config.analysed_steps) + 1 + bool(config.purpose)


def analyse(
    problem: Problem, config: ReportConfig, size: Size, phase: Phases
) -> Analysis | None:
    """Train a problem's network and analyse it at the checkpoints.

    The Fisher is taken over `size.examples` random training examples. An interrupt, or a
    training that diverges, after the first checkpoint ends the work early; what is done
    is returned. Several processes train together, and the first analyses, for which the
    others wait; they return None.

    Raises
    ------
    NumericalError
        If the training diverges before anything is analysed.

    Examples
    --------
    >>> import fisherlab as fl
    >>> from fisherlab.problems.networks import perceptron
    >>> x, y = fl.problems.load("digits").train
    >>> part = (x[:50, 100:104], y[:50])
    >>> network = perceptron([4, 3, 10], "tanh")
    >>> small = Problem("digits", network, fl.Categorical(), part, part)
    >>> config = ReportConfig(steps=2)
    >>> from fisherlab.report.sizes import fitted
    >>> with Phases(count_phases(config), quiet=True) as phase:
    ...     analysis = analyse(small, config, fitted(small, config), phase)
    >>> analysis.results.frobenius_error.dims
    ('step', 'layer', 'approximator')
    """
    rows: list[xr.Dataset] = []
    stats: Statistics | None = None
    found: xr.Dataset | None = None
    ended: KeyboardInterrupt | FisherlabError | None = None
    try:
        path = checkpoints(problem, config, size, phase)
        for (step, model), seconds in zip(path, size.seconds, strict=True):
            moment = by_first(_moment, problem, model, step, config, size, phase, seconds)
            if moment is not None:
                stats, gradient, row = moment
                rows.append(row)
        if config.purpose and stats is not None:
            with phase("purposes"), fl.frozen(model):
                found = _judged(problem, model, stats, gradient, config, size)
    except (KeyboardInterrupt, FisherlabError) as stop:
        if stats is None or live() is not None:
            raise
        ended = stop
    if stats is None:
        return None
    with phase("inverse blocks"):
        damping = config.dampings[0]
        inverses = pictured(stats, config.approximators, damping, size.drawn, size.spectra)
    results = _joined(rows).assign_attrs(attributes_of(problem, config, size))
    results = results if found is None else beside(results, found)
    results.attrs["subset"] += f"; losses over at most {size.losses:,}"
    why = [] if ended is None else [f"later steps: {str(ended) or 'interrupted'}"]
    results.attrs["left_out"] = "\n".join([*size.told, *why])
    return Analysis(results, inverses, ended)


def by_first(work: Callable[..., T], *given: Any) -> T | None:
    """Do a work here, or of several processes on the first, for which the others wait."""
    ranks = live()
    return work(*given) if ranks is None else ranks.by_first(partial(work, *given))


def checkpoints(
    problem: Problem, config: ReportConfig, size: Size, phase: Phases
) -> Iterable[tuple[int, nn.Module]]:
    """Train, and give (step, model) at each step that is analysed."""
    rate = learning_rate(problem, config)
    optimizer = torch.optim.SGD(problem.model.parameters(), lr=rate, momentum=_MOMENTUM)
    path = trajectory(
        problem,
        optimizer,
        config.training_steps,
        size.moments,
        batch_size=size.batch,
        seed=config.seed,
        progress=lambda step: phase.note(f"step {step} of {config.training_steps}"),
    )
    for _ in size.moments:
        with phase("train"):
            arrived = next(path)
        optimizer.zero_grad()  # the next step begins with none
        if arrived[0] == size.moments[-1]:
            optimizer.state.clear()  # and there is none after the last moment
        yield arrived


def learning_rate(problem: Problem, config: ReportConfig) -> float:
    """Return the rate asked for, or one for the mean over an example's labels.

    Losses sum over outputs: a rate that suits one label diverges on 784 pixels.

    Examples
    --------
    >>> learning_rate(fl.problems.load("digits", examples=10), ReportConfig())
    0.05
    """
    if config.lr is not None:
        return config.lr
    labels = problem.train[1]
    return _RATE * len(labels) / max(labels.numel(), 1)


def _moment(
    problem: Problem,
    model: nn.Module,
    step: int,
    config: ReportConfig,
    size: Size,
    phase: Phases,
    seconds: float,
) -> tuple[Statistics, Any, xr.Dataset]:
    """Return statistics and gradient of a step, and its row of the results in a time."""
    stats, gradient = collected(problem, model, step, config, size, phase)
    with phase("compare", f"at step {step}"):
        row = fl.compare(
            stats,
            config.approximators,
            damping=config.dampings,
            gradient=gradient,
            budget=size.budget,
            time=seconds,
        )
        row = with_noise(row, stats)
    sets = {
        name: drawn(whole, size.losses, config.seed)
        for name, whole in (("train", problem.train), ("test", problem.test))
    }
    with phase("losses", f"at step {step}"), fl.frozen(model):
        found = measured(model, problem.likelihood, sets, size.at_once)
    return stats, gradient, row.assign(found).assign_coords(step=step)


def _judged(
    problem: Problem,
    model: nn.Module,
    stats: Statistics,
    gradient: Any,
    config: ReportConfig,
    size: Size,
) -> xr.Dataset:
    """Judge the last moment by the purposes that were asked for."""
    tests = len(problem.test[0])
    asked = Asked(
        stats,
        gradient,
        model,
        problem.likelihood,
        drawn(problem.train, size.examples, config.seed),
        drawn(problem.test, min(tests, HELD_OUT), config.seed) if tests else None,
        config.dampings[0],
        config.prior,
        len(problem.train[0]),
        size.held_out,
    )
    names = config.purpose
    return judged(names, asked, config.approximators, size.budget, size.judging)


def collected(
    problem: Problem,
    model: nn.Module,
    step: int,
    config: ReportConfig,
    size: Size,
    phase: Phases,
) -> tuple[Statistics, Any]:
    """Return the statistics of random examples, and their mean gradient."""
    data = drawn(problem.train, size.examples, config.seed)
    with phase("collect", f"at step {step}"), fl.frozen(model):
        stats = fl.collect(
            model, data, problem.likelihood, size.fisher, budget=size.budget * 3 // 2
        )
        return stats, fl.mean_gradient(model, data, problem.likelihood)


def _joined(rows: Sequence[xr.Dataset]) -> xr.Dataset:
    return xr.concat(
        rows,
        dim="step",
        data_vars="all",
        coords="minimal",
        compat="override",
        join="exact",
        combine_attrs="override",
    )


def pictured(
    stats: Statistics,
    approximators: Any,
    damping: Any,
    inverses: Sequence[str] | None,
    spectra: Sequence[str],
    progress: Any = False,
) -> xr.DataTree | None:
    """Return what is drawn of whole matrices: inverses of some layers, spectra of others.

    Examples
    --------
    >>> data = (torch.rand(20, 3).double(), None)
    >>> stats = fl.collect(nn.Linear(3, 2).double(), data, fl.Categorical())
    >>> sorted(pictured(stats, ["kfac"], 0.1, None, ["weight"])["weight"].data_vars)
    ['eigenvalue', 'inverse', 'share', 'status']
    """
    tree = fl.inverse_blocks(stats, approximators, damping, inverses, progress=progress)
    found = fl.density(
        stats,
        approximators,
        layers=spectra,
        damping=damping,
        probes=PROBES,
        steps=STEPS,
        whole=WHOLE,
        progress=progress,
    )
    nodes = {
        name: node.to_dataset()[["eigenvalue", "share"]]
        for name, node in found.children.items()
    }
    for name, node in tree.children.items():
        own, more = node.to_dataset(), nodes.get(name, xr.Dataset())
        nodes[name] = own.merge(more).assign_attrs(more.attrs | own.attrs)
    ordered = {name: nodes[name] for name in stats if name in nodes}
    return xr.DataTree.from_dict({"/": tree.to_dataset(), **ordered}) if ordered else None


def attributes_of(
    problem: Problem, config: ReportConfig, size: Size
) -> dict[str, str | int]:
    """Return what the results tell of the problem and the training."""
    known = not config.model and ":" not in config.problem
    network = (
        fl.problems.describe(config.problem).network
        if known
        else type(problem.model).__name__
    )
    parameters = sum(p.numel() for p in problem.model.parameters())
    training = {
        "optimizer": "SGD",
        "momentum": _MOMENTUM,
        "lr": learning_rate(problem, config),
        "batch_size": size.batch,
        "steps": config.training_steps,
    }
    return {
        "problem": problem.name,
        "model": f"{network}, {parameters:,} parameters",
        "seed": config.seed,
        "training": json.dumps(training),
        "subset": (
            f"examples drawn at random by seed {config.seed}, the same at every step and "
            "for every method"
        ),
    }
