"""`fisherlab report` and `sweep`: train, analyse, write a page; or a saved result."""

from __future__ import annotations

import argparse
from collections.abc import Collection, Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, Final, Literal, get_args, get_origin, get_type_hints

from fisherlab.cli.parsing import (
    DATA_DIR,
    OWN,
    add_command,
    add_workers,
    executor_of,
    first_of_all,
    listed,
    of_first,
    several,
)
from fisherlab.cli.parsing import METAVARS as OF_SUBJECT
from fisherlab.report.config import PURPOSES, ReportConfig


def add(commands: Any) -> None:
    """Add the command."""
    text = (
        "Train a problem, analyse its Fisher blocks on the way, and write a report. "
        "Or analyse a model of one's own (--model, --data), or write the page of "
        "saved results again (fisherlab report results.nc)."
    )
    report = add_command(
        commands,
        "report",
        _report,
        text,
        "report --problem mnist --steps 100 --out reports/mnist",
    )
    report.add_argument(
        "results",
        nargs="?",
        type=Path,
        help="saved results, or a report's folder: write their page, compute nothing",
    )
    add_options(report)
    several(report)


def add_options(
    parser: argparse.ArgumentParser, without: Collection[str] = (), **defaults: Any
) -> None:
    """Add an option for each field of the configuration, but for those left out."""
    kinds = get_type_hints(ReportConfig)
    for title, options in OPTIONS.items():
        group = parser.add_argument_group(title)
        for field, text in options.items():
            if field not in without:
                default = defaults.get(field, getattr(ReportConfig(), field))
                _option(group, field, text, default, _settings(field, kinds[field]))


def _option(
    group: Any, field: str, text: str, default: Any, settings: Mapping[str, Any]
) -> None:
    option = f"--{field.replace('_', '-')}"
    group.add_argument(option, default=default, help=text, **settings)


def _settings(field: str, kind: Any) -> dict[str, Any]:
    """Return how argparse reads a field, from its type."""
    if kind is bool:
        return {"action": "store_true"}
    if get_origin(kind) is Literal:
        return {"choices": get_args(kind)}
    named = {"metavar": METAVARS[field]} if field in METAVARS else {}
    if get_origin(kind) is tuple:
        return listed(get_args(kind)[0]) | named
    plain = next((one for one in get_args(kind) if one is not type(None)), kind)
    return {"type": plain} | named


METAVARS: Final = {
    **OF_SUBJECT,
    "approximators": "NAME",
    "purpose": "PURPOSE",
    "damping": "LAMBDA",
    "alpha": "ALPHA",
    "factored": "LAMBDA",
    "layers": "BLOCK",
    "checkpoints": "STEP",
    "data_dir": "FOLDER",
    "out": "FOLDER",
}
OPTIONS: Final[dict[str, dict[str, str]]] = {
    "what is analysed": {
        **OWN,
        "approximators": "approximations, see `fisherlab approximators`",
        "fisher": "labels from the model's own distribution, sampled from it, or from the "
        "data; auto is exact where it fits, else sampled",
        "samples": "sampled labels per example (monte-carlo)",
        "purpose": f"what they are judged for: {', '.join(PURPOSES)}",
        "prior": "prior precision of the Laplace posterior",
        "damping": "dampings λ, beside the matrix",
        "alpha": "dampings relative to each block's mean eigenvalue; 2.0 if none of any "
        "kind is given",
        "factored": "dampings λ on the factors of Kronecker products",
        "examples": "most examples that the Fisher is taken over",
        "layers": "blocks whose inverse is drawn (default: those up to 2,000 parameters)",
        "device": "cpu, or what torch finds, such as cuda, cuda:1, mps, xpu",
        "budget": "memory of the analysis, e.g. 4GiB; what exceeds it is left out",
        "time": "time of the analysis, e.g. 20min; what exceeds it is left out",
    },
    "training": {
        "steps": "training steps (default: 1000; 0 for a model of your own)",
        "checkpoints": "steps after which to analyse (default: four, spaced "
        "logarithmically)",
        "batch_size": "examples in a minibatch (default: 64, fewer where a step is slow)",
        "lr": "learning rate (default: 0.05 divided by the labels of an example)",
        "seed": "decides weights, order and sampled labels",
        "data_dir": DATA_DIR,
    },
    "output": {
        "out": "folder of the report (default: a new one in reports)",
        "overwrite": "replace the report in --out",
        "quiet": "print the path of the page only",
    },
}
"""Group, field of the configuration and help of its option; the type says the rest."""


def _report(arguments: argparse.Namespace, command: str) -> None:
    config = configuration(arguments)
    if arguments.results is not None:
        of_first(lambda: _rebuild(arguments.results, config))
        return

    from fisherlab.report.job import run

    page = run(config, command)
    if first_of_all():
        print(page)


def _rebuild(results: Path, config: ReportConfig) -> None:
    default = ReportConfig()
    used = {"out", "overwrite", "quiet"}
    given = [
        f"--{field.name.replace('_', '-')}"
        for field in fields(ReportConfig)
        if field.name not in used
        and getattr(config, field.name) != getattr(default, field.name)
    ]
    if given:
        raise ValueError(
            f"{', '.join(given)} would need a new computation: leave {results} out, or "
            "give only --out, --overwrite and --quiet with it."
        )

    from fisherlab.report.job import rebuild

    print(rebuild(results, config.out, overwrite=config.overwrite))


def configuration(arguments: argparse.Namespace) -> ReportConfig:
    """Return what the arguments of `report` ask for."""
    names = {field.name for field in fields(ReportConfig)}
    given = {name: value for name, value in vars(arguments).items() if name in names}
    lists = {name: tuple(v) for name, v in given.items() if isinstance(v, list)}
    return ReportConfig(**given | lists)


ALPHAS: Final = (1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0, 100.0)


def add_sweep(commands: Any) -> None:
    """Add the command."""
    text = (
        "Train a problem, or take a model of your own, and hold the damped inverse and "
        "step of every approximation against the exact ones over decades of damping."
    )
    sweep = add_command(
        commands, "sweep", _sweep, text, "sweep --problem digits --steps 100"
    )
    add_options(
        sweep, without=("checkpoints", "layers", "budget", "purpose", "prior"), alpha=ALPHAS
    )
    add_workers(sweep)


def _sweep(arguments: argparse.Namespace, command: str) -> None:
    config = configuration(arguments)
    if arguments.alpha is ALPHAS and (config.damping or config.factored):
        config = replace(config, alpha=())

    from fisherlab.report.job import run_sweep

    print(run_sweep(config, command, executor_of(arguments, Path("runs") / "jobs")))
