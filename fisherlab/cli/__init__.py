"""The command line: a file a command; parsing loads neither torch nor xarray."""

from __future__ import annotations

import io
import os
import shlex
import sys
from collections.abc import Sequence

import fisherlab
from fisherlab.cli import commands, follow, parsing, report
from fisherlab.cli.parsing import Parser
from fisherlab.errors import FisherlabError

COMMANDS = (
    report.add,
    follow.add,
    follow.add_tune,
    commands.add_compare,
    report.add_sweep,
    commands.add_reproduce,
    commands.add_estimate,
    commands.add_listings,
    commands.add_lab,
    commands.add_completion,
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command and return its exit code.

    0: done; 2: bad input, said in one line on stderr; 130: interrupted, also by SIGTERM;
    141: nobody reads standard output any more. Anything else is a defect and raises.

    Examples
    --------
    >>> main(["problems"])  # doctest: +ELLIPSIS
    name  ...
    digits  ...
    0
    """
    words = list(sys.argv[1:] if argv is None else argv)
    if isinstance(sys.stdout, io.TextIOWrapper):  # a λ ends no command where it is none
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        arguments = parser().parse_args(words)
        with parsing.group(arguments) as rank:
            if rank:
                arguments.quiet = True
            arguments.act(arguments, shlex.join(["fisherlab", *words]))
        print(end="", flush=True)
    except BrokenPipeError:  # of `head`, which has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except (ValueError, FisherlabError, OSError) as error:
        if parsing.tells(error):
            print(f"fisherlab: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as stop:
        print(": ".join(["fisherlab: interrupted", *stop.args]), file=sys.stderr)
        return 130
    return 0


def parser() -> Parser:
    """Return the parser of all commands."""
    program = Parser(
        prog="fisherlab",
        description="How good is each approximation of a network's Fisher matrix?",
        allow_abbrev=False,
    )
    program.add_argument(
        "--version", action="version", version=f"fisherlab {fisherlab.__version__}"
    )
    known = program.add_subparsers(required=True, metavar="command")
    for add in COMMANDS:
        add(known)
    return program
