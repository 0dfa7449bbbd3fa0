"""The command line: parse, call, and turn errors into one line and an exit code.

Importing this module and parsing load neither torch nor xarray.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Callable, Sequence
from dataclasses import fields
from itertools import chain
from pathlib import Path
from typing import Any, NoReturn

import fisherlab
from fisherlab.errors import FisherlabError
from fisherlab.report.config import DEFAULT_APPROXIMATORS, ReportConfig


class _Parser(argparse.ArgumentParser):
    """Report a mistake in one line instead of printing the usage first."""

    def error(self, message: str) -> NoReturn:
        raise ValueError(f"{message}. See `{self.prog} --help`.")


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command and return its exit code.

    0: done; 2: bad input, said in one line on stderr; 130: interrupted. Anything else
    is a defect and raises.

    Examples
    --------
    >>> main(["problems"])  # doctest: +ELLIPSIS
    name  ...
    digits  ...
    0
    """
    words = list(sys.argv[1:] if argv is None else argv)
    try:
        arguments = _parser().parse_args(words)
        arguments.act(arguments, shlex.join(["fisherlab", *words]))
    except (ValueError, FisherlabError, OSError) as error:
        print(f"fisherlab: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as stop:
        print(": ".join(["fisherlab: interrupted", *stop.args]), file=sys.stderr)
        return 130
    return 0


def _parser() -> _Parser:
    parser = _Parser(
        prog="fisherlab",
        description="How good is each approximation of a network's Fisher matrix?",
        allow_abbrev=False,
    )
    parser.add_argument(
        "--version", action="version", version=f"fisherlab {fisherlab.__version__}"
    )
    commands = parser.add_subparsers(required=True, metavar="command")
    _add_report(commands)
    _add_estimate(commands)
    _add(commands, "problems", _problems, "List data sets and networks.")
    _add(commands, "approximators", _approximators, "List the approximations.")
    return parser


def _add(
    commands: Any, name: str, act: Callable[..., None], text: str
) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = commands.add_parser(
        name,
        help=text,
        description=text,
        allow_abbrev=False,
    )
    parser.set_defaults(act=act)
    return parser


def _add_report(commands: Any) -> None:
    text = "Train a problem, analyse its Fisher blocks on the way, and write a report."
    report = _add(commands, "report", _report, text)
    _add_subject(report.add_argument_group("what is analysed"))
    _add_training(report.add_argument_group("training"))
    _add_output(report.add_argument_group("output"))


def _add_subject(group: Any) -> None:
    _option(group, "problem", "problem, see `fisherlab problems`")
    _option(
        group,
        "approximators",
        "approximations, see `fisherlab approximators`",
        nargs="+",
        type=_many(str),
        metavar="NAME",
    )
    _option(
        group,
        "fisher",
        "labels from the model's own distribution, sampled from it, or from the data",
        choices=("exact", "monte-carlo", "empirical"),
    )
    _option(group, "samples", "sampled labels per example (monte-carlo)", type=int)
    _option(
        group,
        "damping",
        "damping, relative to each block's mean eigenvalue",
        nargs="+",
        type=_many(float),
        metavar="ALPHA",
    )
    _option(group, "examples", "most examples that the Fisher is taken over", type=int)
    _option(
        group,
        "layers",
        "blocks whose inverse is drawn (default: those up to 2,000 parameters)",
        nargs="+",
        type=_many(str),
        metavar="BLOCK",
    )
    _option(group, "device", "cpu, cuda or cuda:<number>")
    _option(group, "budget", "memory that dense inverses may take, e.g. 4GiB")


def _add_estimate(commands: Any) -> None:
    text = "Count bytes and flops of an analysis, and where every parameter goes."
    estimate = _add(commands, "estimate", _estimate, text)
    for name, default, help_text in (
        ("problem", "digits", "problem, see `fisherlab problems`"),
        ("fisher", "exact", "exact, monte-carlo or empirical"),
        (
            "budget",
            None,
            "bytes everything may take, e.g. 4GiB (default: half of the free)",
        ),
        ("data-dir", None, "folder of the data files"),
    ):
        estimate.add_argument(f"--{name}", default=default, help=help_text)
    estimate.add_argument("--samples", type=int, default=1, help="sampled labels")
    estimate.add_argument("--examples", type=int, default=2000, help="examples counted")
    estimate.add_argument(
        "--approximators",
        nargs="+",
        type=_many(str),
        default=[list(DEFAULT_APPROXIMATORS)],
        metavar="NAME",
        help="approximations, see `fisherlab approximators`",
    )


def _add_training(group: Any) -> None:
    _option(group, "steps", "training steps", type=int)
    _option(
        group,
        "checkpoints",
        "steps after which to analyse (default: four, spaced logarithmically)",
        nargs="+",
        type=_many(int),
        metavar="STEP",
    )
    _option(group, "batch_size", "examples in a minibatch", type=int)
    _option(group, "lr", "learning rate", type=float)
    _option(group, "seed", "decides weights, order and sampled labels", type=int)
    _option(
        group,
        "data_dir",
        "folder of the data files (default: $FISHERLAB_DATA, then the cache)",
        type=Path,
        metavar="FOLDER",
    )


def _add_output(group: Any) -> None:
    _option(
        group,
        "out",
        "folder of the report (default: a new one, reports/<problem>-<time>)",
        type=Path,
        metavar="FOLDER",
    )
    _option(group, "overwrite", "replace the report in --out", action="store_true")
    _option(group, "quiet", "print the path of the page only", action="store_true")


def _option(group: Any, field: str, text: str, **settings: Any) -> None:
    """Add an option for a field of the configuration, with the field's default."""
    default = getattr(ReportConfig(), field)
    values = default if isinstance(default, tuple) else (default,)
    shown = " ".join(str(v) for v in values if v is not None and v is not False)
    if shown:
        text = f"{text} (default: {shown})"
    option = f"--{field.replace('_', '-')}"
    group.add_argument(option, default=default, help=text, **settings)


def _many(kind: Callable[[str], Any]) -> Callable[[str], list[Any]]:
    """Return a reader of values that may also be separated by commas."""

    def read(text: str) -> list[Any]:
        return [kind(part) for part in text.split(",") if part]

    # argparse names the reader when it complains.
    read.__name__ = f"list of {getattr(kind, '__name__', 'values')}"
    return read


def _report(arguments: argparse.Namespace, command: str) -> None:
    config = _config(arguments)

    from fisherlab.report.job import run

    print(run(config, command))


def _config(arguments: argparse.Namespace) -> ReportConfig:
    values: dict[str, Any] = {
        field.name: getattr(arguments, field.name) for field in fields(ReportConfig)
    }
    for name, value in values.items():
        # A list holds, for every word given, the list of what stood between commas.
        if isinstance(value, list):
            values[name] = tuple(chain.from_iterable(value))
    return ReportConfig(**values)


def _estimate(arguments: argparse.Namespace, command: str) -> None:
    import fisherlab as fl

    fishers: dict[str, Any] = {
        "exact": fl.Exact(),
        "monte-carlo": fl.MonteCarlo(arguments.samples),
        "empirical": fl.Empirical(),
    }
    if arguments.fisher not in fishers:
        known = ", ".join(fishers)
        raise ValueError(f"--fisher must be one of {known}, but is {arguments.fisher!r}.")
    problem = fl.problems.load(arguments.problem, data_dir=arguments.data_dir)
    x, y = problem.train
    batch = x[: arguments.examples], y[: arguments.examples]
    print(fl.coverage(problem.model, batch))
    print()
    print(
        fl.estimate(
            problem.model,
            batch,
            problem.likelihood,
            list(chain.from_iterable(arguments.approximators)),
            fishers[arguments.fisher],
            budget=arguments.budget,
        )
    )


def _problems(arguments: argparse.Namespace, command: str) -> None:
    from fisherlab import problems
    from fisherlab.report.table import aligned

    rows = [("name", "network", "data", "files")]
    for name in problems.names():
        known = problems.describe(name)
        folders = dict.fromkeys(f"{file.folder}/" for file in known.files)
        rows.append((name, known.network, known.summary, " ".join(folders) or "none"))
    print(aligned(rows))


def _approximators(arguments: argparse.Namespace, command: str) -> None:
    import fisherlab as fl
    from fisherlab.report.table import aligned

    rows = [("name", "what it is", "in Python")]
    for name, value in fl.approximators().items():
        summary = (type(value).__doc__ or "").strip().partition("\n")[0]
        rows.append((name, summary, repr(value)))
    print(aligned(rows))
