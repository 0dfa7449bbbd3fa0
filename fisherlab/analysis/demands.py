"""What purposes cost cell by cell, counted before anything is computed."""

from collections.abc import Mapping, Sequence

from fisherlab.analysis.allowances import Allowance, chosen
from fisherlab.analysis.counts import Work, counted, own, product, shared
from fisherlab.approximators import Approximator, ExactBlock
from fisherlab.approximators.base import facts
from fisherlab.purposes import Demand, Purpose
from fisherlab.samples import Samples
from fisherlab.statistics import LayerStatistics, Statistics

USUAL = Demand(traces=True)


def left_out(
    stats: Statistics,
    methods: Mapping[str, Approximator],
    purposes: Sequence[Purpose],
    allowance: Allowance,
) -> dict[tuple[str, str, str], str]:
    """Return (layer, approximator, purpose) to the reason why it exceeds the allowance.

    Examples
    --------
    >>> import torch, fisherlab as fl
    >>> data = (torch.rand(20, 3).double(), None)
    >>> stats = fl.collect(torch.nn.Linear(3, 2).double(), data, fl.Categorical())
    >>> methods = {"kfac": fl.KFAC()}
    >>> left_out(stats, methods, [fl.Matrix()], Allowance(1e12, 1e9))
    {}
    >>> list(left_out(stats, methods, [fl.Matrix()], Allowance(10.0, 1e9)))
    [('weight', 'kfac', 'matrix')]
    """
    cells, common, built = {}, {}, {}
    for name, layer in stats.items():
        samples = ExactBlock()(layer).samples.counted_as
        for method, approximator in methods.items():
            built[name, method] = own(samples, approximator, "matrix")
        for purpose in purposes:
            asked = demand(purpose, layer)
            common[name, purpose.name] = _exact(samples, asked)
            for method, approximator in methods.items():
                cells[name, method, purpose.name] = _method(samples, approximator, asked)
    return dict(chosen(cells, common, len(methods), allowance, built).reasons)


def demand(purpose: Purpose, layer: LayerStatistics) -> Demand:
    """Return what a purpose says it asks for, or what one is taken to ask for."""
    counted = getattr(purpose, "demand", None)
    return USUAL if counted is None else counted(layer)


def _exact(s: Samples, asked: Demand) -> Work:
    """Count the norm, one solve or inverse of the exact block, and its further solves."""
    work = shared(s, "matrix") + Work(asked.flops)
    if asked.traces:
        work = work + shared(s, "damping")
    elif asked.dampings or asked.weights:
        work = work + shared(s, "gradient")
    return work + Work(asked.weights * exact_solve(s))


def exact_solve(s: Samples) -> float:
    """Count a solve with the exact block once it is factorised, refined and checked.

    Examples
    --------
    >>> import torch
    >>> from fisherlab.samples import OuterSamples
    >>> exact_solve(OuterSamples(torch.ones(9, 4), torch.ones(2, 9, 3)))
    576.0
    """
    p, m = s.weight_shape[0] * s.weight_shape[1], s.total
    return 4.0 * min(p * p, 2 * p * m + m * m)


def _method(s: Samples, method: Approximator, asked: Demand) -> Work:
    """Count what a purpose takes of a method once that is built."""
    work = Work(asked.products * product(s) + asked.flops)
    if facts(method).result == "exact":
        return work
    cell = counted(s, method)
    if asked.dampings or asked.weights or asked.traces:
        work = work + cell.prepared() + Work(asked.dampings * cell.one_more())
    if asked.traces:
        work = work + cell.against_inverse()
    return work + Work(asked.weights * cell.further(asked.traces))
