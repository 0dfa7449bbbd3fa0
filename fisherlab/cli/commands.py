"""The commands of few options: estimate, compare, reproduce, lab and what there is."""

from __future__ import annotations

import argparse
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from fisherlab.cli.parsing import (
    DATA_DIR,
    add_command,
    add_json,
    add_subject,
    add_workers,
    as_json,
    executor_of,
    listed,
    show,
    subject,
)
from fisherlab.report.config import DEFAULT_APPROXIMATORS

if TYPE_CHECKING:
    from fisherlab.analysis.coverages import Coverage
    from fisherlab.analysis.estimates import Estimate
    from fisherlab.problems import Description, Problem
import importlib.util
import os
import shutil
import sys


def add_estimate(commands: Any) -> None:
    """Add the command."""
    text = "Count bytes and flops of an analysis, and where every parameter goes."
    estimate = add_command(
        commands, "estimate", _estimate, text, "estimate --problem resnet18 --examples 128"
    )
    add_subject(estimate)
    for name, default, help_text in (
        ("fisher", "exact", "exact, monte-carlo or empirical"),
        (
            "budget",
            None,
            "bytes everything may take, e.g. 4GiB (default: half of the free)",
        ),
        ("data-dir", None, DATA_DIR),
    ):
        estimate.add_argument(f"--{name}", default=default, help=help_text)
    estimate.add_argument(
        "--samples", type=int, default=1, help="sampled labels per example (monte-carlo)"
    )
    add_json(estimate)
    estimate.add_argument("--examples", type=int, default=2000, help="examples counted")
    estimate.add_argument(
        "--ranks", type=int, help="also count what one of so many processes takes"
    )
    estimate.add_argument(
        "--approximators",
        **listed(str),
        default=list(DEFAULT_APPROXIMATORS),
        metavar="NAME",
        help="approximations, see `fisherlab approximators`",
    )
    estimate.add_argument(
        "--optimizers",
        **listed(str),
        default=[],
        metavar="NAME",
        help="with --ranks: also count what their steps send",
    )
    estimate.add_argument(
        "--batch-size", type=int, default=64, help="examples of a step, of all ranks"
    )


def _estimate(arguments: argparse.Namespace, command: str) -> None:
    import fisherlab as fl
    from fisherlab.numerics.devices import readable
    from fisherlab.report import own
    from fisherlab.showing import aligned

    fishers: dict[str, Any] = {
        "exact": fl.Exact(),
        "monte-carlo": fl.MonteCarlo(arguments.samples),
        "empirical": fl.Empirical(),
    }
    if arguments.fisher not in fishers:
        known = ", ".join(fishers)
        raise ValueError(f"--fisher must be one of {known}, but is {arguments.fisher!r}.")
    problem = own.named(subject(arguments))
    x, y = problem.train
    batch = x[: arguments.examples], y[: arguments.examples]
    with fl.frozen(problem.model) as model:
        covered = fl.coverage(model, batch)
        counted = fl.estimate(
            model,
            batch,
            problem.likelihood,
            arguments.approximators,
            fishers[arguments.fisher],
            budget=arguments.budget,
            ranks=arguments.ranks,
        )
    steps = _steps(problem, arguments)
    if arguments.json:
        print(_bill(covered, counted, steps))
        return
    print(f"{covered}\n\n{counted}")
    if steps:
        rows = [[name, *map(readable, row.values())] for name, row in steps.items()]
        print("\n" + aligned([["optimizer", *next(iter(steps.values()))], *rows]))


def _steps(problem: Problem, arguments: argparse.Namespace) -> dict[str, dict[str, int]]:
    """Return the bytes that a step of each optimiser sends, and of its gradient alone."""
    from fisherlab.training import step_bytes

    names, found = arguments.optimizers, {}
    if names and arguments.ranks is None:
        raise ValueError("--optimizers: how many processes is not known; give --ranks.")
    how = {"ranks": arguments.ranks, "batch_size": arguments.batch_size}
    for name in names:
        told = step_bytes(problem, name, **how)
        found[name] = {**vars(told.at(0)), "gradient": told.gradient.total}
    return found


def _bill(covered: Coverage, counted: Estimate, steps: dict[str, dict[str, int]]) -> str:
    """Write all tables and the totals as JSON: bytes, multiply-adds, null for none."""
    totals = ("statistics_bytes", "result_bytes", "peak_bytes", "budget", "flops", "fits")
    found = {name: getattr(counted, name) for name in ("examples", *totals)}
    found |= {
        "coverage": covered.table().to_dict("records"),
        "rows": [vars(row) for row in counted.rows],
        "steps": steps,
    }
    if (told := counted.shares) is not None:
        parts: dict[str, Any] = {"rows": [vars(row) for row in told.rows]}
        parts |= {name: vars(getattr(told, name)) for name in ("sent", "step")}
        found["shares"] = {**vars(told), "step_bytes": told.step_bytes, **parts}
    return as_json(found)


def add_compare(commands: Any) -> None:
    """Add the command."""
    text = "Set two saved results, or two reports, side by side on a page."
    compare = add_command(
        commands, "compare", _compare, text, "compare reports/before reports/after"
    )
    for name in ("first", "second"):
        compare.add_argument(
            name, type=Path, help="saved results (.nc), or the folder of a report"
        )
    compare.add_argument(
        "--out",
        type=Path,
        metavar="FOLDER",
        help="folder of the page (default: a new one, reports/compare-<time>)",
    )
    compare.add_argument("--overwrite", action="store_true", help="replace a page in --out")
    add_json(compare)


def _compare(arguments: argparse.Namespace, command: str) -> None:
    from fisherlab.report.two_runs import compare_runs

    page = compare_runs(
        arguments.first, arguments.second, arguments.out, overwrite=arguments.overwrite
    )
    if arguments.json:
        import fisherlab as fl

        pair: Any = fl.open(page.with_name("runs.nc"))
        table = fl.plots.table(pair)
        show([list(table), *table.values.tolist()], arguments)
    print(page, file=sys.stderr if arguments.json else sys.stdout)


def add_reproduce(commands: Any) -> None:
    """Add the command."""
    text = (
        "Compute a figure, table or theorem of a paper beside what was published; "
        "`list` names them, `all` runs everything."
    )
    command = add_command(
        commands, "reproduce", _reproduce, text, "reproduce kfac-figure-3 --quick"
    )
    command.add_argument("name", nargs="?", default="list", help="an id, `list` or `all`")
    add_json(command)
    size = command.add_mutually_exclusive_group()
    size.add_argument("--quick", action="store_true", help="minutes a row, not hours")
    size.add_argument("--paper", action="store_true", help="the paper's size (default)")
    command.add_argument("--seed", type=int, default=0, help="decides everything random")
    command.add_argument("--seeds", type=int, default=1, help="so many, from --seed on")
    command.add_argument("--device", default="cpu", help="where networks are trained")
    command.add_argument(
        "--problem", metavar="NAME", help="train on another one, where `list` names some"
    )
    command.add_argument(
        "--steps", type=int, metavar="N", help="of each training, where `list` names it"
    )
    command.add_argument("--data-dir", type=Path, help=DATA_DIR)
    command.add_argument(
        "--out",
        type=Path,
        metavar="FOLDER",
        help="new or empty folder (default: a new one, reproduced/<name>); of `all`, "
        "where it goes on",
    )
    add_workers(command)


def _reproduce(arguments: argparse.Namespace, command: str) -> None:
    from fisherlab.numerics.devices import require_device
    from fisherlab.reproduce import catalogue
    from fisherlab.reproduce.experiment import Setting

    if arguments.name == "list":
        show(_rows_listed(arguments.data_dir), arguments)
        return
    require_device(arguments.device)
    setting = Setting(
        arguments.seed,
        arguments.quick,
        arguments.device,
        arguments.data_dir,
        Path("runs"),
        arguments.problem,
        arguments.steps,
    )
    executor = executor_of(arguments, Path("runs") / "jobs")
    seeds, out = arguments.seeds, arguments.out
    if arguments.name == "all":
        print(catalogue.write_all(setting, seeds, out, executor=executor))
    else:
        print(catalogue.write(arguments.name, setting, seeds, out, executor))


def _rows_listed(data_dir: Path | None) -> list[tuple[str, ...]]:
    """Return the head and a line for every row of every paper."""
    from fisherlab.reproduce import catalogue
    from fisherlab.reproduce.catalogue import state

    known = catalogue.experiments()
    lines: list[tuple[str, ...]] = [
        ("id", "command", "what it shows", "data", "quick/paper min", "state")
    ]
    for row in catalogue.rows():
        made = known.get(row.experiment or "")
        data, minutes = "", ""
        if made is not None:
            data = " ".join(_there(name, data_dir) for name in made.data) or "none"
            if made.problems:
                data += f"; --problem {' '.join(made.problems)}"
            if made.trains:
                data += "; --steps N"
            minutes = "/".join(f"{one:g}" for one in made.minutes)
        told = (row.name, row.experiment or "", row.shows, data, minutes, state(row, known))
        lines.append(told)
    return lines


def _there(name: str, data_dir: Path | None) -> str:
    """Return the name of a problem, marked where its files are missing."""
    from fisherlab.problems import describe
    from fisherlab.problems.files import find

    missing = not all(find(file, data_dir) for file in describe(name).files)
    return f"{name} (missing)" if missing else name


def add_listings(commands: Any) -> None:
    """Add the commands."""
    parser = add_command(
        commands, "problems", _problems, "List data sets and networks.", "problems --json"
    )
    parser.add_argument(
        "--data-dir",
        type=Path,
        help=DATA_DIR,
    )
    parser.add_argument(
        "--download",
        metavar="NAME",
        help="fetch the data files of this problem instead (needs pooch)",
    )
    text = "List the approximations."
    approximations = add_command(
        commands, "approximators", _approximators, text, "approximators --json"
    )
    for each in (parser, approximations):
        add_json(each)


def _problems(arguments: argparse.Namespace, command: str) -> None:
    from fisherlab import problems

    if arguments.download is not None:
        paths = problems.download(arguments.download, arguments.data_dir)
        print(*paths or [f"{arguments.download} needs no files."], sep="\n")
        return
    rows = [("name", "network", "data", "likelihood", "files")]
    for name in problems.names():
        known = problems.describe(name)
        likelihood = type(known.likelihood).__name__
        files = _files(known, arguments.data_dir)
        rows.append((name, known.network, known.summary, likelihood, files))
    show(rows, arguments)


def _files(known: Description, data_dir: Path | None) -> str:
    """Name the folders of the files, and say whether the files are there."""
    from fisherlab.problems.files import find

    if not known.files:
        return "none needed"
    folders = " ".join(dict.fromkeys(f"{file.folder}/" for file in known.files))
    there = all(find(file, data_dir) for file in known.files)
    return f"{folders} ({'there' if there else 'missing'})"


def _approximators(arguments: argparse.Namespace, command: str) -> None:
    import fisherlab as fl

    rows = [("name", "what it is", "in Python")]
    for name, value in fl.approximators().items():
        summary = (type(value).__doc__ or "").strip().partition("\n")[0]
        rows.append((name, summary, repr(value)))
    show(rows, arguments)


SHELLS: Final = ("bash", "zsh", "fish")


def add_completion(commands: Any) -> None:
    """Add the command."""
    text = (
        "Print what a shell needs to complete commands, options and names at the tab key: "
        "bash, zsh or fish."
    )
    completion = add_command(commands, "completion", _completion, text, "completion bash")
    completion.add_argument("shell", choices=SHELLS, help="the shell")


def _completion(arguments: argparse.Namespace, command: str) -> None:
    try:
        import shtab
    except ImportError as error:
        raise ValueError(
            "completion needs shtab: pip install 'fisherlab[completion]'."
        ) from error
    from fisherlab.cli import parser

    program, known = parser(), _known_names()
    taken = [a.choices for a in program._actions if isinstance(a.choices, dict)]
    each = chain.from_iterable(one._actions for one in taken[0].values())
    for action in each:
        if action.dest in known:
            action.choices = known[action.dest]
        elif action.type is Path:
            action.complete = shtab.FILE
    print(shtab.complete(program, arguments.shell))


def _known_names() -> dict[str, list[str]]:
    """Return the words that options take, by what the parser calls them."""
    import fisherlab as fl
    from fisherlab.cli.follow import PROBES
    from fisherlab.report.config import LIKELIHOODS, PURPOSES

    return {
        "problem": list(fl.problems.names()),
        "approximators": list(fl.approximators()),
        "optimizer": list(fl.optimizers()),
        "optimizers": list(fl.optimizers()),
        "likelihood": list(LIKELIHOODS),
        "purpose": list(PURPOSES),
        "probes": list(PROBES),
    }


def add_lab(commands: Any) -> None:
    """Add the command."""
    text = "Open JupyterLab on copies of the notebooks; what is there is kept."
    lab = add_command(commands, "lab", _lab, text, "lab my-notebooks --no-browser")
    lab.add_argument(
        "folder",
        nargs="?",
        type=Path,
        default=Path("fisherlab-notebooks"),
        help="folder of the copies",
    )
    lab.add_argument("--port", type=int, help="port of the server (default: Jupyter's)")
    lab.add_argument(
        "--no-browser", action="store_true", help="print the address, open no browser"
    )
    lab.add_argument(
        "--allow-root", action="store_true", help="start as root, e.g. in a container"
    )


def _lab(arguments: argparse.Namespace, command: str) -> None:
    missing = [
        name for name in ("jupyterlab", "ipykernel") if not importlib.util.find_spec(name)
    ]
    if missing:
        raise ValueError(
            f"{' and '.join(missing)}: not installed. pip install 'fisherlab[lab]' does it."
        )
    copied, kept = copy_notebooks(arguments.folder)
    told = f"{len(copied)} notebooks copied into {arguments.folder}"
    print(told + (f", {len(kept)} kept as they were there" if kept else ""), flush=True)
    # JupyterLab takes the place of this process: it answers Ctrl-C in its own way.
    os.execv(sys.executable, server(arguments))


def server(arguments: argparse.Namespace) -> list[str]:
    """Return the command that starts JupyterLab with this interpreter's kernel."""
    words = [sys.executable, "-m", "jupyterlab", str(arguments.folder)]
    if arguments.port is not None:
        words.append(f"--port={arguments.port}")
    switches = {
        "--no-browser": arguments.no_browser,
        "--allow-root": arguments.allow_root,
    }
    return words + [switch for switch, asked in switches.items() if asked]


def copy_notebooks(folder: Path) -> tuple[list[Path], list[Path]]:
    """Copy the notebooks that are not there; return the new ones and those kept.

    Raises
    ------
    ValueError
        If this installation came without notebooks, or `folder` is a file.
    """
    source = notebooks()
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder} is a file, not a folder. Name another one.")
    folder.mkdir(parents=True, exist_ok=True)
    copied, kept = [], []
    for original in sorted(source.glob("*.ipynb")):
        target = folder / original.name
        if target.exists():
            kept.append(target)
        else:
            shutil.copyfile(original, target)
            copied.append(target)
    return copied, kept


def notebooks() -> Path:
    """Return the folder of the notebooks: in the package, else in the checkout."""
    package = Path(__file__).resolve().parent.parent
    for folder in (package / "notebooks", package.parent / "notebooks"):
        if any(folder.glob("[0-9][0-9]_*.ipynb")):
            return folder
    raise ValueError("this installation of fisherlab came without its notebooks.")
