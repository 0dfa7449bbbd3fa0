"""`fisherlab report`: train, analyse, write a page; or the page of a saved result."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Collection, Mapping
from dataclasses import fields
from itertools import chain
from pathlib import Path
from typing import Any, Final

from fisherlab.cli.parsing import add_command, many
from fisherlab.report.config import ReportConfig


def add(commands: Any) -> None:
    """Add the command."""
    text = (
        "Train a problem, analyse its Fisher blocks on the way, and write a report. "
        "Or analyse a model of one's own (--model, --data), or write the page of "
        "saved results again (fisherlab report results.nc)."
    )
    report = add_command(commands, "report", _report, text)
    report.add_argument(
        "results",
        nargs="?",
        type=Path,
        help="saved results, or a report's folder: write their page, compute nothing",
    )
    add_options(report)


def add_options(
    parser: argparse.ArgumentParser, without: Collection[str] = (), **defaults: Any
) -> None:
    """Add an option for each field of the configuration, but for those left out."""
    for title, options in OPTIONS.items():
        group = parser.add_argument_group(title)
        for field, (text, settings) in options.items():
            if field not in without:
                default = defaults.get(field, getattr(ReportConfig(), field))
                _option(group, field, text, default, settings)


def _option(
    group: Any, field: str, text: str, default: Any, settings: Mapping[str, Any]
) -> None:
    values = default if isinstance(default, tuple) else (default,)
    shown = " ".join(str(v) for v in values if v is not None and v is not False)
    if shown:
        text = f"{text} (default: {shown})"
    option = f"--{field.replace('_', '-')}"
    group.add_argument(option, default=default, help=text, **settings)


def _several(kind: Callable[[str], Any], metavar: str) -> dict[str, Any]:
    return {"nargs": "+", "type": many(kind), "metavar": metavar}


_SWITCH: Final = {"action": "store_true"}
_FOLDER: Final = {"type": Path, "metavar": "FOLDER"}
_SUBJECT: Final[dict[str, tuple[str, dict[str, Any]]]] = {
    "problem": ("problem, see `fisherlab problems`", {}),
    "model": (
        "your own model: a function without arguments that returns it",
        {"metavar": "MODULE:FUNCTION"},
    ),
    "data": (
        "its data: an .npz or .pt file with x and y, or a function that returns (x, y)",
        {"metavar": "FILE|MODULE:FUNCTION"},
    ),
    "likelihood": (
        "what its output means",
        {"choices": ("categorical", "bernoulli", "gaussian")},
    ),
    "approximators": (
        "approximations, see `fisherlab approximators`",
        _several(str, "NAME"),
    ),
    "fisher": (
        "labels from the model's own distribution, sampled from it, or from the data; "
        "auto is exact where it fits, else sampled",
        {"choices": ("auto", "exact", "monte-carlo", "empirical")},
    ),
    "samples": ("sampled labels per example (monte-carlo)", {"type": int}),
    "damping": ("dampings λ, beside the matrix", _several(float, "LAMBDA")),
    "alpha": (
        "dampings relative to each block's mean eigenvalue (2 if no damping is given)",
        _several(float, "ALPHA"),
    ),
    "factored": (
        "dampings λ on the factors of Kronecker products",
        _several(float, "LAMBDA"),
    ),
    "examples": ("most examples that the Fisher is taken over", {"type": int}),
    "layers": (
        "blocks whose inverse is drawn (default: those up to 2,000 parameters)",
        _several(str, "BLOCK"),
    ),
    "device": ("cpu, cuda or cuda:<number>", {}),
    "budget": ("memory of the analysis, e.g. 4GiB; what exceeds it is left out", {}),
    "time": ("time of the analysis, e.g. 20min; what exceeds it is left out", {}),
}
_TRAINING: Final[dict[str, tuple[str, dict[str, Any]]]] = {
    "steps": (
        "training steps (default: 1000; 0 for a model of your own)",
        {"type": int},
    ),
    "checkpoints": (
        "steps after which to analyse (default: four, spaced logarithmically)",
        _several(int, "STEP"),
    ),
    "batch_size": ("examples in a minibatch", {"type": int}),
    "lr": (
        "learning rate (default: 0.05 divided by the labels of an example)",
        {"type": float},
    ),
    "seed": ("decides weights, order and sampled labels", {"type": int}),
    "data_dir": (
        "folder of the data files (default: $FISHERLAB_DATA, then the cache)",
        _FOLDER,
    ),
}
_OUTPUT: Final[dict[str, tuple[str, dict[str, Any]]]] = {
    "out": ("folder of the report (default: a new one in reports)", _FOLDER),
    "overwrite": ("replace the report in --out", _SWITCH),
    "quiet": ("print the path of the page only", _SWITCH),
}
OPTIONS: Final = {
    "what is analysed": _SUBJECT,
    "training": _TRAINING,
    "output": _OUTPUT,
}
"""Group, field of the configuration, help and settings of its option."""


def _report(arguments: argparse.Namespace, command: str) -> None:
    config = configuration(arguments)
    if arguments.results is not None:
        _rebuild(arguments.results, config)
        return

    from fisherlab.report.job import run

    print(run(config, command))


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

    from fisherlab.report.saved import rebuild

    print(rebuild(results, config.out, overwrite=config.overwrite))


def configuration(arguments: argparse.Namespace) -> ReportConfig:
    """Return what the arguments of `report` ask for."""
    values: dict[str, Any] = {
        field.name: getattr(arguments, field.name)
        for field in fields(ReportConfig)
        if hasattr(arguments, field.name)
    }
    for name, value in values.items():
        # A list holds, for every word given, the list of what stood between commas.
        if isinstance(value, list):
            values[name] = tuple(chain.from_iterable(value))
    return ReportConfig(**values)
