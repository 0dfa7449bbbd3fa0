"""The jobs behind reports: of a command, of a model, of a result at hand or saved."""

import json
import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import Any, Final

import xarray as xr
from torch import nn

import fisherlab as fl
from fisherlab.analysis.allowances import parse_time
from fisherlab.analysis.cells import Damping, dampings
from fisherlab.analysis.executors import Workers
from fisherlab.analysis.files import beside
from fisherlab.analysis.intervals import with_noise
from fisherlab.analysis.verdicts import damping_verdict
from fisherlab.approximators.ranks import require_same_weights
from fisherlab.approximators.register import Chosen
from fisherlab.catalogue import QUANTITIES, TEXTS
from fisherlab.errors import NumericalError, meant
from fisherlab.likelihoods import Likelihood
from fisherlab.numerics.devices import parse_budget, require_device
from fisherlab.numerics.ranks import live
from fisherlab.operators.base import RelativeDamping
from fisherlab.problems import Problem
from fisherlab.report import own
from fisherlab.report.analysis import (
    Analysis,
    analyse,
    attributes_of,
    by_first,
    checkpoints,
    collected,
    count_phases,
    pictured,
)
from fisherlab.report.config import DEFAULT_APPROXIMATORS, DEFAULT_PURPOSES, ReportConfig
from fisherlab.report.folder import (
    Phases,
    describe_run,
    environment,
    in_reports,
    whole_folder,
)
from fisherlab.report.judging import Asked, judged
from fisherlab.report.page import EXPECTED, write_page
from fisherlab.report.sizes import Size, fitted, spread
from fisherlab.settings import numeric
from fisherlab.showing import aligned

DEFAULT_DAMPING = RelativeDamping(2.0)
PARTS = ("report.html", "results.nc", "inverse_blocks.nc", "run.json", "figures")


@numeric
def of_model(
    model: nn.Module,
    data: Any,
    likelihood: Likelihood,
    out: str | Path | None = None,
    *,
    approximators: Chosen = DEFAULT_APPROXIMATORS,
    fisher: Any = None,
    damping: Damping = DEFAULT_DAMPING,
    purpose: Sequence[str] = DEFAULT_PURPOSES,
    prior: float = 1.0,
    held_out: tuple[Any, Any] | None = None,
    budget: str | int | None = "1 GiB",
    title: str = "",
    overwrite: bool = False,
    progress: bool = False,
) -> Path:
    """Analyse a model as it is, write its report, and return the path of the page.

    Parameters
    ----------
    model
        The network; it is analysed in eval mode and left as it was.
    data
        A pair (x, y), or batches that can be gone through twice, as `fl.collect` takes.
    likelihood
        What the output means, e.g. `fl.Categorical()`.
    out
        The folder of the report; by default a new one in `reports`.
    approximators
        Names, or a mapping of names to values.
    fisher
        `fl.Exact()` by default.
    damping
        As `fl.compare` takes it, `RelativeDamping(2)` by default; the first also damps
        the inverses that are drawn.
    purpose
        What the matrices are judged for: names as `fisherlab report --purpose` takes them.
    prior
        Prior precision of the Laplace posterior.
    held_out
        A pair (x, y) of other examples, for predictive variances and calibration.
    budget
        Memory that dense inverses may take.
    title
        The name at the head of the page; by default the model's class.
    overwrite
        Replace an earlier report in `out`.
    progress
        Show bars while the statistics and every table are made.

    Raises
    ------
    ValueError
        For unknown approximations, or an `out` that is not empty.
    UnsupportedModelError
        If a parameter has no block; see `fl.coverage`.

    Examples
    --------
    >>> import tempfile, torch
    >>> model = torch.nn.Linear(3, 2).double()
    >>> data = (torch.rand(20, 3).double(), torch.randint(2, (20,)))
    >>> with tempfile.TemporaryDirectory() as out:
    ...     page = of_model(model, data, fl.Categorical(), out, approximators=["kfac"])
    ...     sorted(path.name for path in page.parent.iterdir())
    ['figures', 'inverse_blocks.nc', 'report.html', 'results.nc', 'run.json']
    """
    with _folder(out, overwrite) as (scratch, place, record):  # refused before the work
        first = dampings(damping).each[0]
        with fl.frozen(model):
            labels = fisher or fl.Exact()
            stats = fl.collect(model, data, likelihood, labels, progress=progress)
            gradient = fl.mean_gradient(model, data, likelihood)
        ds = fl.compare(
            stats,
            approximators,
            damping=damping,
            gradient=gradient,
            budget=budget,
            progress=progress,
        )
        with fl.frozen(model):
            pair = data if isinstance(data, tuple) else next(iter(data))
            asked = Asked(
                stats,
                gradient,
                model,
                likelihood,
                pair,
                held_out,
                first,
                prior,
                stats.provenance.examples,
            )
            found = (
                judged(tuple(purpose), asked, approximators, budget, progress=progress)
                if purpose
                else None
            )
        ds = ds if found is None else beside(ds, found)
        name = title or type(model).__name__
        count = sum(parameter.numel() for parameter in model.parameters())
        told = {"problem": name, "model": f"{type(model).__name__}, {count:,} parameters"}
        tree = pictured(stats, approximators, first, None, spread(list(stats)), progress)
        write_parts(with_noise(ds, stats).assign_attrs(told), tree, record, scratch)
    return place / "report.html"


def write(
    ds: xr.Dataset,
    out: str | Path | None = None,
    *,
    inverses: xr.DataTree | None = None,
    run: Mapping[str, Any] | None = None,
    overwrite: bool = False,
) -> Path:
    """Write the report of a result of `fl.compare`, and return the path of its page.

    Parameters
    ----------
    ds
        The result, with coordinates `layer` and `approximator`.
    out
        The folder of the report; by default a new one in `reports`.
    inverses
        What `fl.inverse_blocks` or `fl.density` returned, for their figures.
    run
        How the result came about (command, settings), for the record and the page.
    overwrite
        Replace an earlier report in `out`.

    Raises
    ------
    ValueError
        If the result has no layers and approximations, or `out` is not empty.

    Examples
    --------
    >>> import tempfile
    >>> dims = ("layer", "approximator")
    >>> coords = {"layer": ["0"], "approximator": ["kfac"]}
    >>> ds = xr.Dataset({"frobenius_error": (dims, [[0.4]])}, coords)
    >>> with tempfile.TemporaryDirectory() as out:
    ...     write(ds, out).name
    'report.html'
    """
    with _folder(out, overwrite) as (scratch, place, record):
        write_parts(ds, inverses, record | dict(run or {}), scratch)
    return place / "report.html"


@contextmanager
def _folder(
    out: str | Path | None, overwrite: bool
) -> Iterator[tuple[Path, Path, dict[str, Any]]]:
    """Yield a scratch folder, the place it goes to in the end, and how it came about."""
    started = datetime.now().astimezone()
    record = environment() | {"started_at": started.isoformat(timespec="seconds")}
    fallback = in_reports("report", started)
    folder = whole_folder(out, fallback, overwrite=overwrite, owned=PARTS)
    with folder as (scratch, place):
        yield scratch, place, record


def write_parts(
    ds: xr.Dataset, inverses: xr.DataTree | None, record: Mapping[str, Any], folder: Path
) -> None:
    """Write results, inverses, page, figures and record into a folder that exists.

    Examples
    --------
    >>> import tempfile
    >>> dims = ("layer", "approximator")
    >>> coords = {"layer": ["0"], "approximator": ["kfac"]}
    >>> ds = xr.Dataset({"frobenius_error": (dims, [[0.4]])}, coords)
    >>> with tempfile.TemporaryDirectory() as out:
    ...     write_parts(ds, None, {}, Path(out))
    ...     sorted(path.name for path in Path(out).iterdir())
    ['figures', 'report.html', 'results.nc', 'run.json']
    """
    fl.save(ds, folder / "results.nc")
    if inverses is not None and inverses.children:
        fl.save(single(inverses), folder / "inverse_blocks.nc")
    write_page(ds, inverses, folder, record)
    text = json.dumps(record, indent=2, default=str)
    (folder / "run.json").write_text(text + "\n")


def single(tree: xr.DataTree) -> xr.DataTree:
    """Keep seven digits of the inverses: enough for a picture, in half the space.

    Examples
    --------
    >>> node = xr.Dataset({"inverse": ("row", [1.0])})
    >>> str(single(xr.DataTree.from_dict({"fc": node}))["fc"]["inverse"].dtype)
    'float32'
    """
    short: xr.DataTree = tree.map_over_datasets(_single)
    return short


def _single(ds: xr.Dataset) -> xr.Dataset:
    return ds.assign(inverse=ds["inverse"].astype("float32")) if "inverse" in ds else ds


PAGE: Final = ("report.html", "figures")
_DIMS: Final = ("layer", "approximator", "step", "damping", "seed")
BESIDE: Final = ("inverse_blocks.nc", "run.json")


def rebuild(
    results: str | Path, out: str | Path | None = None, *, overwrite: bool = False
) -> Path:
    """Write the page of a saved result and return its path.

    In the folder of a report its page and figures are renewed. Of any other file, or
    with `out`, a new folder is made, which takes copies of the results along.

    Parameters
    ----------
    results
        A file of `fl.save`, or a folder that holds `results.nc`.
    out
        The folder of the page; by default the report's own, or a new one in `reports`.
    overwrite
        Replace an earlier report in `out`.

    Raises
    ------
    DataError
        If the file is missing or not readable.
    ValueError
        If it holds no table of layers and approximations, or `out` is not empty.

    Examples
    --------
    >>> rebuild("nowhere.nc")
    Traceback (most recent call last):
    fisherlab.errors.DataError: open: there is no file nowhere.nc.
    """
    file = located(Path(results))
    ds = load_result(file)
    run = read_run(file.parent)
    tree = _blocks(file.parent / BESIDE[0])
    own = out is None and (file.parent / PAGE[0]).exists()
    target = file.parent if own else out
    owned = PAGE if own else (*PAGE, "results.nc", *BESIDE)
    fallback = in_reports(file.stem)
    folder = whole_folder(target, fallback, overwrite=own or overwrite, owned=owned)
    with folder as (scratch, place):
        write_page(ds, tree, scratch, run)
        if not own:
            _take_along(file, scratch)
    return place / PAGE[0]


def located(path: Path) -> Path:
    """Return the file of results that a path means: itself, or that of a folder.

    Examples
    --------
    >>> located(Path("a.nc")).name
    'a.nc'
    """
    inside = path / "results.nc"
    return inside if path.is_dir() and inside.exists() else path


def load_result(file: Path) -> xr.Dataset:
    """Open a result that has layers and approximations, or say that it has none.

    Examples
    --------
    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     load_result(fl.save(xr.Dataset(), Path(folder) / "a.nc"))  # doctest: +ELLIPSIS
    Traceback (most recent call last):
    ValueError: .../a.nc holds no table of layers and approximations...
    """
    ds = fl.open(file)
    fault = _fault(ds) if isinstance(ds, xr.Dataset) else "it is a tree"
    if not isinstance(ds, xr.Dataset) or fault:
        raise ValueError(
            f"{file} holds no table of layers and approximations: {fault}. Name what "
            "fl.compare returned and fl.save wrote, e.g. the results.nc of a report."
        )
    return ds


def _fault(ds: xr.Dataset) -> str:
    """Say what in a result is not what a report is made of, "" if nothing is."""
    for dim in ("layer", "approximator"):
        if dim not in ds.dims or dim not in ds.indexes:
            return f"it has no labels along {dim}"
        labels = ds.indexes[dim]
        if labels.has_duplicates or not all(isinstance(one, str) for one in labels):
            return f"the labels along {dim} are not texts that differ"
    for dim, kinds in (("step", "iu"), ("damping", "iuf")):
        if dim in ds.dims and (not ds.sizes[dim] or ds[dim].dtype.kind not in kinds):
            return f"{dim} is no row of {'whole ' if dim == 'step' else ''}numbers"
    for name in map(str, ds.data_vars):
        if name in QUANTITIES and name not in TEXTS and ds[name].dtype.kind not in "iuf":
            return f"{name} is {ds[name].dtype}, no real number"
        lacking = {"layer", "approximator"} - set(ds[name].dims)
        more = set(map(str, ds[name].dims)) - set(_DIMS)
        if name in EXPECTED and (lacking or more):
            return f"{name} is over {', '.join(map(str, ds[name].dims))}"
    return ""


def read_run(folder: Path) -> dict[str, Any]:
    """Return what `run.json` of a folder says, {} without one.

    Examples
    --------
    >>> read_run(Path("nowhere"))
    {}
    """
    file = folder / BESIDE[1]
    if not file.is_file():
        return {}
    try:
        told = json.loads(file.read_text("utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(
            f"{file} is damaged: {error}. Remove it, or put it back; the page only shows "
            "what it says."
        ) from error
    return told if isinstance(told, dict) else {}


def _blocks(file: Path) -> xr.DataTree | None:
    tree = fl.open(file) if file.is_file() else None
    return tree if isinstance(tree, xr.DataTree) else None


def _take_along(file: Path, folder: Path) -> None:
    copy = shutil.copytree if file.is_dir() else shutil.copy2
    copy(file, folder / ("results.zarr" if file.is_dir() else "results.nc"))
    for name in BESIDE:
        if (file.parent / name).is_file():
            shutil.copy2(file.parent / name, folder / name)


def run(config: ReportConfig, command: str = "") -> Path:
    """Write a report and return the path of its page.

    The folder holds `report.html`, `results.nc`, `inverse_blocks.nc`, `run.json` and
    `figures/`, and appears only when all is written. An interrupt after the first
    checkpoint, or a training that diverges there, ends the analysis early: what is done
    is written, and the interrupt or the error is raised again. Where a process group is
    live, its ranks train together; the first analyses and writes.

    Parameters
    ----------
    config
        What to do.
    command
        The command line, for the record.

    Raises
    ------
    ValueError
        If a name, a device or the folder is refused; nothing is written then.
    DataError
        If a data file is missing or damaged.
    NumericalError
        If the training diverges or a factorisation fails.

    Examples
    --------
    >>> run(ReportConfig(problem="digit"))  # doctest: +ELLIPSIS
    Traceback (most recent call last):
    ValueError: There is no problem 'digit'. The problems are digits, mnist, ...
    """
    started = datetime.now().astimezone()
    check(config)
    phase = Phases(0, quiet=config.quiet)
    # Before the bar appears, so that a complaint about the input stands alone.
    ranks = live()
    with phase("load"):
        problem = load(config) if ranks is None else ranks.together(lambda: load(config))
        size = fitted(problem, config)
    if ranks is not None:
        require_same_weights(ranks, problem.model)
        size = ranks.gathered(size)[0]
    phase.total = count_phases(replace(config, checkpoints=size.moments)) + 2
    fallback = in_reports(config.subject, started)
    folder = whole_folder(config.out, fallback, overwrite=config.overwrite, owned=PARTS)
    with ExitStack() as stack:
        places = by_first(stack.enter_context, folder)
        if not config.quiet:
            _tell(size, config)
        with phase:
            analysis = analyse(problem, config, size, phase)
            by_first(_written, analysis, config, command, started, places, phase, stack)
    if analysis is None or places is None:
        return Path()
    page = places[1] / "report.html"
    if not config.quiet:
        print(summary_table(analysis.results), end="\n\n")
    if isinstance(analysis.ended, KeyboardInterrupt):
        raise KeyboardInterrupt(f"what was finished is in {page}")
    if analysis.ended is not None:
        raise NumericalError(f"{analysis.ended} What was finished is in {page}.")
    return page


def _tell(size: Size, config: ReportConfig) -> None:
    """Say on stderr what is left out, and by which limits."""
    if size.told:
        told = "\n  ".join(size.told)
        limits = f"--time {config.time} and --budget {config.budget}"
        print(f"left out for size, to stay within {limits}:\n  {told}", file=sys.stderr)


def check(config: ReportConfig) -> None:
    """Refuse unknown names before anything is loaded."""
    own.check_problem(config)
    _check_known("approximator", config.approximators, tuple(fl.approximators()))
    require_device(config.device)
    parse_budget(config.budget)
    parse_time(config.time)


def _check_known(kind: str, names: tuple[str, ...], known: tuple[str, ...]) -> None:
    for name in names:
        if name not in known:
            raise ValueError(
                f"There is no {kind} {name!r} here. Choose from {', '.join(known)}."
                + meant(name, known)
            )


def load(config: ReportConfig) -> Problem:
    """Load the problem, and try one example so that mistakes show before training."""
    problem = own.named(config)
    x, y = problem.train
    with fl.frozen(problem.model) as model:
        stats = fl.collect(model, (x[:1], y[:1]), problem.likelihood, fl.Empirical())
    _check_known("layer", config.layers, tuple(stats))
    return problem.to(config.device)


def _written(
    analysis: Analysis,
    config: ReportConfig,
    command: str,
    started: datetime,
    places: tuple[Path, Path],
    phase: Phases,
    stack: ExitStack,
) -> None:
    """Write a report, and let its folder appear."""
    _write(analysis, describe_run(config, command, started), places[0], phase)
    stack.close()


def _write(analysis: Analysis, record: dict[str, Any], folder: Path, phase: Phases) -> None:
    record |= {"interrupted": analysis.ended is not None, "seconds": phase.seconds}
    with phase("save"):
        fl.save(analysis.results, folder / "results.nc")
        if analysis.inverses is not None:
            fl.save(single(analysis.inverses), folder / "inverse_blocks.nc")
    with phase("page"):
        write_page(analysis.results, analysis.inverses, folder, record)
    (folder / "run.json").write_text(json.dumps(record, indent=2) + "\n")


def summary_table(results: xr.Dataset) -> str:
    """Return the relative errors at the last step as text, a row for each layer.

    Examples
    --------
    >>> import xarray as xr
    >>> errors = xr.DataArray(
    ...     [[[0.0, 0.51234]]],
    ...     {"step": [9], "layer": ["fc1"], "approximator": ["exact", "kfac"]},
    ... )
    >>> print(summary_table(xr.Dataset({"frobenius_error": errors})))
    Relative Frobenius error at step 9
    layer   exact    kfac
    fc1    0.0000  0.5123
    """
    last = results["frobenius_error"].isel(step=-1).transpose("layer", "approximator")
    head = ["layer", *map(str, last["approximator"].values)]
    rows = [
        [str(layer), *(f"{value:.4f}" for value in values)]
        for layer, values in zip(last["layer"].values, last.values, strict=True)
    ]
    title = f"Relative Frobenius error at step {int(last['step'])}"
    return f"{title}\n{aligned([head, *rows], numbers=True)}"


def run_sweep(config: ReportConfig, command: str = "", executor: Workers = None) -> Path:
    """Write the page of a damping sweep after the training, and return its path.

    The folder holds `report.html`, `results.nc` (`fl.sweep`, and `fl.compare`'s metrics
    that need no damping), `run.json` and `figures/`.

    Raises
    ------
    ValueError
        If a name, a device or the folder is refused; nothing is written then.

    Examples
    --------
    >>> run_sweep(ReportConfig(problem="digit"))  # doctest: +ELLIPSIS
    Traceback (most recent call last):
    ValueError: There is no problem 'digit'. The problems are digits, mnist, ...
    """
    started = datetime.now().astimezone()
    config = replace(config, checkpoints=(config.training_steps,))
    check(config)
    phase = Phases(5, quiet=config.quiet)
    with phase("load"):
        problem = load(config)
        size = fitted(problem, config)
    fallback = in_reports(f"sweep-{config.subject}", started)
    folder = whole_folder(config.out, fallback, overwrite=config.overwrite, owned=PARTS)
    with folder as (scratch, place), phase:
        for step, model in checkpoints(problem, config, size, phase):
            stats, gradient = collected(problem, model, step, config, size, phase)
        ds = _swept(stats, gradient, config, phase, executor)
        ds = ds.assign_coords(step=config.training_steps)
        ds = ds.assign_attrs(attributes_of(problem, config, size))
        record = describe_run(config, command, started) | {"seconds": phase.seconds}
        with phase("page"):
            write_parts(ds, None, record, scratch)
    if not config.quiet:
        print("\n".join(damping_verdict(ds)), end="\n\n")
    return place / "report.html"


def _swept(
    stats: fl.statistics.Statistics,
    gradient: Any,
    config: ReportConfig,
    phase: Phases,
    executor: Workers,
) -> xr.Dataset:
    with phase("compare"):
        plain = with_noise(fl.compare(stats, config.approximators), stats)
    with phase("sweep"):
        asked = {"damping": config.dampings, "gradient": gradient, "executor": executor}
        ds = fl.sweep(stats, config.approximators, **asked)
    ds["status"] = ds["status"].where(ds["status"] != "ok", plain["status"])
    return ds.assign({n: plain[n] for n in plain.data_vars if n not in ds})
