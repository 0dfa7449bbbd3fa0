"""Every approximation beside the exact block, or the exact network, as one Dataset."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
import xarray as xr
from torch import nn

from fisherlab.analysis.allowances import LONG, RATE, Allowance, cut, may_be_long
from fisherlab.analysis.cells import (
    Cells,
    Damping,
    Telling,
    attributes,
    dampings,
    layer_coordinates,
    located,
    reason,
    teller,
    watched,
)
from fisherlab.analysis.executors import Workers, filled
from fisherlab.analysis.layerwise import Request, Source, compare_layers, joined
from fisherlab.analysis.metric_table import (
    Metrics,
    Question,
    begin,
    fill,
    mean_gradients,
    pairs_of,
    question,
)
from fisherlab.analysis.purposes import judge, judge_model
from fisherlab.approximators import Approximator, ExactBlock
from fisherlab.approximators.network import ExactNetwork
from fisherlab.approximators.register import Chosen, by_name, network_by_name
from fisherlab.catalogue import NEEDS
from fisherlab.errors import FisherlabError, warn
from fisherlab.metrics.pairs import Pair, paired
from fisherlab.numerics.devices import Budget, parse_budget
from fisherlab.numerics.linalg import decomposed_once
from fisherlab.purposes import Purpose
from fisherlab.settings import numeric
from fisherlab.statistics import Layers, Statistics


@numeric
def compare(
    stats: Layers | nn.Module,
    *given: Any,
    approximators: Chosen = None,
    metrics: Metrics | None = None,
    damping: Damping = None,
    gradient: Mapping[str, Any] | None = None,
    reference: Layers | None = None,
    k: int = 10,
    budget: Budget = None,
    time: float | str | None = None,
    purpose: Purpose | Sequence[Purpose] | None = None,
    progress: Telling = False,
    executor: Workers = None,
    **source: Any,
) -> xr.Dataset:
    """Hold every approximation of every layer against the exact block.

    ``compare(stats, approximators)`` or, straight from a model whose statistics need not
    fit into memory at once, ``compare(model, data, likelihood, approximators)``.

    Parameters
    ----------
    stats
        Statistics the approximations are made from, or a model: its layers are
        collected, measured and freed, as many at once as fit.
    given
        The approximators, as the keyword; of a model its data, the likelihood, and then
        the approximators.
    approximators
        Names, or a mapping of names to values; all named ones by default.
    metrics
        Names of `fisherlab.catalogue.METRICS`, which tells what each means and whether it
        needs `damping`, or `gradient` too; by default those of low cost for what is given.
        A function of one's own, of the exact block and the approximation (operators in
        float64) to a number, gives a variable of its name: ``{"mine": f}``, or among names.
    damping
        λ, a sequence of λ, or `RelativeDamping(α)`, a fraction of the mean eigenvalue.
    gradient
        Block name to w (d_out, d_in) or `MeanGradient`, for `direction_cosine`. Of a
        model with a damping, that of the mean loss at the data's labels by default.
    reference
        Statistics of another Fisher to be called exact.
    k
        The dimension of the subspaces of `subspace_overlap`.
    budget
        Bytes one exact block may take where it has to be formed; of a model bytes for
        everything beside the model, half of the free memory by default. A layer that
        does not fit has the bytes in its status.
    time
        Seconds, or a text such as "5 min", counted in multiply-adds at the rate of two
        plain cores: what exceeds it is left out, the dearest cells first, and its
        `status` says so. Everything is computed by default.
    purpose
        What the matrix is used for: `fl.Step`, `fl.Laplace`, `fl.Influence`,
        `fl.Pruning`, `fl.EWC`, `fl.Sharpness`, `fl.Matrix`, or a value of one's own. Its
        measures take the place of metrics, in a table as `fisherlab.purposes` tells.
    progress
        Whether to show a bar over layers; of a model also a callable that is given
        ``(layer, done, layers, seconds)``. Without it, statistics that are counted to take
        more than a minute give a warning beforehand.
    executor
        What does the layers: anything with ``submit``, such as a `ProcessPoolExecutor` or
        a ``dask.distributed.Client``, or a function that begins one. The numbers are the
        same; the budget is that of each worker.
    source
        Of a model alone: `fisher`, `layers` and `dtype` as in `collect`, and `store`, a
        netCDF file that is written after every layer and gone on from. Where a process
        group of ``torch.distributed`` is live (or is given as `group`), the data are
        gathered and the layers dealt to its ranks; all return the same table.

    Returns
    -------
    xarray.Dataset
        Dims `layer`, `approximator` and, with damping, `damping`; NaN where a value is
        not to be had, with the reason in `status`; `floored` names the metrics of a cell
        whose number is only a bound; attributes tell how it was made.

    Raises
    ------
    ValueError
        For unknown names, a metric without what it needs, or a gradient that lacks
        a layer; metrics or an executor beside a purpose; an executor beside a time, or
        where a process group is live.
    TypeError
        For arguments of a model beside statistics, or the other way round.
    StoreError
        If the store holds another comparison.
    ExecutorError
        If the executor loses layers.

    Notes
    -----
    Everything is exact. Of positions that share a weight, sums over samples go through
    whichever counts the fewest multiply-adds: inner products of all samples, matrices of
    examples, or pairs of positions.

    Examples
    --------
    >>> import torch, fisherlab as fl
    >>> data = (torch.rand(20, 3).double(), None)
    >>> stats = fl.collect(torch.nn.Linear(3, 2).double(), data, fl.Categorical())
    >>> ds = fl.compare(stats, ["kfac", "kpsvd"], damping=0.1)
    >>> dict(ds.sizes)
    {'layer': 1, 'approximator': 2, 'damping': 1}
    """
    asked_of = {"metrics": metrics, "damping": damping, "gradient": gradient, "k": k}
    if isinstance(stats, nn.Module):
        unfit = {"reference": reference, "time": time}
        request = _of_model(stats, given, approximators, asked_of, unfit, budget, source)
        if purpose is None:
            return compare_layers(request, _store(request, source), progress, executor)
        several = _alone(purpose, asked_of, store=source.get("store"), executor=executor)
        return judge_model(
            request.source, request.methods, several, request.limit, progress
        )
    stats = Statistics.of(stats, "compare")
    if reference is not None:
        reference = Statistics.of(reference, "compare: reference")
    approximators = _chosen_of(given, approximators, source)
    limit = parse_budget(budget, stats.device)
    if purpose is not None:
        several = _alone(purpose, asked_of, reference=reference, executor=executor)
        limited = budget is not None or time is not None
        allowed = Allowance.of(time, limit) if limited else None
        return judge(stats, approximators, several, allowed, progress)
    chosen = by_name(approximators)
    if executor is not None:
        measure = partial(_measured, chosen, {**asked_of, "gradient": None}, limit=limit)
        return _over(executor, measure, stats, reference, gradient, time, progress)
    levels = dampings(damping)
    asked = question(metrics, levels, gradient, stats, reference is not None, k)
    cells = Cells(list(stats), list(chosen), levels)
    begin(cells, asked)
    if time is not None or progress is False:
        allowed = Allowance.of(time, limit)
        cells.left_out = _left_out(stats, asked, chosen, allowed, time is None)
    for name in watched(stats, progress):
        exact = ExactBlock()((reference or stats)[name]).to(torch.float64)
        with decomposed_once(*stats[name].rows):  # for all methods
            pairs = pairs_of(
                cells, "compare", stats[name], exact, chosen, mixed=asked.mixed, limit=limit
            )
            fill(cells, asked, (name, exact), pairs, limit)
            del pairs  # not held beside those of the next layer
    made = attributes(stats, chosen, analysis="compare", damping_kind=levels.kind)
    if reference is not None:
        made["reference_fisher"] = reference.provenance.fisher
    return cells.dataset(layer_coordinates(stats), made)


def _chosen_of(given: Sequence[Any], named: Chosen, source: Mapping[str, Any]) -> Chosen:
    """Return the approximators that stand beside statistics."""
    if source or len(given) > 1 or (given and named is not None):
        more = [*source, *(["more positional arguments"] if given[1:] else [])]
        raise TypeError(
            f"compare(stats, approximators): {', '.join(more) or 'approximators twice'} "
            "given beside statistics. fisher, layers, dtype and store belong to "
            "compare(model, data, likelihood, approximators)."
        )
    return given[0] if given else named


def _of_model(
    model: nn.Module,
    given: Sequence[Any],
    named: Chosen,
    asked: Mapping[str, Any],
    unfit: Mapping[str, Any],
    budget: Budget,
    source: Mapping[str, Any],
) -> Request:
    """Read the arguments of a comparison straight from a model."""
    unknown = source.keys() - {"fisher", "layers", "dtype", "store", "group"}
    twice = len(given) == 3 and named is not None
    if unknown or twice or len(given) not in (2, 3):
        raise TypeError(
            "compare(model, data, likelihood, approximators, *, fisher, layers, dtype, "
            f"store, group, ...): {len(given)} positional arguments after the model and "
            f"the keywords {sorted(unknown)} were given."
        )
    for name, value in unfit.items():
        if value is not None:
            raise ValueError(
                f"compare of a model takes no {name}=, which needs the statistics of all "
                "layers at once: compare(fl.collect(model, data, likelihood), ...)."
            )
    settings = {name: source.get(name) for name in ("fisher", "layers", "dtype", "group")}
    data = Source.of(model, given[0], given[1], **settings)
    chosen = by_name(given[2] if len(given) == 3 else named)
    levels = dampings(asked["damping"])
    along = bool(levels.labels) and (asked["gradient"] is not None or data.labelled)

    measure = partial(_measured, chosen, asked)
    limit = parse_budget(budget, data.device)
    if data.ranks is not None:  # what fits on all of them
        limit = min(data.ranks.gathered(limit))
    gradient = asked["gradient"]
    return Request(data, chosen, measure, along, gradient, limit, levels.kind, asked)


def _measured(
    chosen: Mapping[str, Approximator],
    asked: Mapping[str, Any],
    stats: Statistics,
    gradient: Any,
    limit: int,
    reference: Statistics | None = None,
) -> xr.Dataset:
    """Return the rows of some layers, wherever this is called."""
    about = {**asked, "gradient": gradient, "reference": reference}
    return compare(stats, chosen, budget=limit, **about)


def _over(
    executor: Workers,
    measure: Callable[..., xr.Dataset],
    stats: Statistics,
    reference: Statistics | None,
    gradient: Mapping[str, Any] | None,
    time: float | str | None,
    progress: Any,
) -> xr.Dataset:
    """Return the rows of statistics, each layer done by an executor."""
    if time is not None:
        raise ValueError(
            "compare: time= is counted over all layers, which executor= does apart. "
            "Leave one of them out."
        )
    cells, tell = {}, teller(progress, len(stats))
    for name in stats:
        one, exact = (
            each and Statistics({name: each[name]}, each.provenance)
            for each in (stats, reference)
        )
        along = gradient and {name: gradient[name]}
        cells[name] = partial(measure, one, along, reference=exact)
    rows = {}
    for name, row in filled("compare", cells, executor):
        rows[name] = row
        tell(name)
    return joined([rows[name] for name in cells])


def _store(request: Request, source: Mapping[str, Any]) -> Any:
    """Return where the rows are kept: by the first of several processes alone."""
    ranks = request.source.ranks
    return source.get("store") if ranks is None or not ranks.rank else None


def _alone(
    purpose: Purpose | Sequence[Purpose], asked: Mapping[str, Any], **more: object
) -> Sequence[Purpose]:
    """Return purposes as a sequence; refuse what they bring along themselves."""
    for name in ("metrics", "damping", "gradient", *more):
        if {**asked, **more}[name] is not None:
            raise ValueError(
                f"compare: {name}= was given beside purpose=, which has its own or takes "
                "none. Give it to the purpose, e.g. fl.Step(gradient, damping), or compare "
                "twice."
            )
    return purpose if isinstance(purpose, Sequence) else [purpose]


def _left_out(
    stats: Statistics,
    asked: Question,
    chosen: Mapping[str, Approximator],
    allowance: Allowance,
    silent: bool,
) -> Mapping[tuple[str, str, str], str]:
    """Return what exceeds an allowance; where it is silent, nothing but a warning."""
    samples = {name: ExactBlock()(s).samples.counted_as for name, s in stats.items()}
    count = len(asked.dampings.each) or 1
    if silent and not may_be_long(samples, len(chosen) * count):
        return {}
    parts = [part for part in NEEDS if part == "matrix" or asked.of(part)]
    counted = cut(samples, chosen, parts, allowance, count)
    if silent:
        _foretell(counted.flops / RATE)
    return {} if silent else counted.reasons


def _foretell(seconds: float) -> None:
    """Warn before a comparison that is counted to take long, and would say nothing."""
    if seconds > LONG:
        warn(
            f"compare: about {seconds / 60:.0f} minutes are counted. progress=True shows "
            "how far it is; time='1 min' leaves out what is dearest; statistics of "
            "fl.MonteCarlo(1) or of fewer examples have fewer columns."
        )


NETWORK = "network"


@numeric
def compare_networks(
    stats: Layers,
    approximators: Chosen = None,
    *,
    metrics: Metrics | None = None,
    damping: Damping = None,
    gradient: Mapping[str, Any] | None = None,
    k: int = 10,
    budget: Budget = None,
    progress: Telling = False,
) -> xr.Dataset:
    """Hold approximations that couple layers against the exact Fisher of the network.

    Parameters
    ----------
    stats
        Statistics of matching columns: collected with ``compress=False`` where an output
        has more columns than a layer has outputs.
    approximators
        Names of `network_approximators`, or a mapping of names to values; all by default.
    metrics, damping, gradient, k, budget, progress
        As for `compare`, told of methods; the gradient of every block is joined to one.

    Returns
    -------
    xarray.Dataset
        The schema of `compare` with the one layer "network".

    Raises
    ------
    ValueError
        For unknown names, what `compare` refuses, or columns that do not match.

    Examples
    --------
    >>> import torch, fisherlab as fl
    >>> model = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.Linear(2, 3)).double()
    >>> data = (torch.rand(20, 3).double(), None)
    >>> stats = fl.collect(model, data, fl.Gaussian(), compress=False)
    >>> ds = fl.compare_networks(stats, ["kfac-block-diagonal", "khatri-rao"])
    >>> ds.frobenius_error.sizes["approximator"]
    2
    """
    stats = Statistics.of(stats, "compare_networks")
    chosen = network_by_name(approximators)
    exact = ExactNetwork()(stats).to(torch.float64)
    joined = {}
    if gradient is not None:
        joined = {NETWORK: exact.join(mean_gradients(gradient, stats))}
    levels = dampings(damping)
    asked = question(metrics, levels, None, stats, False, k, joined)
    cells = Cells([NETWORK], list(chosen), levels)
    begin(cells, asked)
    pairs: dict[str, Pair] = {}
    for method in watched(chosen, progress, "method"):
        try:
            approx = chosen[method](stats)
            pairs[method] = paired("compare_networks", exact, approx, mixed=False)
        except FisherlabError as error:
            cells.blame(NETWORK, method, reason(error))
    fill(cells, asked, (NETWORK, exact), pairs, parse_budget(budget, exact.device))
    made = attributes(stats, chosen, analysis="compare_networks", damping_kind=levels.kind)
    return cells.dataset(located({NETWORK: (exact.shape[0], 1, 1, "")}), made)
