"""`fisherlab tune`: find the best settings of optimisers on a grid."""

from __future__ import annotations

import argparse
import importlib.util
from datetime import datetime
from itertools import chain
from pathlib import Path
from typing import Any

from fisherlab.cli.follow import add_output, add_problem, load_problem
from fisherlab.cli.parsing import add_command, many


def add(commands: Any) -> None:
    """Add the command."""
    text = (
        "Train with every setting of a grid and find the best of each optimiser. The same "
        "command with the same folder goes on where it stopped."
    )
    tune = add_command(commands, "tune", _tune, text)
    _add_search(tune.add_argument_group("search"))
    add_output(tune.add_argument_group("output"), "runs/tune-<problem>-<time>")


def _add_search(group: Any) -> None:
    add_problem(group)
    group.add_argument(
        "--optimizers",
        nargs="+",
        type=many(str),
        default=[["sgd-momentum", "adam", "kfac"]],
        metavar="NAME",
        help="optimisers (default: sgd-momentum adam kfac)",
    )
    group.add_argument(
        "--grid", default="coarse", help="coarse, koroko or bahamou (default: coarse)"
    )
    group.add_argument("--lr", nargs="+", type=many(float), help="learning rates instead")
    group.add_argument("--damping", nargs="+", type=many(float), help="dampings instead")
    group.add_argument("--trials", type=int, help="most settings of an optimiser")
    group.add_argument("--steps", type=int, default=200, help="steps of a training")
    group.add_argument("--batch-size", type=int, default=64, help="examples in a minibatch")
    group.add_argument(
        "--seeds", nargs="+", type=many(int), default=[[0]], help="seeds (default: 0)"
    )
    group.add_argument(
        "--objective",
        choices=("train_loss", "test_loss"),
        default="train_loss",
        help="what is minimised (default: train_loss)",
    )
    group.add_argument("--seed", type=int, default=0, help="draws the settings")


def _tune(arguments: argparse.Namespace, command: str) -> None:
    names = list(chain.from_iterable(arguments.optimizers))

    import fisherlab as fl

    _check_names(names)
    fl.problems.describe(arguments.problem)
    out = arguments.out or (
        Path("runs") / f"tune-{arguments.problem}-{datetime.now():%Y%m%d-%H%M%S}"
    )
    if importlib.util.find_spec("optuna") is None:
        raise ValueError("tune needs optuna: pip install 'fisherlab[tune]'.")
    tuned = fl.tune(
        lambda seed: load_problem(arguments, seed),
        names,
        _grids(arguments, names),
        steps=arguments.steps,
        seeds=list(chain.from_iterable(arguments.seeds)),
        trials=arguments.trials,
        batch_size=arguments.batch_size,
        objective=arguments.objective,
        store=out,
        seed=arguments.seed,
        progress=not arguments.quiet,
    )
    if not arguments.quiet:
        print(_table(tuned), end="\n\n")
    print(out / "results.nc")


def _check_names(names: list[str]) -> None:
    from fisherlab.training.register import optimizers

    known = optimizers()
    unknown = [name for name in names if name not in known]
    if unknown:
        raise ValueError(f"--optimizers: {unknown[0]!r} is none of {', '.join(known)}.")


def _grids(arguments: argparse.Namespace, names: list[str]) -> dict[str, Any]:
    from fisherlab.training.studies import preset

    grids: dict[str, Any] = {}
    for name in names:
        grid = dict(preset(arguments.grid, name))
        for setting in grid:
            given = getattr(arguments, setting)
            if given:
                grid[setting] = tuple(chain.from_iterable(given))
        grids[name] = grid
    return grids


def _table(tuned: Any) -> str:
    """Return the best setting of every optimiser as text."""
    from fisherlab.analysis.wording import aligned

    names = [n for n in ("lr", "damping") if n in tuned.coords]
    rows = [["optimizer", *names, str(tuned.attrs["objective"])]]
    for optimizer in tuned["optimizer"].values:
        one = tuned.sel(optimizer=optimizer)
        best = int(one["best"])
        if best < 0:
            rows.append([str(optimizer), *("" for _ in names), "none finished"])
            continue
        values = [float(one[n][best]) for n in (*names, "objective")]
        rows.append([str(optimizer), *(f"{v:.4g}" for v in values)])
    return aligned(rows, numbers=True)
