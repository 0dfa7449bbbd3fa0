"""How a training was made: what must be equal to go on, and what is good to know."""

from __future__ import annotations

import inspect
import platform
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from importlib import metadata
from typing import Any, Final

import torch
from torch import Tensor

import fisherlab
from fisherlab.codes import checksum, codes, described, made_with
from fisherlab.problems.problem import Problem
from fisherlab.training.schedules import BatchSize

_PACKAGES: Final = ("torch", "numpy", "xarray", "h5netcdf")
_SAMPLED: Final = 256  # examples of a set that its fingerprint reads
_LIVE: Final = ("model", "likelihood", "params")  # not settings of an optimiser
Settings = dict[str, Any]


def settings(
    problem: Problem,
    optimizer: torch.optim.Optimizer,
    scheduler: torch.optim.lr_scheduler.LRScheduler | None,
    probes: Sequence[object],
    batch_size: BatchSize,
    seed: int,
) -> Settings:
    """Return what decides a trajectory and what is measured on it, as JSON values.

    Examples
    --------
    >>> import fisherlab as fl
    >>> problem = fl.problems.load("digits")
    >>> sgd = torch.optim.SGD(problem.model.parameters(), lr=0.1)
    >>> found = settings(problem, sgd, None, [fl.probes.Losses()], 64, 0)
    >>> found["optimizer"]["name"], found["optimizer"]["lr"], found["probes"]
    ('SGD', [0.1], ['Losses(examples=None)'])
    """
    return {
        **described_problem(problem),
        "optimizer": _optimizer(optimizer),
        "scheduler": None if scheduler is None else type(scheduler).__name__,
        "probes": [described(probe) for probe in probes],
        "batch_size": _plain(batch_size),
        "seed": seed,
        **_silent(probes),
        **_groups(optimizer),
        **_schedule(scheduler, "scheduler"),
        **codes(scheduler=_functions(scheduler), batch_size=batch_size),
    }


def described_problem(problem: Problem) -> Settings:
    """Return what a problem is, its initial weights left out.

    Examples
    --------
    >>> import fisherlab as fl
    >>> described_problem(fl.problems.load("digits"))["dtype"]
    'float64'
    """
    first = next(problem.model.parameters())
    return {
        "problem": problem.name,
        "model": described(problem.model),
        "likelihood": described(problem.likelihood),
        "dtype": str(first.dtype).removeprefix("torch."),
        "train": _fingerprint(problem.train),
        "test": _fingerprint(problem.test),
        "labels": [checksum(y) for _, y in (problem.train, problem.test)],
        "augment": described(problem.augment),
        **codes(augment=problem.augment, model=problem.model),
    }


def _optimizer(optimizer: torch.optim.Optimizer) -> Settings:
    """Return the settings of an optimiser; not its state, so that live ones may go on."""
    rates = [g.get("initial_lr", g.get("lr")) for g in optimizer.param_groups]
    given = inspect.signature(type(optimizer)).parameters
    own = {
        name: value
        for name, value in vars(optimizer).items()
        if (name in given or name == "curvature") and name not in _LIVE
    }
    found = {**optimizer.defaults, **own}
    return {
        "name": type(optimizer).__name__,
        "lr": [None if rate is None else float(rate) for rate in rates],
        **{n: _plain(v) for n, v in found.items() if n != "lr" and v is not None},
    }


def _silent(probes: Sequence[object]) -> Settings:
    """Return the settings of probes that do not show them; their code may be mended."""
    return {
        f"probe {k} {name}": _plain(value)
        for k, probe in enumerate(probes)
        if type(probe).__repr__ is object.__repr__
        for name, value in made_with(probe).items()
    }


def _groups(optimizer: torch.optim.Optimizer) -> Settings:
    """Return the settings of every group of parameters, but those a scheduler moves."""
    found: Settings = {}
    for k, group in enumerate(optimizer.param_groups):
        moved = {"params", "lr", "initial_lr"}
        if "max_momentum" in group:
            moved |= {"momentum", "betas"}
        own = {name: _plain(v) for name, v in group.items() if name not in moved}
        found |= {f"group {k} {name}": value for name, value in own.items()}
    return found


def _schedule(scheduler: object, name: str) -> Settings:
    """Return the settings of a scheduler and of those it is made of."""
    found: Settings = {}
    for part, value in _parts(scheduler).items():
        if part == "_schedulers":
            for k, one in enumerate(value):
                found |= _schedule(one, f"{name} {k}")
        else:
            found[f"{name} {part.strip('_')}"] = _plain(value)
    return found


def _functions(scheduler: object) -> list[object]:
    """Return the functions that a scheduler and those it is made of ask."""
    found: list[object] = []
    for part, value in _parts(scheduler).items():
        several = value if isinstance(value, list) else [value]
        if part == "_schedulers":
            found += [f for one in several for f in _functions(one)]
        else:
            found += [f for f in several if callable(f)]
    return found


def _parts(scheduler: object) -> Settings:
    """Return what a scheduler was made with: no counters, and not its optimiser."""
    moving = ("optimizer", "base_lrs", "last_epoch", "T_cur", "T_i", "verbose")
    nested = ("_schedulers", "_milestones")
    every = {} if scheduler is None else vars(scheduler)
    return {
        name: value
        for name, value in every.items()
        if name in nested or not (name in moving or name.startswith("_"))
    }


def _plain(value: object) -> bool | int | float | str:
    return value if isinstance(value, (bool, int, float, str)) else described(value)


def _fingerprint(pair: tuple[Tensor, Tensor]) -> str:
    """Return shapes and a checksum of examples spread over the set."""
    samples = [tensor[:: max(1, len(tensor) // _SAMPLED)] for tensor in pair]
    shapes = ["x".join(map(str, tensor.shape)) for tensor in pair]
    return f"{', '.join(shapes)}, {checksum(*samples)}"


def differences(there: Mapping[str, Any], here: Mapping[str, Any]) -> list[str]:
    """Name the settings that differ, with both values.

    What one of the two versions of the program does not record is not compared.

    Examples
    --------
    >>> there, here = ({"seed": 0, "optimizer": {"lr": lr}} for lr in (1, 2))
    >>> differences(there, here)
    ['optimizer lr is 1 there and 2 here']
    """
    both = [name for name in there if name in here]
    return _unlike({n: there[n] for n in both}, {n: here[n] for n in both})


def _unlike(there: Mapping[str, Any], here: Mapping[str, Any]) -> list[str]:
    found = []
    for name in {**there, **here}:
        old, new = there.get(name), here.get(name)
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            found += [f"{name} {line}" for line in _unlike(old, new)]
        elif old != new:
            found.append(f"{name} is {_short(old)} there and {_short(new)} here")
    return found


def _short(value: object) -> str:
    text = " ".join(str(value).split())
    return text if len(text) <= 80 else f"{text[:77]}..."


def session(step: int) -> Settings:
    """Return when, with what and on what a process went on from a step."""
    return {
        "started_at": datetime.now(UTC).isoformat(timespec="seconds"),
        "from_step": step,
        "versions": {
            "fisherlab": fisherlab.__version__,
            "python": platform.python_version(),
            **{name: metadata.version(name) for name in _PACKAGES},
        },
        "platform": platform.platform(),
        "threads": torch.get_num_threads(),
    }
