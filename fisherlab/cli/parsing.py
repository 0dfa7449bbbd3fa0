"""What every command's parser shares."""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable, Sequence
from itertools import chain
from typing import Any, Final, NoReturn

from fisherlab.errors import meant
from fisherlab.report.config import LIKELIHOODS, ReportConfig

Rows = Sequence[Sequence[Any]]


class Parser(argparse.ArgumentParser):
    """Report a mistake in one line instead of printing the usage first."""

    def error(self, message: str) -> NoReturn:
        """Raise instead of printing and leaving."""
        near = self._near(message)
        raise ValueError(f"{message}.{near} See `{self.prog} --help`.")

    def _near(self, message: str) -> str:
        """Find what may have been meant: a choice that argparse lists, or an option."""
        given, listed, choices = message.partition("(choose from ")
        if listed:
            word = given.rpartition("invalid choice: ")[2].strip(" '")
            return meant(word, (one.strip(" '") for one in choices.rstrip(")").split(",")))
        given = message.removeprefix("unrecognized arguments: ")
        return meant(given.split()[0], self._options()) if given != message else ""

    def _options(self) -> set[str]:
        """Return the options of this parser and of its commands."""
        commands = (
            command
            for action in self._actions
            if isinstance(action.choices, dict)
            for command in action.choices.values()
        )
        return {
            option for one in (self, *commands) for option in one._option_string_actions
        }


def add_command(
    commands: Any, name: str, act: Callable[..., None], text: str
) -> argparse.ArgumentParser:
    """Add a command that calls `act(arguments, command line)`."""
    parser: argparse.ArgumentParser = commands.add_parser(
        name,
        help=text,
        description=text,
        allow_abbrev=False,
    )
    parser.set_defaults(act=act)
    return parser


OWN: Final = {
    "problem": "problem, see `fisherlab problems`, or a function that returns one",
    "model": "your own model: its name, or that of a function that returns it",
    "data": "its data: an .npz or .pt file with x and y, or the name of a pair (x, y), a "
    "DataLoader, or a function that returns one",
    "likelihood": f"what its output means: {', '.join(LIKELIHOODS)}, or a function that "
    "returns a fl.Likelihood",
}
"""What is computed with, by options that every command has: name and help."""
METAVARS: Final = {
    "problem": "NAME|MODULE:FUNCTION",
    "model": "MODULE:FUNCTION",
    "data": "FILE|MODULE:FUNCTION",
    "likelihood": "NAME|MODULE:FUNCTION",
}


def add_subject(group: Any) -> None:
    """Add what says which problem, or which model of one's own, is computed with."""
    for name, text in OWN.items():
        default = getattr(ReportConfig(), name)
        shown = f"{text} (default: {default})" if default else text
        group.add_argument(f"--{name}", default=default, metavar=METAVARS[name], help=shown)


def subject(arguments: argparse.Namespace, seed: int = 0) -> ReportConfig:
    """Return which problem or model the options name, with the weights of a seed."""
    given = {name: getattr(arguments, name) for name in (*OWN, "data_dir")}
    return ReportConfig(**given, seed=seed)


def add_json(parser: Any) -> None:
    """Add the option of every command that prints a table; `show` heeds it."""
    parser.add_argument("--json", action="store_true", help="print the table as JSON")


def show(rows: Rows, arguments: argparse.Namespace, *, numbers: bool = False) -> None:
    """Print a table, whose first row is its head: as lines of text, or as JSON.

    Examples
    --------
    >>> rows = [("layer", "error"), ("fc", 0.51234), ("out", float("nan"))]
    >>> show(rows, argparse.Namespace(json=False))
    layer  error
    fc     0.5123
    out    nan
    >>> show(rows[:2], argparse.Namespace(json=True))
    [
     {
      "layer": "fc",
      "error": 0.51234
     }
    ]
    """
    from fisherlab.analysis.wording import aligned

    if arguments.json:
        head, *body = rows
        print(as_json([dict(zip(head, row, strict=True)) for row in body]))
        return
    text = [[f"{v:.4g}" if isinstance(v, float) else str(v) for v in row] for row in rows]
    print(aligned(text, numbers=numbers))


def as_json(found: Any) -> str:
    """Write what was found as JSON, which has null for numbers that are not finite.

    Examples
    --------
    >>> as_json({"a": (1.5, float("nan"), 3)}).split()
    ['{', '"a":', '[', '1.5,', 'null,', '3', ']', '}']
    """

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {name: plain(one) for name, one in value.items()}
        if isinstance(value, list | tuple):
            return [plain(one) for one in value]
        return None if isinstance(value, float) and not math.isfinite(value) else value

    return json.dumps(plain(found), indent=1, ensure_ascii=False, allow_nan=False)


def listed(kind: Callable[[str], Any]) -> dict[str, Any]:
    """Return how argparse reads a list of values, apart by spaces or by commas.

    Examples
    --------
    >>> parser = Parser()
    >>> _ = parser.add_argument("--lr", **listed(float))
    >>> parser.parse_args(["--lr", "0.1,0.2", "0.3"]).lr
    [0.1, 0.2, 0.3]
    """

    def read(text: str) -> list[Any]:
        return [kind(part) for part in text.split(",") if part]

    # argparse names the reader when it complains.
    read.__name__ = f"list of {getattr(kind, '__name__', 'values')}"
    return {"nargs": "+", "type": read, "action": _Flat}


class _Flat(argparse.Action):
    def __call__(self, parser: Any, namespace: Any, values: Any, _: Any = None) -> None:
        """Keep what stood between the commas of all words as one list."""
        setattr(namespace, self.dest, list(chain.from_iterable(values)))
