"""`fisherlab follow` and `tune`: train with any optimiser, measure, find best settings."""

from __future__ import annotations

import argparse
import importlib.util
import sys
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any, Final

from fisherlab.cli.parsing import (
    DATA_DIR,
    Rows,
    add_command,
    add_json,
    add_subject,
    add_workers,
    executor_of,
    first_of_all,
    listed,
    of_first,
    several,
    show,
    subject,
)

PROBES: Final = ("losses", "errors", "directions", "spectra", "staleness")
FISHERS: Final = ("exact", "monte-carlo", "empirical")
# Those that form no dense block: a trajectory has many moments.
_METRICS: Final = (
    "frobenius_error",
    "cosine_similarity",
    "trace_ratio",
    "direction_cosine",
)


def add(commands: Any) -> None:
    """Add the command."""
    text = (
        "Train a problem with an optimiser and measure along the way. The results go to a "
        "folder; the same command with that folder goes on where it stopped."
    )
    follow = add_command(
        commands,
        "follow",
        _follow,
        text,
        "follow --optimizer kfac --steps 200 --out runs/kfac",
    )
    several(follow)
    _add_training(follow.add_argument_group("training"))
    _add_probes(follow.add_argument_group("what is measured"))
    add_output(follow.add_argument_group("output"), "runs/<problem>-<optimizer>-<time>")


def _add_training(group: Any) -> None:
    add_problem(group)
    group.add_argument("--optimizer", default="sgd-momentum", help="optimiser")
    group.add_argument("--lr", type=float, help="learning rate (default: the optimiser's)")
    damping = group.add_mutually_exclusive_group()
    damping.add_argument("--damping", type=float, help="λ (default: the optimiser's)")
    damping.add_argument(
        "--factored",
        type=float,
        metavar="LAMBDA",
        help="λ on the factors of Kronecker products instead",
    )
    group.add_argument("--steps", type=int, default=1000, help="steps in all")
    group.add_argument(
        "--seconds",
        type=float,
        metavar="S",
        help="end after so much time in steps (default: no end)",
    )
    group.add_argument("--batch-size", type=int, default=64, help="examples in a minibatch")
    group.add_argument("--seed", type=int, default=0, help="decides weights and batches")
    group.add_argument(
        "--deterministic",
        action="store_true",
        help="only algorithms that give the same bits every time (on a GPU)",
    )


def add_problem(group: Any) -> None:
    """Add what says which problem is trained, in which precision and where."""
    add_subject(group)
    group.add_argument("--data-dir", type=Path, metavar="FOLDER", help=DATA_DIR)
    group.add_argument(
        "--dtype",
        choices=("float64", "float32"),
        default="float64",
        help="precision",
    )
    group.add_argument(
        "--device",
        default="cpu",
        help="cpu, or what torch finds: cuda, cuda:1, mps, xpu",
    )


def _add_probes(group: Any) -> None:
    when = group.add_mutually_exclusive_group()
    when.add_argument(
        "--every", type=int, metavar="K", help="measure every K steps instead"
    )
    when.add_argument(
        "--moments",
        type=int,
        default=10,
        help="moments, spaced logarithmically",
    )
    group.add_argument(
        "--probes",
        **listed(str),
        default=["losses", "errors"],
        metavar="PROBE",
        help=f"some of {', '.join(PROBES)}",
    )
    group.add_argument(
        "--approximators",
        **listed(str),
        default=["kfac", "kpsvd", "mini-block"],
        metavar="NAME",
        help="see `fisherlab approximators`",
    )
    group.add_argument("--examples", type=int, default=500, help="examples of a Fisher")
    group.add_argument(
        "--fisher",
        choices=FISHERS,
        default="exact",
        help="labels of errors, spectra and staleness; one is sampled of each example by "
        "monte-carlo",
    )
    group.add_argument(
        "--on",
        choices=("train", "test", "batch"),
        help="their examples; batch: those of the next step (default: train, and batch for "
        "staleness)",
    )
    group.add_argument(
        "--metrics",
        **listed(str),
        default=list(_METRICS),
        metavar="NAME",
        help="of the errors, see `fl.metrics`",
    )
    group.add_argument(
        "--alpha",
        type=float,
        default=1.0,
        help="damping of the probes, relative to the mean eigenvalue",
    )
    group.add_argument(
        "--layers", **listed(str), metavar="BLOCK", help="blocks measured (default: all)"
    )


def add_output(group: Any, default: str) -> None:
    """Add the folder and how much is said."""
    group.add_argument(
        "--out", type=Path, metavar="FOLDER", help=f"the store (default: {default})"
    )
    group.add_argument("--quiet", action="store_true", help="show no bar and no table")
    add_json(group)


def _follow(arguments: argparse.Namespace, command: str) -> None:
    words = arguments.probes
    unknown = [word for word in words if word not in PROBES]
    if unknown:
        raise ValueError(f"--probes: {unknown[0]!r} is none of {', '.join(PROBES)}.")
    if arguments.steps < 1:
        raise ValueError(f"--steps must be at least 1, but is {arguments.steps}.")

    import fisherlab as fl

    out = of_first(lambda: arguments.out or _new_folder(arguments))
    problem = load_problem(arguments, arguments.seed)
    damping = arguments.damping
    if arguments.factored is not None:
        damping = fl.Factored(arguments.factored)
    given = {"lr": arguments.lr, "damping": damping}
    settings = {name: value for name, value in given.items() if value is not None}
    results = fl.follow(
        problem,
        fl.optimizer(arguments.optimizer, problem, **settings),
        steps=arguments.steps,
        seconds=arguments.seconds,
        probes=_probes(arguments, words),
        every=_moments(arguments),
        batch_size=arguments.batch_size,
        seed=arguments.seed,
        store=out,
        deterministic=arguments.deterministic,
        progress=not arguments.quiet,
    )
    if first_of_all():
        _tell(_by_moment(results), out, arguments)


def _moments(arguments: argparse.Namespace) -> Any:
    import fisherlab as fl

    if arguments.every is not None:
        return arguments.every
    return fl.LogarithmicSteps(arguments.moments)


def _new_folder(arguments: argparse.Namespace) -> Path:
    name = f"{subject(arguments).subject}-{arguments.optimizer}"
    return Path("runs") / f"{name}-{datetime.now():%Y%m%d-%H%M%S}"


def load_problem(arguments: argparse.Namespace, seed: int) -> Any:
    """Load the problem that the options name, with the weights of a seed."""
    import torch

    from fisherlab.numerics.devices import require_device
    from fisherlab.report import own

    require_device(arguments.device)
    dtype = getattr(torch, arguments.dtype)
    problem = own.named(subject(arguments, seed), dtype)
    return problem.to(arguments.device)


def _probes(arguments: argparse.Namespace, words: list[str]) -> list[Any]:
    import fisherlab as fl
    from fisherlab.approximators.register import network_approximators
    from fisherlab.report import own

    own.check_problem(subject(arguments))
    named = arguments.approximators
    coupled = [name for name in named if name in network_approximators()]
    methods = [name for name in named if name not in coupled]
    if coupled and "directions" not in words:
        raise ValueError(
            f"--approximators: {coupled[0]!r} couples layers; only the probe 'directions' "
            "follows such methods."
        )
    damping = fl.RelativeDamping(arguments.alpha)
    made = (fl.Exact(), fl.MonteCarlo(1, arguments.seed), fl.Empirical())
    shared: dict[str, Any] = {
        "fisher": dict(zip(FISHERS, made, strict=True))[arguments.fisher],
        "examples": arguments.examples,
        "layers": arguments.layers,
    }
    if arguments.on is not None:
        shared["on"] = arguments.on
    makers: dict[str, Any] = {
        "losses": fl.probes.Losses,
        "errors": lambda: fl.probes.Errors(
            methods, metrics=arguments.metrics, damping=damping, **shared
        ),
        "directions": lambda: fl.probes.Directions(
            methods, damping, layers=arguments.layers, network=coupled
        ),
        "spectra": lambda: fl.probes.Spectra(methods, **shared),
        "staleness": lambda: fl.probes.Staleness(methods, **shared),
    }
    return [makers[word]() for word in dict.fromkeys(words)]


def _tell(rows: Rows, out: Path, arguments: argparse.Namespace) -> None:
    """Print a table and where the results are; with JSON on stdout, this on stderr."""
    if arguments.json or not arguments.quiet:
        show(rows, arguments, numbers=True)
    if arguments.json:
        print(out, file=sys.stderr)
    else:
        print(out if arguments.quiet else f"\n{out}")


def _by_moment(results: Any) -> Rows:
    """Return the results that are one number a moment, a row for each."""
    names = [str(n) for n, v in results.data_vars.items() if v.dims == ("step",)]
    numbers = [results[name].values.astype(float).tolist() for name in names]
    steps = results["step"].values.tolist()
    return [["step", *names], *zip(steps, *numbers, strict=True)]


def add_tune(commands: Any) -> None:
    """Add the command."""
    text = (
        "Train with every setting of a grid and find the best of each optimiser. The same "
        "command with the same folder goes on where it stopped."
    )
    tune = add_command(
        commands,
        "tune",
        _tune,
        text,
        "tune --optimizers adam kfac --trials 4 --out runs/search",
    )
    _add_search(tune.add_argument_group("search"))
    add_output(tune.add_argument_group("output"), "runs/tune-<problem>-<time>")


def _add_search(group: Any) -> None:
    add_problem(group)
    group.add_argument(
        "--optimizers",
        **listed(str),
        default=["sgd-momentum", "adam", "kfac"],
        metavar="NAME",
        help="optimisers",
    )
    group.add_argument("--grid", default="coarse", help="coarse, koroko or bahamou")
    group.add_argument("--lr", **listed(float), help="learning rates instead of the grid's")
    group.add_argument("--damping", **listed(float), help="dampings instead of the grid's")
    group.add_argument(
        "--trials", type=int, help="most settings of an optimiser (default: all)"
    )
    group.add_argument("--steps", type=int, default=200, help="steps of a training")
    group.add_argument("--batch-size", type=int, default=64, help="examples in a minibatch")
    group.add_argument("--seeds", **listed(int), default=[0], help="seeds")
    group.add_argument(
        "--objective",
        choices=("train_loss", "test_loss"),
        default="train_loss",
        help="what is minimised",
    )
    group.add_argument("--seed", type=int, default=0, help="draws the settings")
    add_workers(group)


def _tune(arguments: argparse.Namespace, command: str) -> None:
    names = arguments.optimizers

    import fisherlab as fl
    from fisherlab.report import own

    _check_names(names)
    asked = subject(arguments)
    own.check_problem(asked)
    now = datetime.now()
    out = arguments.out or Path("runs") / f"tune-{asked.subject}-{now:%Y%m%d-%H%M%S}"
    if importlib.util.find_spec("optuna") is None:
        raise ValueError("tune needs optuna: pip install 'fisherlab[tune]'.")
    tuned = fl.tune(
        partial(load_problem, arguments),
        names,
        _grids(arguments, names),
        steps=arguments.steps,
        seeds=arguments.seeds,
        trials=arguments.trials,
        batch_size=arguments.batch_size,
        objective=arguments.objective,
        store=out,
        seed=arguments.seed,
        progress=not arguments.quiet,
        executor=executor_of(arguments, out / "jobs"),
    )
    _tell(_best(tuned), out / "results.nc", arguments)


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
                grid[setting] = tuple(given)
        grids[name] = grid
    return grids


def _best(tuned: Any) -> Rows:
    """Return the best setting of every optimiser, a row for each."""
    names = [n for n in ("lr", "damping") if n in tuned.coords]
    rows: list[list[Any]] = [["optimizer", *names, str(tuned.attrs["objective"])]]
    for optimizer in tuned["optimizer"].values:
        one = tuned.sel(optimizer=optimizer)
        best = int(one["best"])
        if best < 0:
            rows.append([str(optimizer), *("" for _ in names), "none finished"])
            continue
        values = [float(one[n][best]) for n in (*names, "objective")]
        rows.append([str(optimizer), *values])
    return rows
