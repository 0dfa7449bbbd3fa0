"""Reports from Python: of a model and its data, or of a result at hand."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any

import xarray as xr
from torch import nn

import fisherlab as fl
from fisherlab.analysis.damping import Damping, dampings
from fisherlab.analysis.intervals import with_noise
from fisherlab.analysis.merging import beside
from fisherlab.approximators.register import Chosen
from fisherlab.likelihoods import Likelihood
from fisherlab.operators.dampings import RelativeDamping
from fisherlab.report.analysis import pictured
from fisherlab.report.config import DEFAULT_APPROXIMATORS, DEFAULT_PURPOSES
from fisherlab.report.folder import in_reports, whole_folder
from fisherlab.report.judging import Asked, judged
from fisherlab.report.page import write_page
from fisherlab.report.record import environment
from fisherlab.report.sizes import spread
from fisherlab.settings import numeric

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
